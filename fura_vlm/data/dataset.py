"""A mixture as a torch dataset: conversations tokenized in advance, images opened when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from fura_vlm.data.conversation import EncodingError, Tokens, cut, spread, tokenize
from fura_vlm.data.images import ImageError, load_image
from fura_vlm.data.messages import DataError, Problem, Record

BATCH = 1000
"""Records that are tokenized at once."""


def count_image_tokens(processor) -> int:
    """How many tokens an image takes in the language model of a LLaVA with this ``LlavaProcessor``."""
    size = processor.image_processor.crop_size
    patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"  # the tower's class token
    return patches + processor.num_additional_image_tokens - dropped


# ------------------------------------------------------------------------------------------------------- rows


def row_schema(processor) -> pa.Schema:
    """The columns of an encoded record.

    ``input_ids``, in two or four bytes a token, and ``supervised``, one bit a token, are the conversation with an
    image as one token; ``length`` counts the image with all its tokens. ``image`` is the path of the file or null;
    ``file``, ``place`` and ``id`` say which record it is.
    """
    token = pa.uint16() if len(processor.tokenizer) <= 1 << 16 else pa.uint32()
    columns = {"input_ids": pa.list_(token), "supervised": pa.list_(pa.bool_()), "length": pa.int32()}
    return pa.schema(columns | dict.fromkeys(("image", "file", "place", "id"), pa.string()))


def encode_rows(
    records: Sequence[Record], processor, max_length: int, conversation: str = "v1"
) -> tuple[pa.RecordBatch, list[Problem]]:
    """Tokenizes records into the columns of ``row_schema``.

    Args:
        records: no more than fit into memory several times.
        processor: a ``LlavaProcessor`` with a fast tokenizer.
        max_length: tokens of a row, image tokens included; longer ones are cut on the right.
        conversation: what a record becomes, a key of ``fura_vlm.data.conversation.RENDER``.

    Returns:
        The rows of those that can be encoded; what is wrong with the others, and those that are cut.

    Raises:
        EncodingError: if the tokenizer will not do.
    """
    image_tokens = count_image_tokens(processor)
    good, rows, problems = [], [], []
    for record, tokens in zip(records, tokenize(records, processor.tokenizer, conversation), strict=True):
        try:
            if isinstance(tokens, EncodingError):
                raise tokens
            kept = cut(tokens, processor.image_token_id, image_tokens, max_length)
        except EncodingError as reason:
            problems.append(record.problem(str(reason)))
            continue
        good.append(record)
        rows.append(kept)
        if lost := len(tokens.ids) - len(kept.ids):
            note = f"longer than {max_length} tokens: the last {lost} are cut off"
            problems.append(record.problem(note, skipped=False))
    lengths = np.array([len(row.ids) for row in rows], np.int32)
    starts = np.append(0, np.cumsum(lengths)).astype(np.int32)
    ids = np.concatenate([row.ids for row in rows]) if rows else []
    supervised = np.concatenate([row.supervised for row in rows]) if rows else []
    lengths += np.array([bool(record.pictures) for record in good], np.int32) * (image_tokens - 1)
    schema = row_schema(processor)
    columns = {
        "input_ids": pa.ListArray.from_arrays(starts, pa.array(ids, schema.field("input_ids").type.value_type)),
        "supervised": pa.ListArray.from_arrays(starts, pa.array(supervised, pa.bool_())),
        "length": lengths,
        "image": [record.image_path for record in good],
        "file": [record.file for record in good],
        "place": [record.place for record in good],
        "id": [record.id for record in good],
    }
    return pa.RecordBatch.from_pydict(columns, schema), problems


# ---------------------------------------------------------------------------------------------------- dataset


class ConversationDataset(Dataset):
    """Rows for training a LLaVA, as the collator takes them.

    A row has ``input_ids`` and ``labels``, (length,) int64, and with an image ``pixel_values``, (3, height,
    width) float32, normalised. Whether images are padded to a square with the mean colour, as LLaVA v1.5
    trains (``image_aspect_ratio=pad``), is the image processor's ``do_pad``.

    All texts are tokenized beforehand and are columns of an Arrow table: the lengths must be known to group
    batches, and Arrow's memory is shared with the loader's workers at no cost, which Python's strings are not.
    The table is in memory if it is made from records here; that of a large mixture is in files that all
    processes map (``fura_vlm.data.index``).

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
        batches, problems = [], []
        bar = tqdm(total=len(records), desc="tokens", disable=not progress or len(records) < 20_000)
        for start in range(0, len(records), BATCH):
            rows, found = encode_rows(records[start : start + BATCH], processor, max_length, conversation)
            batches.append(rows)
            problems += found
            bar.update(len(rows))
        bar.close()
        self._use(pa.Table.from_batches(batches, row_schema(processor)), processor, problems)

    @classmethod
    def from_files(cls, files: Sequence[str], processor, problems: list[Problem], left_out: Sequence[str] = ()):
        """The dataset over files with the columns of ``row_schema``, which are mapped into memory, not read.

        Args:
            files: Arrow streams, as ``datasets.Dataset.from_file`` takes them.
            processor: the ``LlavaProcessor`` that the rows were made with.
            problems: what was wrong with the records.
            left_out: images whose rows are left out.
        """
        dataset = cls.__new__(cls)
        dataset._files = list(files)
        dataset._use(read_table(files), processor, problems, left_out)
        return dataset

    def _use(self, table: pa.Table, processor, problems: list[Problem], left_out: Sequence[str] = ()) -> None:
        self.image_processor = processor.image_processor
        self.image_token_id = processor.image_token_id
        self.num_image_tokens = count_image_tokens(processor)
        self.problems = problems
        self._table = table
        used = pc.invert(pc.is_in(table["image"], pa.array(left_out, pa.string())))
        self._rows = np.flatnonzero(used)  # by the dataset's index, the row of the table
        self.has_image = pc.is_valid(table["image"]).to_numpy()[self._rows]
        self.lengths = table["length"].to_numpy()[self._rows].astype(np.int64)

    _files: list[str] | None = None

    def __getstate__(self) -> dict:
        # What is in files is mapped anew where the dataset arrives: another process, perhaps another machine.
        return self.__dict__ | ({"_table": None} if self._files else {})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Raises ``DataError``, naming record and file, if the image cannot be read any more."""
        if self._table is None:
            self._table = read_table(self._files)
        row = int(self._rows[index])
        ids = self._table["input_ids"][row].values.to_numpy().astype(np.int64)
        supervised = self._table["supervised"][row].values.to_numpy(zero_copy_only=False)
        ids, labels = spread(Tokens(ids, supervised), self.image_token_id, self.num_image_tokens)
        item = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if (path := self._table["image"][row].as_py()) is not None:
            try:
                image = load_image(path)
            except ImageError as error:
                file, place, name = (self._table[column][row].as_py() for column in ("file", "place", "id"))
                raise DataError(f"{file}, {place} (id {name}): {error}") from error
            item["pixel_values"] = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return item

    def answers(self, most: int = 1000) -> Iterator[np.ndarray]:
        """The supervised token ids, (n,), of at most so many rows, spread evenly over the dataset."""
        table = self._table if self._table is not None else read_table(self._files)
        for row in self._rows[:: max(1, len(self) // most)]:
            ids = table["input_ids"][int(row)].values.to_numpy()
            yield ids[table["supervised"][int(row)].values.to_numpy(zero_copy_only=False)]


def read_table(files: Sequence[str]) -> pa.Table:
    """Arrow streams with the same columns as one table, mapped into memory.

    Raises:
        DataError: if a file is missing or damaged.
    """
    for file in files:
        if not os.path.isfile(file):
            raise DataError(
                f"The index file {file} is not on this machine: keep the mixture where all machines see it "
                "under the same path"
            )
    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files]).data.table
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"The index {os.path.dirname(files[0])} is damaged ({error}): remove it") from error
