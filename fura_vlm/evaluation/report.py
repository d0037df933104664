"""What an evaluation leaves for people: a Markdown table and a page with bars and samples."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader

from fura_vlm.training.report import write_text

__all__ = ["PUBLISHED", "markdown", "page", "read_samples", "write_samples", "write_text"]

BENCHMARKS = {"gqa": "GQA", "scienceqa": "ScienceQA-IMG", "textvqa": "TextVQA", "pope": "POPE"}
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
    names = list(results["scores"])
    published = results["published"]
    head = ["task", "n", "metric"]
    for name in names:
        head += [f"{name}, %", "95 % interval"]
    head += [f"7B {name} (published)" for name in published]
    lines = [f"# {results['model']}", "", _row(head), _row(["---", "---:", "---"] + ["---:"] * (len(head) - 3))]
    first = results["scores"][names[0]]
    for task, score in first.items():
        n = str(score["n"]) if score["n"] == score["total"] else f"{score['n']} of {score['total']}"
        row = [task, n, score["metric"]]
        for name in names:
            each = results["scores"][name][task]
            row += [f"{100 * each['score']:.1f}", f"{100 * each['low']:.1f} to {100 * each['high']:.1f}"]
        figures = [each["scores"].get(_benchmark(task)) for each in published.values()]
        lines.append(_row(row + [f"{figure:.1f}" if figure else "" for figure in figures]))
    row = ["average", "", ""]
    for name in names:
        row += [f"{100 * results['average'][name]:.1f}", ""]
    complete = sorted(filter(None, map(_benchmark, first))) == sorted(BENCHMARKS) and len(first) == len(BENCHMARKS)
    means = [f"{sum(e['scores'].values()) / len(e['scores']):.1f}" if complete else "" for e in published.values()]
    lines += [_row(row + means), "", *notes(results)]
    return "\n".join(lines) + "\n"


def notes(results: dict) -> list[str]:
    """What the figures stand on, a sentence a line."""
    lines = [f"Tasks: {results['protocol']}. Data: {results['data']}."]
    sources = {each["source"] for each in results["published"].values()}
    lines.append(
        f"Published figures: LLaVA-1.5-7B on the real benchmarks, in the paper's protocol ({'; '.join(sorted(sources))})."
    )
    if results["protocol"] != "paper":
        lines.append(
            "lmms-eval's tasks differ from that protocol in TextVQA (no OCR tokens), POPE (one F1 over all questions) and "
            "in how sentences are read: --protocol paper follows it."
        )
    if results["limit"]:
        lines.append(f"Only the first {results['limit']} documents of each task.")
    for task, score in next(iter(results["scores"].values())).items():
        if score["unreadable"]:
            listed = ", ".join(str(each["document"]) for each in score["unreadable"][:10])
            lines.append(
                f"{task}: {len(score['unreadable'])} of {score['total']} documents are left out, their pictures do not "
                f"decode (documents {listed}{', ...' if len(score['unreadable']) > 10 else ''}; reasons in results.json)."
            )
    return [f"- {line}" for line in lines]


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
        results=results, bars=bars, groups=groups, notes=[line.removeprefix("- ") for line in notes(results)]
    )


def write_samples(path: Path, samples: list) -> None:
    """Writes scored answers as JSONL, under a temporary name first."""
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def read_samples(path: Path) -> list[dict]:
    """What :func:`write_samples` wrote, as dictionaries."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _benchmark(task: str) -> str | None:
    return next((key for key in BENCHMARKS if task.startswith(key)), None)


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
