from pathlib import Path

import numpy as np
import pytest
import torch
from made_records import llava_record
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

from fura_vlm.data.collator import Collator
from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.data.images import load_image
from fura_vlm.data.messages import DataError
from fura_vlm.data.records import read_records
from fura_vlm.families.vicuna import render

REAL = Path(__file__).parents[3] / "shared/real/real_mixture.json"


def make_record(name, *values, image=None):
    return llava_record(name, values, image and str(image))


@pytest.fixture
def wide(tmp_path):
    """A picture of 50 x 30 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


@pytest.fixture
def records(wide):
    return [
        make_record("1", "<image>\nWhat is this?", "A cat", image=wide),
        make_record("2", "What is this?", "A dog."),
        make_record("3", "What is this?\n<image>", "A cat", "And that?", "No", image=wide),
    ]


def as_llava_does(path: Path, size: int, mean, std) -> np.ndarray:
    """LLaVA v1.5's image_aspect_ratio=pad, followed by CLIP's preprocessing: (3, size, size)."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(50, 30), (31, 64), (28, 28), (40, 40), (1, 90), (9, 8)])
def test_pixel_values_are_those_of_llava(llava, tmp_path, shape):
    width, height = shape
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    [row] = ConversationDataset([make_record("1", "<image>\nWhat", "No", image=path)], llava, 100)
    images = llava.processor.image_processor
    expected = as_llava_does(path, 28, np.array(images.image_mean), np.array(images.image_std))
    [pixels] = row["pictures"]["pixel_values"]
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-5)


def test_rows(llava, records):
    dataset = ConversationDataset(records, llava, 100)
    assert len(dataset) == 3 and not dataset.problems
    assert dataset.has_image.tolist() == [True, False, True]
    for record, row, length in zip(records, dataset, dataset.lengths, strict=True):
        [encoded] = llava.encode([(record.messages, [(0, 0)] * len(record.pictures))])
        ids, labels = llava.spread(encoded)
        assert row["input_ids"].tolist() == ids.tolist()
        assert row["labels"].tolist() == labels.tolist()
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert len(row["input_ids"]) == length
        assert ("pixel_values" in row["pictures"]) == bool(record.pictures)


def test_rows_are_what_the_processor_makes(llava, records):
    for record, row in zip(records, ConversationDataset(records, llava, 100), strict=True):
        images = [load_image(path) for path in record.pictures] or None
        made = llava.processor(text=[render(record.messages).text], images=images, return_tensors="pt")
        assert torch.equal(made["input_ids"][0], row["input_ids"])
        if images:
            assert torch.equal(made["pixel_values"], row["pictures"]["pixel_values"])


def test_what_does_not_fit(llava, records):
    whole = ConversationDataset(records, llava, 100).lengths
    dataset = ConversationDataset(records, llava, int(whole[0]))
    assert len(dataset) == 3 and dataset.lengths.tolist() == [whole[0], whole[1], whole[0]]
    [note] = dataset.problems
    assert not note.skipped and note.record == "3"
    assert note.reason == f"longer than {whole[0]} tokens: the last {whole[2] - whole[0]} are cut off"

    dataset = ConversationDataset(records, llava, int(whole[1]))  # too short for the rows with an image
    assert [problem.record for problem in dataset.problems if problem.skipped] == ["1", "3"]
    assert len(dataset) == 1 and len(dataset[0]["input_ids"]) == len(dataset[0]["labels"]) == dataset.lengths[0]


def test_special_tokens_in_a_text_are_a_problem(llava, records):
    bad = make_record("bad", "What is </s>?", "No")
    dataset = ConversationDataset([bad, *records], llava, 100)
    assert len(dataset) == 3
    [problem] = dataset.problems
    assert (problem.file, problem.place, problem.record) == ("m.json", "record bad", "bad")
    assert "</s>" in problem.reason


def test_nothing_at_all(llava):
    dataset = ConversationDataset([], llava, 100)
    assert len(dataset) == 0 and dataset.lengths.shape == dataset.has_image.shape == (0,)


def test_workers_open_the_images(llava, records, wide):
    dataset = ConversationDataset(records, llava, 100)
    loader = DataLoader(dataset, 3, num_workers=1, collate_fn=Collator(llava))
    [batch] = loader
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    assert batch["input_ids"].shape == (3, dataset.lengths.max())
    wide.unlink()  # nothing has been opened in advance
    with pytest.raises(DataError, match=r"m.json, record 1 \(id 1\): .*wide.png does not exist"):
        list(loader)


def test_a_llava_takes_the_batch(llava, records):
    model = LlavaForConditionalGeneration(llava.config)
    batch = Collator(llava)(list(ConversationDataset(records, llava, 100)))
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("strategy, additional, expected", [("default", 1, 4), ("full", 1, 5), ("default", 0, 3)])
def test_image_tokens(llava, monkeypatch, strategy, additional, expected):
    monkeypatch.setattr(llava.processor, "vision_feature_select_strategy", strategy)
    monkeypatch.setattr(llava.processor, "num_additional_image_tokens", additional)
    assert llava.image_tokens == expected
    made = llava.processor(text="<image>", images=Image.new("RGB", (9, 9)))
    assert made["input_ids"][0].count(llava.run_id) == expected


@pytest.mark.skipif(not REAL.is_file(), reason="the real mixture is not here")
def test_real_mixture(llava):
    records, _ = read_records(REAL)
    dataset = ConversationDataset(records, llava, 2048)
    assert dataset.has_image.tolist() == [True] * 4 + [False] and not dataset.problems
    batch = Collator(llava)(list(dataset))
    assert batch["pixel_values"].shape == (4, 3, 28, 28)
    answers = [message.text for record in records for message in record.messages if message.role == "assistant"]
    supervised = [row["labels"][row["labels"] != -100] for row in dataset]
    said = "".join(llava.tokenizer.decode(row) for row in supervised)
    assert [answer.strip() for answer in said.split("</s>")] == [*answers, ""]
