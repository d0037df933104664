"""What an evaluation writes for people: Markdown tables, and a page with charts and samples to search."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader
from rich.console import Console

from fura_vlm.files import write_text
from fura_vlm.tables import Table

__all__ = ["markdown", "page", "read_samples", "show", "write_samples"]

SAMPLES = 2000  # of each task on the page; all are in the JSONL files
PICTURED = 20  # of each task and outcome that are shown with their pictures
RIGHT = 0.5  # a score from which an answer counts as right here
THUMBNAIL = 224


def markdown(results: dict) -> str:
    """The tables of an evaluation: one row a task and their average, in percent, and tuned against base.

    Args:
        results: what ``results.json`` holds.
    """
    lines = [f"# {results['model']}", "", f"{results['date']}: `{results['command']}`", ""]
    for title, head, rows in _tables(results):
        lines += [*([f"## {title}", ""] if title else []), Table(head, rows).markdown(), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(results))]) + "\n"


def show(results: dict, console: Console) -> None:
    """The same on a terminal."""
    for title, head, rows in _tables(results):
        console.print(Table(head, rows).drawn(title or results["model"]))
    for note in notes(results):
        console.print(f"- {note}", highlight=False)


def _tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of the scores, of POPE's answers, and of tuned against base."""
    tables = [("", *_scores(results))]
    answers = _yes_no(results)
    if answers:
        head = ["task", "model", "precision", "recall", "accuracy", "says yes", "says neither"]
        tables.append(("POPE's answers, %", head, answers))
    if results["paired"]:
        head = ["task", "tuned, %", "base, %", "difference", "tuned better", "base better", "p"]
        tables.append(("Tuned against base, document by document", head, _paired(results)))
    return tables


def _scores(results: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of scores."""
    names, published = list(results["scores"]), results["published"]
    head = [
        "task",
        "n",
        *(f"{name}, % (95 % interval)" for name in names),
        *(f"published: {name}" for name in published),
    ]
    rows, tasks = [], results["scores"][names[0]]
    for task, score in tasks.items():
        n = str(score["n"]) if score["n"] == score["total"] else f"{score['n']} of {score['total']}"
        ours = [_with_interval(results["scores"][name][task]) for name in names]
        theirs = (method["scores"].get(task) for method in published.values())
        rows.append([task, n, *ours, *(f"{figure:.1f}" if figure else "" for figure in theirs)])
    means = [_percent(results["average"][name]) for name in names]
    means += ["" if method["average"] is None else f"{method['average']:.1f}" for method in published.values()]
    return head, [*rows, ["average", "", *means]]


def _yes_no(results: dict) -> list[list[str]]:
    """Of each model in the tasks that ask for yes or no."""
    return [
        [task, name, *(_percent(share) for share in score["yes_no"].values())]
        for name, scores in results["scores"].items()
        for task, score in scores.items()
        if score["yes_no"]
    ]


def _paired(results: dict) -> list[list[str]]:
    return [
        [
            task, _percent(test["second"]), _percent(test["first"]), f"{100 * test['difference']:+.1f}",
            str(test["second_better"]), str(test["first_better"]), f"{test['p_value']:.2g}",
        ]
        for task, test in results["paired"].items()
    ]  # fmt: skip


def _types(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table for each way in which a task tells its questions apart: one row a type, the models side by side."""
    names, tables = list(results["scores"]), []
    for task, score in results["scores"][names[0]].items():
        for way, groups in score["by_type"].items():
            shares = ["precision", "recall", "says yes"] if score["yes_no"] else []
            head = [way, "n", *(f"{name}, % (95 % interval)" for name in names)]
            head += [f"{name}: {share}" for name in names for share in shares]
            rows = []
            for value, figures in groups.items():
                each = [results["scores"][name][task]["by_type"][way][value] for name in names]
                row = [value, str(figures["n"]), *map(_with_interval, each)]
                keys = ("precision", "recall", "said_yes") if shares else ()
                rows.append(row + [_percent(figures["yes_no"][key]) for figures in each for key in keys])
            tables.append((f"{task} by {way}", head, rows))
    return tables


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _with_interval(figures: dict) -> str:
    if figures["low"] is None:
        return _percent(figures["score"])
    return f"{_percent(figures['score'])} ({_percent(figures['low'])} to {_percent(figures['high'])})"


def notes(results: dict) -> list[str]:
    """Notes on how the figures were computed, a sentence or two each."""
    scores = next(iter(results["scores"].values()))
    metrics = ", ".join(f"{task} {score['metric']}" for task, score in scores.items())
    sources = sorted({method["source"] for method in results["published"].values()})
    lines = [
        f"Tasks: {results['protocol']}. Data: {results['data']}. Metrics: {metrics}.",
        "Intervals: Wilson's, with documents taken as independent.",
        *results["notes"],
    ]
    if results["paired"]:
        lines.append(
            "Tuned against base: p is the chance of a difference at least this large if the two were equal (McNemar's "
            "exact test for answers that are right or wrong, permutations for fractions)."
        )
    if results["published"]:
        lines.append(f"Sources of what is published: {'; '.join(sources)}.")
    if results["limit"]:
        lines.append(f"Only the first {results['limit']} documents of each task.")
    for task, score in scores.items():
        if score["unreadable"]:
            listed = ", ".join(str(each["document"]) for each in score["unreadable"][:10])
            more = ", ..." if len(score["unreadable"]) > 10 else ""
            lines.append(
                f"{task}: {len(score['unreadable'])} of {score['total']} documents are left out, because their "
                f"pictures do not decode (documents {listed}{more}; reasons in results.json)."
            )
    return lines


def page(results: dict, samples: dict[str, list], pictures_of: Callable[[str, int], list]) -> str:
    """The page, HTML with everything in it: charts, tables, and samples with their pictures to search and filter.

    Args:
        results: what ``results.json`` holds.
        samples: the scored answers of each model.
        pictures_of: gives the pictures of a task's document.
    """
    names = list(results["scores"])
    charts = []
    for task, score in results["scores"][names[0]].items():
        published = {name: each["scores"].get(task) for name, each in results["published"].items()}
        charts.append({
            "task": task, "metric": score["metric"],
            "rows": [(name, results["scores"][name][task]) for name in reversed(names)],
            "published": {name: figure for name, figure in published.items() if figure},
        })  # fmt: skip
    environment = Environment(
        loader=PackageLoader("fura_vlm", "evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        results=results,
        charts=charts,
        tables=_tables(results),
        types=_types(results),
        notes=notes(results),
        shown=_shown(samples, pictures_of),
    )


def _shown(samples: dict[str, list], pictures_of: Callable[[str, int], list]) -> dict:
    """The samples of the page as JSON has them: first those that only one of two models answers right, task by turns.

    Pictures stand once each in ``pictures``; samples have their places. A full set has too many for one page: the first
    of each task and outcome have theirs.
    """
    names = list(samples)
    tasks = list(dict.fromkeys(row.task for row in next(iter(samples.values()))))
    groups: dict[tuple[int, int, str], list] = {}
    for rows in zip(*samples.values(), strict=True):
        right = [row.score >= RIGHT for row in rows]
        outcome = (
            " and ".join(name for name, each in zip(names, right, strict=True) if each) or "none"
        )  # fmt: skip
        # 0: only one is right; 1: all are wrong; 2: all are right.
        rank = 0 if len(set(right)) > 1 else 1 + right[0]
        groups.setdefault((rank, tasks.index(rows[0].task), outcome), []).append(rows)
    pictures: dict[str, int] = {}
    ordered, per_task, cards = [], Counter(), []
    for (rank, task, outcome), group in groups.items():
        ordered += [(rank, turn, task, outcome, rows) for turn, rows in enumerate(group)]
    for _, turn, _, outcome, rows in sorted(ordered, key=lambda each: each[:4]):
        one = rows[0]
        per_task[one.task] += 1
        if per_task[one.task] > SAMPLES:
            continue
        places = []
        if turn < PICTURED:
            for picture in pictures_of(one.task, one.document):
                places.append(pictures.setdefault(_data_url(picture), len(pictures)))
        cards.append({
            "task": one.task, "document": one.document, "question": one.question, "expected": one.expected,
            "answers": [row.predicted for row in rows], "scores": [round(row.score, 3) for row in rows],
            "outcome": outcome, "types": list(one.types.values()), "pictures": places,
        })  # fmt: skip
    return {
        "models": names, "samples": cards, "pictures": list(pictures), "right": RIGHT, "total": per_task.total(),
    }  # fmt: skip


def write_samples(path: Path, samples: list) -> None:
    """Writes scored answers as JSONL, under a temporary name first."""
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def read_samples(path: Path) -> list[dict]:
    """What :func:`write_samples` wrote, as dictionaries."""
    with path.open(encoding="utf-8") as file:  # splitlines() would also cut at a U+2028 in an answer
        return [json.loads(line) for line in file]


def _data_url(picture) -> str:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
