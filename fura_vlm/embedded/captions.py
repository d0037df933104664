"""What the embedded model is pretrained on: statements about scenes, and plain text. No questions with answers.

The captions are many short true sentences about one picture, as in dense captioning; the text tells of the same
world without a picture and holds the words that people use to ask, so that no word of an instruction is new to
the model. Nothing here pairs a question with its answer: following instructions is left to fine-tuning.
"""

from __future__ import annotations

import random

from fura_vlm.embedded.questions import LETTER, PLACES, ROLES, SHORT, options, plural, relation, role
from fura_vlm.embedded.scenes import COLORS, SHAPES, SIGN_COLORS, WORDS, Scene
from fura_vlm.families.vicuna import SYSTEM_PROMPT


def caption(scene: Scene, rng: random.Random, sentences: int = 10) -> str:
    """True sentences about ``scene``, in random order, joined by spaces."""
    said = [_list(scene, rng)] if rng.random() < 0.3 else []
    while len(said) < sentences:
        sentence = rng.choice(_STATEMENTS)(scene, rng)
        if sentence:
            said.append(sentence)
    rng.shuffle(said)
    return " ".join(said)


def text(rng: random.Random, sentences: int = 8) -> str:
    """Sentences without a picture."""
    return " ".join(rng.choice(_TEXTS)(rng) for _ in range(sentences))


# ----------------------------------------------------------------------------------------- about a picture


def _list(scene, rng):
    things = [f"a {t.size} {t.color} {t.shape} at the {t.place}" for t in rng.sample(scene.things, len(scene.things))]
    return "We see " + ", ".join(things) + "."


def _attribute(scene, rng):
    thing = rng.choice(scene.things)
    names = scene.names(thing)
    if not names:
        return None
    name = rng.choice(names)
    said = [f"The {name} is {thing.size}.", f"The {name} is at the {thing.place}."]
    if name == thing.shape:
        said += [f"The {name} is {thing.color}.", f"The color of the {name} is {thing.color}."]
    if name == f"{thing.color} object":
        said += [f"The {name} is a {thing.shape}.", f"The shape of the {name} is: {thing.shape}."]
    return rng.choice(said)


def _count(scene, rng):
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        shape = thing.shape if rng.random() < 0.8 else rng.choice(list(SHAPES))
        name, number = plural(shape), scene.count(shape=shape)
    else:
        color = thing.color if rng.random() < 0.8 else rng.choice(list(COLORS))
        name, number = f"{color} objects", scene.count(color=color)
    return rng.choice((f"The number of {name} is {number}.", f"Counting the {name} gives {number}."))


def _relation(scene, rng):
    a, b = rng.sample(scene.things, 2)
    words = relation(a, b, rng)
    if words is None or not scene.names(a) or not scene.names(b):
        return None
    where = words[0] if words[0] in ("above", "below") else f"to the {words[0]} of"
    return f"The {rng.choice(scene.names(a))} is {where} the {rng.choice(scene.names(b))}."


def _presence(scene, rng):
    shape = rng.choice(list(SHAPES))
    if scene.count(shape=shape):
        return rng.choice((f"A {shape} is present.", f"As for a {shape}, the image has one."))
    return rng.choice((f"A {shape} is absent.", f"As for a {shape}, the image has none."))


def _sign(scene, rng):
    if not scene.signs:
        return "No sign is present."
    sign = rng.choice(scene.signs)
    name = "sign" if len(scene.signs) == 1 and rng.random() < 0.5 else f"{sign.color} sign"
    return rng.choice((f"The {name} says {sign.word}.", f"Written on the {name} is {sign.word}."))


def _role(scene, rng):
    given = role(scene, rng)
    if given is None:
        return None
    hint, name, thing = given
    rest = [
        f"The {name} is {thing.color}.",
        f"The {name} is at the {thing.place}.",
        f"The {name} is {thing.size}.",
    ]
    if rng.random() < 0.3:
        return f"{hint} The number of {plural(name)} is {scene.count(shape=thing.shape)}."
    return f"{hint} {rng.choice(rest)}"


def _options(scene, rng):
    thing = rng.choice(scene.things)
    names = scene.names(thing)
    kind = rng.choice(("color", "place", "count", "word"))
    if kind == "word" and scene.signs:
        sign = rng.choice(scene.signs)
        name, answer, others = f"what the {sign.color} sign says", sign.word, WORDS
    elif kind == "count":
        name, answer = f"the number of {plural(thing.shape)}", str(scene.count(shape=thing.shape))
        others = [str(n) for n in range(6)]
    elif kind == "color" and thing.shape in names:
        name, answer, others = f"the color of the {thing.shape}", thing.color, COLORS
    elif names:
        name, answer, others = f"the place of the {rng.choice(names)}", thing.place, PLACES
    else:
        return None
    choices, letter = options(answer, others, rng)
    return f"Listed are {_lettered(choices, rng)} Of these {name} is {letter}."


def _lettered(choices, rng):
    separator, end = rng.choice(((", ", "."), ("\n", "\n"), (" ", ".")))
    return separator.join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False)) + end


_STATEMENTS = (
    _attribute, _attribute, _attribute, _count, _count, _relation, _relation, _presence, _presence,
    _sign, _sign, _role, _role, _options, _options, _options,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- without a picture


def _a(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _thing(rng):
    return f"{rng.choice(list(COLORS))} {rng.choice(list(SHAPES))}"


def _asking(rng):
    who = rng.choice(("Anna", "Tom", "The user", "USER", "A curious user", "ASSISTANT", "The assistant"))
    shape, color, name = rng.choice(list(SHAPES)), rng.choice(list(COLORS)), rng.choice(ROLES)
    asked = rng.choice((
        f"What color is the {shape}?", f"Which color does the {shape} have?", f"What shape is the {color} object?",
        f"What is the {color} object?", f"Is the {shape} small or large?", f"Where is the {shape}?",
        f"How many {plural(shape)} are there?", f"How many {color} objects are there?",
        f"Is the {shape} to the left or to the right of the {_thing(rng)}?",
        f"Is the {shape} above or below the {_thing(rng)}?", f"Is there a {shape} in the image?",
        "What does the sign say?", f"What is written on the {rng.choice(SIGN_COLORS)} sign?",
        "What word is written on the sign?", f"Which color is the {name}?",
        f"How many of this kind are there: {name}?",
    ))  # fmt: skip
    return rng.choice((f'{who} asks: "{asked}"', f'"{asked}" is what {who} wants to know.'))


def _manner(rng):
    return rng.choice((
        SYSTEM_PROMPT, f"Some tasks end like this: {SHORT}", f"Some tasks end like this: {LETTER}",
        "USER is the one who asks.", "ASSISTANT is the one who helps.",
        "USER: and ASSISTANT: begin the lines of a chat.",
        "Yes and No are short answers.", "A, B, C and D are letters of options.",
        "Context: what comes before a question.", "Any answer may be a word, a number, a letter or a phrase.",
    ))  # fmt: skip


def _story(rng):
    role_name = rng.choice(ROLES)
    return rng.choice((
        f"Once {_a(_thing(rng))} stood at the {rng.choice(PLACES)} of a page.",
        f"A {rng.choice(SIGN_COLORS)} sign stands in the picture.",
        f"The {rng.choice(ROLES)} drew {rng.randint(0, 5)} {plural(rng.choice(list(SHAPES)))}.",
        f"On this card each {rng.choice(list(SHAPES))} is a {role_name}.",
        f"The word {rng.choice(WORDS)} was painted in {rng.choice(list(COLORS))}.",
        f"Some like {_thing(rng)}s, others like {_thing(rng)}s.",
    ))  # fmt: skip


def _looking_up(rng):
    choices, letter = options(*rng.choice((
        (rng.choice(list(COLORS)), COLORS), (rng.choice(WORDS), WORDS), (rng.choice(PLACES), PLACES),
        (str(rng.randint(0, 5)), [str(n) for n in range(6)]),
    )), rng)  # fmt: skip
    answer = choices["ABCDE".index(letter)]
    return rng.choice((
        f"Listed are {_lettered(choices, rng)} Of these {answer} is {letter}.",
        f"Listed are {_lettered(choices, rng)} Of these {letter} is {answer}.",
    ))  # fmt: skip


def _knowing(rng):
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    place = rng.randrange(25)
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return rng.choice((
        f"The letter after {letters[place]} is {letters[place + 1]}.",
        f"{a} and {b} make {a + b}.",
        f"{max(a, b) + 1} is more than {min(a, b)}.",
        f"The opposite of {rng.choice(('left is right', 'above is below', 'small is large', 'top is bottom'))}.",
    ))  # fmt: skip


_TEXTS = (_asking, _asking, _asking, _manner, _manner, _story, _story, _looking_up, _looking_up, _knowing)
