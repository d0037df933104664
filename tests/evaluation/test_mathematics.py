"""The suite of mathematics: what is asked and how, how answers are scored, and what is said of wrong files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.compare import compare
from fura_vlm.evaluation.config import CompareConfig, EvalConfig
from fura_vlm.evaluation.mathematics import Mathematics, find, read_set
from fura_vlm.evaluation.problems import BOXED
from fura_vlm.evaluation.source import find_model
from fura_vlm.evaluation.suite import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = Path(__file__).parents[3] / "shared" / "text" / "math"
WORDS = [("What is one and one?", "2.0"), ("What is 2 + 3?", "5.0"), ("And that?", "7.0")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    records = [{"instruction": text, "input": "", "output": "", "answer": answer} for text, answer in WORDS]
    (folder / "AddSub-test.json").write_text(json.dumps(records))
    (folder / "AIME24.jsonl").write_text(json.dumps({"problem": "What is $1+1$?", "answer": "2"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(folder_of) -> Path:
    return folder_of("text")


@pytest.fixture(scope="module")
def settings(model, data, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("results") / "eval"
    return {
        "model": str(model),
        "suite": "math",
        "data": str(data),
        "output_dir": str(folder),
        "max_new_tokens": 24,
    }


@pytest.fixture(scope="module")
def evaluated(settings) -> Path:
    return evaluate(EvalConfig(**settings))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples-model.jsonl").read_text().splitlines()]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_word_problems_are_answered_greedily_as_by_transformers_alone(evaluated, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    alone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = []
    for text, _ in WORDS:
        prompt = f"<|im_start|>user\n{text}{BOXED}<|im_end|>\n<|im_start|>assistant\n"
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        ids = alone.generate(**inputs, do_sample=False, max_new_tokens=24)
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert [row["predicted"] for row in rows(evaluated) if row["task"] == "AddSub"] == expected


def test_hard_sets_are_asked_eight_times(evaluated):
    answers = [json.loads(line) for line in (evaluated / "answers" / "answers-0.jsonl").read_text().splitlines()]
    assert len(answers) == len({row["key"] for row in answers}) == 8 + len(WORDS)
    [row] = [row for row in rows(evaluated) if row["task"] == "AIME24"]
    assert row["predicted"].startswith(f"{round(8 * row['score'])} of 8 are right. The first: ")
    notes = " ".join(results_of(evaluated)["notes"])
    assert "AIME24: the mean of 8 answers, temperature 0.6, top-p 0.95, up to 24 tokens." in notes
    assert "AddSub: one answer, greedy" in notes


def test_scores_are_shares_of_right_answers(settings, evaluated, tmp_path):
    """Answers that are put in the place of the model's own: half of the eight are right, and one of three is."""
    kept = evaluated / "answers" / "answers-0.jsonl"
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    results = results_of(evaluated)
    suite = Mathematics(EvalConfig(**settings), find_model(settings["model"]))
    suite.load()
    assert results["scores"]["model"]["AddSub"]["n"] == 3 and len(keys) == 11
    folder = tmp_path / "eval"
    (folder / "answers").mkdir(parents=True)
    # Asked again, every key is there: nothing is written by the model.
    said = {key: "nothing here" for key in keys}
    hard = [key for key in keys if key in keys_of(suite, "AIME24")]
    easy = [key for key in keys if key in keys_of(suite, "AddSub")]
    said |= {key: r"so \boxed{\frac{4}{2}}" if number % 2 else "3" for number, key in enumerate(hard)}
    said[keys_of(suite, "AddSub")[1]] = "It is 5."
    assert len(hard) == 8 and len(easy) == 3
    lines = [json.dumps({"key": key, "answer": text}) for key, text in said.items()]
    (folder / "answers" / "answers-0.jsonl").write_text("\n".join(lines) + "\n")
    again = results_of(evaluate(EvalConfig(**settings | {"output_dir": str(folder)})))
    scores = again["scores"]["model"]
    assert scores["AIME24"]["score"] == 0.5 and scores["AddSub"]["score"] == pytest.approx(1 / 3)
    assert scores["AddSub"]["metrics"]["unread"] == pytest.approx(2 / 3)
    assert any("AddSub 2 of 3" in note for note in again["notes"])


def keys_of(suite: Mathematics, name: str) -> list[str]:
    """The keys of a set's answers, in order."""
    from importlib.metadata import version

    from fura_vlm.evaluation.answers import request_key

    source = suite.source
    identity = [source.fingerprint(), "torch.float32", "template", version("transformers")]
    return [
        request_key(model=identity, question=each.text + BOXED, arguments=suite.arguments(name), sample=sample)
        for each in suite.sets[name]
        for sample in range(suite.samples(name))
    ]


def test_second_evaluation_asks_nothing_again(evaluated, settings):
    before = {path: path.read_bytes() for path in (evaluated / "answers").iterdir()}
    evaluate(EvalConfig(**settings))
    assert {path: path.read_bytes() for path in (evaluated / "answers").iterdir()} == before and before


def test_two_evaluations_are_compared_and_form_and_words_can_be_set(evaluated, settings, tmp_path, capsys):
    own = {"conversation": "alpaca", "instruction": "", "samples": 2, "temperature": 1.0, "tasks": "AddSub,AIME24"}
    other = evaluate(EvalConfig(**settings | own | {"output_dir": str(tmp_path / "alpaca")}))
    assert "AddSub: the mean of 2 answers, temperature 1, top-p 1" in " ".join(results_of(other)["notes"])
    compare(CompareConfig(str(evaluated), str(other)))
    assert "AddSub" in capsys.readouterr().out


def test_a_run_is_asked_with_its_own_words(model, tmp_path):
    def words(settings: dict, **given) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        config = EvalConfig(str(tmp_path), suite="math", data=".", **given)
        return Mathematics(config, find_model(str(model))).instruction

    assert words({"reward": "math", "instruction": " Think."}) == " Think."
    assert words({"reward": "math", "instruction": None}) == words({"method": "fura"}) == BOXED
    assert words({"reward": "math", "instruction": " Think."}, instruction="") == ""


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"data": "auto"}, "give --data FOLDER"),
        ({"tasks": "AIME26"}, "There is no set 'AIME26' in the suite math: the sets are MATH-500"),
        ({"tasks": "SVAMP"}, "There is no SVAMP-test.json in"),
        ({"tasks": "SVAMP", "data": "hub"}, "SVAMP is on no hub that this program knows"),
        ({"data": "."}, "holds none of the sets MATH-500"),
        ({"samples": 0}, "samples is 0: give 1 or more"),
        ({"top_p": 1.5}, "top_p is 1.5: give 0 or more, and at most 1"),
        ({"samples": 4, "temperature": 0.0}, "are all the same"),
        ({"num_beams": 2}, "num_beams is no setting of the suite math"),
    ],
)
def test_settings_that_cannot_be(own, words, settings):
    with pytest.raises(FuraVLMError) as caught:
        evaluate(EvalConfig(**settings | own))
    assert words in str(caught.value)


def test_another_schema_is_named(tmp_path):
    (tmp_path / "SVAMP.json").write_text(json.dumps([{"Body": "A", "Question": "How many?", "Answer": 1.0}]))
    with pytest.raises(FuraVLMError, match="SVAMP.json, record 1: it has no text in problem"):
        read_set(str(tmp_path), "SVAMP")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sets are not here")
@pytest.mark.parametrize(("name", "number"), [("MultiArith", 600), ("AddSub", 395), ("SingleEq", 508), ("SVAMP", 1000)])
def test_real_sets_are_read_whole(name, number):
    assert find(str(REAL), name) and len(read_set(str(REAL), name)) == number
