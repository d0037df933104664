"""The embedded world: small pictures of coloured shapes and signs, and what is true of them.

A scene is drawn on a grid of 3 x 3 cells. Objects (a shape, a colour, a size) take one cell each, a sign with a
word takes two neighbouring cells of a row. Everything follows from ``(seed, split, index)``: the same three give
the same scene and the same pixels (for one version of Pillow, whose built-in font is used).

Training and evaluation never share a scene: a hash of what the scene shows decides the split it belongs to
(:func:`split_of`), and :func:`make_scene` draws again until the scene falls into the one it was asked for.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 95, 200),
    "yellow": (240, 205, 30),
    "orange": (245, 130, 20),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
    "pink": (245, 130, 190),
}
# Some shapes are commoner than others, and some like each other's company: without that a "popular" or an
# "adversarial" negative (POPE, arXiv 2305.10355) would be no different from a random one.
SHAPES = {
    "circle": 5,
    "square": 5,
    "triangle": 4,
    "star": 4,
    "heart": 3,
    "cross": 3,
    "diamond": 2,
    "moon": 2,
}
COMPANY = (("circle", "star", "moon"), ("square", "triangle", "diamond"), ("heart", "cross", "circle"))
SIZES = {"small": 0.24, "large": 0.44}  # radius as a share of the cell
SIGN_COLORS = ("red", "green", "blue", "black")
WORDS = tuple(
    "BANK BEAR BELL BIRD BOAT BOOK CAFE CAKE CITY CLUB COAT CORN DESK DOOR DUCK EXIT FARM FISH FOOD GATE "
    "GIFT GOLD HILL HOME JAZZ KING LAKE LAMP LION MAIL MENU MILK MOON NEWS OPEN PARK PIZZA POOL RAIN ROAD "
    "SALE SHOP SNOW SOUP STOP TAXI TEA TREE WOLF ZOO".split()
)
BACKGROUNDS = ((255, 255, 255), (244, 240, 228), (228, 236, 244), (234, 244, 230), (236, 236, 236))
CANVASES = ((112, 112), (112, 112), (112, 96), (96, 112))
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
# What pretraining also sees, so that the eyes know more than the questions ask for.
OTHER_COLORS = {"brown": (120, 72, 30), "gray": (128, 128, 128), "teal": (0, 128, 128), "white": (255, 255, 255)}
OTHER_SHAPES = ("rectangle", "oval")
SPLITS = ("train", "eval")
EVAL_SHARE = 10  # one scene in so many belongs to evaluation


@dataclass(frozen=True)
class Thing:
    """One object: names of shape, colour and size, and its cell as (row, column), each 0 to 2."""

    shape: str
    color: str
    size: str
    cell: tuple[int, int]

    @property
    def place(self) -> str:
        row, column = self.cell
        if (row, column) == (1, 1):
            return "center"
        return " ".join(name for name in (ROWS[row], COLUMNS[column]) if name not in ("middle", "center"))


@dataclass(frozen=True)
class Sign:
    """A coloured board with a word; it covers the cells ``cell`` and the one right of it."""

    word: str
    color: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``canvas`` is (width, height) in pixels, ``background`` an RGB triple."""

    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    canvas: tuple[int, int]
    background: tuple[int, int, int]

    def count(self, shape: str | None = None, color: str | None = None) -> int:
        return sum(shape in (None, t.shape) and color in (None, t.color) for t in self.things)

    def names(self, thing: Thing) -> list[str]:
        """The phrases that mean this thing and no other: "circle", "red object", "red circle"."""
        found = []
        if self.count(shape=thing.shape) == 1:
            found.append(thing.shape)
        if self.count(color=thing.color) == 1:
            found.append(f"{thing.color} object")
        if self.count(shape=thing.shape, color=thing.color) == 1:
            found.append(f"{thing.color} {thing.shape}")
        return found


def split_of(scene: Scene) -> str:
    """The split a scene belongs to, from a hash of its objects and signs (not of canvas or background)."""
    shown = sorted((t.shape, t.color, t.size, t.cell) for t in scene.things)
    text = repr((shown, sorted((s.word, s.color, s.cell) for s in scene.signs)))
    return "eval" if hashlib.sha256(text.encode()).digest()[0] % EVAL_SHARE == 0 else "train"


def make_scene(seed: int, split: str, index: int, with_sign: bool | None = None) -> Scene:
    """Scene number ``index`` of a split.

    Args:
        seed: the seed of the whole set.
        split: ``"train"`` or ``"eval"``.
        index: any integer.
        with_sign: ``True`` asks for at least one sign, ``False`` for none, ``None`` leaves it to chance.

    Raises:
        ValueError: for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{split}/{index}/{with_sign}")
    while True:
        scene = _draw_lots(rng, with_sign)
        if split_of(scene) == split:
            return scene


def make_other_scene(seed: int, index: int) -> Scene:
    """A scene of a wider world for pretraining: one to five things, more colours and shapes, any light background."""
    rng = random.Random(f"{seed}/other/{index}")
    colors = (*COLORS, *OTHER_COLORS)
    cells = [(row, column) for row in range(3) for column in range(3)]
    things = tuple(
        Thing(rng.choice((*SHAPES, *OTHER_SHAPES * 2)), rng.choice(colors), rng.choice(list(SIZES)), cell)
        for cell in rng.sample(cells, rng.choice((1, 1, 2, 3, 4, 5)))
    )
    return Scene(things, (), rng.choice(CANVASES), tuple(rng.randrange(200, 250) for _ in range(3)))


def _draw_lots(rng: random.Random, with_sign: bool | None) -> Scene:
    free = {(row, column) for row in range(3) for column in range(3)}
    signs = []
    number = rng.choices((0, 1, 2), (45, 40, 15))[0] if with_sign is None else with_sign * rng.choice((1, 1, 2))
    rows = rng.sample(range(3), number)
    for row, color, word in zip(rows, rng.sample(SIGN_COLORS, number), rng.sample(WORDS, number), strict=True):
        cell = (row, rng.randrange(2))
        signs.append(Sign(word, color, cell))
        free -= {cell, (row, cell[1] + 1)}

    company = rng.choice(COMPANY)
    weights = [weight * (6 if shape in company else 1) for shape, weight in SHAPES.items()]
    things = [
        Thing(rng.choices(list(SHAPES), weights)[0], rng.choice(list(COLORS)), rng.choice(list(SIZES)), cell)
        for cell in rng.sample(sorted(free), rng.randint(2, min(5, len(free))))
    ]
    return Scene(tuple(things), tuple(signs), rng.choice(CANVASES), rng.choice(BACKGROUNDS))


# ---------------------------------------------------------------------------------------------------- drawing

_OVERSAMPLE = 2
_RGB = {**COLORS, **OTHER_COLORS}


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, ``scene.canvas`` pixels."""
    width, height = (side * _OVERSAMPLE for side in scene.canvas)
    picture = Image.new("RGB", (width, height), scene.background)
    pen = ImageDraw.Draw(picture)
    cell_w, cell_h = width / 3, height / 3
    for thing in scene.things:
        row, column = thing.cell
        center = ((column + 0.5) * cell_w, (row + 0.5) * cell_h)
        _draw_shape(pen, thing.shape, center, SIZES[thing.size] * min(cell_w, cell_h), _RGB[thing.color], scene)
    for sign in scene.signs:
        row, column = sign.cell
        x, y = (column + 1) * cell_w, (row + 0.5) * cell_h
        half_w, half_h = 0.94 * cell_w, 0.40 * cell_h
        pen.rectangle((x - half_w, y - half_h, x + half_w, y + half_h), fill=COLORS[sign.color])
        pen.text((x, y), sign.word, fill="white", font=_font(round(0.58 * cell_h)), anchor="mm")
    return picture.reduce(_OVERSAMPLE)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _draw_shape(pen, shape, center, r, color, scene) -> None:
    x, y = center

    def polygon(*points):
        pen.polygon([(x + r * px, y + r * py) for px, py in points], fill=color)

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=color)
    elif shape == "triangle":
        polygon((0, -1), (1, 0.85), (-1, 0.85))
    elif shape == "diamond":
        polygon((0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0))
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=color)
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=color)
    elif shape == "star":
        polygon(*_STAR)
    elif shape == "heart":
        polygon(*_HEART)
    elif shape == "moon":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        pen.ellipse((x - 0.35 * r, y - 0.95 * r, x + 1.35 * r, y + 0.75 * r), fill=scene.background)
    elif shape == "rectangle":
        pen.rectangle((x - r, y - 0.55 * r, x + r, y + 0.55 * r), fill=color)
    elif shape == "oval":
        pen.ellipse((x - r, y - 0.6 * r, x + r, y + 0.6 * r), fill=color)
    else:
        raise ValueError(f"no drawing for the shape {shape!r}")


# Outlines around (0, 0) with a radius of about 1, y pointing down.
_STAR = [
    (radius * math.sin(k * math.pi / 5), -radius * math.cos(k * math.pi / 5))
    for k in range(10)
    for radius in ((1.1, 0.45)[k % 2],)
]
_HEART = [
    (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
    for t in (k * math.pi / 20 for k in range(40))
]
