import copy

import pytest
import torch

from fura_vlm.data.collator import Collator


def row(ids, image=None):
    item = {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, *ids[1:]])}
    return item if image is None else item | {"pixel_values": torch.full((3, 2, 2), float(image))}


def test_a_mixed_batch(tokenizer):
    batch = Collator(tokenizer)([row([1, 7, 8], image=5), row([1, 9]), row([1, 7], image=6)])
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[1, 7, 8], [1, 9, pad], [1, 7, pad]]
    assert batch["labels"].tolist() == [[-100, 7, 8], [-100, 9, -100], [-100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 6]
    assert {value.dtype for key, value in batch.items() if key != "pixel_values"} == {torch.int64}


def test_text_only_has_no_pixel_values(tokenizer):
    assert set(Collator(tokenizer)([row([1, 2]), row([1])])) == {"input_ids", "labels", "attention_mask"}


def test_pad_to_multiple_of(tokenizer):
    collator = Collator(tokenizer, pad_to_multiple_of=8)
    assert {tuple(value.shape) for value in collator([row([1] * 5), row([1] * 9)]).values()} == {(2, 16)}
    assert collator([row([1] * 8)])["attention_mask"].tolist() == [[1] * 8]


def test_a_tokenizer_without_padding_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        Collator(other)
