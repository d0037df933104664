"""The evaluation of a server's model, against the same model in this process."""

import json
from pathlib import Path

import pytest
from odd_server import Odd, odd_server
from PIL import Image

from fura_vlm.evaluation.base import SuiteError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.generation import EvaluationError, Question
from fura_vlm.evaluation.served import ServedAnswerer, ServedSource
from fura_vlm.evaluation.suite import evaluate
from fura_vlm.remote.server import Server, ServerError

ARGUMENTS = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "until": []}
RED = Image.new("RGB", (40, 40), "red")


def test_the_scores_are_those_of_the_model_here(model_server, merged, benchmarks, tmp_path):
    settings = {"data": str(benchmarks), "limit": 2}
    evaluate(EvalConfig(merged, output_dir=str(tmp_path / "here"), dtype="float32", **settings))
    evaluate(EvalConfig(merged, output_dir=str(tmp_path / "there"), server=model_server, **settings))
    here, there = (
        [json.loads(line) for line in (tmp_path / name / "samples-model.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    )
    assert here == there and len({row["predicted"] for row in here}) > 3
    assert len((tmp_path / "there" / "answers" / "answers-0.jsonl").read_text().splitlines()) == len(there) == 8
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    assert results["base"] == f"{merged} of {model_server}" and f"--server {model_server}" in results["command"]


@pytest.fixture(scope="module")
def odd() -> str:
    with odd_server() as address:
        yield address


def answers(address: str, *asked: dict, retries: int = 0, sees: bool = True) -> list[str]:
    """To one question for each, with these arguments and a picture."""
    server = Server(address, retries=retries, seconds=30)
    source = ServedSource(server, "model", sees)
    questions = [
        Question(f"shapes, document {number}", f"<image>Number {number}?", lambda: [RED], ARGUMENTS | arguments)
        for number, arguments in enumerate(asked)
    ]
    try:
        got = {}
        for batch in ServedAnswerer(source, 2).answers(questions, progress=False):
            got |= batch
        return [got[number] for number in range(len(questions))]
    finally:
        server.close()


def test_errors_that_pass_are_asked_again(odd):
    assert answers(f"{odd}/once/v1", *[{}] * 5, retries=1) == ["One two three"] * 5


def test_an_answer_ends_where_the_task_says(odd):
    """The server is left there, too."""
    Odd.left.clear()
    assert answers(f"{odd}/endless/v1", {"until": [" more"]}) == ["One two three"]
    assert Odd.left.wait(30)


@pytest.mark.parametrize(
    "way, arguments, sees, said",
    [
        ("strict", {}, True, "^shapes, document [01]: The server at .* refuses the question"),
        ("breaking", {}, True, "^shapes, document [01]: The server at .* has broken off its answer"),
        ("named", {"num_beams": 4}, True, "^shapes, document 0: its task asks for num_beams, which a server does not"),
        ("named", {}, False, "^shapes, document 0: it has a picture, and model of .* takes none: choose another model"),
    ],
)
def test_a_failure_names_the_document(odd, way, arguments, sees, said):
    with pytest.raises(EvaluationError, match=said):
        answers(f"{odd}/{way}/v1", arguments, arguments, sees=sees)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"suite": "commonsense", "data": "."}, "The suite commonsense puts its questions in a form of its own"),
        ({"adapter": "runs/one"}, "adapter is for a model in this process"),
        ({"dtype": "bfloat16"}, "dtype is for a model in this process"),
    ],
)
def test_settings_that_do_not_go_with_a_server(odd, settings, said):
    with pytest.raises(SuiteError, match=said):
        evaluate(EvalConfig("model", server=odd, **settings))


def test_a_key_without_a_server_and_a_model_that_is_not_there(odd, tmp_path):
    with pytest.raises(SuiteError, match="--server_key is the key of a server"):
        evaluate(EvalConfig("model", server_key="MY_KEY"))
    with pytest.raises(ServerError, match="knows no model model"):
        evaluate(EvalConfig("model", server=f"{odd}/unknown/v1", output_dir=str(tmp_path)))
    assert not list(Path(tmp_path).iterdir())
