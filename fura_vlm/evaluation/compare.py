"""Two evaluated models against each other, document by document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import CompareConfig
from fura_vlm.files import write_text


class CompareError(FuraVLMError):
    """Results that are missing or have no document in common."""


Document = tuple[str, str, str, int]
"""What tells a document from the others of its task: question, expected answer, hash of the picture, and which one it
is of those that are alike in these."""


def compare(config: CompareConfig) -> str:
    """Prints the table, writes it where ``config`` says, and returns it.

    The documents that both have are compared; what only one has is said. POPE's documents count as right or wrong here,
    so its figures are accuracies, whatever its metric.

    Raises:
        CompareError: if a folder holds no results, or the two have no documents in common.
    """
    from fura_vlm.evaluation.statistics import paired_test

    first, second = _read(config.first), _read(config.second)
    rows, said = [], []
    for task in [*first, *(task for task in second if task not in first)]:
        a, b = first.get(task), second.get(task)
        if a is None or b is None:
            said.append(f"{task}: only {'B' if a is None else 'A'} was asked it; it is left out.")
            continue
        common = [document for document in a if document in b]
        if len(common) < max(len(a), len(b)):
            compared = f"the {len(common)} that both have are compared" if common else "none in common; it is left out"
            said.append(f"{task}: the documents differ, {len(a)} in A and {len(b)} in B: {compared}.")
        if common:
            test = paired_test([a[document] for document in common], [b[document] for document in common])
            rows.append(
                f"| {task} | {test.n} | {100 * test.first:.1f} | {100 * test.second:.1f} "
                f"| {100 * test.difference:+.1f} | {test.first_better} | {test.second_better} | {test.p_value:.2g} "
                f"| {test.method} |"
            )
    if not rows:
        raise CompareError(
            f"{config.first} and {config.second} have no documents in common (A was asked {', '.join(first)}; "
            f"B {', '.join(second)}): evaluate both on the same tasks and data"
        )
    if any(row.startswith("| pope") for row in rows):
        said.append("POPE's answers count as right or wrong here: these are accuracies, where its score is an F1.")
    head = [
        f"A: {config.first}  \nB: {config.second}",
        "",
        "| task | n | A, % | B, % | B - A | A better | B better | p | test |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    table = "\n".join([*head, *rows, *([""] if said else []), *(f"- {each}" for each in said)]) + "\n"
    Console().print(Markdown(table))
    if config.output_path:
        write_text(config.output_path, table)
    return table


def _read(path: str) -> dict[str, dict[Document, float]]:
    """Scores by task and document."""
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
    by_task: dict[str, dict[Document, float]] = {}
    alike: Counter = Counter()
    try:
        names = list(json.loads((folder / "results.json").read_text("utf-8"))["scores"])
        for row in read_samples(folder / f"samples-{names[0]}.jsonl"):
            task, content = row["task"], (row["question"], row["expected"], row["picture"])
            by_task.setdefault(task, {})[(*content, alike[task, content])] = row["score"]
            alike[task, content] += 1
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CompareError(f"{folder} holds no whole results ({error!r}): evaluate again with fura-vlm eval") from error
    return by_task
