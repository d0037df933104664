"""Tasks of lm-eval over this project's models: a task of one's own, from a local file, and what is said of others."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.suite import evaluate

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = [
    {"question": "What is this?", "choices": ["a cat", "a dog", "red"], "gold": 0},
    {"question": "And that?", "choices": ["red", "it is a cat", "blue"], "gold": 2},
    {"question": "Is it red?", "choices": ["yes", "no, it is blue", "a dog"], "gold": 1},
]

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """
task: local_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 5, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def settings(folder_of, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.json").write_text(json.dumps(DOCUMENTS))
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "documents.json"))
    names = ["local_choice", "local_written"]
    return {"model": str(folder_of("text")), "suite": "lm-eval", "data": str(folder), "tasks": names, "batch_size": 2}


@pytest.fixture(scope="module")
def evaluated(settings, tmp_path_factory) -> Path:
    return evaluate(EvalConfig(**settings, output_dir=str(tmp_path_factory.mktemp("results") / "eval")))


def test_scores_are_those_of_the_model_alone(evaluated, settings):
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()

    def log_likelihood(question: str, choice: str) -> float:
        before = tokenizer(question)["input_ids"]
        ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
        with torch.no_grad():
            chosen = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return float(chosen[len(before) - 1 :].sum())

    likeliest = []
    for document in DOCUMENTS:
        values = [log_likelihood(document["question"], choice) for choice in document["choices"]]
        likeliest.append(values.index(max(values)))
    said = []
    for document in DOCUMENTS:
        inputs = tokenizer(document["question"], return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        said.append(tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[0])

    rows = [json.loads(line) for line in (evaluated / "samples-model.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in rows[:3]] == [f"choice {number}" for number in likeliest]
    assert [row["predicted"].strip() for row in rows[3:]] == [text.strip() for text in said]
    right = [document["gold"] == number for document, number in zip(DOCUMENTS, likeliest, strict=True)]
    assert [row["score"] for row in rows[:3]] == right
    score = json.loads((evaluated / "results.json").read_text())["scores"]["model"]["local_choice"]
    assert score["score"] == pytest.approx(sum(right) / 3) and (score["metric"], score["n"]) == ("acc", 3)
    assert [row["question"] for row in rows[:3]] == [document["question"] for document in DOCUMENTS]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["no_such_task"]}, "has no task 'no_such_task': python -m lm_eval ls tasks"),
        ({"tasks": []}, "name those you want with --tasks"),
        ({"data": "nowhere"}, "There is no folder nowhere"),
        ({"data": "embedded"}, "no embedded tasks for lm-eval"),
    ],
)
def test_tasks_that_are_not_there(changes, said, settings, tmp_path):
    with pytest.raises(FuraVLMError, match=said):
        evaluate(EvalConfig(**settings | {"output_dir": str(tmp_path / "eval")} | changes))


def test_data_that_are_not_there(settings, tmp_path):
    (tmp_path / "lost.yaml").write_text(
        CHOICE.format(file=tmp_path / "lost.json").replace("local_choice", "lost_choice")
    )
    own = {"data": str(tmp_path), "tasks": ["lost_choice"], "output_dir": str(tmp_path / "eval")}
    with pytest.raises(FuraVLMError, match=r"lm-eval fails in lost_choice \(.*lost.json"):
        evaluate(EvalConfig(**settings | own))


def test_a_model_that_takes_pictures(settings, folder_of, tmp_path):
    with pytest.raises(FuraVLMError, match="takes pictures, .* use --suite visual"):
        evaluate(EvalConfig(**settings | {"model": str(folder_of("llava")), "output_dir": str(tmp_path / "eval")}))
