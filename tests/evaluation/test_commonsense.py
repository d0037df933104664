"""Commonsense questions: what is asked, how answers are read and choices judged, and what is said of wrong files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_models import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.commonsense import CHOICES, WHOLE, Commonsense, first_choice, read_set
from fura_vlm.evaluation.compare import compare
from fura_vlm.evaluation.config import CompareConfig, EvalConfig
from fura_vlm.evaluation.generation import Answerer
from fura_vlm.evaluation.likelihood import likelihoods
from fura_vlm.evaluation.scores import score_of_means
from fura_vlm.evaluation.source import find_model
from fura_vlm.evaluation.suite import evaluate
from fura_vlm.modelling.load import load_family

pytestmark = pytest.mark.usefixtures("one_thread")

BOOLQ = [("is the sky blue", "true"), ("is a cat red", "false"), ("is this a dog, and that a cat", "true")]
ARC = [
    (("What is this?", "a cat", "a dog", "red"), "answer3"),
    (("And that?", "a dog", "a cat", "blue", "it is a red cat"), "answer1"),
]


def boolq(question: str) -> str:
    return (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false"
    )


def arc(question: str, *choices: str) -> str:
    listed = " ".join(f"Answer{number}: {choice}" for number, choice in enumerate(choices, 1))
    names = "/".join(f"answer{number}" for number in range(1, len(choices) + 1))
    return f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {names}"


def record(instruction: str, answer: str) -> dict:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def alpaca(instruction: str) -> str:
    """The prompt, written by hand."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Both places that a set may have."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "boolq").mkdir()
    (folder / "boolq" / "test.json").write_text(json.dumps([record(boolq(each), answer) for each, answer in BOOLQ]))
    (folder / "ARC-Easy-test.json").write_text(json.dumps([record(arc(*each), answer) for each, answer in ARC]))
    return folder


@pytest.fixture(scope="module")
def model(folder_of) -> Path:
    return folder_of("text")


@pytest.fixture(scope="module")
def settings(model, data, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("results") / "eval"
    own = {"tasks": "boolq,ARC-Easy", "data": str(data), "output_dir": str(folder), "max_new_tokens": 6}
    return {"model": str(model), "suite": "commonsense", **own}


@pytest.fixture(scope="module")
def evaluated(settings) -> Path:
    return evaluate(EvalConfig(**settings))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples-model.jsonl").read_text().splitlines()]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("said", "name", "read"),
    [
        ("the correct answer is true", "boolq", "true"),
        ("It is false, not true.", "boolq", "false"),
        ("True", "boolq", None),  # LLM-Adapters' script knows small letters alone
        ("untrue", "boolq", "true"),  # and looks inside words
        ("answer2 or answer1", "ARC-Easy", "answer2"),
        ("the correct answer is answer12", "openbookqa", "answer1"),
        ("ending4", "hellaswag", "ending4"),
        ("option 1", "winogrande", None),
        ("", "piqa", None),
    ],
)
def test_the_first_match_is_the_answer(said, name, read):
    assert first_choice(said, CHOICES[name]) == read


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_transformers_alone(beams, model, settings, tmp_path):
    own = {"output_dir": str(tmp_path / "eval"), "num_beams": beams, "batch_size": 2}
    said = [row["predicted"] for row in rows(evaluate(EvalConfig(**settings | own)))]
    tokenizer = AutoTokenizer.from_pretrained(model)
    alone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = []
    for text in [*(boolq(each) for each, _ in BOOLQ), *(arc(*each) for each, _ in ARC)]:
        inputs = tokenizer(alpaca(text), return_tensors="pt")
        ids = alone.generate(**inputs, do_sample=False, num_beams=beams, max_new_tokens=6)
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert said == expected and any(said)


def test_what_names_no_choice_is_counted_and_wrong(evaluated):
    results, samples = results_of(evaluated), rows(evaluated)
    for name, number in (("boolq", 3), ("ARC-Easy", 2)):
        own = [row for row in samples if row["task"] == name]
        score = results["scores"]["model"][name]
        unread = [row for row in own if not any(choice in row["predicted"] for choice in CHOICES[name])]
        assert score["n"] == len(own) == number and score["metrics"]["unread"] == len(unread) / number
        assert all(row["score"] == 0 for row in unread)
        if unread:
            assert f"{name} {len(unread)} of {number}" in (evaluated / "results.md").read_text()
    assert results["max_new_tokens"] == 6 and not results["published"]
    assert [row["expected"] for row in samples] == [answer for _, answer in BOOLQ + ARC]


def test_second_evaluation_asks_nothing_again(evaluated, settings):
    before = {path: path.read_bytes() for path in (evaluated / "answers").iterdir()}
    evaluate(EvalConfig(**settings))
    assert {path: path.read_bytes() for path in (evaluated / "answers").iterdir()} == before and before


def test_two_evaluations_are_compared(evaluated, settings, tmp_path):
    other = evaluate(EvalConfig(**settings | {"output_dir": str(tmp_path / "likely"), "score": "likelihood",
                                              "max_new_tokens": None}))  # fmt: skip
    text = compare(CompareConfig(str(evaluated), str(other)))
    own = [row["score"] for row in rows(other) if row["task"] == "boolq"]
    assert "| boolq" in text and f"| {100 * sum(own) / 3:.1f} |" in text and "ARC-Easy" in text


# -------------------------------------------------------------------------------------------------------- likelihoods


@pytest.fixture(scope="module")
def judged(model) -> tuple[list, list, list]:
    """Questions, what is found of them in batches of two, and what transformers' own loss says of each alone."""
    questions = [(f"{number}", boolq(each), ["the correct answer is true", "the correct answer is false", "A cat"])
                 for number, (each, _) in enumerate(BOOLQ)]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    alone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answerer = Answerer(alone, load_family(str(model), conversation="alpaca"), torch.float32, batch_size=2)
    found = {}
    for batch in likelihoods(answerer, questions, progress=False):
        assert not found.keys() & batch.keys()
        found |= batch
    expected = []
    for _, text, answers in questions:
        for answer in answers:
            ids = tokenizer(alpaca(text) + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : tokenizer(alpaca(text), return_tensors="pt")["input_ids"].shape[1]] = -100
            with torch.no_grad():
                expected.append(-float(alone(input_ids=ids, labels=labels).loss))
    return questions, [value for number in range(3) for value in found[number]], expected


def test_likelihoods_are_the_losses_of_transformers(judged):
    _, found, expected = judged
    assert found == pytest.approx(expected, abs=1e-5) and len({round(value, 4) for value in expected}) > 3


def test_the_likeliest_choice_is_the_answer(judged, settings, tmp_path):
    _, _, expected = judged
    own = {"output_dir": str(tmp_path / "eval"), "score": "likelihood", "tasks": "boolq", "max_new_tokens": None}
    folder = evaluate(EvalConfig(**settings | own))
    likeliest = ["true" if expected[3 * number] > expected[3 * number + 1] else "false" for number in range(3)]
    assert [row["predicted"] for row in rows(folder)] == likeliest
    right = sum(said == answer for said, (_, answer) in zip(likeliest, BOOLQ, strict=True))
    assert results_of(folder)["scores"]["model"]["boolq"]["score"] == pytest.approx(right / 3)


# ---------------------------------------------------------------------------------------------- published, processes


def test_published_figures_stand_beside_whole_sets_only(settings):
    suite = Commonsense(EvalConfig(**settings), find_model(settings["model"]))

    def of(sizes: dict[str, int]) -> dict:
        return suite.published({name: score_of_means([1.0] * n, "accuracy", {}, n) for name, n in sizes.items()})

    [whole] = of(WHOLE).values()
    assert (whole["scores"], whole["average"]) == ({"boolq": 76.5}, 87.3)
    assert sum(WHOLE.values()) == 22_419 and WHOLE.keys() == CHOICES.keys()
    [one_cut] = of(WHOLE | {"piqa": 1837}).values()
    assert (one_cut["scores"], one_cut["average"]) == ({"boolq": 76.5}, None)
    [alone] = of({"boolq": 3270}).values()
    assert alone["average"] is None
    assert not of({"boolq": 3269}) and not of({"piqa": 1838})


def test_two_processes_answer_as_one(evaluated, settings, tmp_path):
    options = settings | {"output_dir": str(tmp_path / "two")}
    arguments = [str(word) for key, value in options.items() if key != "model" for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fura_vlm.cli",
         "eval", settings["model"], *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path / "two") == rows(evaluated)
    assert len(list((tmp_path / "two" / "answers").iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------- the form


def test_a_question_has_the_form_that_a_model_names(model, settings, tmp_path):
    config = EvalConfig(**settings)
    assert Commonsense(config, find_model(str(model))).source.conversation == "alpaca"
    named = tmp_path / "vicuna"
    load_family(str(model), conversation="vicuna").processor.save_pretrained(named)
    for file in model.iterdir():
        if not (named / file.name).exists():
            (named / file.name).symlink_to(file)
    assert load_family(str(named)).conversation == "vicuna"
    assert Commonsense(config, find_model(str(named))).source.conversation is None
    chosen = EvalConfig(**settings | {"conversation": "template"})
    assert Commonsense(chosen, find_model(str(named))).source.conversation == "template"


def test_a_tokenizer_without_a_padding_token(model, tmp_path):
    """Llama 3 has none."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").symlink_to(model / "config.json")
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    family = load_family(str(tmp_path))
    assert family.tokenizer.pad_token_id == family.tokenizer.eos_token_id is not None


# ---------------------------------------------------------------------------------------------------------- mistakes

GOOD = record(boolq("is it"), "true")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([GOOD, {"question": "is it", "answer": True}], "record 2: it has no text 'instruction'"),
        ([GOOD | {"answer": None}], "record 1: it has no text 'answer'"),
        ([GOOD, ["is it", "true"]], "record 2: it is no object"),
        ([GOOD | {"instruction": "is it?"}], "record 1: its instruction does not end with 'Answer format:'"),
        ([GOOD | {"answer": "yes"}], "record 1: its answer 'yes' is none of its choices true/false"),
        ([record(arc("What?", "a", "b"), "answer1")], "its choices are answer1/answer2, and those of boolq are"),
        ([GOOD | {"input": "more"}], "record 1: its input is not empty"),
        ([], "holds no records"),
    ],
)
def test_records_of_another_form(records, said, tmp_path):
    file = tmp_path / "boolq-test.json"
    file.write_text(json.dumps(records))
    with pytest.raises(FuraVLMError, match=said) as error:
        read_set(str(tmp_path), "boolq")
    assert str(file) in str(error.value)


def test_a_file_that_is_cut_off(tmp_path):
    (tmp_path / "boolq-test.json").write_text(json.dumps([GOOD] * 3)[:-20])
    with pytest.raises(FuraVLMError, match="boolq-test.json is cut off"):
        read_set(str(tmp_path), "boolq")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": "piqa"}, "neither .*piqa/test.json nor .*piqa-test.json: fetch .*--tasks"),
        ({"tasks": "ARC"}, "no commonsense set 'ARC': the sets are boolq, piqa"),
        ({"data": "auto"}, "give --data FOLDER"),
        ({"protocol": "paper"}, "protocol is no setting of the suite commonsense but of visual"),
        ({"suite": "visual", "score": "likelihood"}, "score is no setting of the suite visual but of commonsense"),
        ({"num_beams": 0}, "num_beams is 0: give 1 or more"),
        ({"conversation": "chatml"}, "conversation is chatml"),
    ],
)
def test_settings_that_cannot_be(changes, said, settings, tmp_path):
    with pytest.raises(FuraVLMError, match=said):
        evaluate(EvalConfig(**settings | {"output_dir": str(tmp_path / "eval")} | changes))
