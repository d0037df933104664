import copy

import pytest
import torch

from fura_vlm.data.collator import Collator


def row(ids, *images):
    pixels = {"pixel_values": torch.stack([torch.full((3, 2, 2), float(image)) for image in images])} if images else {}
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, *ids[1:]]), "pictures": pixels}


def test_a_mixed_batch(llava):
    batch = Collator(llava)([row([1, 7, 8], 5), row([1, 9]), row([1, 7], 6, 7)])
    pad = llava.tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[1, 7, 8], [1, 9, pad], [1, 7, pad]]
    assert batch["labels"].tolist() == [[-100, 7, 8], [-100, 9, -100], [-100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 6, 7]
    assert {value.dtype for key, value in batch.items() if key != "pixel_values"} == {torch.int64}


def test_text_only_has_no_pixel_values(llava):
    assert set(Collator(llava)([row([1, 2]), row([1])])) == {"input_ids", "labels", "attention_mask"}


def test_pad_to_multiple_of(llava):
    collator = Collator(llava, pad_to_multiple_of=8)
    assert {tuple(value.shape) for value in collator([row([1] * 5), row([1] * 9)]).values()} == {(2, 16)}
    assert collator([row([1] * 8)])["attention_mask"].tolist() == [[1] * 8]


def test_a_tokenizer_without_padding_token(tokenizer, llava_of):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        Collator(llava_of(other))
