"""Conversations with pictures, and what a family makes of them."""

import numpy as np
from PIL import Image

from fura_vlm.families.messages import Message, Picture, Text


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, so that nothing depends on luck."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts) -> Message:
    """A question of words and, for each number, a picture."""
    return Message("user", tuple(Text(part) if isinstance(part, str) else Picture(f"{part}.png") for part in parts))


def assistant(text: str) -> Message:
    return Message("assistant", (Text(text),))


def system(text: str) -> Message:
    return Message("system", (Text(text),))


PICTURES = {1: picture(61, 33, 1), 2: picture(30, 95, 2), 3: picture(120, 50, 3)}
TEXT_ONLY = [system("You help people."), user("How many are there?"), assistant("three")]
TURNS = [user("What?"), assistant("No."), user("Describe it please"), assistant("A red dog and a cat")]
ONE = [user(1, "What is this?"), assistant("A cat.")]
TWO = [user(1, "What is this?"), assistant("A red dog."), user("And ", 2, " this?"), assistant("3 dogs")]
TOGETHER = [user(2, 3, "How many?"), assistant("three")]


def conversations(name: str) -> list[list[Message]]:
    return [TEXT_ONLY, TURNS] if name == "text" else [TEXT_ONLY, TURNS, ONE, TWO, TOGETHER]


def images(messages) -> list[Image.Image]:
    return [PICTURES[int(source.removesuffix(".png"))] for message in messages for source in message.pictures]


def encode(family, messages):
    """Spread ids and labels."""
    [encoded] = family.encode([(messages, [image.size for image in images(messages)])])
    if isinstance(encoded, Exception):
        raise encoded
    assert encoded.length == len(family.spread(encoded)[0])
    return family.spread(encoded)
