"""Scores and tables, against counting by hand."""

import pytest
from PIL import Image

from fura_vlm.evaluation.heldout import Answer, blind_guess, exact_match, read_answers, write_answers
from fura_vlm.training import report


def answer(number, family, expected, predicted, image=None):
    return Answer(str(number), family, "<image>\nWhat?\nOnly one word.", expected, predicted, image)


ANSWERS = [
    answer(0, "gqa", "red", "Red."),
    answer(1, "gqa", "blue", "red"),
    answer(2, "gqa", "red", "red"),
    answer(3, "gqa", "green", "greenish"),
    answer(4, "pope", "Yes", " yes"),
    answer(5, "pope", "No", "Yes"),
]


def test_exact_match_by_family():
    assert exact_match(ANSWERS) == {"gqa": 0.5, "pope": 0.5, "mean": 0.5}


def test_blind_guess_is_the_commonest_answer():
    assert blind_guess(ANSWERS) == {"gqa": 0.5, "pope": 0.5, "mean": 0.5}
    assert blind_guess(ANSWERS[:3]) == {"gqa": pytest.approx(2 / 3), "mean": pytest.approx(2 / 3)}


def test_table():
    table = report.score_table({"gqa": 0.0, "mean": 0.0}, {"gqa": 0.5, "mean": 0.5}, {"gqa": 0.25, "mean": 0.25})
    assert "| gqa | 25.0 | 0.0 | 50.0 | +50.0 |" in table.splitlines()


def test_worse_than_a_guess_is_said():
    """In the table, and in a sentence that names the families and the causes; not where all is well."""
    after, blind = {"gqa": 0.085, "pope": 0.6, "mean": 0.3425}, {"gqa": 0.38, "pope": 0.5, "mean": 0.44}
    rows = report.score_table(dict.fromkeys(after, 0.0), after, blind).splitlines()
    assert "| gqa | 38.0 | 0.0 | 8.5 | +8.5, below the guess |" in rows
    assert "| pope | 50.0 | 0.0 | 60.0 | +60.0 |" in rows
    said = report.below_the_guess(after, blind)
    assert "gqa (8.5 %, the guess 38.0 %)" in said and "pope" not in said
    assert all(cause in said for cause in ("too few steps", "learning rate", "tokenizer"))
    assert report.below_the_guess(blind, blind) == ""


def test_answers_round_trip(tmp_path):
    write_answers(tmp_path / "answers.jsonl", ANSWERS)
    assert read_answers(tmp_path / "answers.jsonl") == ANSWERS
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_metrics_survive_a_cut_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert report.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_pictures_are_written_whole(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    pictured = [answer(n, "gqa", "red", "red", str(tmp_path / "a.png")) for n in range(3)]
    rows = [{"step": n, "loss": 1 / (n + 1), "learning_rate": 0.1} for n in range(5)]
    report.plot_curve(rows, tmp_path / "loss.png")
    report.plot_scores({"gqa": 0.1}, {"gqa": 0.9}, {"gqa": 0.3}, tmp_path / "scores.png")
    report.plot_samples(pictured, pictured, tmp_path / "samples.png")
    for name in ("loss", "scores", "samples"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
            assert picture.width > 500
