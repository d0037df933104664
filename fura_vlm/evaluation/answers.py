"""Answers on disk: an interrupted evaluation goes on from those it has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def request_key(**parts) -> str:
    """A hash of all that an answer depends on; ``parts`` are values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class AnswerStore:
    """Answers by :func:`request_key`, in a folder of JSONL files, one for each process that writes.

    lmms-eval's own response cache writes when all requests of all tasks are answered. This one has every finished
    batch, and of a last line that a crash cut off, nothing.

    Args:
        folder: made if it is not there. All its files are read.
        rank: number of this process; it writes ``answers-<rank>.jsonl``.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, str] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):  # splitlines() would also cut at a U+2028 in an answer
                try:
                    row = json.loads(line)
                except ValueError:  # JSON, or a character, that was cut off
                    continue
                self._answers[row["key"]] = row["answer"]
        self._path = folder / f"answers-{rank}.jsonl"
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")  # the next answer does not continue the line that was cut off

    def get(self, key: str) -> str | None:
        """The answer, or ``None`` where there is none yet."""
        return self._answers.get(key)

    def add(self, answers: dict[str, str]) -> None:
        """Keeps answers, in memory and on disk."""
        self._answers |= answers
        lines = (json.dumps({"key": key, "answer": text}, ensure_ascii=False) + "\n" for key, text in answers.items())
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
