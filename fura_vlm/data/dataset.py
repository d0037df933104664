"""A mixture as a torch dataset: conversations tokenized in advance, images opened when they are asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from fura_vlm.data.conversation import EncodingError, Tokens, cut, spread, tokenize
from fura_vlm.data.images import ImageError, load_image
from fura_vlm.data.records import DataError, Problem, Record


def count_image_tokens(processor) -> int:
    """How many tokens an image takes in the language model of a LLaVA with this ``LlavaProcessor``."""
    size = processor.image_processor.crop_size
    patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"  # the tower's class token
    return patches + processor.num_additional_image_tokens - dropped


class ConversationDataset(Dataset):
    """Rows for training a LLaVA, as the collator takes them.

    A row has ``input_ids`` and ``labels``, (length,) int64, and with an image ``pixel_values``, (3, height,
    width) float32, normalised. Whether images are padded to a square with the mean colour, as LLaVA v1.5
    trains (``image_aspect_ratio=pad``), is the image processor's ``do_pad``.

    All texts are tokenized at construction and kept in flat arrays of two or four bytes a token, in which an
    image is one token: the lengths must be known to group batches, and arrays are shared with the loader's
    workers at no cost, which Python's strings are not.

    Args:
        records: records whose image files exist.
        processor: a ``LlavaProcessor`` with a fast tokenizer.
        max_length: tokens of a row, image tokens included; longer ones are cut on the right.
        progress: show a bar if there are many records.
        conversation: what a record becomes, a key of ``fura_vlm.data.conversation.RENDER``.

    Attributes:
        problems: records that cannot be encoded and are left out, and those that are cut.
        lengths: (rows,) int64, tokens of each row, image tokens included.
        has_image: (rows,) bool.

    Raises:
        EncodingError: if the tokenizer will not do.
    """

    def __init__(
        self, records: list[Record], processor, max_length: int, progress: bool = True, conversation: str = "v1"
    ):
        self.image_processor = processor.image_processor
        self.image_token_id = processor.image_token_id
        self.num_image_tokens = count_image_tokens(processor)
        self.problems: list[Problem] = []
        self._names: list[str] = []
        self._images: list[str | None] = []
        dtype = np.uint16 if len(processor.tokenizer) <= 1 << 16 else np.uint32
        ids, supervised = [], []
        bar = tqdm(total=len(records), desc="tokens", disable=not progress or len(records) < 20_000)
        for start in range(0, len(records), 1000):
            part = records[start : start + 1000]
            for record, tokens in zip(part, tokenize(part, processor.tokenizer, conversation), strict=True):
                try:
                    kept = self._fit(record, tokens, max_length)
                except EncodingError as reason:
                    self.problems.append(record.problem(str(reason)))
                    continue
                self._names.append(str(record))
                self._images.append(record.image_path)
                ids.append(kept.ids.astype(dtype))
                supervised.append(kept.supervised)
            bar.update(len(part))
        bar.close()
        self._starts = np.cumsum([0] + [len(row) for row in ids])
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype)
        self._supervised = np.concatenate(supervised) if ids else np.zeros(0, bool)
        self.has_image = np.array([path is not None for path in self._images], dtype=bool)
        self.lengths = np.diff(self._starts) + self.has_image * (self.num_image_tokens - 1)

    def _fit(self, record: Record, tokens: Tokens | EncodingError, max_length: int) -> Tokens:
        if isinstance(tokens, EncodingError):
            raise tokens
        kept = cut(tokens, self.image_token_id, self.num_image_tokens, max_length)
        if len(kept.ids) < len(tokens.ids):
            lost = len(tokens.ids) - len(kept.ids)
            note = f"longer than {max_length} tokens: the last {lost} are cut off"
            self.problems.append(record.problem(note, skipped=False))
        return kept

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Raises ``DataError``, naming record and file, if the image cannot be read any more."""
        row = slice(self._starts[index], self._starts[index + 1])
        tokens = Tokens(self._ids[row].astype(np.int64), self._supervised[row])
        ids, labels = spread(tokens, self.image_token_id, self.num_image_tokens)
        item = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if (path := self._images[index]) is not None:
            try:
                image = load_image(path)
            except ImageError as error:
                raise DataError(f"{self._names[index]}: {error}") from error
            item["pixel_values"] = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return item
