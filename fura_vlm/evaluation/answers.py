"""Answers on disk, from which an interrupted evaluation continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from loguru import logger

from fura_vlm.files import write_text


def request_key(**parts) -> str:
    """A hash of all that an answer depends on; ``parts`` are values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class AnswerStore:
    """Answers by :func:`request_key`, in a folder of JSONL files, one for each process that writes.

    lmms-eval's own response cache writes when all requests of all tasks are answered. This one has every finished
    batch. A row that cannot be read, such as a last line that a crash cut off, is skipped with a warning, and its
    question is asked again.

    Args:
        folder: made if it is not there. All its files are read.
        rank: number of this process; it writes ``answers-<rank>.jsonl``.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"answers-{rank}.jsonl"
        self._answers: dict[str, str] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            own = path == self._path
            # splitlines() would also cut at a U+2028 in an answer. What follows the last end of a line is nothing, or a
            # row that was cut off, or, in a file of another process, one that is being written now.
            *lines, rest = path.read_bytes().split(b"\n")
            lines += [rest] if own and rest else []
            rows = [_row(line) for line in lines]
            self._answers |= dict(row for row in rows if row)
            broken = [number for number, row in enumerate(rows, 1) if row is None]
            if broken and (own or rank == 0):
                listed = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
                logger.warning(
                    f"{path}: {'this line is' if len(broken) == 1 else 'these lines are'} not readable as an answer: "
                    f"{listed}. What they answered is asked again"
                )
            if own and (broken or rest):  # the next answer must not continue a line that was cut off
                write_text(path, "".join(_line(*row) for row in rows if row))

    def get(self, key: str) -> str | None:
        """The answer, or ``None`` if there is no answer yet."""
        return self._answers.get(key)

    def add(self, answers: dict[str, str]) -> None:
        """Keeps answers, in memory and on disk."""
        self._answers |= answers
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(key, text) for key, text in answers.items()))


def answer_all(
    folder: Path, keys: list[str], answers: Callable[[list[int]], Iterator[dict[int, str]]]
) -> list[str] | None:
    """The answers to all questions. Those that ``folder`` holds are not asked for again; of the others, each process
    asks its share.

    Args:
        folder: the results' folder; answers are kept in ``answers`` in it.
        keys: :func:`request_key` of each question.
        answers: asks the questions of these numbers; yields batches of answers by their places among them.

    Returns: an answer for each key, or ``None`` on all processes but the main one.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = AnswerStore(folder / "answers", rank)
    mine = [place for place in range(rank, len(keys), processes) if store.get(keys[place]) is None]
    for batch in answers(mine):
        store.add({keys[mine[number]]: said for number, said in batch.items()})
    if processes > 1:
        PartialState().wait_for_everyone()
        store = AnswerStore(folder / "answers", rank)  # with what the others have written
    return [store.get(key) for key in keys] if rank == 0 else None


def _line(key: str, answer: str) -> str:
    return json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n"


def _row(line: bytes) -> tuple[str, str] | None:
    """Key and answer, or ``None`` if the line is something else."""
    try:
        row = json.loads(line)
        key, answer = row["key"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, not UTF-8, or JSON of another shape
        return None
    return (key, answer) if isinstance(key, str) and isinstance(answer, str) else None
