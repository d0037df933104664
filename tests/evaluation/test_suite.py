"""The command as a user gives it: what it leaves, how it goes on, and what it says when something is wrong."""

import fcntl
import io
import json
import os
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, load_dataset
from eval_models import BASE, ROOT, copy_of, make_adapter
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from fura_vlm import files
from fura_vlm.commands import parse
from fura_vlm.embedded.benchmarks import write_benchmarks
from fura_vlm.embedded.embedded import EmbeddedConfig, EmbeddedError, write_embedded
from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.compare import compare
from fura_vlm.evaluation.config import CompareConfig, EvalConfig
from fura_vlm.evaluation.generation import Answerer
from fura_vlm.evaluation.report import write_samples
from fura_vlm.evaluation.scores import Sample
from fura_vlm.evaluation.source import Source
from fura_vlm.evaluation.suite import _check_folder, evaluate
from fura_vlm.evaluation.tasks import TASKS, load_tasks


@pytest.fixture(scope="module")
def settings(adapter, benchmarks, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("results") / "eval"
    return {"model": str(adapter.parent), "data": str(benchmarks), "output_dir": str(folder), "max_new_tokens": 8}


@pytest.fixture(scope="module")
def evaluated(settings) -> Path:
    return evaluate(EvalConfig(**settings))


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"samples-{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "family, task", list(zip(("gqa", "scienceqa", "textvqa", "pope"), TASKS["lmms-eval"], strict=True))
)
def test_lmms_eval_asks_what_training_asked(family, task, benchmarks, tmp_path):
    write_embedded(EmbeddedConfig(output_dir=str(tmp_path / "mixture"), train_records=1, eval_per_family=6))
    records = json.loads((tmp_path / "mixture" / "eval.json").read_text())
    records = [record for record in records if record["family"] == family]
    loaded = load_tasks([task], str(benchmarks))[task].task
    for record, doc in zip(records, loaded.eval_docs, strict=True):
        question, answer = (turn["value"] for turn in record["conversations"])
        assert "<image>\n" + loaded.doc_to_text(doc) == question
        for said, right in ((answer, 1), ({"yes": "no", "no": "yes"}.get(answer.lower(), "nothing"), 0)):
            outcome = loaded.process_results(doc, [said])
            assert (outcome["pope_accuracy"]["score"] if family == "pope" else outcome["exact_match"]) == right
        [picture] = loaded.doc_to_visual(doc)
        assert picture.tobytes() == Pillow.open(tmp_path / "mixture" / record["image"]).tobytes()


def test_benchmarks_are_made_once(benchmarks, tmp_path):
    assert not write_benchmarks(benchmarks, per_task=6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(EmbeddedError, match="holds something else than embedded data"):
        write_benchmarks(tmp_path / "mine")
    full = load_dataset(str(benchmarks / "POPE"), "Full")
    assert all(set(split["category"]) == {name} for name, split in full.items())
    assert sum(map(len, full.values())) == 6


def test_results_are_those_of_the_samples(evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert list(results["scores"]) == ["tuned", "base"]
    for name, scores in results["scores"].items():
        samples = rows(evaluated, name)
        assert list(scores) == list(TASKS["lmms-eval"]) and len(samples) == 24
        for task, score in scores.items():
            own = [row["score"] for row in samples if row["task"] == task]
            assert score["n"] == score["total"] == len(own) == 6
            if task != "pope":
                assert score["score"] == pytest.approx(sum(own) / 6)
            assert score["low"] <= score["score"] <= score["high"]
            assert all(row["predicted"] for row in samples)
        assert results["average"][name] == pytest.approx(sum(s["score"] for s in scores.values()) / 4)


def test_second_evaluation_asks_nothing_again(evaluated, settings):
    before = {path: path.read_bytes() for path in (evaluated / "answers").iterdir()}
    results = json.loads((evaluated / "results.json").read_text())
    evaluate(EvalConfig(**settings))
    assert {path: path.read_bytes() for path in (evaluated / "answers").iterdir()} == before
    again = json.loads((evaluated / "results.json").read_text())
    assert again.pop("date") >= results.pop("date") and again == results


def test_paper_protocol_with_one_model_in_memory_at_a_time(settings, tmp_path, monkeypatch):
    models, alive = [], []
    load = Source.load

    def watched(source, *arguments):
        alive.append(sum(model() is not None for model in models))
        model, processor = load(source, *arguments)
        models.append(weakref.ref(model))
        return model, processor

    monkeypatch.setattr(Source, "load", watched)
    own = settings | {"output_dir": str(tmp_path / "paper"), "protocol": "paper", "limit": 3, "max_new_tokens": 2}
    results = json.loads((evaluate(EvalConfig(**own)) / "results.json").read_text())
    assert alive == [0, 0]
    assert list(results["scores"]["tuned"]) == list(TASKS["paper"])
    score = results["scores"]["tuned"]["pope_paper"]
    assert set(score["metrics"]) == {"pope_mean_f1", "pope_predicted_yes"}
    assert score["yes_no"]["said_yes"] == score["metrics"]["pope_predicted_yes"]
    assert score["low"] <= score["score"] <= score["high"] and score["low"] < score["high"]
    assert "OCR token" in rows(tmp_path / "paper", "tuned")[6]["question"]
    assert results["published"] == {} and "LLaVA-1.5" not in (tmp_path / "paper" / "index.html").read_text()


def test_compare(known, tmp_path):
    """Against its own answers on other documents: GQA's second half with another picture each, POPE's first four,
    twice a question of ScienceQA's in place of two, no TextVQA but a task of its own."""
    samples = rows(known, "base")
    by_task = {task: [row for row in samples if row["task"] == task] for task in TASKS["lmms-eval"]}
    for row in by_task["gqa"][3:]:
        row["picture"] = "another"
    changed = [*by_task["gqa"], *by_task["pope"][:4], *by_task["scienceqa_img"][:5], by_task["scienceqa_img"][4]]
    changed += [row | {"task": "own"} for row in by_task["textvqa_val"]]
    folder = tmp_path / "run" / "eval"
    write_samples(folder / "samples-model.jsonl", [Sample(**row) for row in reversed(changed)])
    (folder / "results.json").write_text(json.dumps({"scores": {"model": {}}}))
    table = compare(CompareConfig(str(known), str(tmp_path / "run"), output_path=str(tmp_path / "compared.md")))
    assert (tmp_path / "compared.md").read_text() == table
    # Tuned: 0 1 1 ..., base: 1 1 0 ...
    interval = r" \(-\d\d\.\d to \+\d\d\.\d\)"
    assert re.search(rf"\| gqa \| 3 \| 66\.7 \| 66\.7 \| \+0\.0{interval} \| 1 \| 1 \| 1 \| McNemar, exact \|", table)
    assert re.search(rf"\| scienceqa_img \| 5 \| 80\.0 \| 40\.0 \| -40\.0{interval} \| 3 \| 1 \| 0\.62 \|", table)
    assert re.search(r"\| pope \| 4 \| 75.0 \|", table) and "these are accuracies" in table
    assert "gqa: the documents differ, 6 in A and 6 in B: the 3 that both have are compared." in table
    assert "pope: the documents differ, 6 in A and 4 in B: the 4 that both have are compared." in table
    assert "scienceqa_img: the documents differ, 6 in A and 6 in B: the 5 that" in table
    assert "textvqa_val: only A was asked it" in table and "own: only B was asked it" in table
    write_samples(folder / "samples-model.jsonl", [Sample(**row | {"question": "?"}) for row in samples])
    with pytest.raises(
        FuraVLMError, match=r"have no documents in common \(A was asked gqa, .*evaluate both on the same"
    ):
        compare(CompareConfig(str(known), str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FuraVLMError, match="holds no results"):
        compare(CompareConfig(str(tmp_path / "empty"), str(known)))
    with pytest.raises(FuraVLMError, match="There is no folder"):
        compare(CompareConfig(str(tmp_path / "nowhere"), str(known)))


def test_compare_tuned_and_base_of_one_folder(known, tmp_path):
    """Tuned, document 0 is wrong; the base is right on documents 0 and 1."""
    table = compare(CompareConfig(str(known)))
    assert f"A: the base in {known}" in table and f"B: the tuned model in {known}" in table
    assert re.search(r"\| gqa \| 6 \| 33\.3 \| 83\.3 \| \+50\.0 \(.*\) \| 1 \| 4 \| 0\.38 \|", table)
    [section] = re.findall("gqa: 5 of 6 documents on which they differ\n\n(.*?)\n\n", table, re.S)
    listed = [line.split(" | ") for line in section.splitlines()[2:]]
    samples = {name: [row for row in rows(known, name) if row["task"] == "gqa"] for name in ("tuned", "base")}
    assert len(listed) == 5
    for number, line in zip([0, 2, 3, 4, 5], listed, strict=True):
        assert " ".join(samples["base"][number]["question"].split()) in line[0]
        assert line[2:4] == [samples["base"][number]["predicted"], samples["tuned"][number]["predicted"]]
    assert [line[-1] for line in listed] == ["A |"] + ["B |"] * 4

    few = compare(CompareConfig(str(known), listed=2))
    assert "gqa: 5 of 6 documents on which they differ, the first 2 (--listed 5 shows all)" in few
    assert "on which they differ" not in compare(CompareConfig(str(known), listed=0))
    with pytest.raises(FuraVLMError, match="listed is -1: give 0 or more"):
        compare(CompareConfig(str(known), listed=-1))
    write_samples(tmp_path / "samples-model.jsonl", [Sample(**row) for row in rows(known, "base")])
    (tmp_path / "results.json").write_text(json.dumps({"scores": {"model": {}}}))
    with pytest.raises(FuraVLMError, match="has no answers of a base to compare with: name a second folder"):
        compare(CompareConfig(str(tmp_path)))


def test_compare_reads_what_was_written(known, tmp_path):
    """An answer may have characters that Python takes for the end of a line; a file may have been cut off."""
    samples = rows(known, "tuned")
    write_samples(tmp_path / "samples-tuned.jsonl", [Sample(**row | {"predicted": "a\u2028\x85b"}) for row in samples])
    (tmp_path / "results.json").write_bytes((known / "results.json").read_bytes())
    table = compare(CompareConfig(str(known), str(tmp_path)))
    assert table.count("| 6 |") == 4 and "on which they differ" not in table
    (tmp_path / "samples-tuned.jsonl").unlink()
    with pytest.raises(FuraVLMError, match="no whole results"):
        compare(CompareConfig(str(known), str(tmp_path)))
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(FuraVLMError, match="no whole results"):
        compare(CompareConfig(str(known), str(tmp_path)))
    with pytest.raises(FuraVLMError, match="not a results file of this program"):
        _check_folder(tmp_path, {"fingerprint": ""})


@pytest.mark.parametrize(
    "typed, names",
    [
        ("pope", ["pope"]),
        ('["pope"]', ["pope"]),
        ("pope,gqa", ["pope", "gqa"]),
        ("[pope, gqa]", ["pope", "gqa"]),
        (" pope, gqa,", ["pope", "gqa"]),
        ("pope gqa", ["pope", "gqa"]),
        ("[pope, 5]", ["pope", "5"]),
        ("", []),
    ],
)
def test_tasks_as_people_type_them(typed, names):
    command, options = parse(["eval", "model", "--tasks", typed])
    assert (command, EvalConfig(**options).tasks) == ("eval", names)


def test_a_folder_is_one_evaluation_at_a_time(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    own = settings | {"output_dir": str(tmp_path / "eval"), "tasks": ["no_such_task"]}
    (tmp_path / "eval").mkdir()
    # The system's own lock, as another process holds it: lmms-eval makes FileLock one for all of this process.
    with (tmp_path / "eval" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FuraVLMError, match="Another evaluation is under way in .*choose another --output_dir"):
            evaluate(EvalConfig(**own))
    for _ in range(2):  # and one that failed lets go of it
        with pytest.raises(FuraVLMError, match="no task 'no_such_task'"):
            evaluate(EvalConfig(**own))


def test_the_same_command_goes_on(settings, benchmarks, tmp_path, monkeypatch, capsys):
    """After Ctrl-C in the second batch of three, and with a row of the first one broken."""
    asked, generate = [], Answerer._generate

    def watched(answerer, inputs, arguments):
        asked.append(len(inputs))
        if asked == [2, 2]:
            raise KeyboardInterrupt
        return generate(answerer, inputs, arguments)

    monkeypatch.setattr(Answerer, "_generate", watched)
    folder = tmp_path / "eval"
    own = {"output_dir": str(folder), "tasks": "pope", "base": False, "batch_size": 2, "max_new_tokens": 2}
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvalConfig(**settings | own))
    assert f"Stopped. The same command continues from the answers in {folder}." in capsys.readouterr().err
    file = folder / "answers" / "answers-0.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(f'{first}\n{{"key": "{json.loads(second)["key"]}", "answer": null}}\n')
    evaluate(EvalConfig(**settings | own))
    assert sum(asked) == 2 + 2 + 5  # all but the one answer that is whole
    assert "answers-0.jsonl: this line is not readable as an answer: 2" in capsys.readouterr().err
    results = json.loads((folder / "results.json").read_text())
    assert results["scores"]["tuned"]["pope"]["n"] == 6
    # What is typed for it again gives the same configuration.
    command, options = parse(shlex.split(results["command"])[1:])
    assert EvalConfig(**options) == EvalConfig(**settings | own)
    assert not results["published"] and results["data"] == str(benchmarks)


def test_another_task_of_lmms_eval(settings, tmp_path, monkeypatch):
    """Its data are loaded by lmms-eval, which finds a folder before the hub."""
    folder = tmp_path / "lmms-lab-encoder" / "RealWorldQA"
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    Pillow.new("RGB", (20, 20), "red").save(picture, "PNG")
    images = [{"bytes": picture.getvalue(), "path": None}] * 5
    data = Dataset.from_dict({"image": images, "question": ["Which colour?"] * 5, "answer": ["red"] * 5})
    data.cast_column("image", Image()).to_parquet(folder / "test-00000-of-00001.parquet")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    own = {"tasks": ["realworldqa"], "limit": 2, "base": False, "output_dir": str(tmp_path / "eval")}
    score = json.loads((evaluate(EvalConfig(**settings | own)) / "results.json").read_text())["scores"]["tuned"]
    assert (score["realworldqa"]["n"], score["realworldqa"]["total"]) == (2, 2)
    assert len(rows(tmp_path / "eval", "tuned")) == 2


def test_lmms_eval_scores_as_the_suite(evaluated, benchmarks, settings, adapter, tmp_path):
    # Its own command, its own loading of the four tasks: a folder is found before the hub.
    (tmp_path / "lmms-lab-encoder").symlink_to(benchmarks)
    command = [sys.executable, "-m", "lmms_eval", "--model", "fura_llava", "--batch_size", "4", "--log_samples"]
    arguments = f"pretrained={ROOT / BASE},adapter={adapter},dtype=float32"
    command += ["--model_args", arguments, "--gen_kwargs", f"max_new_tokens={settings['max_new_tokens']}"]
    command += ["--tasks", ",".join([*TASKS["lmms-eval"], "pope_paper"]), "--include_path", str(ROOT / "eval")]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "own")],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = json.loads((evaluated / "results.json").read_text())["scores"]["tuned"]
    [file] = (tmp_path / "own").rglob("*_results.json")
    scores = json.loads(file.read_text())["results"]
    for task in TASKS["lmms-eval"]:
        for metric, value in expected[task]["metrics"].items():
            assert scores[task][f"{metric},none"] == pytest.approx(value)
        [file] = (tmp_path / "own").rglob(f"*_samples_{task}.jsonl")
        own = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        suite = [row["predicted"] for row in rows(evaluated, "tuned") if row["task"] == task]
        assert [row["filtered_resps"] for row in own] == suite
    [file] = (tmp_path / "own").rglob("*_samples_pope_paper.jsonl")
    answers = [json.loads(line)["filtered_resps"][0] for line in file.read_text().splitlines()]
    said_no = [bool({"no", "not"} & set(re.findall(r"\w+", answer.split(".")[0].lower()))) for answer in answers]
    assert scores["pope_paper"]["pope_predicted_yes,none"] == pytest.approx(said_no.count(False) / 6)


def test_two_processes_score_as_one(evaluated, settings, tmp_path):
    options = {
        "output_dir": str(tmp_path / "two"),
        "base": "false",
        "tasks": '["pope","textvqa_val"]',
        "batch_size": "2",
    }
    arguments = [word for key, value in (settings | options).items() if key != "model" for word in (f"--{key}", value)]
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "fura_vlm.cli", "eval", settings["model"]]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:], *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    together = {(row["task"], row["document"]): row for row in rows(tmp_path / "two", "tuned")}
    alone = {(row["task"], row["document"]): row for row in rows(evaluated, "tuned")}
    assert together == {key: row for key, row in alone.items() if key[0] in ("pope", "textvqa_val")}


# ------------------------------------------------------------------------------------------------------ mistakes


def test_pictures_that_do_not_decode_are_counted(benchmarks, settings, tmp_path):
    def cut(data):
        raw = data.cast_column("image", Image(decode=False))
        broken = raw.map(
            lambda row, n: {"image": {"bytes": row["image"]["bytes"][: None if n % 3 else 60], "path": None}},
            with_indices=True,
            features=raw.features,
        )
        return broken.cast_column("image", Image())

    data = copy_of(benchmarks, tmp_path / "data", "textvqa", cut)
    own = {"data": str(data), "output_dir": str(tmp_path / "eval"), "tasks": ["textvqa_val"], "base": False}
    folder = evaluate(EvalConfig(**settings | own))
    score = json.loads((folder / "results.json").read_text())["scores"]["tuned"]["textvqa_val"]
    assert (score["n"], score["total"]) == (4, 6)
    assert [each["document"] for each in score["unreadable"]] == [0, 3]
    assert all(each["reason"] for each in score["unreadable"])
    table = (folder / "results.md").read_text()
    assert "| textvqa_val | 4 of 6 |" in table and "documents 0, 3" in table


def test_other_columns(benchmarks, settings, tmp_path):
    data = copy_of(benchmarks, tmp_path / "data", "POPE", lambda data: data.rename_column("answer", "label"))
    with pytest.raises(FuraVLMError, match=r"POPE data at .* have no column answer: they must have those of .*/POPE"):
        evaluate(EvalConfig(**settings | {"data": str(data), "tasks": ["pope"], "output_dir": str(tmp_path / "eval")}))


def test_no_such_task(settings):
    with pytest.raises(FuraVLMError, match="lmms-eval has no task 'scienceqa_image': did you mean scienceqa_img"):
        evaluate(EvalConfig(**settings | {"tasks": ["scienceqa_image"]}))


@pytest.mark.parametrize(
    "name, said", [("mmmu", "is a group of"), ("mme", "no score that is a mean.*run it with python -m lmms_eval")]
)
def test_tasks_that_cannot_stand_in_the_table(settings, name, said):
    with pytest.raises(FuraVLMError, match=f"^{name} {'' if 'group' in said else 'has '}{said}"):
        evaluate(EvalConfig(**settings | {"tasks": [name]}))


def test_damaged_data(benchmarks, settings, tmp_path):
    data = copy_of(benchmarks, tmp_path / "data", "POPE", lambda data: data)
    [file] = (data / "POPE" / "default").iterdir()
    content = bytearray(file.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    file.write_bytes(content)
    with pytest.raises(FuraVLMError, match="The data .*POPE cannot be loaded"):
        evaluate(EvalConfig(**settings | {"data": str(data), "tasks": ["pope"], "output_dir": str(tmp_path / "eval")}))


def test_no_such_data(settings, tmp_path):
    with pytest.raises(FuraVLMError, match="There are no data at .*nowhere"):
        evaluate(EvalConfig(**settings | {"data": str(tmp_path / "nowhere")}))


def test_no_network(settings, tmp_path):
    arguments = ["--data", "hub", "--offline", "true", "--output_dir", str(tmp_path / "eval"), "--tasks", '["pope"]']
    done = subprocess.run(
        [sys.executable, "-m", "fura_vlm.cli", "eval", settings["model"], *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("fura-vlm eval: The data lmms-lab-encoder/POPE cannot be loaded")
    assert last.endswith("or name a folder with --data, or --data embedded")


def test_results_of_another_model(evaluated, settings, tmp_path):
    other = make_adapter(tmp_path / "adapter", seed=1)
    with pytest.raises(FuraVLMError, match="holds the results of another model .*choose another --output_dir"):
        evaluate(EvalConfig(**settings | {"model": str(other)}))


def test_adapter_for_another_base(settings, tmp_path):
    own = settings | {"output_dir": str(tmp_path / "eval"), "tasks": ["pope"]}
    fura = make_adapter(tmp_path / "fura")
    path = fura / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_size": 64}))  # the shapes of other layers
    with pytest.raises(FuraVLMError, match=f"The adapter at .* cannot be used .*: it was trained over {BASE}"):
        evaluate(EvalConfig(**own | {"model": str(fura)}))

    base = LlavaForConditionalGeneration.from_pretrained(BASE)
    get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"])).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: torch.cat([value, value]) for key, value in load_file(path).items()}, path)
    with pytest.raises(
        FuraVLMError, match=r"The adapter at .* cannot be used \(.*size mismatch for .*\): it was trained over"
    ):
        evaluate(EvalConfig(**own | {"model": str(tmp_path / "lora")}))


@pytest.mark.parametrize("name, value", [("limit", 0), ("max_new_tokens", 0), ("num_workers", -1)])
def test_numbers_out_of_range(settings, name, value):
    with pytest.raises(FuraVLMError, match=f"{name} is {value}: give {value + 1} or more, or leave it out"):
        evaluate(EvalConfig(**settings | {name: value}))
