"""A mixture as a torch dataset: conversations tokenized in advance, images opened when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from fura_vlm.data.images import ImageError, image_size, load_image
from fura_vlm.data.messages import DataError, Problem, Record
from fura_vlm.families.base import Encoded, EncodingError, Family

BATCH = 1000
"""Records that are tokenized at once."""


# ------------------------------------------------------------------------------------------------------- rows


def row_schema(family: Family) -> pa.Schema:
    """The columns of an encoded record.

    ``input_ids``, in two or four bytes a token, and ``supervised``, one bit a token, are the conversation with each
    run of a picture's tokens as one of them; ``runs`` are the lengths of the runs, and ``length`` counts all tokens.
    ``images`` are the sources of the pictures; ``file``, ``place`` and ``id`` say which record it is.
    """
    token = pa.uint16() if len(family.tokenizer) <= 1 << 16 else pa.uint32()
    columns = {"input_ids": pa.list_(token), "supervised": pa.list_(pa.bool_()), "runs": pa.list_(pa.int32())}
    columns |= {"length": pa.int32(), "images": pa.list_(pa.string())}
    return pa.schema(columns | dict.fromkeys(("file", "place", "id"), pa.string()))


def encode_rows(records: Sequence[Record], family: Family, max_length: int) -> tuple[pa.RecordBatch, list[Problem]]:
    """Tokenizes records into the columns of ``row_schema``.

    Args:
        records: no more than fit into memory several times.
        family: that of the model.
        max_length: tokens of a row, image tokens included; longer ones are cut on the right.

    Returns:
        The rows of those that can be encoded; what is wrong with the others, and those that are cut.

    Raises:
        EncodingError: if the tokenizer will not do.
        ModelError: if the model cannot be trained with pictures or conversations at all.
    """
    measured, problems = _measured(records, family)
    good, rows = [], []
    encoded = family.encode([(record.messages, sizes) for record, sizes in measured])
    for (record, _), tokens in zip(measured, encoded, strict=True):
        try:
            if isinstance(tokens, EncodingError):
                raise tokens
            kept = family.cut(tokens, max_length)
        except EncodingError as reason:
            problems.append(record.problem(str(reason)))
            continue
        good.append(record)
        rows.append(kept)
        if lost := len(tokens.ids) - len(kept.ids):
            note = f"longer than {max_length} tokens: the last {lost} are cut off"
            problems.append(record.problem(note, skipped=False))
    schema = row_schema(family)
    columns = {
        "input_ids": _lists([row.ids for row in rows], schema.field("input_ids").type.value_type),
        "supervised": _lists([row.supervised for row in rows], pa.bool_()),
        "runs": _lists([row.runs for row in rows], pa.int32()),
        "length": [row.length for row in rows],
        "images": [record.pictures for record in good],
        "file": [record.file for record in good],
        "place": [record.place for record in good],
        "id": [record.id for record in good],
    }
    return pa.RecordBatch.from_pydict(columns, schema), problems


def _measured(records: Sequence[Record], family: Family) -> tuple[list[tuple[Record, list]], list[Problem]]:
    """Each record with the sizes of its pictures, if the family needs them."""
    if not family.needs_sizes:
        return [(record, [(0, 0)] * len(record.pictures)) for record in records], []

    def sizes(record: Record) -> list[tuple[int, int]] | Problem:
        try:
            return [image_size(source) for source in record.pictures]
        except ImageError as error:
            return record.problem(str(error))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(zip(records, pool.map(sizes, records), strict=True))
    problems = [each for _, each in found if isinstance(each, Problem)]
    return [(record, each) for record, each in found if not isinstance(each, Problem)], problems


def _lists(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    starts = np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int32)
    return pa.ListArray.from_arrays(starts, pa.array(np.concatenate(rows) if rows else [], kind))


# ---------------------------------------------------------------------------------------------------- dataset


class ConversationDataset(Dataset):
    """Rows for training, as the collator takes them.

    A row has ``input_ids`` and ``labels``, (length,) int64, and under ``pictures`` the tensors that the family makes of
    its pictures, none if it has none.

    All texts are tokenized beforehand and are columns of an Arrow table: the lengths must be known to group
    batches, and Arrow's memory is shared with the loader's workers at no cost, which Python's strings are not.
    The table is in memory if it is made from records here; that of a large mixture is in files that all
    processes map (``fura_vlm.data.index``).

    Args:
        records: records whose image files exist.
        family: that of the model.
        max_length: tokens of a row, image tokens included; longer ones are cut on the right.
        progress: show a bar if there are many records.

    Attributes:
        problems: records that cannot be encoded and are left out, and those that are cut.
        lengths: (rows,) int64, tokens of each row, image tokens included.
        has_image: (rows,) bool.

    Raises:
        EncodingError: if the tokenizer will not do.
    """

    def __init__(self, records: list[Record], family: Family, max_length: int, progress: bool = True):
        batches, problems = [], []
        bar = tqdm(total=len(records), desc="tokens", disable=not progress or len(records) < 20_000)
        for start in range(0, len(records), BATCH):
            rows, found = encode_rows(records[start : start + BATCH], family, max_length)
            batches.append(rows)
            problems += found
            bar.update(len(rows))
        bar.close()
        self._use(pa.Table.from_batches(batches, row_schema(family)), family, problems)

    @classmethod
    def from_files(cls, files: Sequence[str], family: Family, problems: list[Problem], left_out: Sequence[str] = ()):
        """The dataset over files with the columns of ``row_schema``, which are mapped into memory, not read.

        Args:
            files: Arrow streams, as ``datasets.Dataset.from_file`` takes them.
            family: with the processor that the rows were made with.
            problems: what was wrong with the records.
            left_out: images whose rows are left out.
        """
        dataset = cls.__new__(cls)
        dataset._files = list(files)
        dataset._use(read_table(files), family, problems, left_out)
        return dataset

    def _use(self, table: pa.Table, family: Family, problems: list[Problem], left_out: Sequence[str] = ()) -> None:
        self.family = family
        self.problems = problems
        self._table = table
        self._rows = np.flatnonzero(~rows_with(table, left_out))  # by the dataset's index, the row of the table
        self.has_image = (pc.list_value_length(table["images"]).to_numpy() > 0)[self._rows]
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
        ids, runs = (self._table[name][row].values.to_numpy().astype(np.int64) for name in ("input_ids", "runs"))
        supervised = self._table["supervised"][row].values.to_numpy(zero_copy_only=False)
        ids, labels = self.family.spread(Encoded(ids, supervised, runs))
        item = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        try:
            images = [load_image(source) for source in self._table["images"][row].as_py()]
        except ImageError as error:
            file, place, name = (self._table[column][row].as_py() for column in ("file", "place", "id"))
            raise DataError(f"{file}, {place} (id {name}): {error}") from error
        return item | self.family.token_type_ids(ids) | {"pictures": self.family.pixels(images)}

    def supervised(self) -> np.ndarray:
        """(rows,) int64: the tokens of each row that have a loss."""
        counts = []
        for chunk in (self._table if self._table is not None else read_table(self._files))["supervised"].chunks:
            ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
            sums = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy(zero_copy_only=False))])
            counts.append(np.diff(sums[ends], prepend=0))
        return np.concatenate(counts)[self._rows].astype(np.int64)

    def answers(self, most: int = 1000) -> Iterator[np.ndarray]:
        """The supervised token ids, (n,), of at most so many rows, spread evenly over the dataset."""
        table = self._table if self._table is not None else read_table(self._files)
        for row in self._rows[:: max(1, len(self) // most)]:
            ids = table["input_ids"][int(row)].values.to_numpy()
            yield ids[table["supervised"][int(row)].values.to_numpy(zero_copy_only=False)]


def rows_with(table: pa.Table, sources: Sequence[str]) -> np.ndarray:
    """(rows,) bool: those that have one of these pictures."""
    found = np.zeros(len(table), dtype=bool)
    images = table["images"].combine_chunks()
    there = pc.is_in(pc.list_flatten(images), pa.array(sources, pa.string())).to_numpy(zero_copy_only=False)
    found[pc.list_parent_indices(images).to_numpy()[there]] = True
    return found


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
        raise DataError(
            f"The index {os.path.dirname(files[0])} is damaged ({error}): remove it and train again"
        ) from error
