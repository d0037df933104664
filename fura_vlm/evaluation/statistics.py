"""Intervals and paired tests. The statistics are scipy's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
RESAMPLES = 1000
SEED = 0


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson(right: float, n: int) -> Interval:
    """Wilson's score interval of a share (E. B. Wilson 1927); everything from 0 to 1 where ``n`` is 0.

    It says something at the ends too: of 12 right answers of 12, the share may still be 75.8 %.

    Args:
        right: their number, from 0 to ``n``; a sum of fractions will do.
        n: of how many.
    """
    if not n:
        return Interval(0.0, 1.0)
    z2 = stats.norm.ppf((1 + CONFIDENCE) / 2) ** 2
    share = right / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends one limit is the share itself, but for the rounding.
    return Interval(min(max(float(middle - half), 0.0), share), max(min(float(middle + half), 1.0), share))


def mean_interval(scores: Sequence[float]) -> Interval | None:
    """The interval of a mean over documents.

    Scores between 0 and 1 get Wilson's interval of their sum, fractions such as TextVQA's as well: no such scores vary
    more than zeros and ones of the same mean do (Bhatia and Davis 2000), so theirs is if anything too wide. Scores on
    another scale get the percentile bootstrap, or ``None`` where all are the same and nothing is known of their range.
    """
    values = np.asarray(scores, dtype=float)
    if ((values >= 0) & (values <= 1)).all():
        return wilson(float(values.sum()), len(values))
    return _bootstrap(values)


def _bootstrap(values: np.ndarray) -> Interval | None:
    """The percentile bootstrap of a mean; ``None`` where all values are the same."""
    if np.ptp(values) == 0:
        return None
    result = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=RESAMPLES, batch=64, rng=np.random.default_rng(SEED)
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """The interval of a difference of means, second - first, of two models on the same documents in the same order.

    Tango's score interval for paired shares (T. Tango 1998, Statistics in Medicine 17, 891), which says something at
    the ends too: where two models never differ on 12 documents, the difference may still be 24 % either way. It takes
    the documents that only the one and only the other answers right. Fractions count as parts of documents: their
    differences vary no more than those of zeros and ones with the same gains and losses do, so that the interval is if
    anything too wide. Scores on another scale get the percentile bootstrap of the differences, or ``None`` where all
    of these are the same.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    differences = b - a
    if (np.concatenate([a, b]) >= 0).all() and (np.concatenate([a, b]) <= 1).all():
        gained, lost = float(differences.clip(min=0).sum()), float(-differences.clip(max=0).sum())
        low, high = _least_difference(gained, lost, len(a)), -_least_difference(lost, gained, len(a))
        return Interval(min(low, float(differences.mean())), max(high, float(differences.mean())))
    return _bootstrap(differences)


def _least_difference(gained: float, lost: float, n: int) -> float:
    """The lower limit of (gained - lost) / n: the least difference that the score test does not refuse."""
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)

    def too_small(difference: float) -> float:
        """Above 0 where the test refuses this difference. ``share`` is the likeliest share of what is lost there."""
        linear = -gained - lost + (2 * n - gained + lost) * difference
        root = np.sqrt(max(linear**2 + 8 * n * lost * difference * (1 - difference), 0.0))
        share = (root - linear) / (4 * n)
        variance = max(n * (2 * share + difference * (1 - difference)), 0.0)
        return gained - lost - n * difference - z * np.sqrt(variance)

    upper = (gained - lost) / n - 1e-9  # where the difference is 1, the test refuses nothing
    if upper <= -1:
        return -1.0
    return float(optimize.brentq(too_small, -1.0, upper))


class YesNo(NamedTuple):
    """How questions were answered that ask for yes or no, by counts of answers.

    Answers that say neither are in ``n`` alone, but for those to questions whose answer is yes: they are in
    ``unread_yes``.
    """

    n: int
    true_yes: int
    false_yes: int
    false_no: int
    true_no: int
    unread_yes: int

    @classmethod
    def of(cls, predictions: Sequence[str], truths: Sequence[str]) -> YesNo:
        """Counts answers; those that are neither ``"yes"`` nor ``"no"`` are unread."""
        said = Counter(zip(predictions, truths, strict=True))
        true_yes, false_yes, false_no = said["yes", "yes"], said["yes", "no"], said["no", "yes"]
        unread_yes = Counter(truths)["yes"] - true_yes - false_no
        return cls(len(truths), true_yes, false_yes, false_no, said["no", "no"], unread_yes)

    @property
    def precision(self) -> float:
        """Share of the answers yes that are right, 0 where there are none, as lmms-eval has it."""
        return _share(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        """Share of the questions to be answered yes that are, among those answered yes or no, as lmms-eval has it."""
        return _share(self.true_yes, self.true_yes + self.false_no)

    @property
    def f1(self) -> float:
        """Their harmonic mean."""
        return _share(2 * self.true_yes, 2 * self.true_yes + self.false_yes + self.false_no)

    @property
    def accuracy(self) -> float:
        """Share of all questions that are answered right."""
        return _share(self.true_yes + self.true_no, self.n)

    @property
    def said_yes(self) -> float:
        """Share of all questions that are answered yes. The labels have no part in it."""
        return _share(self.true_yes + self.false_yes, self.n)

    @property
    def unread(self) -> float:
        """Share of the answers that say neither yes nor no."""
        return 1 - _share(self.true_yes + self.false_yes + self.false_no + self.true_no, self.n)

    def f1_interval(self) -> Interval:
        """The interval of F1.

        F1 is 2p / (1 + p), where p = true yes / (true yes + false yes + false no) is a share (F*, in Hand, Christen and
        Kirielle 2021). As that grows with p, Wilson's limits of p give those of F1 (the "Wilson indirect" interval of
        Lam, Gopal and Qian 2023, arXiv 2309.14621). Where no answer counts towards F1, the unread ones to questions
        whose answer is yes do: each is a yes that was missed.
        """
        counted = self.true_yes + self.false_yes + self.false_no
        low, high = wilson(self.true_yes, counted or self.unread_yes)
        return Interval(2 * low / (1 + low), 2 * high / (1 + high))


def mean_of_intervals(intervals: Sequence[Interval]) -> Interval:
    """The interval of a mean of scores over related questions: the mean of the lower and that of the upper limits.

    It is right where the scores rise and fall together, and too wide otherwise. POPE's three kinds of question are
    about the same pictures, and their questions to be answered yes are the same.
    """
    return Interval(float(np.mean([each.low for each in intervals])), float(np.mean([each.high for each in intervals])))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


class PairedTest(NamedTuple):
    """Two models on the same documents; the scores are means over documents, ``difference`` is second - first.

    ``first_better`` and ``second_better`` count the documents on which one of them has the higher score.
    """

    n: int
    first: float
    second: float
    difference: float
    first_better: int
    second_better: int
    p_value: float
    method: str


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Whether two models differ, by their scores on the same documents in the same order.

    Zeros and ones get McNemar's exact test (the documents that only one of them answers right, against a fair
    coin); fractions, such as TextVQA's, the permutation test that swaps the models document by document.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    first_better, second_better = int(np.sum(a > b)), int(np.sum(b > a))
    differing = first_better + second_better
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        p_value = stats.binomtest(second_better, differing).pvalue if differing else 1.0
        method = "McNemar, exact"
    elif not differing:
        p_value, method = 1.0, "paired permutations"
    else:
        test = stats.permutation_test(
            (b, a),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            batch=256,
            rng=np.random.default_rng(SEED),
        )
        p_value, method = test.pvalue, "paired permutations"
    means = float(a.mean()), float(b.mean())
    return PairedTest(
        len(a), *means, float(b.mean() - a.mean()), first_better, second_better, float(p_value), method
    )  # fmt: skip
