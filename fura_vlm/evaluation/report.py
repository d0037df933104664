"""What an evaluation leaves for people: a Markdown table and a page with bars and samples."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from jinja2 import Environment, PackageLoader
from rich import box
from rich.console import Console
from rich.table import Table

from fura_vlm.evaluation.tasks import TASKS
from fura_vlm.files import write_text

__all__ = ["PUBLISHED", "markdown", "page", "read_samples", "show", "write_samples"]

BENCHMARKS = ("gqa", "scienceqa", "textvqa", "pope")
"""What the published scores are of, in the order of ``TASKS``."""

PUBLISHED = {
    "full fine-tuning": {
        "scores": {"gqa": 62.0, "scienceqa": 66.8, "textvqa": 58.2, "pope": 85.9},
        "source": "LLaVA-1.5, arXiv 2310.03744",
    },
    "LoRA": {
        "scores": {"gqa": 62.9, "scienceqa": 68.4, "textvqa": 58.2, "pope": 86.4},
        "source": "DoRA, arXiv 2402.09353",
    },
    "DoRA": {
        "scores": {"gqa": 62.9, "scienceqa": 69.9, "textvqa": 57.0, "pope": 87.2},
        "source": "DoRA, arXiv 2402.09353",
    },
}
"""Published results of LLaVA-1.5-7B on the real benchmarks, in percent, in the paper's protocol."""

SAMPLES = 4  # right ones, and wrong ones, of each task on the page
THUMBNAIL = 224


def markdown(results: dict) -> str:
    """The table of an evaluation: one row a task and their average, in percent.

    Args:
        results: what ``results.json`` holds.
    """
    head, rows = _table(results)
    lines = [f"# {results['model']}", "", _row(head), _row(["---", *["---:"] * (len(head) - 1)]), *map(_row, rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results))]) + "\n"


def show(results: dict, console: Console) -> None:
    """The same on a terminal, where the names of the tasks stay whole."""
    head, rows = _table(results)
    table = Table(title=results["model"], box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(head):
        longest = max(len(word) for word in name.split())
        table.add_column(name, justify="right" if number else "left", no_wrap=not number, min_width=longest)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes(results):
        console.print(f"- {note}", highlight=False)


def _table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Its head and its rows."""
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
        each = (results["scores"][name][task] for name in names)
        ours = [f"{100 * s['score']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})" for s in each]
        theirs = (method["scores"].get(_benchmark(task)) for method in published.values())
        rows.append([task, n, *ours, *(f"{figure:.1f}" if figure else "" for figure in theirs)])
    means = [f"{100 * results['average'][name]:.1f}" for name in names]
    if sorted(map(str, map(_benchmark, tasks))) == sorted(BENCHMARKS):
        means += [f"{mean(method['scores'].values()):.1f}" for method in published.values()]
    else:
        means += [""] * len(published)
    return head, [*rows, ["average", "", *means]]


def notes(results: dict) -> list[str]:
    """What the figures stand on, a sentence or two each."""
    scores = next(iter(results["scores"].values()))
    metrics = ", ".join(f"{task} {score['metric']}" for task, score in scores.items())
    sources = sorted({method["source"] for method in results["published"].values()})
    lines = [
        f"Tasks: {results['protocol']}. Data: {results['data']}. Metrics: {metrics}.",
        f"Published: LLaVA-1.5-7B on the real benchmarks in the paper's protocol ({'; '.join(sources)}).",
    ]
    if results["protocol"] != "paper":
        lines.append(
            "lmms-eval's tasks differ from that protocol in TextVQA (no OCR tokens), in POPE (one F1 over all "
            "questions) and in how sentences are read: --protocol paper follows it."
        )
    if results["limit"]:
        lines.append(f"Only the first {results['limit']} documents of each task.")
    for task, score in scores.items():
        if score["unreadable"]:
            listed = ", ".join(str(each["document"]) for each in score["unreadable"][:10])
            more = ", ..." if len(score["unreadable"]) > 10 else ""
            lines.append(
                f"{task}: {len(score['unreadable'])} of {score['total']} documents are left out, for their pictures do "
                f"not decode (documents {listed}{more}; reasons in results.json)."
            )
    return lines


def page(results: dict, samples: dict[str, list], tasks: dict) -> str:
    """The page, HTML with everything in it: bars, the table, samples right and wrong with their pictures.

    Args:
        results: what ``results.json`` holds.
        samples: the scored answers of each model.
        tasks: the loaded tasks, for the pictures.
    """
    names = list(results["scores"])
    bars = []
    for task, score in results["scores"][names[0]].items():
        rows = [(name, "base" if name == "base" else "ours", results["scores"][name][task]) for name in reversed(names)]
        published = {name: each["scores"].get(_benchmark(task)) for name, each in results["published"].items()}
        bars.append({
            "task": task, "metric": score["metric"], "rows": rows,
            "published": {name: figure for name, figure in published.items() if figure},
        })  # fmt: skip
    main = names[0]
    others = {(row.task, row.document): row.predicted for row in samples.get("base", []) if main != "base"}
    groups = []
    for task, loaded in tasks.items():
        rows = [row for row in samples[main] if row.task == task]
        groups.append({
            "task": task,
            "right": [_card(row, loaded, others) for row in rows if row.score >= 0.5][:SAMPLES],
            "wrong": [_card(row, loaded, others) for row in rows if row.score < 0.5][:SAMPLES],
        })  # fmt: skip
    environment = Environment(loader=PackageLoader("fura_vlm", "evaluation"), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.jinja").render(
        results=results, bars=bars, groups=groups, notes=notes(results)
    )


def write_samples(path: Path, samples: list) -> None:
    """Writes scored answers as JSONL, under a temporary name first."""
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def read_samples(path: Path) -> list[dict]:
    """What :func:`write_samples` wrote, as dictionaries."""
    with path.open(encoding="utf-8") as file:  # splitlines() would also cut at a U+2028 in an answer
        return [json.loads(line) for line in file]


def _benchmark(task: str) -> str | None:
    return next((BENCHMARKS[names.index(task)] for names in TASKS.values() if task in names), None)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _card(sample, loaded, others: dict) -> dict:
    pictures = loaded.task.doc_to_visual(loaded.document(sample.document)) or []
    return {
        "question": sample.question,
        "expected": sample.expected,
        "predicted": sample.predicted,
        "base": others.get((sample.task, sample.document)),
        "pictures": [_data_url(picture) for picture in pictures],
    }


def _data_url(picture) -> str:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
