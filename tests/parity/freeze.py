"""Writes the frozen files anew:  python tests/parity/freeze.py embedded

Only what the embedded model itself decides is written: ``frozen/embedded.json``, after that model or its mixture has
been made anew. ``python tests/parity/freeze.py all`` writes everything, which is right only where LLaVA-1.5's rules
were wrong before: look at each line that git then says has changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import chats
import parity_calls
import varied_records

FROZEN = Path(__file__).parent / "frozen"
CONVERSATIONS = ("v1", "plain")


def records_text(mixture: Path, conversation: str) -> str:
    """A line for each record: its place and kind, and what training makes of it."""
    kinds = [kind for kind, _ in varied_records.make_records()]
    rows = parity_calls.training_rows(mixture, conversation)
    return "".join(f"{place} {kind} {row}\n" for place, (kind, row) in enumerate(zip(kinds, rows, strict=True), 1))


def chat_prompts(mixture: Path) -> list[dict]:
    return [parity_calls.chat_prompt(*conversation) for conversation in chats.conversations(mixture.parent)]


def without_embedded_ids(tasks: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """What does not depend on the embedded model's tokenizer."""
    return {
        name: [{key: value for key, value in document.items() if key != "embedded_ids"} for document in documents]
        for name, documents in tasks.items()
    }


def embedded_ids(tasks: dict[str, list[dict]]) -> dict[str, list[str]]:
    """What does."""
    return {name: [document["embedded_ids"] for document in documents] for name, documents in tasks.items()}


def _write(name: str, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    (FROZEN / name).write_text(text, "utf-8")
    print(f"wrote {FROZEN / name}, {len(text.encode()):,} bytes")


def main(what: str) -> None:
    FROZEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = parity_calls.task_prompts(folder)
        _write("embedded.json", {"ids": embedded_ids(tasks), "losses": parity_calls.training_losses(folder)})
        if what == "all":
            mixture = varied_records.write_mixture(folder / "varied")
            _write("mixture.txt", parity_calls.digest(mixture.read_bytes()) + "\n")
            for conversation in CONVERSATIONS:
                _write(f"records-{conversation}.txt", records_text(mixture, conversation))
            _write("tasks.json", without_embedded_ids(tasks))
            _write("chats.json", chat_prompts(mixture))


if __name__ == "__main__":
    if sys.argv[1:] not in (["embedded"], ["all"]):
        sys.exit(__doc__)
    main(sys.argv[1])
