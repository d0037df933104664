"""The embedded model with an adapter of random weights, and small embedded benchmarks."""

from pathlib import Path

import datasets
import pytest
from eval_models import copy_of, make_adapter
from peft import PeftModel

from fura_vlm.embedded.benchmarks import write_benchmarks
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.lmms_model import FuraVLM
from fura_vlm.evaluation.suite import evaluate


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "benchmarks"
    write_benchmarks(folder, per_task=6)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="session")
def typed_benchmarks(benchmarks, tmp_path_factory) -> Path:
    """The benchmarks as real ones are: GQA's questions have types, and nothing says that they are embedded."""

    def typed(data):
        if "imageId" not in data.column_names:
            return data
        types = [dict(zip(("structural", "semantic", "detailed"), each, strict=True)) for each in GQA_TYPES]
        return data.remove_columns("types").add_column("types", types)

    folder = copy_of(benchmarks, tmp_path_factory.mktemp("typed") / "benchmarks", "GQA", typed)
    (folder / "recipe.json").unlink()
    return folder


GQA_TYPES = [("query", "attr", None), ("verify", "obj", None), *[("query", "rel", None)] * 4]


@pytest.fixture(scope="session")
def known(adapter, typed_benchmarks, tmp_path_factory) -> Path:
    """The results of a model whose answers are given: tuned, document 0 of each task is wrong and the other five are
    right; the base answers documents 0 and 1 right and says something with a tag in it to the others. In POPE it says
    yes to the others."""

    def given(model, requests):
        answers = []
        for request in requests:
            *_, number, task, split = request.args
            document = model.task_dict[task][split][number]
            right = document["answers"][0] if "answers" in document else document["answer"]
            right = "ABCDE"[right] if isinstance(right, int) else right
            tuned = isinstance(model.answerer.model, PeftModel)
            wrong = {"yes": "no", "no": "yes"}.get(right, "a very red thing") if tuned else (
                "yes" if task == "pope" else "</script><img src=x>"
            )  # fmt: skip
            answers.append(right if (number > 0 if tuned else number < 2) else wrong)
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FuraVLM, "generate_until", given)
        folder = str(tmp_path_factory.mktemp("known") / "eval")
        return evaluate(EvalConfig(str(adapter.parent), data=str(typed_benchmarks), output_dir=folder))
