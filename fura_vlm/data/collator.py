"""Rows to batches."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from fura_vlm.data.conversation import IGNORE


class Collator:
    """Pads rows on the right, as one does for training, and stacks the images of those that have one.

    Called with rows of ``ConversationDataset`` it returns ``input_ids``, ``attention_mask`` and ``labels``,
    (rows, longest) int64, and, unless all rows are text only, ``pixel_values``, (rows with image, 3, height,
    width), in the order of the rows, as transformers' LLaVA takes them.

    Args:
        tokenizer: gives the padding token.
        pad_to_multiple_of: rounds the length of a batch up; a multiple of 8 suits tensor cores.

    Raises:
        ValueError: if the tokenizer has no padding token.
    """

    def __init__(self, tokenizer, pad_to_multiple_of: int = 1):
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
        self.pad_token_id = tokenizer.pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORE),
        }
        images = [row["pixel_values"] for row in rows if "pixel_values" in row]
        return batch | {"pixel_values": torch.stack(images)} if images else batch

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.pad_to_multiple_of
        return torch.nn.functional.pad(padded, (0, missing), value=value)
