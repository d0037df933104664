"""Which answers of a conversation are good, told from the scene alone.

The rules read plain English: numbers as digits or words, colours and shapes by name, places by their rows and columns.
An answer may say more than was asked as long as nothing of it is wrong.
"""

from __future__ import annotations

import re

from fura_vlm.embedded.conversations import Asked
from fura_vlm.embedded.questions import plural
from fura_vlm.embedded.scenes import COLORS, SHAPES, Scene
from fura_vlm.embedded.words import NUMBERS

_SIDES = {
    "top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom", "left": "left", "right": "right",
    "center": "center", "centre": "center", "middle": "center",
}  # fmt: skip
_CAPITALS = r"\b[A-Z]{3,}\b"
_DENIALS = {"no", "not", "none", "nothing", "without", "don't", "isn't", "can't", "cannot", "doesn't", "aren't"}
_REPLIES = {
    "hello": {"hello", "hi", "hey", "welcome", "good", "nice"},
    "thanks": {"welcome", "glad", "pleasure", "problem", "anytime", "happy"},
    "bye": {"bye", "goodbye", "see", "farewell"},
    "how_are_you": {"fine", "well", "good", "great"},
    "who": {"assistant", "model", "computer", "program"},
    "can_do": {"picture", "pictures", "questions", "help", "describe", "ask"},
}


def is_good(scene: Scene, asked: Asked, answer: str) -> bool:
    """Whether ``answer`` is a good one to ``asked`` about ``scene``.

    Raises:
        KeyError: for an unknown kind of question.
    """
    plain = re.sub(_CAPITALS, " ", answer)  # a sign may say MOON, which is no moon
    words = re.findall(r"[a-z']+|\d+", plain.lower())
    return _GOOD[asked.kind](scene, asked.subject, words, answer)


def _count(scene, shape, words, answer) -> bool:
    said = {int(word) if word.isdigit() else NUMBERS.index(word) for word in words if word.isdigit() or word in NUMBERS}
    if not said and _DENIALS & set(words):
        said = {0}
    return said == {scene.count(shape=shape)}


def _color(scene, thing, words, answer) -> bool:
    return {word for word in words if word in COLORS} == {thing.color}


def _place(scene, thing, words, answer) -> bool:
    said, true = {_SIDES[word] for word in words if word in _SIDES}, set(thing.place.split())
    return said == true or (len(true) == 1 and said == true | {"center"})


def _absent(scene, subject, words, answer) -> bool:
    return bool(_DENIALS & set(words)) and "yes" not in words


def _describe(scene, subject, words, answer) -> bool:
    """Every shape with its colour and every word of a sign is true, and at least two thirds of the things are named."""
    names = {name: shape for shape in SHAPES for name in (shape, plural(shape))}
    true = {(thing.color, thing.shape) for thing in scene.things}
    pairs = {(words[i - 1] if i else "", names[word]) for i, word in enumerate(words) if word in names}
    signs = set(re.findall(_CAPITALS, answer))
    return pairs <= true and 3 * len(pairs) >= 2 * len(true) and signs <= {sign.word for sign in scene.signs}


def _small_talk(scene, intent, words, answer) -> bool:
    return bool(_REPLIES[intent] & set(words)) and not {*COLORS, *SHAPES} & set(words)


_GOOD = {
    "describe": _describe, "count": _count, "color": _color, "place": _place, "absent": _absent,
    "small_talk": _small_talk,
}  # fmt: skip
