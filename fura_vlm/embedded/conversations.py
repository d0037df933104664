"""Conversations about scenes in plain words: several turns, short true answers, small talk, false premises.

Training has :func:`conversation` and :func:`small_talk`. :func:`held_out_conversations` asks of held-out scenes in
phrasings that training never has; :mod:`fura_vlm.embedded.judge` says which answers are good.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fura_vlm.embedded.asking import HELD_OUT, PICTURE, ask_for
from fura_vlm.embedded.questions import PLACES, plural, relation
from fura_vlm.embedded.scenes import COLORS, SHAPES, Scene, Sign, Thing, make_scene
from fura_vlm.embedded.words import HELD_OUT_THINGS, THINGS

KINDS = ("describe", "count", "color", "place", "absent", "small_talk")
REPLIES = {
    "hello": "Hello! Ask me about the picture.",
    "thanks": "You are welcome.",
    "bye": "Goodbye!",
    "how_are_you": "I am fine, thank you.",
    "who": "I am an assistant. I look at pictures and answer questions.",
    "can_do": "I can tell you what a picture shows. Ask me about shapes, colors, places and words.",
    "praise": "I am glad to help.",
    "off_topic": "I do not know. I only know about pictures.",
}
ANYTHING = ("object", "thing", "shape", "one")  # what people call a thing without saying its shape
Turn = tuple[str, str]


def a(name: str) -> str:
    """The name with "a" or "an" before it."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def spoken(scene: Scene, thing: Thing, rng: random.Random) -> str | None:
    """A name that means this thing and no other, as people say it, or ``None`` where none does."""
    names = scene.names(thing)
    return rng.choice(names).replace("object", rng.choice(ANYTHING)) if names else None


# ------------------------------------------------------------------------------------------------ what is answered


def description(scene: Scene, detailed: bool = False) -> str:
    """All that the scene shows in the order of reading; ``detailed`` adds how many things there are."""
    parts = _in_order((*scene.things, *scene.signs))
    said = [
        f"{a(part.color)} sign that says {part.word}"
        if isinstance(part, Sign)
        else f"a {part.size} {part.color} {part.shape} at the {part.place}"
        for part in parts
    ]
    text = f"I see {_joined(said)}."
    return f"{text} There are {len(scene.things)} objects in all." if detailed else text


def short_description(scene: Scene) -> str:
    """The things by colour and shape alone, in the order of reading."""
    parts = _in_order((*scene.things, *scene.signs))
    said = [a(f"{part.color} {'sign' if isinstance(part, Sign) else part.shape}") for part in parts]
    return f"I see {_joined(said)}."


def colors_of(scene: Scene) -> str:
    """The colours of the things, in the order of reading."""
    return f"I see {_joined(list(dict.fromkeys(thing.color for thing in _in_order(scene.things))))}."


def shapes_of(scene: Scene) -> str:
    """The shapes of the things, in the order of reading."""
    return f"I see {_joined(list(dict.fromkeys(a(thing.shape) for thing in _in_order(scene.things))))}."


def _in_order(parts: Iterable[Thing | Sign]) -> list[Thing | Sign]:
    """In the order of reading."""
    return sorted(parts, key=lambda part: part.cell)


def _joined(said: list[str]) -> str:
    return " and ".join((", ".join(said[:-1]), said[-1]) if len(said) > 1 else said)


def number_of(name: str, number: int) -> str:
    """ "There are 3 circles." with ``name`` in the singular."""
    if number == 1:
        return f"There is 1 {name}."
    return f"There are {number or 'no'} {plural(name)}."


def missing(name: str) -> str:
    """What is said of a thing that is not there."""
    return f"I do not see {a(name)}."


def where(thing: Thing, other: Thing, rng: random.Random) -> str | None:
    """ "to the left of", "above", ...: where ``thing`` is as seen from ``other``."""
    words = relation(thing, other, rng)
    if words is None:
        return None
    return words[0] if words[0] in ("above", "below") else f"to the {words[0]} of"


def found_at(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One of the nine places that no sign covers, and what is there: "a large red circle", at times "nothing"."""
    signs = {(sign.cell[0], sign.cell[1] + more) for sign in scene.signs for more in (0, 1)}
    cells = {(row, column) for row in range(3) for column in range(3)} - signs
    empty = sorted(cells - {thing.cell for thing in scene.things})
    if empty and rng.random() < 0.2:
        return Thing("", "", "", rng.choice(empty)).place, "nothing"
    thing = rng.choice(scene.things)
    return thing.place, f"a {thing.size} {thing.color} {thing.shape}"


# ---------------------------------------------------------------------------------------------------- one turn each


class _Talk:
    """One conversation: the scene, and the thing spoken of last, which "it" means."""

    def __init__(self, scene: Scene, rng: random.Random):
        self.scene, self.rng = scene, rng
        self.it: tuple[Thing, str, str] | None = None  # the thing, the name it was called by, what was asked

    def _thing(self, without: str = "") -> tuple[Thing, str] | None:
        """A thing that has a name of its own, and that name, which says nothing of ``without``."""
        found = []
        for thing in self.scene.things:
            names = [name for name in self.scene.names(thing) if without != "color" or name == thing.shape]
            if names:
                found.append((thing, self.rng.choice(names)))
        if not found:
            return None
        thing, name = self.rng.choice(found)
        return thing, name.replace("object", self.rng.choice(ANYTHING))

    def describe(self) -> Turn:
        kind = self.rng.choices(("describe", "describe_short", "describe_long"), (6, 2, 2))[0]
        answers = {
            "describe": description(self.scene),
            "describe_short": short_description(self.scene),
            "describe_long": description(self.scene, detailed=True),
        }
        return ask_for(kind, self.rng), answers[kind]

    def count(self) -> Turn:
        scene, rng = self.scene, self.rng
        kind = rng.random()
        if kind < 0.15:
            return ask_for("count_all", rng), number_of("object", len(scene.things))
        some = rng.choice(scene.things)
        if kind < 0.7:
            shape = some.shape if rng.random() < 0.85 else rng.choice(list(SHAPES))
            name, number = shape, scene.count(shape=shape)
        else:
            color = some.color if rng.random() < 0.85 else rng.choice(list(COLORS))
            name, number = f"{color} {rng.choice(('object', 'thing', 'shape'))}", scene.count(color=color)
        return ask_for("count", rng, things=plural(name), a=a(name)), number_of(name, number)

    def at_place(self) -> Turn | None:
        """The colour, shape or size of a thing that is called by its place."""
        thing = self.rng.choice(self.scene.things)
        name = f"{self.rng.choice(ANYTHING)} at the {thing.place}"
        kind = self.rng.choice(("color", "shape", "size"))
        self.it = (thing, name, kind)
        facts = {"color": thing.color, "shape": a(thing.shape), "size": thing.size}
        return ask_for(kind, self.rng, thing=name), f"The {name} is {facts[kind]}."

    def listed(self) -> Turn:
        """Which colours or shapes there are."""
        kind = self.rng.choice(("colors", "shapes"))
        return ask_for(kind, self.rng), colors_of(self.scene) if kind == "colors" else shapes_of(self.scene)

    def color(self) -> Turn | None:
        found = self._thing(without="color")
        if found is None:
            return None
        self.it = (*found, "color")
        return ask_for("color", self.rng, thing=found[1]), f"The {found[1]} is {found[0].color}."

    def shape(self) -> Turn | None:
        things = [thing for thing in self.scene.things if f"{thing.color} object" in self.scene.names(thing)]
        if not things:
            return None
        thing = self.rng.choice(things)
        name = f"{thing.color} {self.rng.choice(ANYTHING)}"
        self.it = (thing, name, "shape")
        return ask_for("shape", self.rng, thing=name), f"The {name} is a {thing.shape}."

    def size(self) -> Turn | None:
        found = self._thing()
        if found is None:
            return None
        self.it = (*found, "size")
        return ask_for("size", self.rng, thing=found[1]), f"The {found[1]} is {found[0].size}."

    def place(self) -> Turn | None:
        found = self._thing()
        if found is None:
            return None
        self.it = (*found, "place")
        return ask_for("place", self.rng, thing=found[1]), f"The {found[1]} is at the {found[0].place}."

    def relation(self) -> Turn | None:
        scene, rng = self.scene, self.rng
        one, other = rng.sample(scene.things, 2)
        name, beside, side = spoken(scene, one, rng), spoken(scene, other, rng), where(one, other, rng)
        if name is None or beside is None or side is None:
            return None
        asked = ask_for("relation", rng, thing=name, other=beside)
        # A question that names two sides is answered with one of them.
        for sides in (("left", "right"), ("above", "below"), ("over", "under")):
            if all(word in asked.lower() for word in sides):
                upright = sides != ("left", "right")
                if (one.cell[0] if upright else one.cell[1]) == (other.cell[0] if upright else other.cell[1]):
                    return None
                first = one.cell[0] < other.cell[0] if upright else one.cell[1] < other.cell[1]
                side = {True: ("above", "below"), False: ("to the left of", "to the right of")}[upright][not first]
        self.it = (one, name, "relation")
        return asked, f"The {name} is {side} the {beside}."

    def sign(self) -> Turn | None:
        if not self.scene.signs:
            return missing_turn("sign", self.rng) if self.rng.random() < 0.2 else None
        sign = self.rng.choice(self.scene.signs)
        name = "sign" if len(self.scene.signs) == 1 and self.rng.random() < 0.6 else f"{sign.color} sign"
        return ask_for("sign", self.rng, sign=name), f"The {name} says {sign.word}."

    def present(self) -> Turn:
        thing = self.rng.choice(self.scene.things)
        name = thing.shape if self.rng.random() < 0.6 else f"{thing.color} {thing.shape}"
        return _presence(name, self.rng), f"Yes, there is {a(name)}."

    def absent(self) -> Turn:
        scene, rng = self.scene, self.rng
        kind = rng.random()
        if kind < 0.4:
            name = rng.choice([shape for shape in SHAPES if not scene.count(shape=shape)])
        elif kind < 0.6:
            pairs = [(c, s) for c in COLORS for s in SHAPES if not scene.count(s, c)]
            name = " ".join(rng.choice(pairs))
        else:
            name = rng.choice(THINGS)
        return _presence(name, rng), f"No, {missing(name)}"

    def check(self) -> Turn | None:
        """Is the circle red? Is it at the top left? Are there 2 circles?"""
        rng, found = self.rng, self._thing(without="color")
        if rng.random() < 0.25:
            shape = rng.choice(self.scene.things).shape
            true = self.scene.count(shape=shape)
            said = true if rng.random() < 0.5 else rng.choice([number for number in range(1, 5) if number != true])
            answer = f"{'Yes' if said == true else 'No'}, {_small(number_of(shape, true))}"
            return ask_for("check_count", rng, number=f"{said} {plural(shape) if said > 1 else shape}"), answer
        if found is None:
            return None
        thing, name = found
        kind = rng.choice(("color", "place"))
        true = thing.color if kind == "color" else f"at the {thing.place}"
        others = list(COLORS) if kind == "color" else [f"at the {place}" for place in PLACES]
        said = true if rng.random() < 0.5 else rng.choice([other for other in others if other != true])
        self.it = (thing, name, kind)
        answer = f"{'Yes' if said == true else 'No'}, the {name} is {true}."
        return ask_for("check", rng, thing=name, fact=said), answer

    def what_at(self) -> Turn:
        spot, said = found_at(self.scene, self.rng)
        return ask_for("what_at", self.rng, spot=spot), f"I see {said} at the {spot}."

    def false_premise(self) -> Turn:
        rng = self.rng
        gone = [shape for shape in SHAPES if not self.scene.count(shape=shape)]
        name = rng.choice(gone) if rng.random() < 0.6 else rng.choice(THINGS)
        return missing_turn(name, rng)

    def follow_up(self) -> Turn | None:
        """A question about "it", the other of two, or the same question about another thing."""
        if self.it is None:
            return None
        rng, (thing, name, asked) = self.rng, self.it
        kind = rng.choice(("it", "it", "about", "other"))
        if kind == "other":
            others = [t for t in self.scene.things if t.shape == thing.shape and t is not thing]
            if len(others) != 1 or asked not in ("place", "size", "color") or thing.color == others[0].color:
                return None
            self.it = (others[0], f"other {thing.shape}", asked)
            if asked == "place":
                said = f"at the {others[0].place}"
                return ask_for("other_place", rng, thing=thing.shape), f"The other {thing.shape} is {said}."
            return ask_for("other_color", rng, thing=thing.shape), f"The other {thing.shape} is {others[0].color}."
        if kind == "about":
            found = self._thing(without=asked)
            if found is None or found[0] is thing or asked not in ("color", "place", "size"):
                return None
            self.it = (*found, asked)
            facts = {"color": found[0].color, "place": f"at the {found[0].place}", "size": found[0].size}
            return ask_for("about", rng, thing=found[1]), f"The {found[1]} is {facts[asked]}."
        facts = {"color": thing.color, "place": f"at the {thing.place}", "size": thing.size, "shape": a(thing.shape)}
        unsaid = [fact for fact in facts if fact != asked and facts[fact].split()[-1] not in name]
        fact = rng.choice(unsaid)
        self.it = (thing, name, fact)
        return ask_for(f"it_{fact}", rng), f"It is {facts[fact]}."

    def chat(self) -> Turn:
        intent = self.rng.choices(*zip(*_CHAT, strict=True))[0]
        return ask_for(intent, self.rng), REPLIES[intent]


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _presence(name: str, rng: random.Random) -> str:
    return ask_for("presence", rng, a=a(name), things=plural(name))


def missing_turn(name: str, rng: random.Random) -> Turn:
    """A question that takes for granted what is not there."""
    if name == "sign":
        return ask_for("sign", rng, sign="sign"), missing("sign")
    return ask_for(rng.choice(("color", "place", "size")), rng, thing=name), missing(name)


_TURNS = (
    ("describe", 6), ("count", 6), ("color", 5), ("place", 5), ("present", 3), ("absent", 4), ("relation", 4),
    ("false_premise", 2), ("sign", 3), ("shape", 2), ("size", 2), ("chat", 9), ("follow_up", 7), ("check", 4),
    ("what_at", 3), ("at_place", 3), ("listed", 2),
)  # fmt: skip


_CHAT = (
    ("hello", 3), ("thanks", 3), ("praise", 2), ("how_are_you", 4), ("who", 5), ("can_do", 5), ("off_topic", 3),
    ("bye", 2),
)  # fmt: skip


def conversation(scene: Scene, rng: random.Random, turns: int) -> list[Turn]:
    """``turns`` questions and answers about a scene; some begin with a greeting or end with a goodbye."""
    talk, said = _Talk(scene, rng), []
    if rng.random() < 0.25:
        said.append((ask_for("hello", rng), REPLIES["hello"]))
    kinds, weights = zip(*_TURNS, strict=True)
    while len(said) < turns:
        kind = rng.choices(kinds, weights)[0]
        turn = getattr(talk, kind)()
        if turn is None or turn[0] in [question for question, _ in said]:
            continue
        if kind != "chat" and rng.random() < 0.08:  # a greeting and a question at once: the question is answered
            first = ask_for(rng.choice(("thanks", "praise") if said else ("hello",)), rng)
            turn = (f"{first}{'' if first[-1] in '.!?' else '.'} {turn[0]}", turn[1])
        said.append(turn)
    if rng.random() < 0.35:
        intent = rng.choice(("bye", "thanks"))
        said[-1] = (ask_for(intent, rng), REPLIES[intent])
    return said


def small_talk(rng: random.Random, turns: int) -> list[Turn]:
    """A conversation without a picture."""
    said = []
    for intent in rng.sample(list(REPLIES), min(turns, len(REPLIES))):
        said.append((ask_for(intent, rng), REPLIES[intent]))
    return said


# -------------------------------------------------------------------------------------------------- for evaluation


@dataclass(frozen=True)
class Asked:
    """One question of a held-out conversation: its kind, its words, and what it is about (a shape, a thing, ...)."""

    kind: str
    question: str
    subject: Thing | str | None


def held_out_conversations(seed: int, number: int) -> Iterator[tuple[Scene, list[Asked]]]:
    """``number`` conversations of six questions, one of each kind, in phrasings that training does not have.

    The scenes are of the evaluation split. Every thing asked about has a name of its own.
    """
    rng, index, found = random.Random(f"{seed}/eval/conversations"), -1, 0
    while found < number:
        scene = make_scene(seed, "eval", index)
        index -= 1  # the four families count upwards
        talk = _Talk(scene, rng)
        colored, placed = talk._thing(without="color"), talk._thing()
        if colored is None or placed is None:
            continue
        found += 1
        counted = rng.choice(scene.things).shape if rng.random() < 0.85 else rng.choice(list(SHAPES))
        gone = [shape for shape in SHAPES if not scene.count(shape=shape)]
        absent = rng.choice(gone) if rng.random() < 0.5 else rng.choice(HELD_OUT_THINGS)
        intent = rng.choice(list(HELD_OUT["small_talk"]))
        asked = [
            Asked("describe", _phrase("describe", rng), None),
            Asked("count", _phrase("count", rng, things=plural(counted), a=a(counted)), counted),
            Asked("color", _phrase("color", rng, thing=colored[1]), colored[0]),
            Asked("place", _phrase("place", rng, thing=placed[1]), placed[0]),
            Asked("absent", _phrase("absent", rng, a=a(absent)), absent),
        ]
        rng.shuffle(asked)
        small = Asked("small_talk", rng.choice(HELD_OUT["small_talk"][intent]), intent)
        asked.insert({"hello": 0, "how_are_you": 0, "who": 0, "can_do": 0}.get(intent, len(asked)), small)
        yield scene, asked


def _phrase(kind: str, rng: random.Random, **slots: str) -> str:
    said = rng.choice(HELD_OUT[kind]).format(picture=rng.choice(PICTURE), **slots)
    return said[0].upper() + said[1:]
