"""Intervals and paired tests. The statistics are scipy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 1000
SEED = 0


def confidence_interval(items: Sequence, score: Callable[[list], float]) -> tuple[float, float]:
    """95 % interval of a score over documents.

    The mean of zeros and ones gets Wilson's interval; anything else the percentile bootstrap over documents.

    Args:
        items: what the metric keeps of each document, a number or a row of its own.
        score: the metric's aggregation.
    """
    if all(isinstance(item, (int, float, np.number)) and item in (0, 1) for item in items):
        interval = stats.binomtest(int(sum(items)), len(items)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    if len(items) < 2:
        return 0.0, 1.0
    result = stats.bootstrap(
        (np.arange(len(items)),),
        lambda chosen: float(score([items[number] for number in chosen])),
        vectorized=False,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(SEED),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


class PairedTest(NamedTuple):
    """Two models on the same documents; the scores are means over documents, ``difference`` is second - first."""

    n: int
    first: float
    second: float
    difference: float
    p_value: float
    method: str


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Whether two models differ, by their scores on the same documents in the same order.

    Zeros and ones get McNemar's exact test (the documents that only one of them answers right, against a fair
    coin); fractions, such as TextVQA's, the permutation test that swaps the models document by document.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        only_first, only_second = int(np.sum(a > b)), int(np.sum(b > a))
        discordant = only_first + only_second
        p_value = stats.binomtest(only_second, discordant).pvalue if discordant else 1.0
        method = "McNemar, exact"
    elif np.array_equal(a, b):
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
    return PairedTest(len(a), a.mean(), b.mean(), b.mean() - a.mean(), float(p_value), method)
