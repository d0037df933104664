"""Ways to ask in plain words: what a person may type about a picture, and in small talk.

Each intent has phrasings for training and others that are kept for evaluation. Slots: ``{thing}`` "red circle",
``{things}`` "circles", ``{number}`` "2 circles", ``{a}`` "a circle", ``{other}`` another thing, ``{sign}`` "green
sign", ``{spot}`` "top left", ``{fact}`` "red" or "at the top left", ``{picture}`` one of PICTURE. Small talk is put
together by :mod:`fura_vlm.embedded.phrases`.
"""

from __future__ import annotations

import random

from fura_vlm.embedded.phrases import MORE as MORE_PARTS
from fura_vlm.embedded.phrases import SMALL_TALK, from_parts

PICTURE = ("picture", "image", "picture", "image", "photo", "drawing", "pic", "card")

TRAINED: dict[str, tuple[str, ...]] = {
    "describe": (
        "Describe the {picture}.", "Describe this {picture}.", "What do you see?",
        "What do you see in the {picture}?", "What is in the {picture}?", "What is in this {picture}?",
        "What does the {picture} show?", "What can you see here?", "Tell me what you see.",
        "Tell me about the {picture}.", "What is there to see?", "Can you describe the {picture}?",
        "Could you describe this {picture} for me?", "What is shown here?", "Give me a description of the {picture}.",
        "Please describe what you see.", "Explain the {picture}.", "What's in the {picture}?", "What's this?",
        "What is on the {picture}?", "List the things in the {picture}.", "Name everything in the {picture}.",
        "What am I looking at?", "Which objects are in the {picture}?", "Which things do you see?",
        "What objects can you see?", "Tell me what the {picture} shows.", "I want to know what is in the {picture}.",
        "Write a caption for the {picture}.", "Look at the {picture}. What is there?",
    ),
    "describe_short": (
        "Describe the {picture} in a few words.", "Describe the {picture} briefly.", "In short, what do you see?",
        "Give a short description of the {picture}.", "What is in the {picture}? Be brief.", "Give a brief caption.",
    ),
    "describe_long": (
        "Describe the {picture} in detail.", "Give a detailed description of the {picture}.",
        "Tell me everything about the {picture}.", "Describe the {picture} as exactly as you can.",
        "What do you see in detail?", "Describe each thing in the {picture}.", "Give me all the details.",
    ),
    "count": (
        "How many {things} are there?", "How many {things} do you see?", "How many {things} are in the {picture}?",
        "How many {things} can you see?", "Count the {things}.", "Please count the {things}.", "How many {things}?",
        "What is the number of {things}?", "Tell me how many {things} there are.", "Can you count the {things}?",
        "Tell me the number of {things}.", "How many {things} does the {picture} have?",
        "What's the number of {things}?", "How many {things} does the {picture} show?",
        "Could you tell me how many {things} there are?", "I want to know how many {things} there are.",
        "Do you know how many {things} are here?", "Number of {things}?", "How many of the things are {things}?",
        "Give me the number of {things}.", "Are there many {things}? How many?", "{things}: how many?",
        "How many {things} are shown?",
    ),
    "count_all": (
        "How many things are there?", "How many objects are there?", "How many shapes do you see?",
        "How many objects are in the {picture}?", "Count the shapes.", "How many things can you see?",
        "Count all the objects.", "How many shapes are there in all?", "What is the number of things?",
    ),
    "color": (
        "What color is the {thing}?", "What colour is the {thing}?", "Which color does the {thing} have?",
        "Which color is the {thing}?", "Tell me the color of the {thing}.", "What is the color of the {thing}?",
        "What's the color of the {thing}?", "The {thing} is what color?", "Can you tell me the color of the {thing}?",
        "Do you know what color the {thing} is?", "What color does the {thing} have?", "Color of the {thing}?",
        "Say the color of the {thing}.", "I want to know the color of the {thing}.", "Which colour is the {thing}?",
        "Tell me what color the {thing} is.", "In what color is the {thing} drawn?", "Name the color of the {thing}.",
        "How would you call the color of the {thing}?", "What color do you see on the {thing}?",
    ),
    "shape": (
        "What shape is the {thing}?", "What is the {thing}?", "What kind of shape is the {thing}?",
        "Which shape does the {thing} have?", "What's the {thing}?", "Tell me the shape of the {thing}.",
        "The {thing} is what?", "What form has the {thing}?", "What is the shape of the {thing}?",
        "Do you know what the {thing} is?", "What do you call the {thing}?",
    ),
    "size": (
        "Is the {thing} small or large?", "How big is the {thing}?", "How large is the {thing}?",
        "What size is the {thing}?", "Is the {thing} big or small?", "What is the size of the {thing}?",
        "Tell me the size of the {thing}.", "Which size does the {thing} have?",
    ),
    "place": (
        "Where is the {thing}?", "Where do you see the {thing}?", "Where can I find the {thing}?",
        "Tell me where the {thing} is.", "In which part of the {picture} is the {thing}?", "Where's the {thing}?",
        "Where is the {thing} in the {picture}?", "Can you tell me where the {thing} is?", "Find the {thing}.",
        "What is the place of the {thing}?", "In what place is the {thing}?", "The {thing} is where?",
        "What is the position of the {thing}?", "Do you know where the {thing} is?", "Locate the {thing}.",
        "Where should I look for the {thing}?", "Show me where the {thing} is.", "Where does the {thing} stand?",
        "I am looking for the {thing}. Where is it?", "I want to know where the {thing} is.", "Place of the {thing}?",
        "At which place do you see the {thing}?",
    ),
    "presence": (
        "Is there {a}?", "Do you see {a}?", "Is there {a} in the {picture}?", "Can you see {a}?",
        "Does the {picture} show {a}?", "Does the {picture} have {a}?", "Do you see {a} in the {picture}?",
        "Is {a} in the {picture}?", "Is {a} there?", "Can you find {a}?", "Tell me if there is {a}.",
        "Tell me whether there is {a}.", "I want to know if there is {a}.", "Is {a} shown?", "Is there {a} here?",
        "Are there any {things}?", "Do you see any {things}?", "Are there {things} in the {picture}?",
        "Does the {picture} contain {a}?", "Can I see {a} here?", "Is {a} one of the things in the {picture}?",
        "Is there {a} somewhere?", "Do you notice {a}?", "Have you seen {a}?", "Any {things} in the {picture}?",
    ),
    "relation": (
        "Is the {thing} to the left or to the right of the {other}?", "Is the {thing} left or right of the {other}?",
        "Is the {thing} above or below the {other}?", "Is the {thing} over or under the {other}?",
        "Where is the {thing} as seen from the {other}?", "How does the {thing} lie to the {other}?",
        "Where is the {thing} compared with the {other}?", "On which side of the {other} is the {thing}?",
        "Where is the {thing} relative to the {other}?", "Where from the {other} is the {thing}?",
    ),
    "sign": (
        "What does the {sign} say?", "What is written on the {sign}?", "Read the {sign}.", "Can you read the {sign}?",
        "What word is on the {sign}?", "What can you read on the {sign}?", "Tell me what the {sign} says.",
        "What's on the {sign}?", "Which word does the {sign} show?", "Please read the {sign} to me.",
        "Read me the word on the {sign}.", "What text is on the {sign}?",
    ),
    "check": (
        "Is the {thing} {fact}?", "Is it true that the {thing} is {fact}?", "Is the {thing} really {fact}?",
        "Would you say that the {thing} is {fact}?", "The {thing} is {fact}, right?",
        "The {thing} is {fact}, isn't it?", "I think the {thing} is {fact}. Right?",
        "Tell me if the {thing} is {fact}.",
    ),
    "check_count": (
        "Are there {number}?", "Do you see {number}?", "Is it true that there are {number}?",
        "There are {number}, right?", "Does the {picture} have {number}?", "I count {number}. Right?",
        "Are there exactly {number}?",
    ),
    "what_at": (
        "What is at the {spot}?", "What do you see at the {spot}?", "What's at the {spot}?",
        "What can be seen at the {spot}?", "Is there something at the {spot}?", "Which thing is at the {spot}?",
        "Tell me what is at the {spot}.", "And at the {spot}?", "What stands at the {spot} of the {picture}?",
        "What about the {spot}?",
    ),
    "colors": (
        "What colors do you see?", "Which colors are there?", "What colors are in the {picture}?", "Name the colors.",
        "Which colors does the {picture} have?", "What are the colors?", "List the colors in the {picture}.",
    ),
    "shapes": (
        "What shapes do you see?", "Which shapes are there?", "What shapes are in the {picture}?", "Name the shapes.",
        "Which shapes does the {picture} show?", "What are the shapes?", "List the shapes in the {picture}.",
    ),
    "no_picture": (
        "Describe the {picture}.", "What do you see?", "What is in the {picture}?", "Look at this {picture}.",
        "What does the {picture} show?", "Can you see the {picture}?", "How many things are in the {picture}?",
        "What colors do you see?",
    ),
    "it_color": (
        "What color is it?", "And what color is it?", "What is its color?", "Which color does it have?",
        "And its color?", "What colour is it?",
    ),
    "it_place": (
        "Where is it?", "And where is it?", "Where exactly is it?", "And its place?", "Where do you see it?",
        "In which part is it?",
    ),
    "it_size": ("How large is it?", "Is it small or large?", "And how big is it?", "What size is it?", "Is it big?"),
    "it_shape": ("What shape is it?", "And what is it?", "What shape does it have?", "And its shape?"),
    "about": (
        "And the {thing}?", "What about the {thing}?", "And what about the {thing}?", "How about the {thing}?",
        "The {thing}, too?", "Now the {thing}.",
    ),
    "other_color": (
        "And the other one?", "What about the other one?", "And what color is the other one?",
        "What color is the other {thing}?", "And the other {thing}?",
    ),
    "other_place": (
        "And the other one?", "Where is the other one?", "What about the other {thing}?",
        "And where is the other {thing}?", "And the second one?",
    ),
}  # fmt: skip
HELD_OUT: dict = {
    "describe": (
        "What is going on in this {picture}?", "Could you tell me what this {picture} contains?",
        "Say what there is in the {picture}.", "What do we have here?", "Please tell me what is drawn here.",
        "Walk me through the {picture}.", "I cannot see the {picture}. What is in it?", "What things are in here?",
    ),
    "count": (
        "Could you count the {things} for me?", "How many {things} did you find?",
        "Please say how many {things} you see.", "What number of {things} is there?",
        "I count the {things}. What should I get?", "How many {things} are in here?",
        "Tell me, how many {things} are drawn?", "How often do you see {a}? Give the number of {things}.",
    ),
    "color": (
        "Could you name the color of the {thing}?", "What color would you say the {thing} is?",
        "Which color was used for the {thing}?", "Do you see the {thing}? What is its color?",
        "I need the color of the {thing}.", "The {thing} has which color?",
        "Look at the {thing}. What color is that?", "The color of the {thing}, please.",
    ),
    "place": (
        "Where would I find the {thing}?", "Whereabouts is the {thing}?", "Could you say where the {thing} is?",
        "Point me to the {thing}.", "On what part of the {picture} is the {thing}?",
        "Please find the {thing} for me.", "Where was the {thing} drawn?", "In which place can the {thing} be seen?",
    ),
    "absent": (
        "Could there be {a} in this {picture}?", "Did you see {a}?", "Is {a} anywhere in the {picture}?",
        "I think I see {a}. Is it there?", "Would you say there is {a}?", "Can {a} be seen here?",
        "Look for {a}. Is there one?", "Please check if there is {a}.",
    ),
    "small_talk": {
        "hello": ("Hello, nice to meet you!", "Good afternoon!", "Hello again!", "Hey you!"),
        "thanks": (
            "Thank you so much!", "That was helpful, thank you.", "Thanks, that is all I wanted.", "Wow, thanks!",
        ),
        "bye": ("Bye for now!", "I am leaving now, goodbye.", "See you next time!"),
        "how_are_you": ("And how are you doing today?", "Are you doing well?", "Hi, how is your day?"),
        "who": ("Who is speaking?", "Are you a computer?"),
        "can_do": ("What can you help me with?", "What are you able to do?"),
    },
}  # fmt: skip

_KEPT = {"presence": HELD_OUT["absent"], **HELD_OUT, **HELD_OUT["small_talk"]}
TRAINED |= {intent: from_parts(parts, _KEPT.get(intent, ())) for intent, parts in SMALL_TALK.items()}
# What the mixture has besides. The base was pretrained without it: its text has the sentences of TRAINED.
MORE = {
    intent: tuple(sentence for parts in ways for sentence in from_parts(parts, _KEPT[intent]))
    for intent, ways in MORE_PARTS.items()
}

_OPENINGS = (
    "Please tell me: ",
    "Tell me, ",
    "Now, ",
    "So, ",
    "OK, ",
    "Hey, ",
    "One question: ",
    "And ",
    "Next: ",
    "Well, ",
)


def ask_for(intent: str, rng: random.Random, more: bool = True, **slots: str) -> str:
    """A phrasing of ``intent`` as training has it, with the slots filled and, at times, careless spelling.

    Args:
        more: whether ``MORE`` counts, too, as it does in the mixture.

    Raises:
        KeyError: for an unknown intent, or a slot that its phrasing needs and was not given.
    """
    sentences = MORE[intent] if more and intent in MORE and rng.random() < 0.5 else TRAINED[intent]
    said = rng.choice(sentences).format(picture=rng.choice(PICTURE), **slots)
    if rng.random() < 0.12 and said[0].isupper() and said.endswith("?"):
        said = rng.choice(_OPENINGS) + said[0].lower() + said[1:]
    return careless(said[0].upper() + said[1:], rng)


def careless(said: str, rng: random.Random) -> str:
    """The sentence as it stands, or as people type it: all small, or without its last mark."""
    kind = rng.random()
    if kind < 0.12:
        return said.lower().rstrip("?.!")
    if kind < 0.20:
        return said.rstrip("?.")
    if kind < 0.24:
        return said.lower()
    return said
