"""Ten conversations of a chat."""

from __future__ import annotations

from pathlib import Path

from varied_records import picture_names


def conversations(folder: Path) -> list[tuple[list[tuple[str, str | None, str | None]], int]]:
    """Exchanges, each a question, a picture or ``None`` and an answer, and the tokens that the prompt may have."""
    one, two, three = (str(folder / picture_names()[number]) for number in (0, 2, 14))
    talk = [(f"Question {number}?", one if number == 0 else None, f"Yes, {number}." * 3) for number in range(12)]
    shown = [(f"Is {number} red?", (one, two, three)[number % 3], "No") for number in range(7)]
    return [
        ([("What is this?", one, None)], 400),
        ([("What is this?", None, None)], 400),
        ([("What is this?", one, "A cat."), ("Is it red?", None, "No"), ("Where is it?", None, None)], 400),
        ([("One?", one, "1"), ("Two?", two, "2"), ("And three?", three, None)], 400),
        ([("Hello", None, "Hi"), ("And this?", one, None)], 400),
        ([("猫ですか? แมว", two, "はい 👩‍👩‍👧‍👦"), ("e\u0301a\u0300\u0301?", None, None)], 400),
        ([("  What <image> is <s>this</s>?\n\n<pad>", one, "A </s>cat<image>"), ("Sure\tof it?  ", None, None)], 400),
        ([*talk, ("And now?", None, None)], 200),  # the beginning is forgotten, its picture stays
        ([*shown, ("Which?", None, None)], 150),  # pictures are forgotten but for the last
        ([*talk, ("And this one?", two, None)], 120),
    ]
