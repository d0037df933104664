"""What the embedded model is pretrained on: statements about scenes, and plain text. No questions with answers.

The captions are many short true sentences about one picture, as in dense captioning; the text tells of the same
world without a picture and holds the words that people use to ask, so that no word of an instruction is new to
the model. Nothing here pairs a question with its answer: following instructions is left to fine-tuning.
"""

from __future__ import annotations

import random

from fura_vlm.embedded import asking, words
from fura_vlm.embedded.conversations import (
    ANYTHING,
    REPLIES,
    a,
    colors_of,
    description,
    found_at,
    missing,
    number_of,
    shapes_of,
    short_description,
    spoken,
    where,
)
from fura_vlm.embedded.questions import LETTER, PLACES, ROLES, SHORT, options, plural, role
from fura_vlm.embedded.scenes import COLORS, OTHER_SHAPES, SHAPES, SIGN_COLORS, WORDS, Scene
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
    kind = rng.random()
    if kind < 0.5:
        return description(scene, detailed=rng.random() < 0.3)
    if kind < 0.7:
        return short_description(scene)
    if kind < 0.8:
        return rng.choice((colors_of, shapes_of))(scene)
    things = [f"a {t.size} {t.color} {t.shape} at the {t.place}" for t in rng.sample(scene.things, len(scene.things))]
    return "We see " + ", ".join(things) + "."


def _fact(scene, rng) -> tuple[list[str], str, str] | None:
    """One fact about one thing: what it is about, in several words, the fact in short, and a whole sentence."""
    thing = rng.choice(scene.things)
    names = scene.names(thing)
    kind = rng.choice(("color", "shape", "size", "place", "place"))
    by_place = f"{rng.choice(ANYTHING)} at the {thing.place}" if rng.random() < 0.2 else None
    if kind == "color" and (by_place or thing.shape in names):
        name = by_place or thing.shape
        about = [f"the color of the {name}", f"what color the {name} is", f"which color the {name} has"]
        return about, thing.color, f"The {name} is {thing.color}."
    if kind == "shape" and (by_place or f"{thing.color} object" in names):
        name = by_place or f"{thing.color} {rng.choice(ANYTHING)}"
        about = [f"the shape of the {name}", f"what shape the {name} is", f"what the {name} is"]
        return about, thing.shape, f"The {name} is {a(thing.shape)}."
    name = spoken(scene, thing, rng)
    if name is None:
        return None
    if kind == "size":
        about = [f"the size of the {name}", f"whether the {name} is small or large", f"how large the {name} is"]
        return about, thing.size, f"The {name} is {thing.size}."
    about = [f"the place of the {name}", f"where the {name} is", f"where to find the {name}"]
    return about, thing.place, f"The {name} is at the {thing.place}."


def _number(scene, rng):
    thing, kind = rng.choice(scene.things), rng.random()
    if kind < 0.1:
        name, number = rng.choice(("object", "thing", "shape")), len(scene.things)
    elif kind < 0.55:
        shape = thing.shape if rng.random() < 0.75 else rng.choice(list(SHAPES))
        name, number = shape, scene.count(shape=shape)
    else:
        color = thing.color if rng.random() < 0.75 else rng.choice(list(COLORS))
        name, number = f"{color} {rng.choice(('object', 'object', 'thing', 'shape'))}", scene.count(color=color)
    many = plural(name)
    about = [f"the number of {many}", f"how many {many} there are", f"how many {many} the picture shows"]
    return about, str(number), number_of(name, number)


def _side(scene, rng):
    if len(scene.things) < 2:
        return None
    thing, other = rng.sample(scene.things, 2)
    name, beside, side = spoken(scene, thing, rng), spoken(scene, other, rng), where(thing, other, rng)
    if name is None or beside is None or side is None:
        return None
    word = next(word for word in ("left", "right", "above", "below") if word in side)
    sides = "left or right of" if word in ("left", "right") else "above or below"
    about = [
        f"whether the {name} is {sides} the {beside}",
        f"where the {name} is as seen from the {beside}",
        f"whether the {name} is to the left or to the right of the {beside}"
        if word in ("left", "right")
        else f"whether the {name} is {sides} the {beside}",
        f"the {name} beside the {beside}",
        f"the side of the {name} from the {beside}",
    ]
    return about, word, f"The {name} is {side} the {beside}."


def _there(scene, rng):
    shape = rng.choice((*SHAPES, *SHAPES, *OTHER_SHAPES))
    color = rng.choice(list(COLORS)) if rng.random() < 0.25 else None
    if rng.random() < 0.3:
        thing = rng.choice(scene.things)
        shape, color = thing.shape, thing.color
    name = shape if color is None else f"{color} {shape}"
    there = bool(sum(t.shape == shape and color in (None, t.color) for t in scene.things))
    if rng.random() < 0.2:
        name, there = rng.choice(words.THINGS + words.HELD_OUT_THINGS), False
    about = [f"whether there is {a(name)}", f"whether the image has {a(name)}", f"if {a(name)} is in the picture"]
    said = f"There is {a(name)}." if there else missing(name)
    return about, "Yes" if there else "No", said


def _reading(scene, rng):
    if not scene.signs:
        return None
    sign = rng.choice(scene.signs)
    name = "sign" if len(scene.signs) == 1 and rng.random() < 0.5 else f"{sign.color} sign"
    kind = rng.random()
    if kind < 0.15:  # letters alone are easier to learn than whole words
        about = [f"the first letter on the {name}", f"what the {name} begins with"]
        return about, sign.word[0], f"The {name} begins with {sign.word[0]}."
    if kind < 0.3:
        about = [f"the last letter on the {name}", f"what the {name} ends with"]
        return about, sign.word[-1], f"The {name} ends with {sign.word[-1]}."
    about = [f"what the {name} says", f"what is written on the {name}", f"the word on the {name}"]
    return about, sign.word, f"The {name} says {sign.word}."


def _spot(scene, rng):
    spot, said = found_at(scene, rng)
    about = [f"what is at the {spot}", f"the thing at the {spot}", f"which thing is at the {spot}"]
    return about, said, f"I see {said} at the {spot}."


def _true(scene, rng):
    thing = rng.choice(scene.things)
    name = spoken(scene, thing, rng)
    if name is None:
        return None
    color = thing.shape == name and rng.random() < 0.5
    true, others = (thing.color, COLORS) if color else (f"at the {thing.place}", [f"at the {spot}" for spot in PLACES])
    said = true if rng.random() < 0.5 else rng.choice([other for other in others if other != true])
    word = "Yes" if said == true else "No"
    about = [f"whether the {name} is {said}", f"if the {name} is {said}", f"is the {name} {said}"]
    return about, word, f"{word}, the {name} is {true}."


_FACTS = (  # reading is learned last
    (_fact,) * 4 + (_number,) * 2 + (_side,) * 3 + (_there,) * 2 + (_spot,) + (_true,) + (_reading,) * 4
)


def _sentence(scene, rng):
    """A fact as a plain sentence."""
    fact = rng.choice(_FACTS)(scene, rng)
    return fact and fact[2]


def _note(scene, rng):
    """A fact as a note: first what it is about, then the fact, so that what is told is looked up before it is said."""
    fact = rng.choice(_FACTS)(scene, rng)
    if fact is None:
        return None
    about, short, sentence = fact
    topic = rng.choice(about)
    topic = topic[0].upper() + topic[1:]
    return rng.choice((
        f"{topic}: {short}.", f"{topic}: {short}.", f"{topic}:\n{short}", f"{topic} - {short}.", f"{topic}. {sentence}",
        f"About {topic[0].lower() + topic[1:]}: {sentence}",
    ))  # fmt: skip


def _role(scene, rng):
    given = role(scene, rng)
    if given is None:
        return None
    hint, name, thing = given
    rest = [
        f"The {name} is {thing.color}.",
        f"The color of the {name}: {thing.color}.",
        f"The {name} is at the {thing.place}.",
        f"Where the {name} is: {thing.place}.",
        f"The {name} is {thing.size}.",
    ]
    if rng.random() < 0.3:
        return f"{hint} The number of {plural(name)} is {scene.count(shape=thing.shape)}."
    return f"{hint} {rng.choice(rest)}"


def _options(scene, rng):
    """A list of choices and the letter of the true one, with what is looked up before the list or after it."""
    hint, kind = "", rng.choice(("color", "place", "count", "word", "color", "place"))
    given = role(scene, rng) if rng.random() < 0.6 else None
    thing = rng.choice(scene.things)
    names = scene.names(thing)
    if given and kind != "word":
        hint, name, thing = given
        names = [name]
    if kind == "word" and scene.signs:
        sign = rng.choice(scene.signs)
        name, answer, others = f"what is written on the {sign.color} sign", sign.word, WORDS
    elif kind == "count":
        counted = names[0] if hint else thing.shape
        many = plural(counted)
        name, answer = (
            rng.choice((f"the number of {many}", f"how many there are of this kind: {counted}")),
            str(scene.count(shape=thing.shape)),
        )
        others = [str(n) for n in range(6)]
    elif kind == "color" and (hint or thing.shape in names):
        called = names[0] if hint else thing.shape
        name, answer, others = (
            rng.choice((f"the color of the {called}", f"which color the {called} is")),
            thing.color,
            COLORS,
        )
    elif kind == "place" and names:
        called = rng.choice(names)
        name, answer, others = rng.choice((f"the place of the {called}", f"where the {called} is")), thing.place, PLACES
    else:
        return None
    choices, letter = options(answer, others, rng)
    listed = _lettered(choices, rng)
    hint = rng.choice((f"{hint} ", f"Context: {hint}\n")) if hint else ""
    return hint + rng.choice((
        f"Listed are {listed} Of these {name} is {letter}.",
        f"One of these is {name}.\n{listed} The letter is {letter}.",
        f"{name[0].upper() + name[1:]} is in this list.\n{listed} It is {letter}.",
        f"{name[0].upper() + name[1:]} by letter:\n{listed} {letter}.",
    ))  # fmt: skip


def _lettered(choices, rng):
    separator, end = rng.choice(((", ", "."), ("\n", "\n"), ("\n", "\n"), (" ", ".")))
    return separator.join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False)) + end


_STATEMENTS = (_sentence,) * 4 + (_note,) * 7 + (_role, _options, _options, _options)


# ------------------------------------------------------------------------------------------- without a picture


def _thing(rng):
    return f"{rng.choice(list(COLORS))} {rng.choice(list(SHAPES))}"


def _person(rng):
    return rng.choice((*words.PEOPLE, "The user", "USER", "A curious user", "ASSISTANT", "The assistant", "A child"))


_TASKS = (
    "What color is the {shape}?", "Which color does the {shape} have?", "What shape is the {color} object?",
    "What is the {color} object?", "Is the {shape} small or large?", "Where is the {shape}?",
    "How many {many} are there?", "How many {color} objects are there?",
    "Is the {shape} to the left or to the right of the {other}?", "Is the {shape} above or below the {other}?",
    "Is there a {shape} in the image?", "What does the sign say?", "What is written on the {sign} sign?",
    "What word is written on the sign?", "Which color is the {name}?", "How many of this kind are there: {name}?",
)  # fmt: skip


def _asking(rng):
    who, shape = _person(rng), rng.choice(list(SHAPES))
    asked = rng.choice(_TASKS).format(
        shape=shape, many=plural(shape), color=rng.choice(list(COLORS)), other=_thing(rng),
        sign=rng.choice(SIGN_COLORS), name=rng.choice(ROLES),
    )  # fmt: skip
    return rng.choice((f'{who} asks: "{asked}"', f'"{asked}" is what {who} wants to know.'))


def _wondering(rng):
    """Two ways to ask the same, or what a question is about. No answer."""
    intent = rng.choice(list(asking.TRAINED))
    name = rng.choice((
        rng.choice(list(SHAPES)), _thing(rng), f"{rng.choice(list(COLORS))} {rng.choice(('object', 'thing', 'one'))}",
        rng.choice(words.THINGS + words.HELD_OUT_THINGS),
    ))  # fmt: skip
    slots = {
        "thing": name,
        "things": plural(name),
        "a": a(name),
        "other": _thing(rng),
        "sign": f"{rng.choice(SIGN_COLORS)} sign",
        "number": f"{rng.randint(2, 5)} {plural(name)}",
        "spot": rng.choice(PLACES),
        "fact": rng.choice((rng.choice(list(COLORS)), f"at the {rng.choice(PLACES)}")),
    }
    one, two = (asking.ask_for(intent, rng, more=False, **slots) for _ in range(2))
    about = {
        "describe": "the whole picture", "count": f"the number of {plural(name)}", "color": f"the color of the {name}",
        "place": f"the place of the {name}", "presence": f"whether there is {a(name)}",
        "size": f"the size of the {name}",
        "shape": f"the shape of the {name}", "sign": f"the word on the {slots['sign']}",
        "relation": f"the side of the {name} from the {slots['other']}", "what_at": f"what is at the {slots['spot']}",
        "check": f"whether the {name} is {slots['fact']}", "check_count": f"whether there are {slots['number']}",
        "colors": "all the colors", "shapes": "all the shapes", "hello": "a greeting", "thanks": "thanks",
        "bye": "a goodbye", "how_are_you": "how one is", "who": "who one is", "can_do": "what one can do",
        "praise": "praise", "off_topic": "other things than pictures",
    }.get(intent)  # fmt: skip
    ways = [
        f'"{one}" and "{two}" ask for the same.',
        f'"{one}" In other words: "{two}"',
        f'{_person(rng)} says: "{one}"',
    ]
    if about:
        ways += [f'"{one}" is about {about}.', f'{_person(rng)} asks about {about}: "{one}"', f'About {about}: "{one}"']
    return rng.choice(ways)


def _daily(rng):
    """Small sentences of everyday words."""
    thing, other = (rng.choice(words.THINGS + words.HELD_OUT_THINGS) for _ in range(2))
    who, does, look = rng.choice(words.PEOPLE), rng.choice(words.DOES), rng.choice(words.LOOKS)
    small = rng.sample(words.EVERYDAY, 6)
    color = rng.choice((*COLORS, *words.OTHER_COLORS))
    return rng.choice((
        f"{who} {does} {a(thing)}.", f"The {thing} is {look}.", f"{a(look)} {thing} and {a(color)} {other}.",
        f"{who} {does} the {color} {thing} near the {other}.", f"No {thing} is here, {who} says.",
        rng.choice(words.TALK), rng.choice(words.TALK), f"Words: {', '.join(small)}.", f"{' '.join(small)}",
        f"{who} has {rng.choice(words.NUMBERS)} {plural(thing)}.",
        f"I do not see {a(thing)}, {who} says.", f"The colour {color} is a color.",
        f'"{rng.choice(words.TALK)}" says {who}.',
        f"{a(rng.choice(words.OTHER_SHAPES))} is a shape.", f"{who} {does} and {rng.choice(words.DOES)}.",
        f"In the picture is {a(thing)}.", rng.choice(list(REPLIES.values())), f"yes, no, {thing}, {color}, {look}.",
    ))  # fmt: skip


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
        f"Once {a(_thing(rng))} stood at the {rng.choice(PLACES)} of a page.",
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
    m, n = rng.randint(0, 9), rng.randint(0, 9)
    return rng.choice((
        f"The letter after {letters[place]} is {letters[place + 1]}.",
        f"{m} and {n} make {m + n}.",
        f"{max(m, n) + 1} is more than {min(m, n)}.",
        f"The opposite of {rng.choice(('left is right', 'above is below', 'small is large', 'top is bottom'))}.",
    ))  # fmt: skip


_TEXTS = (
    _asking, _asking, _wondering, _wondering, _wondering, _wondering, _daily, _daily, _daily, _manner, _manner, _story,
    _looking_up, _looking_up, _knowing,
)  # fmt: skip
