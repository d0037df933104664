"""The embedded model is what its card says."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, CLIPVisionModel, LlamaModel, LlavaForConditionalGeneration

from fura_vlm.embedded.pretrain_tiny import Pretraining, collate
from fura_vlm.embedded.tiny import train_tokenizer

MODEL = Path(__file__).parents[2] / "data" / "tiny-llava"


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL, backend="pil")


def test_files():
    files = list(MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) <= 24 * 2**20
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights and not [file for file in files if file.suffix in (".bin", ".pt", ".pth")]
    for file in weights:
        with safe_open(file, "pt") as shard:
            assert {shard.get_tensor(name).dtype for name in shard.keys()} == {torch.bfloat16}


def test_classes_are_those_of_the_7b(model):
    assert isinstance(model.model.vision_tower, CLIPVisionModel)
    assert isinstance(model.model.language_model, LlamaModel)
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"


def test_tokenizer_is_the_one_the_script_trains(processor):
    text = "<image>\nThe red circle is at the top left. QWZ 42"
    again = train_tokenizer(seed=0)
    assert again.get_vocab() == processor.tokenizer.get_vocab()
    assert again(text).input_ids == processor.tokenizer(text).input_ids
    assert processor.tokenizer(text).input_ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids, skip_special_tokens=True).endswith("QWZ 42")


def test_held_out_loss_is_the_cards(model, processor):
    """The card's figure was measured on a GPU, in bfloat16, on 2,048 rows; a few dozen must come near it."""
    said = float(re.search(r"Held-out loss \| ([\d.]+)", (MODEL / "README.md").read_text()).group(1))
    rows = Pretraining(processor, seed=0, rows=48, split="eval")
    batch = collate([rows[index] for index in range(48)])
    mean, std = (
        torch.tensor(value).view(1, 3, 1, 1)
        for value in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels = (batch["pixels"].float() / 255 - mean) / std
    with torch.no_grad():
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], pixel_values=pixels).loss
    assert loss.item() == pytest.approx(said, rel=0.1)


def test_it_sees(model, processor):
    """With the pictures exchanged, the captions are much less likely."""
    rows = Pretraining(processor, seed=0, rows=40, split="eval")
    batch = collate([rows[index] for index in range(40) if index % 4 != 3])  # the fourth is text
    pixels = batch["pixels"].float() / 255 * 4 - 2

    def loss(pixels):
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], labels=batch["labels"], pixel_values=pixels).loss.item()

    assert loss(pixels.roll(1, 0)) > 1.5 * loss(pixels)
