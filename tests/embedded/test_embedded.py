"""The embedded world: deterministic, true, disjoint between training and evaluation, in the benchmarks' styles."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fura_vlm.embedded.captions import caption
from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded
from fura_vlm.embedded.questions import FAMILIES, PLACES, ask
from fura_vlm.embedded.scenes import COLORS, SHAPES, Scene, Sign, Thing, draw, make_scene

SMALL = {"train_records": 60, "eval_per_family": 12}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "mixture"
    assert write_embedded(EmbeddedConfig(output_dir=str(folder), **SMALL))
    return folder


def shown(scene):
    return frozenset(scene.things), frozenset(scene.signs)


def test_the_same_numbers_give_the_same_pixels():
    one, two = (draw(make_scene(3, "train", 17)) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != draw(make_scene(3, "train", 18)).tobytes()


def test_no_scene_is_in_both_splits():
    # Different seeds on purpose: pretraining, training and evaluation may use different ones.
    train = {shown(make_scene(seed, "train", i)) for seed in (0, 1) for i in range(1500)}
    held_out = {shown(make_scene(seed, "eval", i)) for seed in (0, 1) for i in range(1500)}
    assert len(train) > 2000 and len(held_out) > 2000
    assert not train & held_out


def test_written_pictures_of_the_splits_differ(mixture):
    pictures = {
        split: {Image.open(p).tobytes() for p in (mixture / "images").glob(f"{split}-*.png")}
        for split in ("train", "eval")
    }
    assert len(pictures["eval"]) == 4 * SMALL["eval_per_family"]
    assert not pictures["train"] & pictures["eval"]


def test_objects_are_where_the_scene_says_and_have_its_colors():
    for index in range(40):
        scene = make_scene(5, "train", index)
        pixels = np.asarray(draw(scene)).astype(int)
        height, width = pixels.shape[:2]
        for thing in scene.things:
            row, column = thing.cell
            part = pixels[height * row // 3 : height * (row + 1) // 3, width * column // 3 : width * (column + 1) // 3]
            exact = (part == COLORS[thing.color]).all(-1).mean()
            assert exact > 0.02, (index, thing)
            others = [c for c in COLORS if c != thing.color]
            assert all((part == COLORS[c]).all(-1).mean() < 0.01 for c in others), (index, thing)


SCENE = Scene(
    things=(
        Thing("circle", "red", "large", (0, 0)),
        Thing("star", "blue", "small", (0, 2)),
        Thing("star", "red", "small", (2, 2)),
    ),
    signs=(Sign("MILK", "green", (1, 0)),),
    canvas=(112, 112),
    background=(255, 255, 255),
)


def test_answers_are_those_a_person_would_give():
    """Every question that can be asked of a small scene, answered by hand."""
    expected = {
        "What color is the circle?": "red",
        "Which color does the circle have?": "red",
        "What shape is the blue object?": "star",
        "What is the blue object?": "star",
        "Is the circle small or large?": "large",
        "Is the blue star small or large?": "small",
        "Where is the circle?": "top left",
        "Where is the red star?": "bottom right",
        "How many stars are there?": "2",
        "How many circles are there?": "1",
        "How many red objects are there?": "2",
        "How many pink objects are there?": "0",
        "Is the circle to the left or to the right of the blue star?": "left",
        "Is the blue star to the left or to the right of the circle?": "right",
        "Is the blue star above or below the red star?": "above",
        "Is the red star above or below the circle?": "below",
        "Is there a star in the image?": "Yes",
        "Is there a heart in the image?": "No",
        "What does the sign say?": "MILK",
        "What is written on the green sign?": "MILK",
    }
    rng, answers = random.Random(0), {}
    for _ in range(4000):
        for family in ("gqa", "pope", "textvqa"):
            question = ask(family, SCENE, rng)
            if question:
                assert answers.setdefault(question.question, question.answer) == question.answer
    assert not [q for q in answers if "the star" in q], "two stars: 'the star' means neither"
    assert {q: answers[q] for q in expected} == expected


def test_the_letter_points_at_the_true_choice():
    rng = random.Random(0)
    truth = {"color": {"circle": "red"}, "place": {"circle": "top left"}}
    seen = Counter()
    for _ in range(500):
        question = ask("scienceqa", SCENE, rng)
        choices, letter = question.extra["choices"], question.answer
        chosen = choices["ABCDE".index(letter)]
        hint = re.match(r"On this card each (\w+) is a (\w+)\.", question.extra["hint"])
        if question.question.startswith("Which color is the"):
            assert hint[2] in question.question and chosen == truth["color"][hint[1]]
        elif question.question.startswith("Where is the"):
            assert hint[2] in question.question and chosen == truth["place"][hint[1]]
        elif question.question.startswith("How many"):
            assert chosen == {"circle": "1", "star": "2"}[hint[1]]
        else:
            assert chosen == "MILK"
        assert len(set(choices)) == len(choices) and f"\n{letter}. {chosen}\n" in question.text
        seen[question.question.split()[0]] += 1
    assert len(seen) == 4


def test_negatives_of_pope_follow_their_category():
    rng = random.Random(0)
    for index in range(300):
        scene = make_scene(0, "train", index)
        present = {t.shape for t in scene.things}
        question = ask("pope", scene, rng)
        shape = re.match(r"Is there a (\w+) in the image", question.question)[1]
        assert (question.answer == "Yes") == (shape in present)
        if question.answer == "No" and question.extra["category"] == "popular":
            assert SHAPES[shape] == max(SHAPES[s] for s in SHAPES if s not in present)


def test_captions_say_what_is_true():
    rng = random.Random(0)
    said = " ".join(caption(SCENE, rng) for _ in range(400))
    assert {"red", "large", "at"} == set(re.findall(r"The circle is (\w+)\b(?! the blue| the red)", said)) - {
        "above",
        "to",
    }
    assert {"MILK"} == set(re.findall(r"The sign says (\w+)\.", said))
    assert {("M", "K")} == {
        (first, last)
        for first in re.findall(r"The sign begins with (\w+)\.", said)
        for last in re.findall(r"The sign ends with (\w+)\.", said)
    }
    assert {"2"} == set(re.findall(r"How many stars there are: (\d)", said))
    assert {"left"} == set(re.findall(r"Where the circle is as seen from the blue star[:\s-]+(\w+)", said))
    assert {"Yes"} == set(re.findall(r"Whether there is a (?:circle|star)[:\s-]+(\w+)", said))
    assert {"No"} == set(re.findall(r"Whether there is a (?:heart|moon|dog)[:\s-]+(\w+)", said))
    assert not re.findall(r"I do not see a (?:circle|star|red circle|red star|blue star)\.", said)
    assert "?" not in said, "captions ask nothing"


def test_the_files_are_in_the_llava_format(mixture):
    train = json.loads((mixture / "train.json").read_text())
    assert len(train) == SMALL["train_records"]
    for record in train:
        roles = [turn["from"] for turn in record["conversations"]]
        assert roles == ["human", "gpt"] * (len(roles) // 2)
        marks = [turn["value"].count("<image>") for turn in record["conversations"]]
        assert marks == [int("image" in record)] + [0] * (len(marks) - 1)
        if "image" in record:
            assert (mixture / record["image"]).is_file()
    first_turns = [r["conversations"][0]["value"] for r in train if "image" in r]
    assert any(t.startswith("<image>") for t in first_turns) and any(t.endswith("<image>") for t in first_turns)
    assert any("image" not in record for record in train)


def test_the_held_out_questions_cover_the_families(mixture):
    held_out = json.loads((mixture / "eval.json").read_text())
    assert Counter(r["family"] for r in held_out) == {family: SMALL["eval_per_family"] for family in FAMILIES}
    answers = {f: [r["conversations"][1]["value"] for r in held_out if r["family"] == f] for f in FAMILIES}
    assert Counter(answers["pope"]) == {"Yes": 6, "No": 6}
    assert set(answers["scienceqa"]) <= set("ABCD")
    assert all(answer.isupper() for answer in answers["textvqa"])
    assert {r.get("category") for r in held_out if r["family"] == "pope"} <= {
        "random",
        "popular",
        "adversarial",
    }


def test_writing_again_changes_nothing_and_other_settings_write_anew(mixture, tmp_path):
    folder = tmp_path / "again"
    config = EmbeddedConfig(output_dir=str(folder), **SMALL)
    assert write_embedded(config)
    for name in ("train.json", "eval.json"):
        assert (folder / name).read_bytes() == (mixture / name).read_bytes()
    stamp = (folder / "train.json").stat().st_mtime_ns
    assert not write_embedded(config)
    assert (folder / "train.json").stat().st_mtime_ns == stamp
    assert write_embedded(EmbeddedConfig(output_dir=str(folder), seed=1, **SMALL))
    assert (folder / "train.json").read_bytes() != (mixture / "train.json").read_bytes()


@pytest.mark.parametrize("recipe", [None, "{", "3", '{"cake": "flour"}', '{"version": 1, "per_task": 200}'])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, recipe):
    (tmp_path / "thesis.txt").write_text("years of work")
    if recipe:
        (tmp_path / "recipe.json").write_text(recipe)
    with pytest.raises(ValueError, match="holds something else than embedded data: name another folder"):
        write_embedded(EmbeddedConfig(output_dir=str(tmp_path), **SMALL))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_places_are_nine_different_names():
    names = {Thing("star", "red", "small", (r, c)).place for r in range(3) for c in range(3)}
    assert names == set(PLACES) and len(names) == 9
