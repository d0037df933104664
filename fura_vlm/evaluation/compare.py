"""Two evaluated models against each other, document by document."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import CompareConfig
from fura_vlm.files import write_text


class CompareError(FuraVLMError):
    """Results that are missing or not of the same questions."""


def compare(config: CompareConfig) -> str:
    """Prints the table, writes it where ``config`` says, and returns it.

    POPE's documents count as right or wrong here, so its figures are accuracies, whatever its metric.

    Raises:
        CompareError: if a folder holds no results, or the two have no task, or other questions, in common.
    """
    from fura_vlm.evaluation.statistics import paired_test

    first, second = _read(config.first), _read(config.second)
    tasks = [task for task in first if task in second]
    if not tasks:
        raise CompareError(f"{config.first} and {config.second} have no task in common: evaluate both on the same")
    lines = [
        f"A: {config.first}  \nB: {config.second}",
        "",
        "| task | n | A, % | B, % | B - A | p | test |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for task in tasks:
        a, b = first[task], second[task]
        common = sorted(a.keys() & b.keys())
        if [a[n]["question"] for n in common] != [b[n]["question"] for n in common] or not common:
            raise CompareError(f"{task}: the two were asked other questions: evaluate both on the same data")
        test = paired_test([a[n]["score"] for n in common], [b[n]["score"] for n in common])
        lines.append(
            f"| {task} | {test.n} | {100 * test.first:.1f} | {100 * test.second:.1f} | {100 * test.difference:+.1f} "
            f"| {test.p_value:.2g} | {test.method} |"
        )
    if any(task.startswith("pope") for task in tasks):
        lines += ["", "POPE's answers count as right or wrong here: these are accuracies, where its score is an F1."]
    table = "\n".join(lines) + "\n"
    Console().print(Markdown(table))
    if config.output_path:
        write_text(config.output_path, table)
    return table


def _read(path: str) -> dict[str, dict[int, dict]]:
    """Samples by task and document."""
    from fura_vlm.evaluation.report import read_samples

    folder = Path(path)
    if not folder.is_dir():
        raise CompareError(f"There is no folder {path}: give two runs, or two folders of results")
    if not (folder / "results.json").is_file():
        inside = sorted(file.parent for file in folder.glob("*/results.json"))
        if len(inside) != 1:
            found = f"several results ({', '.join(str(each) for each in inside)}): name one" if inside else "no results"
            raise CompareError(f"{path} holds {found}; fura-vlm eval writes them")
        folder = inside[0]
    by_task: dict[str, dict[int, dict]] = {}
    try:
        names = list(json.loads((folder / "results.json").read_text())["scores"])
        for row in read_samples(folder / f"samples-{names[0]}.jsonl"):
            by_task.setdefault(row["task"], {})[row["document"]] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{folder} holds no whole results ({error!r}): evaluate again with fura-vlm eval") from error
    return by_task
