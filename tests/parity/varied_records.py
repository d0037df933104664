"""A thousand records in the LLaVA format, and their pictures: the same bytes on every machine and for ever.

All chance comes from ``random.Random(seed).random()``, which Python promises not to change, and all pixels from whole
numbers. Whoever changes this file changes what ``frozen/`` was made from.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

COUNT = 1000
LONG = 150
"""Words of a text that does not fit."""

WORDS = (
    "What is this ? A cat and the red dog on a mat . Is it large or small , or left of that tree Yes No 1 22 2024 "
    "-3.5 50% don't Über naïve café"
).split()
OTHERS = (
    "猫在垫子上", "这是什么？", "红色的圆在左边。", "はい、猫です", "한국어 문장",
    "แมวอยู่บนเสื่อ", "นี่คืออะไร", "Где кошка?", "Нет", "שלום", "مرحبا بالعالم", "नमस्ते",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "😀😀", "🇩🇪", "e\u0301", "a\u0300\u0301\u0302\u0303", "n\u0303o", "Z\u0351\u036b\u0343",
    "\u200b", "\u00a0", "\ufeff", "\u2028", "ﬁ", "𝔘𝔫𝔦", "½",
)  # fmt: skip
CODE = (
    "<b>x</b>", "```python\nif a < b:\n    pass\n```", "USER: Hi", "ASSISTANT: No", "</b>", "<im", "image>", "\\n",
    "\t", "▁", "{{ x }}", "<|im_end|>", "http://x.y/?a=1&b=2", "| a | b |", "$\\frac{1}{2}$", "# Title", "<image", "\0",
)  # fmt: skip
GAPS = (" ", " ", " ", " ", "\n", "  ", "", "\n\n")
MODES = ("RGB", "L", "RGBA", "I;16", "P", "LA", "1", "P-transparent", "RGB-turned")
SIZES = ((1, 1), (1, 77), (91, 2), (56, 56), (112, 56), (57, 56), (3, 200))
"""Sizes of the first pictures; those of the others are drawn."""

PICTURES = 117


class Chance:
    """Numbers and choices from ``random()`` alone."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def below(self, end: int) -> int:
        return int(self.random() * end)

    def pick(self, things):
        return things[self.below(len(things))]

    def text(self, least: int = 1, most: int = 12) -> str:
        """Not blank. Most texts are plain words; some mix everything."""
        mixed, text = self.random() < 0.4, self.pick(WORDS)
        for _ in range(least + self.below(most - least + 1)):
            kind = self.random()
            pieces = WORDS if not mixed or kind < 0.5 else OTHERS if kind < 0.85 else CODE
            text += (self.pick(GAPS) if mixed else " ") + self.pick(pieces)
        return text + (self.pick((" ", "\n", "", "")) if mixed else ".")

    def long(self) -> str:
        return self.text(LONG, LONG + 60)


# -------------------------------------------------------------------------------------------------- pictures


def picture_names() -> list[str]:
    return [f"pictures/{number:03d}-{MODES[number % len(MODES)]}.png" for number in range(PICTURES)]


def write_pictures(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True)
    for number, name in enumerate(picture_names()):
        chance = Chance(10_000 + number)
        size = SIZES[number] if number < len(SIZES) else (1 + chance.below(90), 1 + chance.below(90))
        _write_picture(folder / name, size, MODES[number % len(MODES)], chance)
    whole = (folder / picture_names()[28]).read_bytes()
    (folder / "pictures/cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "pictures/empty.png").write_bytes(b"")
    (folder / "pictures/text.png").write_text("no picture")


def _write_picture(path: Path, size: tuple[int, int], mode: str, chance: Chance) -> None:
    width, height = size
    a, b, c, d = (1 + chance.below(250) for _ in range(4))

    def values(channels: int) -> bytes:
        places = ((x, y, z) for y in range(height) for x in range(width) for z in range(channels))
        return bytes((a * x + b * y + c * x * y + d * (z + 1) * (x // 7 + y // 5)) % 256 for x, y, z in places)

    options = {}
    if mode == "I;16":
        image = Image.frombytes("I;16", size, values(2))
    elif mode == "1":
        image = Image.frombytes("L", size, values(1)).point([255 * (value > 127) for value in range(256)], "1")
    elif mode.startswith("P"):
        image = Image.frombytes("P", size, values(1))
        image.putpalette([(a * value + b) % 256 for value in range(768)])
        if mode == "P-transparent":
            options["transparency"] = bytes((c * value + d) % 256 for value in range(256))
    elif mode == "RGB-turned":
        image, exif = Image.frombytes("RGB", size, values(3)), Image.Exif()
        exif[0x0112] = 1 + chance.below(8)
        options["exif"] = exif
    else:
        image = Image.frombytes(mode, size, values({"RGB": 3, "L": 1, "RGBA": 4, "LA": 2}[mode]))
    image.save(path, "PNG", **options)


# --------------------------------------------------------------------------------------------------- records


def turns(*values: str, first: str = "human") -> list[dict]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[number % 2], "value": value} for number, value in enumerate(values)]


def talk(chance: Chance, rounds: int) -> list[str]:
    return [chance.text(1, 10) for _ in range(2 * rounds)]


def marked(chance: Chance, text: str) -> str:
    """A question with its picture somewhere."""
    half = len(text) // 2
    forms = (
        f"<image>\n{text}", f"<image>\n{text}", f"{text}\n<image>", f"<image>{text}", f"{text} <image>",
        f"{text[:half]}<image>{text[half:]}", f"{text} <image> and then?", f"<image>\n<image>\n{text}",
        f"<image> {text} <image>", "<image>", " \n<image>\n ", f"  <image>\n\n{text}  ",
    )  # fmt: skip
    return chance.pick(forms)


def caption(chance: Chance) -> dict:
    return {"image": chance.pick(picture_names()), "conversations": turns(marked(chance, chance.text()), chance.text())}


def picture_talk(chance: Chance) -> dict:
    said, place = talk(chance, 2 + chance.below(4)), 0
    if chance.random() < 0.25:  # the picture comes with a later question
        place = 2 * chance.below(len(said) // 2)
    said[place] = marked(chance, said[place])
    return {"image": chance.pick(picture_names()), "conversations": turns(*said)}


def text_only(chance: Chance) -> dict:
    record = {"conversations": turns(*talk(chance, 1 + chance.below(5)))}
    return record | ({"image": None} if chance.random() < 0.2 else {})


def other_name(chance: Chance) -> dict:
    """Called .jpg by the record, and .png on the disk."""
    return caption(chance) | {"image": chance.pick(picture_names()).replace(".png", ".jpg")}


def mark_as_text(chance: Chance) -> dict:
    said = talk(chance, 1 + chance.below(2))
    said[0] = f"What does <image> mean? {said[0]}"
    if chance.random() < 0.4:
        said[1] = chance.pick((f"<image> {said[1]}", f"{said[1]} <image>", "It is <image><image> here"))
    return {"conversations": turns(*said)}


def forgotten_picture(chance: Chance) -> dict:
    said = talk(chance, 1 + chance.below(2))
    said[0] = chance.pick(("<image>\n{}", "{}\n<image>", "{}<image>", " <image>{}")).format(chance.pick(WORDS))
    return {"conversations": turns(*said)}


def typed_tokens(chance: Chance) -> dict:
    record = chance.pick((caption, text_only, picture_talk))(chance)
    for _ in range(1 + chance.below(2)):
        turn = chance.pick(record["conversations"])
        token = chance.pick(("<s>", "<s>", "<pad>", "<pad>", "</s>", "<unk>"))
        turn["value"] = chance.pick(("{1}{0}", "{0}{1}", "{0} {1} x", "x{1}x {0}")).format(turn["value"], token)
    return record


def too_long(chance: Chance) -> dict:
    said = talk(chance, 1 + chance.below(3))
    said[1 + 2 * chance.below(len(said) // 2)] = chance.long()
    if chance.random() < 0.5:
        return {"conversations": turns(*said)}
    said[0] = marked(chance, said[0])
    return {"image": chance.pick(picture_names()), "conversations": turns(*said)}


def about_as_long(chance: Chance) -> dict:
    """Some fit, some do not: both sides of the edge."""
    said = [*talk(chance, 1), chance.text(50, 100), chance.text(1, 60)]
    said[0] = marked(chance, said[0])
    return {"image": chance.pick(picture_names()), "conversations": turns(*said)}


def picture_beyond_the_end(chance: Chance) -> dict:
    said = [*talk(chance, 1), marked(chance, chance.text()), chance.text()]
    said[1] = chance.long() if chance.random() < 0.6 else chance.text(90, 120)
    return {"image": chance.pick(picture_names()), "conversations": turns(*said)}


def answer_beyond_the_end(chance: Chance) -> dict:
    if chance.random() < 0.5:
        return {"conversations": turns(chance.long(), chance.text())}
    return {"image": chance.pick(picture_names()), "conversations": turns("<image>\n" + chance.long(), chance.text())}


def answer_first(chance: Chance) -> dict:
    record = chance.pick((caption, text_only, too_long))(chance)
    record["conversations"].insert(0, {"from": "gpt", "value": chance.pick((chance.text(), "", "<image> first"))})
    return record


def blank(chance: Chance) -> dict:
    record = chance.pick((caption, text_only, picture_talk))(chance)
    chance.pick(record["conversations"])["value"] = chance.pick(("", " ", "\n\t ", "\u00a0"))
    return record


def odd_id(chance: Chance) -> dict:
    """Not a key of its own, a number, in another script, twice the same, ``null``; and keys that nobody knows."""
    odd = chance.pick(
        ({}, {"id": 7}, {"id": "猫/é"}, {"id": "same"}, {"id": None}, {"id": [1]}, {"model": "x", "w": 3})
    )
    return {"id": "unused", **caption(chance), "drop id": True} | odd


def broken(chance: Chance, number: int):
    """The rules one by one."""
    name, good = chance.pick(picture_names()), turns("<image>\nWhat is this?", "A cat.")
    human, gpt = ({"from": role, "value": "Yes"} for role in ("human", "gpt"))
    kinds = [
        lambda: {"image": name},
        lambda: {"image": name, "conversations": None},
        lambda: {"image": name, "conversations": {"from": "human"}},
        lambda: {"conversations": []},
        lambda: {"conversations": [gpt]},
        lambda: {"conversations": [human, human, gpt]},
        lambda: {"conversations": [human, gpt, gpt]},
        lambda: {"conversations": [gpt, gpt, human, gpt]},
        lambda: {"conversations": [human, gpt, human]},
        lambda: {"conversations": [human, "Yes"]},
        lambda: {"conversations": [human, {"from": "gpt", "value": 3}]},
        lambda: {"conversations": [human, {"from": "gpt", "value": None}]},
        lambda: {"conversations": [human, {"from": "gpt"}]},
        lambda: {"conversations": [human, {"from": "gpt", "value": "half \ud83d of it"}]},
        lambda: {"image": "pictures/\udc00.png", "conversations": good},
        lambda: {"image": 3, "conversations": good},
        lambda: {"image": "", "conversations": good},
        lambda: {"image": "../elsewhere.png", "conversations": good},
        lambda: {"image": "pictures/../../elsewhere.png", "conversations": good},
        lambda: {"image": f"pictures/../{name}", "conversations": good},  # this one is well
        lambda: {"image": "pictures/none.png", "conversations": good},
        lambda: {"image": "pictures", "conversations": good},
        lambda: {"image": "pictures/cut.png", "conversations": good},
        lambda: {"image": "pictures/empty.png", "conversations": good},
        lambda: {"image": "pictures/text.png", "conversations": good},
        lambda: {"image": name, "conversations": turns("What is this?", "A cat.")},
        lambda: {"image": name, "conversations": turns("<image>\nWhat?", "A <image>.")},
        lambda: "no object",
        lambda: ["no", "object"],
        lambda: 3,
        lambda: None,
    ]
    return kinds[number % len(kinds)]()


SHARES = {
    caption: 300, picture_talk: 170, text_only: 130, other_name: 15, mark_as_text: 25, forgotten_picture: 15,
    typed_tokens: 80, too_long: 60, about_as_long: 40, picture_beyond_the_end: 25, answer_beyond_the_end: 15,
    answer_first: 35, blank: 20, odd_id: 20, broken: 50,
}  # fmt: skip
"""How many of each kind; their order is drawn."""


def make_records() -> list[tuple[str, object]]:
    """``COUNT`` kinds and records."""
    kinds = [kind for kind, count in SHARES.items() for _ in range(count)]
    order = Chance(1)
    keyed = sorted((order.random(), number) for number in range(len(kinds)))
    made, broken_ones = [], 0
    for number, (_, place) in enumerate(keyed):
        kind, chance = kinds[place], Chance(100 + number)
        if kind is broken:
            record, broken_ones = broken(chance, broken_ones), broken_ones + 1
        else:
            record = {"id": str(number)} | kind(chance)
            if record.pop("drop id", None) and record["id"] == "unused":
                del record["id"]
        made.append((kind.__name__, record))
    return made


def write_mixture(folder: Path) -> Path:
    """Writes pictures and ``records.json`` and returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder)
    records = [record for _, record in make_records()]
    assert len(records) == COUNT
    path = folder / "records.json"
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return path
