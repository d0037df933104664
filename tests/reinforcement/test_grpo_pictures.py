"""Training by reward on pictures, with the embedded model: it is rewarded for what it would say anyway."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

from fura_vlm.data.images import load_image
from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.evaluation.heldout import normalise
from fura_vlm.families.messages import Message, Picture, Text, pictures
from fura_vlm.fura.layer import FuraLayer
from fura_vlm.modelling.load import load_base, load_family

MODEL = "data/tiny-llava"
WORDS = "What is in the picture?"


def said(model, family, messages: tuple, tokens: int) -> str:
    """Its greedy answer."""
    inputs = family.inputs(messages, [load_image(path) for path in pictures(messages)])
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return family.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Eight pictures in conversations whose second question is asked, one picture that is broken, and a record of words
    alone."""
    folder = tmp_path_factory.mktemp("pictures")
    model, family = load_base(MODEL, torch.float32), load_family(MODEL)
    records = []
    for number in range(8):
        picture = folder / f"{number}.png"
        draw(make_scene(0, "train", number, with_sign=False)).save(picture)
        asked = (Message("user", (Picture(str(picture)), Text(WORDS))),)
        turns = [("<image>\nIs it a dog?", "No"), (WORDS, said(model, family, asked, 3))]
        records.append({"image": picture.name, "conversations": turns})
    (folder / "broken.png").write_bytes(b"\x89PNG")
    records.append({"image": "broken.png", "conversations": [(f"<image>\n{WORDS}", "a circle")]})
    records.append({"conversations": [(WORDS, "a circle")]})
    for record in records:
        record["conversations"] = [
            {"from": role, "value": value}
            for turn in record["conversations"]
            for role, value in zip(("human", "gpt"), turn, strict=True)
        ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


@pytest.fixture(scope="module")
def finished(grpo, mixture):
    job = grpo(
        "pictures",
        model_name_or_path=MODEL,
        data_path=str(mixture),
        reward="exact",
        only="What is in",
        max_completion_length=3,
    )
    assert job.status == 0, job.output
    return job


def test_three_steps(finished):
    rows = [row for row in finished.metrics() if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["reward"] < 1 for row in rows)
    assert "2 of 10 records left out" in finished.output
    reasons = [json.loads(line)["reason"] for line in (finished.run / "skipped.jsonl").read_text().splitlines()]
    assert any("no picture" in reason for reason in reasons) and len(reasons) == 2


def test_rewards_are_exact_matches(finished):
    for line in (finished.run / "solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["question"].strip() == WORDS
        for answer in row["answers"]:
            assert answer["reward"] == float(normalise(answer["text"]) == normalise(row["expected"]))


def test_adapter_is_trained_in_decoder_and_projector(finished):
    base = LlavaForConditionalGeneration.from_pretrained(MODEL)
    model = PeftModel.from_pretrained(base, str(finished.run / "adapter"))
    trained = {
        name.split(".layers.")[0]
        for name, module in model.named_modules()
        if isinstance(module, FuraLayer) and module.fura_dR["default"].abs().max() > 0
    }
    assert any("language_model" in name for name in trained) and any(
        "multi_modal_projector" in name for name in trained
    )
    assert not any("vision_tower" in name for name in trained)
