"""Conversations in plain words: true answers, phrasings of their own for evaluation, and a judge of answers."""

import random
import re

import pytest

from fura_vlm.embedded.asking import HELD_OUT, MORE, TRAINED
from fura_vlm.embedded.conversations import (
    KINDS,
    Asked,
    conversation,
    description,
    held_out_conversations,
    small_talk,
)
from fura_vlm.embedded.judge import is_good
from fura_vlm.embedded.phrases import plain
from fura_vlm.embedded.scenes import Scene, Sign, Thing, make_scene, split_of

CIRCLE = Thing("circle", "red", "large", (0, 0))
STAR = Thing("star", "blue", "small", (0, 2))
OTHER_STAR = Thing("star", "red", "small", (2, 2))
SCENE = Scene(
    things=(CIRCLE, STAR, OTHER_STAR),
    signs=(Sign("MILK", "green", (1, 0)),),
    canvas=(112, 112),
    background=(255, 255, 255),
)


def test_answers_are_those_a_person_would_give():
    """All that is said of one scene in many conversations, against what a person sees in it."""
    rng, said = random.Random(0), set()
    for _ in range(3000):
        said |= {answer for _, answer in conversation(SCENE, rng, 5)}
    facts = {answer for answer in said if not answer.startswith(("No, I do not see", "I do not see", "There are no"))}
    expected = {
        "The circle is red.", "The circle is large.", "The circle is at the top left.", "The blue object is a star.",
        "The blue star is small.", "The red star is at the bottom right.", "There are 2 stars.", "There is 1 circle.",
        "There are 2 red objects.", "There are 3 objects.", "Yes, there is a circle.", "Yes, there is a blue star.",
        "The circle is to the left of the blue star.", "The blue star is above the red star.",
        "The red star is below the circle.", "The sign says MILK.", "The green sign says MILK.",
        "Yes, the circle is red.", "No, the circle is red.", "No, the circle is at the top left.",
        "Yes, there are 2 stars.", "No, there are 2 stars.", "I see a large red circle at the top left.",
        "I see nothing at the bottom.", "I see red and blue.", "I see a circle and a star.", "The other star is blue.",
        "The object at the top left is red.", "The thing at the top right is a star.", "It is at the top right.",
        "It is a star.",
        "I see a large red circle at the top left, a small blue star at the top right, a green sign that says MILK and "
        "a small red star at the bottom right.",
    }  # fmt: skip
    assert expected <= facts
    for answer in facts:
        assert not re.search(r"\bthe star\b", answer), "two stars: 'the star' means neither"
        assert not re.search(r"circle is (blue|small|at the (bottom|right|top right))", answer)
        assert not re.search(r"There are 2 (circles|blue)|There is 1 star\b|MOON", answer)
    gone = {answer for answer in said if "I do not see" in answer}
    assert any("dog" in answer for answer in gone) and not any(
        re.search(r"see a (circle|star|red circle|blue star|red star|sign)\.", answer) for answer in gone
    )


def test_it_is_what_was_spoken_of_last():
    rng = random.Random(1)
    places = {"circle": "top left", "blue star": "top right", "red star": "bottom right"}
    seen = 0
    for _ in range(6000):
        said = conversation(SCENE, rng, 5)
        for (_, before), (_, answer) in zip(said, said[1:], strict=False):
            named = re.match(r"The (circle|blue star|red star) is", before)
            place = re.match(r"It is at the ([a-z ]+)\.", answer)
            if named and place:
                assert place[1] == places[named[1]]
                seen += 1
    assert seen > 50


def test_small_talk_takes_no_picture():
    said = [turn for seed in range(3000) for turn in small_talk(random.Random(seed), 4)]
    assert {("many thanks", "You are welcome."), ("hello there", "Hello! Ask me about the picture.")} <= {
        (plain(question), answer) for question, answer in said
    }
    assert not [answer for _, answer in said if re.search(r"\b(red|circle|star)\b", answer)]


def test_evaluation_asks_in_phrasings_that_training_never_has():
    trained = {plain(phrase) for bank in (TRAINED, MORE) for phrases in bank.values() for phrase in phrases}
    held_out = [
        phrase
        for phrases in HELD_OUT.values()
        for phrase in (sum(phrases.values(), ()) if isinstance(phrases, dict) else phrases)
    ]
    assert len(held_out) > 40 and not [phrase for phrase in held_out if plain(phrase) in trained]


def test_held_out_conversations_have_each_kind_once_and_scenes_of_evaluation():
    made = list(held_out_conversations(0, 40))
    assert made == list(held_out_conversations(0, 40)) and made != list(held_out_conversations(1, 40))
    trained = {make_scene(0, "train", index) for index in range(300)}
    for scene, asked in made:
        assert sorted(one.kind for one in asked) == sorted(KINDS)
        assert split_of(scene) == "eval" and scene not in trained
        for one in asked:
            if one.kind == "place":
                assert len([thing for thing in scene.things if thing.cell == one.subject.cell]) == 1


@pytest.mark.parametrize(
    ("kind", "subject", "answer", "good"),
    [
        ("count", "star", "There are 2 stars.", True),
        ("count", "star", "Two.", True),
        ("count", "star", "There are 3 stars.", False),
        ("count", "star", "There is one red and there are two others: 3.", False),
        ("count", "moon", "There are no moons.", True),
        ("count", "moon", "B", False),
        ("color", CIRCLE, "The circle is red.", True),
        ("color", CIRCLE, "Red!", True),
        ("color", CIRCLE, "The circle is blue.", False),
        ("color", CIRCLE, "It is red or blue.", False),
        ("place", CIRCLE, "The circle is at the top left.", True),
        ("place", CIRCLE, "In the upper left corner.", True),
        ("place", CIRCLE, "On the left.", False),
        ("place", CIRCLE, "B", False),
        ("absent", "dog", "No, I do not see a dog.", True),
        ("absent", "dog", "There isn't one.", True),
        ("absent", "dog", "Yes, there is a dog.", False),
        ("absent", "dog", "A red circle.", False),
        ("describe", None, "I see a large red circle, a small blue star and a red star.", True),
        ("describe", None, "A red circle and a blue star beside a sign that says MILK.", True),
        ("describe", None, "A red circle.", False),
        ("describe", None, "A red circle, a blue star and a green star.", False),
        ("describe", None, "A red circle and a blue star beside a sign that says MOON.", False),
        ("describe", None, "B", False),
        ("small_talk", "thanks", "You are welcome.", True),
        ("small_talk", "thanks", "I see a red circle.", False),
        ("small_talk", "hello", "Hello! Ask me about the picture.", True),
        ("small_talk", "bye", "Goodbye!", True),
        ("small_talk", "who", "No, I do not see a person.", False),
    ],
)
def test_the_judge(kind, subject, answer, good):
    assert is_good(SCENE, Asked(kind, "", subject), answer) is good


def test_a_perfect_description_is_a_good_one():
    for index in range(200):
        scene = make_scene(3, "eval", index)
        assert is_good(scene, Asked("describe", "", None), description(scene))
