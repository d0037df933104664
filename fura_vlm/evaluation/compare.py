"""Two evaluated models against each other, document by document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import CompareConfig
from fura_vlm.files import write_text
from fura_vlm.tables import Table, markdown, show


class CompareError(FuraVLMError):
    """Results that are missing or have no document in common."""


class Document(NamedTuple):
    """What tells a document from the others of its task."""

    question: str
    expected: str
    picture: str
    """A hash of the picture."""
    number: int
    """Which one it is of those that are alike in all of this."""


class Answer(NamedTuple):
    """What a model said, and its score."""

    said: str
    score: float


Answers = dict[str, dict[Document, Answer]]
"""By task and document."""


def compare(config: CompareConfig) -> str:
    """Prints the comparison, writes it where ``config`` says, and returns it as Markdown.

    The documents that both have are compared; what only one has is said. POPE's documents count as right or wrong here,
    so its figures are accuracies, whatever its metric.

    Raises:
        CompareError: if a folder holds no results, or the two have no documents in common.
    """
    from fura_vlm.evaluation.statistics import paired_interval, paired_test

    if config.listed < 0:
        raise CompareError(f"listed is {config.listed}: give 0 or more")
    names, first, second = _both(config)
    rows, said, differing = [], [], []
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
            scores = [a[document].score for document in common], [b[document].score for document in common]
            test, interval = paired_test(*scores), paired_interval(*scores)
            difference = f"{100 * test.difference:+.1f}"
            if interval:
                difference += f" ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
            counts = str(test.first_better), str(test.second_better)
            means = f"{100 * test.first:.1f}", f"{100 * test.second:.1f}"
            rows.append([task, str(test.n), *means, difference, *counts, f"{test.p_value:.2g}", test.method])
            differing += _differing(task, a, b, common, config.listed)
    if not rows:
        raise CompareError(
            f"{names[0]} and {names[1]} have no documents in common (A was asked {', '.join(first)}; "
            f"B {', '.join(second)}): evaluate both on the same tasks and data"
        )
    said.append(
        "Differences: with their 95 % interval, Tango's score interval for paired shares, as if documents were "
        "independent of one another. p: the chance of a difference at least as large if the two were alike."
    )
    if any(row[0].startswith("pope") for row in rows):
        said.append("POPE's answers count as right or wrong here: these are accuracies, where its score is an F1.")
    head = ["task", "n", "A, %", "B, %", "B - A (95 % interval)", "A better", "B better", "p", "test"]
    page = [f"A: {names[0]}  \nB: {names[1]}", Table(head, rows), "\n".join(f"- {each}" for each in said), *differing]
    show(page)
    text = markdown(page)
    if config.output_path:
        write_text(config.output_path, text)
    return text


def _both(config: CompareConfig) -> tuple[tuple[str, str], Answers, Answers]:
    """What the two are called, and their answers."""
    folder = _results(config.first)
    if config.second is not None:
        return (config.first, config.second), _read(folder), _read(_results(config.second))
    if not (folder / "samples-base.jsonl").is_file():
        raise CompareError(
            f"{folder} has no answers of a base to compare with: name a second folder, or evaluate with --base true"
        )
    return (f"the base in {folder}", f"the tuned model in {folder}"), _read(folder, "base"), _read(folder)


def _differing(task: str, a: dict, b: dict, common: list[Document], listed: int) -> list[str | Table]:
    """A heading and a table of the documents with another score; those first whose scores differ most."""
    found = [document for document in common if a[document].score != b[document].score]
    if not found or not listed:
        return []
    found.sort(key=lambda document: -abs(a[document].score - b[document].score))
    rows = [
        [document.question, document.expected, a[document].said, b[document].said, _better(a[document], b[document])]
        for document in found[:listed]
    ]
    more = f", the first {listed} (--listed {len(found)} shows all)" if len(found) > listed else ""
    heading = f"{task}: {len(found)} of {len(common)} documents on which they differ{more}"
    return [heading, Table(["question", "expected", "A", "B", "better"], rows, left=5)]


def _better(a: Answer, b: Answer) -> str:
    if {a.score, b.score} == {0.0, 1.0}:
        return "A" if a.score > b.score else "B"
    return f"{'A' if a.score > b.score else 'B'}, {a.score:.2g} and {b.score:.2g}"


def _results(path: str) -> Path:
    """The folder with results that a path means."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CompareError(f"There is no folder {path}: give two runs, or two folders of results")
    if (folder / "results.json").is_file():
        return folder
    inside = sorted(file.parent for file in folder.glob("*/results.json"))
    if len(inside) != 1:
        found = f"several results ({', '.join(str(each) for each in inside)}): name one" if inside else "no results"
        raise CompareError(f"{path} holds {found}; fura-vlm eval writes them")
    return inside[0]


def _read(folder: Path, name: str | None = None) -> Answers:
    """The answers of a model; by default of the first that the results have, the tuned one."""
    from fura_vlm.evaluation.report import read_samples

    answers: Answers = {}
    alike: Counter = Counter()
    try:
        name = name or next(iter(json.loads((folder / "results.json").read_text("utf-8"))["scores"]))
        for row in read_samples(folder / f"samples-{name}.jsonl"):
            task, content = row["task"], (row["question"], row["expected"], row["picture"])
            document = Document(*content, alike[task, content])
            answers.setdefault(task, {})[document] = Answer(row["predicted"], row["score"])
            alike[task, content] += 1
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise CompareError(f"{folder} holds no whole results ({error!r}): evaluate again with fura-vlm eval") from error
    return answers
