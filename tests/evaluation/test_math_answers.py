"""What is read of an answer of mathematics, what counts as right, and which sets are read."""

import json
import threading

import pytest

from fura_vlm.data.messages import DataError
from fura_vlm.evaluation.math_answers import is_right, last_boxed, read_answer, read_expected
from fura_vlm.evaluation.problems import iter_questions

CASES = [
    # What is expected, what was said, whether it is right.
    ("4.0", "She had 16 - 12 = 4 kids. The answer is 4.", True),
    ("4.0", "The answer is 4.5.", False),
    ("36", "The price is $36.", True),
    ("1,234", "= 1234 apples", True),
    ("1234", "It is 1,234.", True),
    ("1,2", r"\boxed{1,2}", True),
    ("1,2", r"\boxed{12}", False),
    (r"\frac{1}{2}", r"so \boxed{0.5}", True),
    (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
    ("0.5", "The final answer is $1/2$. I hope it is correct.", True),
    (r"\frac{1}{3}", r"\boxed{0.33}", False),
    ("7", r"\boxed{7} because 3 + 4 = 8 - 1", True),  # a box counts before what comes later
    ("7", r"First \boxed{6}. But that was a mistake, as we see below: the sum is \boxed{7}.", True),
    ("7", r"\boxed{6} and \boxed{7}", True),  # the last box counts, as in MATH; math-verify would take both for one
    ("6,7", r"\boxed{6, 7}", True),
    ("7", "7 is wrong, so 8", False),
    (r"x = 3", r"\boxed{3}", True),
    ("2k", r"\boxed{k + k}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \frac{\pi}{2})}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(\frac{\pi}{2}, 3)}", False),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\text{Evelyn}", r"\boxed{\text{Carla}}", False),
    (r"12 \text{ cm}", r"\boxed{12}", True),
    ("070", "The answer is 70", True),
    ("-5", r"\boxed{-5}", True),
    ("5", r"\boxed{-5}", False),
    ("5", "<think>It is 5.</think> The answer is 6.", False),
    ("6", "<think>It is 5.</think> The answer is 6.", True),
]


@pytest.mark.parametrize(("expected", "said", "right"), CASES)
def test_answers_are_judged_as_by_hand(expected, said, right):
    assert is_right(read_expected(expected), read_answer(said)) is right


@pytest.mark.parametrize("said", ["", "I do not know.", r"\boxed{", "<think>It is 5, or is it"])
def test_what_names_nothing_is_unread_and_wrong(said):
    assert read_answer(said) == [] and not is_right(read_expected("5"), read_answer(said))


def test_an_answer_is_read_outside_the_main_thread():
    """Where math-verify can set no alarm."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(is_right(read_expected("0.5"), read_answer(r"\frac12 = 1/2")))
    )
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"Hence \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"so $\boxed 5$ it is", "5"),
        (r"\fbox{C}", "C"),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_found(text, boxed):
    assert last_boxed(text) == boxed


def read(folder, records: list) -> tuple[list, list]:
    path = folder / "set.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    pairs = list(iter_questions(path))
    return [one for one, _ in pairs if one], [problem for _, problem in pairs if problem]


def test_published_sets_are_read(tmp_path):
    """A record as each of them has it."""
    questions, problems = read(
        tmp_path,
        [
            {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": r"It is \boxed{2}."},
            {"problem": "Halve 1.", "solution": r"\boxed{3}", "answer": r"\frac{1}{2}", "unique_id": "a"},
            {"id": 60, "problem": "Find n.", "answer": "204", "url": "https://example.org", "year": "2024"},
            {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 1,018"},
            {"instruction": " How many kids? ", "input": "", "output": "\nA: 4.", "answer": "4.0"},
            {"question": "Which?", "answer": 7},
        ],
    )
    assert not problems
    assert [(one.text, one.answer) for one in questions] == [
        ("What is $1+1$?", "2"),
        ("Halve 1.", r"\frac{1}{2}"),
        ("Find n.", "204"),
        ("How many?", "1,018"),
        ("How many kids?", "4.0"),
        ("Which?", "7"),
    ]
    assert is_right(questions[3].expected, read_answer("It is 1018."))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "What?", "answer": "1"}, "it has no text in problem, question or instruction (its keys are text"),
        ({"problem": "What?", "solution": "It is 2."}, "it has no answer: there is none in answer"),
        ({"problem": "What?", "answer": True}, "it has no answer"),
        ({"problem": "What?", "answer": "####"}, "math-verify cannot read its answer ''"),
        ({"instruction": "Add.", "input": "1 and 2", "answer": "3"}, "its input is not empty"),
        (["What?", "1"], "it is no object"),
        ('{"problem": ', "the line is not valid JSON"),
    ],
)
def test_another_schema_is_named(tmp_path, record, reason):
    good = {"question": "Which?", "answer": 7}
    questions, [problem] = read(tmp_path, [good, record])
    assert len(questions) == 1 and problem.place == "line 2" and reason in problem.reason


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="none.json"):
        list(iter_questions(tmp_path / "none.json"))
