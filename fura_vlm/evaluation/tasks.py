"""lmms-eval's tasks, with their data from the hub, its cache, or a local folder.

Prompts, generation arguments and metrics are those of the task's YAML file. Of the four benchmarks' tasks the data
are loaded here, because lmms-eval asks for a token for public data, loads GQA's pictures from a fixed address and
copies each of them into every question about it, and ends at the first picture that does not decode.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image as Pillow
from PIL import ImageFile

from fura_vlm.errors import FuraVLMError, first_line
from fura_vlm.evaluation.plugin import NAME
from fura_vlm.evaluation.variants import extended
from fura_vlm.shipped import SHARE

EVAL_FOLDER = SHARE / "eval"
TASKS = {
    "lmms-eval": ("gqa", "scienceqa_img", "textvqa_val", "pope"),
    "paper": ("gqa", "scienceqa_paper", "textvqa_paper", "pope_paper"),
}
"""The tasks of the four benchmarks by protocol, in the order GQA, ScienceQA-IMG, TextVQA, POPE."""

COLUMNS = {
    "GQA": {"imageId", "question", "answer"},
    "ScienceQA": {"image", "question", "choices", "answer", "hint"},
    "textvqa": {"image", "question", "question_id", "answers"},
    "POPE": {"image", "question", "question_id", "answer", "category"},
}
"""The columns that the tasks read, by the last part of the data's path."""

TYPES = {
    "GQA": {"structural": ("types", "structural"), "semantic": ("types", "semantic")},
    "ScienceQA": {"subject": ("subject",), "topic": ("topic",)},
    "POPE": {"category": ("category",)},
}
"""Where a document says of what type its question is, by ways to tell them apart. TextVQA has no types."""


class TaskError(FuraVLMError):
    """A task that does not exist or whose data cannot be used; the message says which and what to do."""


@dataclass
class LoadedTask:
    """A task ready to run.

    Args:
        task: lmms-eval's task, without the documents whose pictures do not decode.
        metric: the first of its metrics, or for POPE the F1 score.
        total: documents before they were left out.
        unreadable: those documents: their number in the split, and the reason.
        benchmark: which of the four it is, a key of ``COLUMNS``; ``None`` for other tasks.
        pictures: for each document that is left a hash of its picture, ``""`` where it has none. Of other tasks
            nothing is known.
    """

    task: ConfigurableTask
    metric: str
    total: int
    unreadable: list[dict] = field(default_factory=list)
    benchmark: str | None = None
    pictures: list[str] | None = None

    def pictures_of(self, number: int) -> list[Pillow.Image]:
        """Those of document ``number``, of those that are left."""
        visuals = self.task.doc_to_visual(self.task.eval_docs[number]) or []
        return visuals if isinstance(visuals, list) else [visuals]

    def types(self, document: dict) -> dict[str, str]:
        """Of what type the question of ``document`` is, by the ways of ``TYPES``; only those that it says."""
        found = {}
        for way, path in TYPES.get(self.benchmark, {}).items():
            value = document
            for key in path:
                value = (value or {}).get(key)
            if value:
                found[way] = str(value)
        return found


def load_tasks(
    names: list[str], data: str | None = None, limit: int | None = None, max_new_tokens: int | None = None
) -> dict[str, LoadedTask]:
    """Tasks by name, with their data.

    Args:
        names: names of lmms-eval's tasks, or of those in ``eval/``.
        data: a folder with folders ``GQA``, ``ScienceQA``, ``textvqa`` and ``POPE`` as they are on the hub; by default
            the hub, or its cache.
        limit: only so many documents of each, the first.
        max_new_tokens: in place of the tasks' own length limits.

    Raises:
        TaskError: if a task does not exist, or its data cannot be had or have other columns or splits.
    """
    tasks = {name: _load(_manager(), name, data, limit) for name in names}
    for loaded in tasks.values() if max_new_tokens else ():
        loaded.task.set_config("generation_kwargs", {"max_new_tokens": max_new_tokens}, update=True)
    return tasks


@functools.cache
def _manager() -> TaskManager:
    """Names and files of all tasks: lmms-eval parses more than three thousand files for it, which takes seconds."""
    return TaskManager(include_path=str(EVAL_FOLDER))


def _load(manager: TaskManager, name: str, data: str | None, limit: int | None) -> LoadedTask:
    kind = manager.task_index.get(name, {}).get("type")
    if kind in ("group", "tag"):
        raise TaskError(f"{name} is a {kind} of lmms-eval's tasks: name those you want")
    if kind not in ("task", "python_task"):
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise TaskError(f"lmms-eval has no task {name!r}{hint}")
    config = extended(load_yaml_config(manager.task_index[name]["yaml_path"]))
    config["metadata"] = _metadata(config.get("metadata"))
    benchmark = Path(config.get("dataset_path") or "").name
    if benchmark not in COLUMNS:
        return _other(name, config, limit)

    path = config["dataset_path"] if data is None else str(Path(data) / benchmark)
    split = config["test_split"]
    documents = _documents(path, config.get("dataset_name"), split)
    missing = COLUMNS[benchmark] - set(documents.column_names)
    if missing:
        raise TaskError(
            f"The {benchmark} data at {path} have no column {', '.join(sorted(missing))}: they must have those of "
            f"{config['dataset_path']} on the hub"
        )
    if limit is not None:
        documents = documents.select(range(min(limit, len(documents))))
    if benchmark == "GQA":  # its pictures are a set of their own
        images = _documents(path, "testdev_balanced_images", split)
        rows = {image: row for row, image in enumerate(images["id"])}
        lost = sorted(set(documents["imageId"]) - rows.keys())
        if lost:
            raise TaskError(f"The GQA data at {path} have no image {lost[0]}: fetch testdev_balanced_images again")
        wanted = [rows[image] for image in documents["imageId"]]
        checked = _check_pictures(images, sorted(set(wanted)))
        pictures = [checked[row] for row in wanted]
        config |= {
            "process_docs": None,
            "doc_to_visual": lambda doc: [images[rows[doc["imageId"]]]["image"].convert("RGB")],
        }
    else:
        checked = _check_pictures(documents, range(len(documents)))
        pictures = [checked[number] for number in range(len(documents))]
    total = len(documents)
    reasons = {number: reason for number, (_, reason) in enumerate(pictures) if reason}
    readable = [number for number in range(total) if number not in reasons]
    if not readable:
        raise TaskError(f"None of the pictures of the {benchmark} data at {path} can be decoded: fetch them again")
    if reasons:
        documents = documents.select(readable)
    task = _WithData(config, DatasetDict({split: documents}))
    unreadable = [{"document": number, "reason": reason} for number, reason in sorted(reasons.items())]
    metrics = [metric["metric"] for metric in config["metric_list"]]
    metric = "pope_f1_score" if "pope_f1_score" in metrics else metrics[0]
    return LoadedTask(task, metric, total, unreadable, benchmark, [pictures[number][0] for number in readable])


def _other(name: str, config: dict, limit: int | None) -> LoadedTask:
    """A task of lmms-eval whose data lmms-eval loads itself."""
    means = [metric["metric"] for metric in config.get("metric_list", []) if metric.get("aggregation") == "mean"]
    if not means:  # MME's sum over pairs of questions, for one: neither a share nor a score for each document
        raise TaskError(
            f"{name} has no score that is a mean over its documents, which the tables and intervals here need: run it "
            "with python -m lmms_eval --model fura_vlm"
        )
    try:
        task = ConfigurableTask(config=config, model_name=NAME)
    except Exception as error:  # whatever libraries and the task's own code raise
        raise TaskError(
            f"The data of {name} cannot be loaded ({_reason(error)}): check the network and your "
            "access to it on the hub"
        ) from error
    return LoadedTask(task, means[0], min(limit or len(task.eval_docs), len(task.eval_docs)))


def _metadata(given: dict | list[dict] | None) -> dict:
    """As one dictionary. lmms-eval takes the version of a task from such a one alone, and many tasks write a list."""
    merged: dict = {}
    for part in given if isinstance(given, list) else [given or {}]:
        merged |= part
    return merged


class _WithData(ConfigurableTask):
    """A task over documents in memory."""

    def __init__(self, config: dict, documents: DatasetDict):
        self._documents = documents
        super().__init__(config=config, model_name=NAME)

    def download(self, dataset_kwargs=None) -> None:
        self.dataset = self._documents
        self.dataset_no_image = DatasetDict({
            split: documents.remove_columns(_image_columns(documents)) for split, documents in self._documents.items()
        })  # fmt: skip


def _documents(path: str, name: str | None, split: str) -> Dataset:
    local = Path(path).is_absolute() or Path(path).is_dir() or path.startswith(".")
    if local and not Path(path).is_dir():
        raise TaskError(f"There are no data at {path}: the folder must hold GQA, ScienceQA, textvqa and POPE")
    try:
        if not local:
            return load_dataset(path, name, split=split)
        # datasets tells local folders apart by their last name alone, and would hand out the data of another one.
        digest = _digest(Path(path))
        cache = Path(datasets.config.HF_DATASETS_CACHE) / f"fura-vlm-{digest}"
        documents = load_dataset(path, name, split=split, cache_dir=str(cache))
        documents._fingerprint = f"{documents._fingerprint}-{digest}"  # part of the key of kept answers
        return documents
    except (OSError, ValueError, KeyError, DatasetsError) as error:  # what fails on the network is an OSError
        way = (
            "the folder must look as it does on the hub"
            if local
            else "check the network, or name a folder with --data, or --data embedded"
        )
        raise TaskError(
            f"The data {path}{f' ({name})' if name else ''} cannot be loaded ({_reason(error)}): {way}"
        ) from error


def _reason(error: BaseException) -> str:
    """Why data cannot be loaded. Some errors only say that there was another; one lists all formats there are."""
    reason = error if isinstance(error, (OSError, ValueError, KeyError)) else error.__cause__ or error
    return textwrap.shorten(first_line(reason), 300, placeholder=" ...")


def _digest(folder: Path) -> str:
    """Sixteen hexadecimal digits for the files of a folder, by their paths, sizes and times."""
    files = sorted(file for file in folder.resolve().rglob("*") if file.is_file())
    listing = "".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _image_columns(documents: Dataset) -> list[str]:
    return [name for name, feature in documents.features.items() if isinstance(feature, Image)]


def _check_pictures(documents: Dataset, rows) -> dict[int, tuple[str, str | None]]:
    """By row a hash of its pictures' files, ``""`` where there are none, and why they do not decode, if they do not."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries turn it on for all: what is missing would be grey
    columns = _image_columns(documents)
    raw = documents.select_columns(columns)
    for column in columns:
        raw = raw.cast_column(column, Image(decode=False))

    def check(row: int) -> tuple[str, str | None]:
        digest = hashlib.sha256()
        pictures = [picture for picture in raw[row].values() if picture is not None]
        for picture in pictures:
            try:
                content = picture["bytes"] or Path(picture["path"]).read_bytes()
                digest.update(content)
                with Pillow.open(io.BytesIO(content)) as image:
                    image.load()
            except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
                return "", first_line(error)
        return digest.hexdigest()[:16] if pictures else "", None

    with ThreadPoolExecutor() as pool:
        return dict(zip(rows, pool.map(check, rows), strict=True))
