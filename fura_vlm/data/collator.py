"""Rows to batches."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from fura_vlm.families.base import IGNORE, Family


class Collator:
    """Pads rows on the right, as one does for training, and joins the pictures of those that have some.

    Called with rows of ``ConversationDataset`` it returns ``input_ids``, ``attention_mask`` and ``labels``,
    (rows, longest) int64, what else the model wants to know of each token, and, unless all rows are text only, the
    tensors of the pictures, in the order of the rows, as the model takes them.

    Args:
        family: gives the padding token and joins the pictures.
        pad_to_multiple_of: rounds the length of a batch up; a multiple of 8 suits tensor cores.

    Raises:
        ValueError: if the tokenizer has no padding token.
    """

    def __init__(self, family: Family, pad_to_multiple_of: int = 1):
        if family.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
        self.family = family
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        values = {"input_ids": self.family.tokenizer.pad_token_id, "labels": IGNORE}
        batch = {
            name: self._pad([row[name] for row in rows], values.get(name, 0)) for name in rows[0] if name != "pictures"
        }
        return batch | self.family.join([row["pictures"] for row in rows if row["pictures"]])

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.pad_to_multiple_of
        return torch.nn.functional.pad(padded, (0, missing), value=value)
