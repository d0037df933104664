"""Mixtures in columns: Parquet files, folders of the ``datasets`` library, and data sets of the Hugging Face hub.

``datasets`` brings each of them into Arrow files (those of Parquet and of the hub lie in its cache), which are mapped
into memory. A picture that is stored in a column, as ``datasets.Image`` stores it, is not copied: a record holds its
address, one string::

    <Arrow file>::<row>::<column>::<number>

``row`` counts from 0 within the file; ``number`` counts from 0 within a list of pictures and is 0 without one.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from fura_vlm.data.messages import DataError
from fura_vlm.families.messages import Picture

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS = 100  # that are made Python objects at once; their pictures are not

_ADDRESS = re.compile(r"(?P<file>.+\.arrow)::(?P<row>\d+)::(?P<column>.+)::(?P<number>\d+)", re.S)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>\w+))?")


# ----------------------------------------------------------------------------------------------------- pictures


class Address(NamedTuple):
    """Where a picture is stored."""

    file: str
    row: int
    column: str
    number: int


def address(source: str) -> Address | None:
    """Where a picture is stored, or ``None`` if ``source`` is the path of its file."""
    found = _ADDRESS.fullmatch(source) if "::" in source else None
    return found and Address(found["file"], int(found["row"]), found["column"], int(found["number"]))


def stored_picture(address: Address) -> bytes:
    """The file content of a picture that is stored in a column.

    Raises:
        FileNotFoundError: if its Arrow file is missing.
        ValueError: if there is no such picture in it.
    """
    file, row, column, number = address
    if not os.path.isfile(file):
        raise FileNotFoundError(file)
    try:
        value = _table(file)[column][row]
        value = value.values[number] if hasattr(value, "values") and not hasattr(value, "keys") else value
        content = (value["bytes"] if hasattr(value, "keys") else value).as_py()
    except (KeyError, IndexError) as error:
        raise ValueError("the data set has changed since its index was made") from error
    if content is None:
        raise ValueError("the data set has changed since its index was made")
    return content


@functools.lru_cache(maxsize=256)
def _table(file: str) -> pa.Table:
    """An Arrow stream as a table that is mapped, not read."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(file)).read_all()


# --------------------------------------------------------------------------------------------------------- rows


def names_columns(path: str | os.PathLike) -> bool:
    """Whether a mixture is a Parquet file, a folder, or a name on the hub, and not JSON."""
    path = os.fspath(path)
    if os.path.isdir(path) or path.endswith(".parquet"):
        return True
    named = _HUB_NAME.fullmatch(path)
    return not os.path.exists(path) and named is not None and Path(named["name"]).suffix not in (".json", ".jsonl")


def iter_rows(path: str | os.PathLike, progress: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a mixture in columns; of each picture that is stored in it, only its address is read.

    Args:
        path: a Parquet file; a folder that ``save_to_disk`` wrote or that ``load_dataset`` reads; or a name on the hub,
            ``user/name``, ``user/name:config`` or ``user/name@split`` (or both). The split is ``train`` where it is
            there, or else the only one.
        progress: show a bar.

    Yields:
        Place (``"row 3"``) and row, in which ``Picture`` stands for a picture that is stored.

    Raises:
        DataError: if it cannot be read.
    """
    number = 0
    files = arrow_files(path)
    with tqdm(total=sum(len(_table(file)) for file in files), desc=str(path), disable=not progress) as bar:
        for file in files:
            first = 0
            for batch in _table(file).to_batches(_ROWS):
                columns = {
                    name: _values(batch.column(name), f"{file}::{{}}::{name}::{{}}", first)
                    for name in batch.schema.names
                }
                first += len(batch)
                for row in range(len(batch)):
                    number += 1
                    yield f"row {number}", {name: values[row] for name, values in columns.items()}
                bar.update(len(batch))


def _values(column: pa.Array, address: str, first: int) -> list[Any]:
    """The values of a column, pictures replaced by where they are: ``address`` takes row and number."""
    import pyarrow as pa

    kind = column.type
    if _holds_pictures(kind):
        return [found and found(address.format(first + row, 0)) for row, found in enumerate(_pictures(column))]
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not _holds_pictures(kind.value_type):
        return column.to_pylist()
    found, values = iter(_pictures(column.flatten())), []
    for row, length in enumerate(column.value_lengths().to_pylist()):
        pictures = [next(found) for _ in range(length or 0)]
        address_of = functools.partial(address.format, first + row)
        values.append(None if length is None else [p and p(address_of(n)) for n, p in enumerate(pictures)])
    return values


def _holds_pictures(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {"bytes", "path"} == {kind.field(n).name for n in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _pictures(array: pa.Array) -> list[Any]:
    """For each picture ``None``, or a function of its address: it gives ``Picture``, or the path of one not stored."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(array.type):
        return [Picture if there else None for there in array.is_valid().to_pylist()]
    stored = pc.struct_field(array, "bytes").is_valid().to_pylist()
    paths = pc.struct_field(array, "path").to_pylist()
    return [
        Picture if there else (lambda _, path=path: path) if path else None
        for there, path in zip(stored, paths, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- files


def state(path: str | os.PathLike) -> dict[str, Any]:
    """Identifies the state of a mixture in columns: its path or name, the size and time of its files, and where its
    rows are.

    Raises:
        DataError: if it cannot be read.
    """
    name = os.fspath(path)
    files = arrow_files(name)  # also where it is one file: the cache may be another one now
    stats = [os.stat(file) for file in ([name] if os.path.isfile(name) else files)]
    return {
        "path": os.path.abspath(name) if os.path.exists(name) else name,
        "size": sum(stat.st_size for stat in stats),
        "changed": max((stat.st_mtime_ns for stat in stats), default=0),
        "rows": files[0] if files else "",
    }


def arrow_files(path: str | os.PathLike) -> list[str]:
    """The Arrow files of a mixture in columns, in order; those that do not exist yet are made or downloaded.

    Raises:
        DataError: if it cannot be read.
    """
    path = os.fspath(path)
    if path.endswith(".parquet") and not os.path.isfile(path):
        raise DataError(f"{path} cannot be read (No such file or directory): check data_path")
    try:
        found = _load(path)
    except DataError:
        raise
    except Exception as error:  # datasets raises all sorts: its own, the hub's, the network's, pyarrow's
        reason = " ".join(str(error).split()) or type(error).__name__
        where = path if os.path.exists(path) else f"{path} (not a file here, so it was looked up on the hub)"
        raise DataError(f"{where} cannot be read as a data set ({reason}): check data_path") from error
    return [os.path.abspath(part["filename"]) for part in found.cache_files]


def _load(path: str) -> datasets.Dataset:
    import datasets

    split = None
    if path.endswith(".parquet"):
        found = datasets.load_dataset("parquet", data_files=path)
    elif os.path.isdir(path):
        saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    else:
        named = _HUB_NAME.fullmatch(path)
        split = named["split"]
        found = datasets.load_dataset(named["name"], named["config"])
    if isinstance(found, datasets.Dataset):
        return found
    split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if split not in found:
        other = f"{path}/" if os.path.isdir(path) else f"{path.partition('@')[0]}@"
        raise DataError(
            f"{path} has no split {split}; it has {', '.join(found)}: give {other}{next(iter(found))}, for example"
        )
    return found[split]
