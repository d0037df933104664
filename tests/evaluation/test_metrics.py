"""The metrics of the tasks as they run, for answers whose scores are worked out by hand from the benchmarks' rules."""

import numpy as np
import pytest
from lmms_eval.tasks import TaskManager
from scipy.stats import binom, binomtest

from fura_vlm.evaluation.statistics import YesNo, mean_interval, paired_interval, paired_test, wilson
from fura_vlm.evaluation.tasks import EVAL_FOLDER, TASKS, load_tasks


@pytest.fixture(scope="module")
def tasks(benchmarks):
    names = list(dict.fromkeys(TASKS["lmms-eval"] + TASKS["paper"]))
    return {name: loaded.task for name, loaded in load_tasks(names, str(benchmarks)).items()}


def pope_score(task, metric, rows):
    results = [task.process_results(doc, [answer])[metric] for doc, answer in rows]
    return task.aggregation()[metric](results)


@pytest.mark.parametrize(
    "answer, score", [("left", 1), ("Left.", 1), (" LEFT! ", 1), ("to the left", 0), ("lefty", 0), ("", 0)]
)
def test_gqa_is_exact_match_without_case_and_punctuation(tasks, answer, score):
    doc = {"question": "Where?", "answer": "left", "imageId": "n0"}
    assert tasks["gqa"].process_results(doc, [answer])["exact_match"] == score


@pytest.mark.parametrize(
    "answer, lmms_eval, paper",
    [
        ("B", 1, 1),
        ("b", 1, 1),
        ("B. blue", 1, 1),
        ("A", 0, 0),
        ("A. B", 0, 0),
        ("blue", 0, 0),
        ("The answer is B.", 0, 1),  # LLaVA's eval_science_qa.py reads it, lmms-eval does not
        ("The answer is B, the blue one.", 0, 1),  # its pattern takes any character after the letter
        ("A. The answer is B.", 0, 0),  # and it looks for a letter at the beginning first
        ("The answer is A.", 0, 0),
        ("The answer is B. The answer is A.", 0, 0),
        ("The answer is D.", 0, 0),  # no such choice
    ],
)
def test_scienceqa_letters(tasks, answer, lmms_eval, paper):
    doc = {"choices": ["red", "blue", "green"], "answer": 1}
    assert tasks["scienceqa_img"].process_results(doc, [answer])["exact_match"] == lmms_eval
    assert tasks["scienceqa_paper"].process_results(doc, [answer])["exact_match"] == paper


@pytest.mark.parametrize(
    "answers, answer, score",
    [
        # VQA's rule (arXiv 1505.00468): against each nine of the ten answers min(1, matches / 3), then the mean.
        (["exit"] * 10, "exit", 1.0),
        (["exit"] * 4 + ["way out"] * 6, "exit", 1.0),  # three are left whichever one is held out
        (["exit"] * 3 + ["way out"] * 7, "exit", (3 * 2 / 3 + 7 * 1) / 10),
        (["exit"] * 2 + ["way out"] * 8, "exit", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (["exit"] + ["way out"] * 9, "exit", (1 * 0 + 9 * 1 / 3) / 10),
        (["exit"] * 10, "exits", 0.0),
        # Its normalisation: case, articles, punctuation, numbers as words, contractions.
        (["exit"] * 10, "The Exit!", 1.0),
        (["2"] * 10, "two", 1.0),
        (["don't"] * 10, "dont", 1.0),
    ],
)
def test_textvqa_soft_accuracy(tasks, answers, answer, score):
    doc = {"question_id": 0, "answers": list(answers)}
    assert tasks["textvqa_val"].process_results(doc, [answer])["exact_match"] == pytest.approx(score)


def pope_documents(*categories_and_answers):
    return [
        {"question_id": str(n), "category": category, "answer": truth}
        for n, (category, truth) in enumerate(categories_and_answers)
    ]


def test_pope_f1_by_hand(tasks):
    docs = pope_documents(*[("random", "yes")] * 4, *[("random", "no")] * 4)
    answers = ["Yes", "yes", "Yes", "No", "Yes", "no", "No", "NO"]
    rows = list(zip(docs, answers, strict=True))
    # 3 true and 1 false positive, 1 false negative: precision 3/4, recall 3/4, F1 3/4; 6 of 8 right.
    assert pope_score(tasks["pope"], "pope_f1_score", rows) == pytest.approx(0.75)
    assert pope_score(tasks["pope"], "pope_accuracy", rows) == pytest.approx(0.75)
    assert pope_score(tasks["pope_paper"], "pope_mean_f1", rows) == pytest.approx(0.75)


def test_pope_reads_sentences_as_its_own_script(tasks):
    docs = pope_documents(*[("random", "yes")] * 2, *[("random", "no")] * 2)
    answers = ["Yes, there is a star. No circle.", "There is not.", "No, there is none.", "I see one."]
    rows = list(zip(docs, answers, strict=True))
    # Read as yes, no, no, yes: 1 true positive, 1 false positive, 1 false negative.
    assert pope_score(tasks["pope_paper"], "pope_mean_f1", rows) == pytest.approx(0.5)
    assert pope_score(tasks["pope"], "pope_f1_score", rows) == 0  # lmms-eval wants the bare word


def test_pope_is_the_mean_of_its_categories(tasks):
    docs = pope_documents(
        *[("random", "yes"), ("random", "no")],
        *[("popular", "yes"), ("popular", "no")],
        *[("adversarial", "yes")] * 2,
    )
    answers = ["yes", "no", "yes", "yes", "no", "no"]
    rows = list(zip(docs, answers, strict=True))
    # F1: random 1, popular 2 * 1/2 * 1 / (1/2 + 1) = 2/3, adversarial 0.
    assert pope_score(tasks["pope_paper"], "pope_mean_f1", rows) == pytest.approx((1 + 2 / 3 + 0) / 3)
    # The labels hold 4 yes of 6, the answers 3.
    assert pope_score(tasks["pope_paper"], "pope_predicted_yes", rows) == pytest.approx(3 / 6)
    assert pope_score(tasks["pope"], "pope_yes_ratio", rows) == pytest.approx(4 / 6)


def test_textvqa_of_the_paper_has_the_ocr_tokens(tasks):
    doc = {"question": "what is it?", "ocr_tokens": ["EXIT", "A1"]}
    closing = "\nAnswer the question using a single word or phrase."
    assert tasks["textvqa_val"].doc_to_text(doc) == "What is it?" + closing
    assert tasks["textvqa_paper"].doc_to_text(doc) == "What is it?\nReference OCR token: EXIT, A1" + closing


@pytest.mark.parametrize(
    "right, n, low, high",  # Newcombe 1998, table I, method 3: the score interval without a correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_of_shares_is_the_published_one(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert mean_interval([1] * right + [0] * (n - right)) == wilson(right, n)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 12, 1000])
def test_interval_of_shares_is_scipys(n):
    for right in range(0, n + 1, max(1, n // 7)):
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        low, high = wilson(right, n)
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert 0 <= low <= right / n <= high <= 1 and low < high


def test_interval_of_fractions_covers_as_often_as_it_says():
    """Answers as TextVQA scores them, near the upper end, where resampling few of them would see no spread."""
    values, chances = np.array([0.0, 0.3, 0.6, 0.9, 1.0]), np.array([0.02, 0.03, 0.05, 0.1, 0.8])
    draws = np.random.default_rng(0).multinomial(25, chances, size=4000)
    intervals = [mean_interval(np.repeat(values, draw)) for draw in draws]
    truth = values @ chances
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.95
    for constant in ([0.9] * 12, [1.0] * 12, [0.0] * 12):
        low, high = mean_interval(constant)
        assert low < high and low <= constant[0] <= high


def test_interval_on_another_scale():
    items = [30.0, 90.0, 60.0, 30.0, 100.0] * 40
    low, high = mean_interval(items)
    half = 1.96 * np.std(items) / 200**0.5
    assert (low, high) == pytest.approx((np.mean(items) - half, np.mean(items) + half), abs=1)
    assert mean_interval([30.0] * 12) is None


def yes_no(true_yes, false_yes, false_no, true_no, unread=()):
    cells = [("yes", "yes")] * true_yes + [("yes", "no")] * false_yes + [("no", "yes")] * false_no
    cells += [("no", "no")] * true_no + [("a picture", truth) for truth in unread]
    return YesNo.of([said for said, _ in cells], [truth for _, truth in cells])


def test_yes_and_no_by_hand():
    answers = yes_no(3, 1, 2, 4, unread=("yes", "no"))
    assert (answers.precision, answers.recall, answers.accuracy) == pytest.approx((3 / 4, 3 / 5, 7 / 12))
    assert (answers.said_yes, answers.unread) == pytest.approx((4 / 12, 2 / 12))
    assert answers.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert yes_no(0, 0, 0, 0, unread=("yes",) * 3)[:2] == (3, 0)


@pytest.mark.parametrize("n, chances", [(60, (0.3, 0.1, 0.2, 0.4)), (200, (0.47, 0.02, 0.03, 0.48))])
def test_interval_of_f1_covers_as_often_as_it_says(n, chances):
    truth = 2 * chances[0] / (2 * chances[0] + chances[1] + chances[2])
    draws = np.random.default_rng(0).multinomial(n, chances, size=4000)
    intervals = [YesNo(n, *map(int, draw), 0).f1_interval() for draw in draws]
    assert 0.935 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.97


def test_interval_of_f1_at_its_ends():
    # 6 of 6: Wilson's lower limit is 1 / (1 + z^2 / 6), and F1 = 2p / (1 + p).
    share = 1 / (1 + 1.959964**2 / 6)
    assert yes_no(6, 0, 0, 6).f1_interval() == pytest.approx((2 * share / (1 + share), 1.0))
    low, high = yes_no(0, 0, 6, 6).f1_interval()
    assert low == 0 and high == pytest.approx(2 * (1 - share) / (2 - share))
    # Captions in place of yes and no: what should have been yes is missed six times.
    assert yes_no(0, 0, 0, 0, unread=("yes",) * 6 + ("no",) * 3).f1_interval() == pytest.approx((low, high))
    assert yes_no(0, 0, 0, 5).f1_interval() == (0, 1)  # nothing that F1 counts


def test_mcnemar_is_exact():
    first = [1, 1, 1, 0, 0] + [1] + [0] * 9
    second = [1, 1, 1, 0, 0] + [0] + [1] * 9
    test = paired_test(first, second)
    assert test.p_value == pytest.approx(2 * binom.cdf(1, 10, 0.5)) == pytest.approx(22 / 1024)
    assert test.difference == pytest.approx(8 / 15) and (test.first_better, test.second_better) == (1, 9)
    assert paired_test(first, first).p_value == 1.0


def test_paired_permutations_of_fractions():
    # Of the 2^4 ways to swap the two, only the given one and its opposite are as far apart.
    test = paired_test([0.0, 0.1, 0.2, 0.3], [0.9, 0.8, 0.7, 0.6])
    assert test.method == "paired permutations"
    assert test.p_value == pytest.approx(2 / 16)


def pairs(gained, lost, n):
    """Right answers of two models, of which the second gains some and loses some."""
    return [0] * gained + [1] * lost + [0] * (n - gained - lost), [1] * gained + [0] * (n - gained)


def test_interval_of_a_difference_is_the_published_one():
    """Tango's of children's airways before and after a transplantation (Fagerland, Lydersen and Laake 2014)."""
    low, high = paired_interval(*pairs(1, 7, 21))
    assert (low, high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert paired_interval(*pairs(7, 1, 21)) == pytest.approx((-high, -low))


@pytest.mark.parametrize("n", [1, 12, 400])
def test_interval_of_a_difference_at_its_ends(n):
    """Solved by hand: the likeliest shares are then one of nothing, or both of a line."""
    z2 = 1.959964**2
    assert paired_interval(*pairs(0, 0, n)) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))
    assert paired_interval(*pairs(n, 0, n)) == pytest.approx(((n - z2) / (n + z2), 1.0))
    assert paired_interval(*pairs(0, n, n)) == pytest.approx((-1.0, (z2 - n) / (n + z2)))


@pytest.mark.parametrize("n, chances", [(40, (0.15, 0.05, 0.8)), (200, (0.02, 0.01, 0.97)), (100, (0.3, 0.3, 0.4))])
def test_interval_of_a_difference_covers_as_often_as_it_says(n, chances):
    draws = np.random.default_rng(0).multinomial(n, chances, size=1000)
    intervals = [paired_interval(*pairs(gained, lost, n)) for gained, lost, _ in draws]
    assert 0.93 <= np.mean([low <= chances[0] - chances[1] <= high for low, high in intervals]) <= 0.975


def test_interval_of_a_difference_of_fractions():
    """Wider than that of whole documents would be is allowed, narrower is not; nothing is known of other scales."""
    values, chances = np.array([-1.0, -0.3, 0.0, 0.3, 0.6, 1.0]), np.array([0.02, 0.1, 0.6, 0.1, 0.1, 0.08])
    draws = np.random.default_rng(0).multinomial(60, chances, size=1000)
    intervals = []
    for draw in draws:
        differences = np.repeat(values, draw)
        intervals.append(paired_interval((-differences).clip(0), differences.clip(0)))
    assert np.mean([low <= values @ chances <= high for low, high in intervals]) >= 0.95
    low, high = paired_interval([0.0] * 12, [0.3] * 12)  # resampling would see no spread
    assert low < 0.3 < high
    items = np.array([30.0, 90.0, 60.0, 30.0, 100.0] * 40)
    low, high = paired_interval(np.zeros(200), items)
    half = 1.96 * items.std() / 200**0.5
    assert (low, high) == pytest.approx((items.mean() - half, items.mean() + half), abs=1)
    assert paired_interval(items, items + 5) is None


@pytest.fixture(scope="module")
def manager():
    """lmms-eval's own; it parses thousands of files."""
    return TaskManager(include_path=str(EVAL_FOLDER))


@pytest.mark.parametrize("name, folder", [("pope_paper", "POPE"), ("textvqa_paper", "textvqa")])
def test_lmms_eval_loads_the_variants_itself(name, folder, benchmarks, manager):
    changed = {"task": name, "dataset_path": str(benchmarks / folder), "dataset_kwargs": None}
    task = manager.load_config(changed)[name]
    ours = load_tasks([name], str(benchmarks))[name].task
    assert task.doc_to_text(task.eval_docs[0]) == ours.doc_to_text(ours.eval_docs[0])
    assert set(task.aggregation()) == set(ours.aggregation())
