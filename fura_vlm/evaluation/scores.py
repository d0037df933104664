"""Scored answers: what one model reached in a task, by type of question, and against another model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fura_vlm.evaluation.statistics import (
    Interval,
    PairedTest,
    YesNo,
    mean_interval,
    mean_of_intervals,
    paired_test,
)

if TYPE_CHECKING:  # lmms-eval takes seconds to import, and not all suites need it
    from fura_vlm.evaluation.tasks import LoadedTask


@dataclass
class Sample:
    """One scored answer.

    Args:
        task: its name.
        document: its number in the task, among the documents whose pictures decode.
        question: the prompt, without the conversation around it.
        expected: the commonest of the right answers.
        predicted: the answer as the metric reads it.
        score: between 0 and 1.
        types: of what type the question is, by the ways the benchmark tells them apart.
        picture: a hash of the picture's file; ``""`` where there is none, or it is not known.
    """

    task: str
    document: int
    question: str
    expected: str
    predicted: str
    score: float
    types: dict[str, str] = field(default_factory=dict)
    picture: str = ""


@dataclass
class Figures:
    """What was reached on some documents.

    Args:
        n: their number.
        score: the task's metric.
        low, high: its 95 % interval; ``None`` where nothing is known of the metric's range.
        yes_no: for POPE ``precision``, ``recall``, ``accuracy``, ``said_yes`` and ``unread``, shares each; the last two
            are of all answers.
    """

    n: int
    score: float
    low: float | None
    high: float | None
    yes_no: dict[str, float] | None


@dataclass
class TaskScore(Figures):
    """What one model reached in one task.

    Args:
        metric: its name.
        total: documents there are; those not in ``n`` have a picture that does not decode.
        metrics: everything that is measured in the task.
        unreadable: the documents that are left out, with the reason.
        by_type: the figures of each type of question, by the ways the benchmark tells them apart.
    """

    metric: str
    total: int
    metrics: dict[str, float]
    unreadable: list[dict]
    by_type: dict[str, dict[str, Figures]]


def score(loaded: LoadedTask, rows: list[dict], metrics: dict[str, float]) -> TaskScore:
    """The score of one model in one task.

    Args:
        loaded: the task.
        rows: what lmms-eval keeps of each document.
        metrics: what it measured on all of them.
    """
    by_type: dict[str, dict[str, list]] = {}
    for row in rows:
        for way, value in loaded.types(row["doc"]).items():
            by_type.setdefault(way, {}).setdefault(value, []).append(row[loaded.metric])
    return TaskScore(
        **vars(_figures(loaded, [row[loaded.metric] for row in rows])),
        metric=loaded.metric,
        total=loaded.total,
        metrics=metrics,
        unreadable=loaded.unreadable,
        by_type={
            way: {value: _figures(loaded, items) for value, items in sorted(groups.items())}
            for way, groups in by_type.items()
        },
    )


def score_of_means(values: list[float], metric: str, metrics: dict[str, float], total: int) -> TaskScore:
    """The score of one model in a task of words whose metric is the mean of ``values``, one for each document.

    Args:
        metrics: everything that was measured.
        total: documents there are.
    """
    low, high = mean_interval(values) or (None, None)
    return TaskScore(len(values), sum(values) / len(values), low, high, None, metric, total, metrics, [], {})


def sample(name: str, loaded: LoadedTask, row: dict) -> Sample:
    """A scored answer from what lmms-eval keeps of a document."""
    answers = row["doc"].get("answers") or [row["target"]]
    item = row[loaded.metric]
    return Sample(
        task=name,
        document=row["doc_id"],
        question=row["arguments"][0],
        expected=max(answers, key=answers.count),
        predicted=row["filtered_resps"][0],
        score=float(item["score"] if isinstance(item, dict) else item),
        types=loaded.types(row["doc"]),
        picture=loaded.pictures[row["doc_id"]] if loaded.pictures else "",
    )


def paired(first: Iterable[Sample], second: Iterable[Sample]) -> dict[str, PairedTest]:
    """The paired test of two models by task; ``first`` and ``second`` are of the same documents in the same order.

    POPE's answers count as right or wrong here, so its figures are accuracies, whatever its metric.
    """
    scores: dict[str, list[tuple[float, float]]] = {}
    for a, b in zip(first, second, strict=True):
        scores.setdefault(a.task, []).append((a.score, b.score))
    return {task: paired_test(*zip(*pairs, strict=True)) for task, pairs in scores.items()}


def _figures(loaded: LoadedTask, items: list) -> Figures:
    """``items`` are what the metric keeps of each document: a number, or for POPE a row."""
    value = float(loaded.task.aggregation()[loaded.metric](items))
    if not isinstance(items[0], dict):
        interval = mean_interval(items)
        return Figures(len(items), value, *(interval or (None, None)), None)
    # lmms-eval's F1 is of all questions; the paper's is the mean of those of the three categories, which its rows name.
    groups: dict[str | None, list[dict]] = {}
    for item in items:
        groups.setdefault(item.get("category"), []).append(item)
    interval: Interval = mean_of_intervals([_yes_no(group).f1_interval() for group in groups.values()])
    counts = _yes_no(items)
    shares = {name: getattr(counts, name) for name in ("precision", "recall", "accuracy", "said_yes", "unread")}
    return Figures(len(items), value, *interval, shares)


def _yes_no(items: list[dict]) -> YesNo:
    return YesNo.of([item["prediction"] for item in items], [item["ground_truth"] for item in items])
