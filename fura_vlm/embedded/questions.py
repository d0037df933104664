"""Questions about scenes, in four families with the answer styles of the benchmarks.

=============  =================================================  ===========================================
family         asks                                               answer, as in
=============  =================================================  ===========================================
``gqa``        attributes, counts and relations                   one word or short phrase, GQA
``pope``       is a shape in the picture; half of them are not    Yes or No, POPE (arXiv 2305.10355)
``textvqa``    the word on a sign                                 the word as written, TextVQA
``scienceqa``  a choice, given a hint in words and the picture    the option's letter, ScienceQA
=============  =================================================  ===========================================

The closing instructions ("Answer the question using a single word or phrase.", "Answer with the option's letter
from the given choices directly.") are those of the LLaVA-1.5 mixture (arXiv 2310.03744, table 7).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from fura_vlm.embedded.scenes import COLORS, COLUMNS, COMPANY, ROWS, SHAPES, WORDS, Scene, Thing

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
FAMILIES = ("gqa", "pope", "textvqa", "scienceqa")
ROLES = ("fish", "planet", "flower", "ship", "robot", "seed", "cloud", "king", "drum", "cell")
PLACES = tuple(
    "center" if (r, c) == ("middle", "center") else f"{r} {c}".replace("middle ", "").replace(" center", "")
    for r in ROWS
    for c in COLUMNS
)


@dataclass(frozen=True)
class Question:
    """One question: ``text`` is the human turn without the ``<image>``, ``answer`` the assistant's.

    ``extra`` carries what the benchmark of the family also records: POPE's ``category`` (``random``, ``popular``
    or ``adversarial``), ScienceQA's ``hint`` and ``choices``.
    """

    family: str
    question: str
    answer: str
    instruction: str
    extra: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        if self.family != "scienceqa":
            return f"{self.question}\n{self.instruction}"
        lettered = zip("ABCDE", self.extra["choices"], strict=False)
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in lettered)
        return f"Context: {self.extra['hint']}\n{self.question}\n{choices}\n{self.instruction}"


def ask(family: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of ``family`` that ``scene`` answers without doubt, or ``None`` where it has none to ask."""
    return _ASK[family](scene, rng)


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "sh")) else "s")


# -------------------------------------------------------------------------------------------------- gqa, short


def relation(a: Thing, b: Thing, rng: random.Random) -> tuple[str, str] | None:
    """Where ``a`` is as seen from ``b``, and the opposite word: ("left", "right"), ("below", "above"), ..."""
    words = []
    if a.cell[1] != b.cell[1]:
        words.append(("left", "right") if a.cell[1] < b.cell[1] else ("right", "left"))
    if a.cell[0] != b.cell[0]:
        words.append(("above", "below") if a.cell[0] < b.cell[0] else ("below", "above"))
    return rng.choice(words) if words else None


def _attribute(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    names = scene.names(thing)
    if not names:
        return None
    kind = rng.choice(("color", "shape", "size", "place"))
    if kind == "color" and thing.shape in names:
        return rng.choice(
            (f"What color is the {thing.shape}?", f"Which color does the {thing.shape} have?")
        ), thing.color
    if kind == "shape" and f"{thing.color} object" in names:
        return rng.choice(
            (f"What shape is the {thing.color} object?", f"What is the {thing.color} object?")
        ), thing.shape
    name = rng.choice(names)
    if kind == "size":
        return f"Is the {name} small or large?", thing.size
    return f"Where is the {name}?", thing.place


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    some = rng.choice(scene.things)
    if rng.random() < 0.5:
        shape = some.shape if rng.random() < 0.8 else rng.choice(list(SHAPES))
        return f"How many {plural(shape)} are there?", str(scene.count(shape=shape))
    color = some.color if rng.random() < 0.8 else rng.choice(list(COLORS))
    return f"How many {color} objects are there?", str(scene.count(color=color))


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    a, b = rng.sample(scene.things, 2)
    words = relation(a, b, rng)
    if words is None or not scene.names(a) or not scene.names(b):
        return None
    first, second = sorted(words, key=lambda word: word in ("right", "below"))
    name_a, name_b = rng.choice(scene.names(a)), rng.choice(scene.names(b))
    if first == "left":
        return f"Is the {name_a} to the left or to the right of the {name_b}?", words[0]
    return f"Is the {name_a} above or below the {name_b}?", words[0]


def _gqa(scene: Scene, rng: random.Random) -> Question | None:
    found = rng.choices((_attribute, _count, _relation), (5, 3, 3))[0](scene, rng)
    return found and Question("gqa", *found, SHORT)


# ---------------------------------------------------------------------------------------------- pope, yes / no


def _pope(scene: Scene, rng: random.Random) -> Question:
    present = {thing.shape for thing in scene.things}
    absent = [shape for shape in SHAPES if shape not in present]
    category = rng.choice(("random", "popular", "adversarial"))
    if rng.random() < 0.5:
        shape, answer = rng.choice(sorted(present)), "Yes"
    else:
        # Popular: among the commonest shapes of all scenes. Adversarial: the absent shape that keeps company
        # with the shapes that are there most often.
        answer = "No"
        if category == "random":
            shape = rng.choice(absent)
        elif category == "popular":
            shape = max(absent, key=lambda s: (SHAPES[s], rng.random()))
        else:
            shape = max(absent, key=lambda s: (sum(s in c and bool(present & set(c)) for c in COMPANY), rng.random()))
    return Question("pope", f"Is there a {shape} in the image?", answer, SHORT, {"category": category})


# ----------------------------------------------------------------------------------------------- textvqa, signs


def _textvqa(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.signs:
        return None
    sign = rng.choice(scene.signs)
    if len(scene.signs) == 1 and rng.random() < 0.5:
        question = rng.choice(("What does the sign say?", "What word is written on the sign?"))
    else:
        question = rng.choice((f"What does the {sign.color} sign say?", f"What is written on the {sign.color} sign?"))
    return Question("textvqa", question, sign.word, SHORT)


# -------------------------------------------------------------------------------------- scienceqa, letters, hint


def role(scene: Scene, rng: random.Random) -> tuple[str, str, Thing] | None:
    """Gives a shape that occurs once a new name: (hint sentence, name, the thing)."""
    things = [thing for thing in scene.things if scene.count(shape=thing.shape) == 1]
    if not things:
        return None
    thing, name = rng.choice(things), rng.choice(ROLES)
    return f"On this card each {thing.shape} is a {name}.", name, thing


def options(answer: str, others, rng: random.Random) -> tuple[list[str], str]:
    """Three or four choices with the answer among them, and its letter."""
    wrong = rng.sample([other for other in others if other != answer], rng.choice((2, 2, 3)))
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return choices, "ABCDE"[choices.index(answer)]


def _scienceqa(scene: Scene, rng: random.Random) -> Question | None:
    kind = rng.choice(("color", "place", "word", "count"))
    if kind == "word" and scene.signs:
        sign = rng.choice(scene.signs)
        hint = f"A {sign.color} sign stands in the picture."
        question, answer, others = f"What is written on the {sign.color} sign?", sign.word, WORDS
    elif kind == "count":
        shape, name = rng.choice(scene.things).shape, rng.choice(ROLES)
        hint = f"On this card each {shape} is a {name}."
        others = [str(n) for n in range(6)]
        question, answer = f"How many of this kind are there: {name}?", str(scene.count(shape=shape))
    else:
        given = role(scene, rng)
        if given is None:
            return None
        hint, name, thing = given
        if kind == "place":
            question, answer, others = f"Where is the {name}?", thing.place, PLACES
        else:
            question, answer, others = f"Which color is the {name}?", thing.color, COLORS
    choices, letter = options(answer, others, rng)
    return Question("scienceqa", question, letter, LETTER, {"hint": hint, "choices": choices})


_ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "gqa": _gqa,
    "pope": _pope,
    "textvqa": _textvqa,
    "scienceqa": _scienceqa,
}
