"""A mixture tokenized once: Arrow files that every process maps, so that no start parses a gigabyte of JSON.

    <mixture>.index/<key>/part-00000.arrow    rows, as ``dataset.row_schema`` describes them; an Arrow stream, which
                                              ``datasets.Dataset.from_file`` reads
    <mixture>.index/<key>/part-00000.jsonl    what is wrong with records of this part
    <mixture>.index/<key>/index.json          what it was made from; written last
    <mixture>.index/<key>/images.json         which images were found broken when they were last checked;
                                              <fallback>/<key>.images.json where that cannot be written

The key is a hash of all that the rows depend on: the mixture (path, size, time of change), the image folder, the
tokenizer, the conversation, what pictures of some sizes become, and the maximum length. Where something of it changes,
another index is made; those of a mixture that has changed are removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from fura_vlm.data.columns import address, names_columns, state
from fura_vlm.data.dataset import BATCH, ConversationDataset, encode_rows, read_table, row_schema, rows_with
from fura_vlm.data.image_checks import DECODE_UP_TO, Verify, check_paths
from fura_vlm.data.images import find_image
from fura_vlm.data.locate import image_hint, source_of
from fura_vlm.data.messages import DataError, Problem
from fura_vlm.data.records import default_image_folder, iter_records
from fura_vlm.families.base import Encoded, EncodingError, Family
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.files import finish, unfinished, write_text

VERSION = 4
"""Raised when the same settings give other rows."""

PART = 20_000
"""Elements of the mixture in a file. If making the index is interrupted, complete files are kept."""

_BAR_FROM = 20_000_000  # bytes of a mixture whose reading shows a bar


@dataclasses.dataclass(frozen=True)
class Index:
    """A complete index.

    Args:
        folder: where it is.
        mixture: what it was made from: a path, or a name on the hub.
        image_folder: where the image paths of the mixture start.
        files: the Arrow files, in the order of the mixture.
        problems: records that are left out and those that are cut.
        fallback: a folder for what cannot be written to ``folder``.
    """

    folder: Path
    mixture: str | Path
    image_folder: Path
    files: list[str]
    problems: list[Problem]
    fallback: Path

    def dataset(self, family: Family, verify: Verify = "auto") -> tuple[ConversationDataset, str]:
        """The dataset of all records whose images can be used; its ``problems`` are those of records and images.

        Args:
            family: the one that the index was made with.
            verify: as in ``check_paths``. Of a large mixture, images that were found good once are not checked again;
                the others are.

        Returns:
            The dataset, and what to do if all images of a source are missing (a line for the screen, or "").

        Raises:
            DataError: if there are images and every one of them is missing.
        """
        table = read_table(self.files)
        paths = pc.unique(pc.list_flatten(table["images"])).to_pylist()
        broken = self._broken_images(paths, verify)
        advice = self._advice(paths, broken)
        selected = table.select(["images", "file", "place", "id"]).filter(pa.array(rows_with(table, list(broken))))
        bad = [
            Problem(
                row["file"], row["place"], row["id"], next(broken[path] for path in row["images"] if path in broken)
            )
            for row in selected.to_pylist()
        ]
        gone = {problem.place for problem in bad}
        kept = [problem for problem in self.problems if problem.place not in gone]  # one reason is enough
        return ConversationDataset.from_files(self.files, family, kept + bad, list(broken)), advice

    def _broken_images(self, paths: list[str], verify: Verify) -> dict[str, str]:
        if verify == "none" or len(paths) <= DECODE_UP_TO:
            return check_paths(paths, verify)
        modes = ("header", "decode")
        mode = "header" if verify == "auto" else verify
        shared, own = self.folder / "images.json", self.fallback / f"{self.folder.name}.images.json"
        memory = shared if os.access(self.folder, os.W_OK) else own  # somebody else may have made the index
        known = next((json.loads(file.read_text()) for file in (memory, shared) if file.is_file()), None)
        if known and modes.index(known["mode"]) >= modes.index(mode):
            mode, paths = known["mode"], list(known["broken"])
        broken = check_paths(paths, mode)
        write_text(memory, json.dumps({"mode": mode, "broken": broken}, indent=1))
        return broken

    def _advice(self, paths: list[str], broken: dict[str, str]) -> str:
        if not broken:
            return ""
        images, missing = defaultdict(int), defaultdict(list)
        for path in paths:
            name = path if address(path) else os.path.relpath(path, self.image_folder)
            images[source_of(name)] += 1
            if path in broken and find_image(path) is None:
                missing[source_of(name)].append(name)
        lost = [source for source, names in missing.items() if len(names) == images[source]]
        if len(lost) == len(images):
            raise DataError(
                f"None of the {len(paths):,} images of {self.mixture} is in {self.image_folder}: "
                + image_hint(self.image_folder, [name for names in missing.values() for name in names])
            )
        said = (
            f"None of {images[source]:,} images in {source}: {image_hint(self.image_folder, missing[source])}"
            for source in lost
        )
        return "\n".join(said)


def open_index(
    data_path: str | os.PathLike,
    image_folder: str | os.PathLike | None,
    family: Family,
    max_length: int,
    fallback: str | os.PathLike,
    progress: bool = True,
) -> Index:
    """The index of a mixture; it is made where it is not there yet.

    Several processes may ask at the same time: one makes it, the others wait. Of an interrupted making, the complete
    parts are used.

    Args:
        data_path: the mixture, as in ``iter_records``.
        image_folder: where its image paths start; by default as in ``iter_records``.
        family: that of the model.
        max_length: tokens of a row, image tokens included.
        fallback: a folder for the index where none can be written beside the mixture, and for what is found out about
            images where somebody else's index is used.
        progress: show a bar if the mixture is large.

    Raises:
        DataError: if the mixture or the image folder cannot be used.
        EncodingError: if the tokenizer will not do.
    """
    on_hub = names_columns(data_path) and not os.path.exists(data_path)
    image_folder = Path(os.path.abspath(default_image_folder(data_path) if image_folder is None else image_folder))
    if not on_hub:
        data_path = Path(os.path.abspath(data_path))  # rows hold paths; a later run may start elsewhere
    mixture = _state(data_path)
    settings = {
        "version": VERSION,
        "mixture": mixture,
        "image_folder": str(image_folder),
        "tokenizer": _fingerprint(family.tokenizer),
        "conversation": family.conversation,
        "examples": _examples(family),
        "max_length": max_length,
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    fallback = Path(fallback)
    beside = fallback if on_hub else data_path.with_name(data_path.name + ".index")
    for folder in (beside / key, fallback / key):
        if (folder / "index.json").is_file():
            break
    else:
        folder = _writable(beside, fallback) / key
        _make_once(folder, settings, data_path, image_folder, family, progress)
    files = sorted(str(file) for file in folder.glob("part-*.arrow"))
    lines = (line for file in files for line in _problem_file(Path(file)).read_text("utf-8").splitlines())
    problems = [Problem(**json.loads(line)) for line in lines]
    return Index(folder, data_path, image_folder, files, problems, fallback)


def _state(data_path: str | os.PathLike) -> dict:
    if names_columns(data_path):
        return state(data_path)
    try:
        found = os.stat(data_path)
    except OSError as error:
        raise DataError(f"{data_path} cannot be read ({error.strerror}): check data_path") from error
    return {"path": str(data_path), "size": found.st_size, "changed": found.st_mtime_ns}


def _examples(family: Family) -> list[str]:
    """What a conversation becomes with pictures of some sizes: another template or image processor gives another."""
    made = []
    for size in ((336, 336), (640, 480), (100, 900)):
        turns = [Message("user", (Text("a\n"), Picture(""))), Message("assistant", (Text("b"),))]
        [encoded] = family.encode([(turns, [size])])
        made.append(str(encoded) if isinstance(encoded, EncodingError) else _digest(encoded))
    return made


def _digest(encoded: Encoded) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in encoded)).hexdigest()[:16]


def _fingerprint(tokenizer) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["truncation"], state["padding"]  # these change with each call
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps([state, special]).encode()).hexdigest()[:16]


def _writable(beside: Path, fallback: Path) -> Path:
    try:
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK):
            return beside
    except OSError:  # data sets are often where one may only read
        pass
    fallback.mkdir(parents=True, exist_ok=True)
    return fallback


def _make_once(folder: Path, settings: dict, *rest) -> None:
    with FileLock(folder.parent / "lock"):
        if not (folder / "index.json").is_file():  # or else another process has just made it
            _remove_outdated(folder.parent, settings["mixture"])
            _make(folder, settings, *rest)


def _remove_outdated(home: Path, mixture: dict) -> None:
    for described in [*home.glob("*/index.json"), *home.glob("*/making.json")]:
        of = json.loads(described.read_text())["mixture"]
        if of["path"] == mixture["path"] and of != mixture:
            shutil.rmtree(described.parent)


def _make(
    folder: Path, settings: dict, data_path: str | Path, image_folder: Path, family: Family, progress: bool
) -> None:
    building = unfinished(folder)  # what an interrupted run has left in it is used
    building.mkdir(exist_ok=True)
    write_text(building / "making.json", json.dumps(settings, indent=1))
    progress = progress and settings["mixture"]["size"] >= _BAR_FROM
    found = iter_records(data_path, image_folder, progress)
    for number in itertools.count():
        part = itertools.islice(found, PART)
        file = building / f"part-{number:05d}.arrow"
        if file.exists():
            elements = sum(1 for _ in part)  # parsed once more, which is quick, to get to what is missing
        else:
            elements = _write_part(file, part, family, settings["max_length"])
        if elements < PART:
            break
    finish(building / "making.json", building / "index.json")
    finish(building, folder)


def _write_part(file: Path, pairs, family: Family, max_length: int) -> int:
    """Returns the number of elements, good or bad."""
    elements, problems = 0, []
    building = unfinished(file)
    with pa.OSFile(str(building), "wb") as sink, pa.ipc.new_stream(sink, row_schema(family)) as stream:
        while batch := list(itertools.islice(pairs, BATCH)):
            elements += len(batch)
            records = [record for record, _ in batch if record is not None]
            rows, found = encode_rows(records, family, max_length)
            problems += [problem for _, problem in batch if problem is not None] + found
            stream.write_batch(rows)
    write_text(_problem_file(file), "".join(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems))
    finish(building, file)
    return elements


def _problem_file(file: Path) -> Path:
    return file.with_suffix(".jsonl")
