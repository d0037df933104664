"""A study, read from a YAML file: the model, the data, the methods with their learning rates, and what is compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import yaml

from fura_vlm.errors import FuraVLMError
from fura_vlm.training.config import Method

VERSION = 1  # raised when the same settings give other results: rows of another version are not counted


class EvidenceError(FuraVLMError, ValueError):
    """A study, its data or its rows cannot be used. The message is one sentence with the way out."""


@dataclass(frozen=True)
class Variant:
    """A method as a study tries it.

    Args:
        name: as tables call it.
        method: one of the project's methods.
        rates: the learning rates to choose from, ascending.
        tier: methods of a lower one are run first.
        adapter: fields of PEFT's configuration, such as ``r`` or FuRA's ``train_side``.
        trains: of ``full``: ``all`` weights of the language model, or those of the ``linear`` layers alone, which are
            what adapters adapt.
        singular_values: the learning rate of FuRA's singular values, as a multiple of the other one.
        projector: the learning rate of the projector, likewise.
        decay: towards the weights that training began with, decoupled from the gradient: after each step a weight goes
            the share ``rate * decay`` of its way back.
        warmup: share of the steps in which the rate rises; by default the study's.
    """

    name: str
    method: Method
    rates: tuple[float, ...]
    tier: int = 1
    adapter: dict = field(default_factory=dict)
    trains: Literal["all", "linear"] = "all"
    singular_values: float = 1.0
    projector: float = 1.0
    decay: float = 0.0
    warmup: float | None = None


@dataclass(frozen=True)
class Training:
    """What all runs of a study have in common.

    Args:
        batch: records in a step.
        epochs: passes over the training part.
        steps: the most steps, if fewer.
        schedule: transformers' name of it.
        warmup: share of the steps in which the rate rises.
        clip: the largest norm of a gradient.
        betas: Adam's.
        precision: ``bfloat16`` is autocast over float32 weights; ``auto`` is that on a GPU, and float32 without one.
    """

    batch: int = 64
    epochs: int = 2
    steps: int | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"


@dataclass(frozen=True)
class Study:
    """A study.

    Args:
        name: the file's, without its ending.
        kind: where the data are from, ``text`` or ``pictures``.
        model: the folder of the base.
        output: the folder of its data, rows and tables.
        data: settings of the data; the fields of ``TextData`` or ``PictureData``.
        conversation: the form of a conversation; by default the model's own.
        training: what all runs have in common.
        search_seeds: seeds with which each learning rate is tried.
        seeds: seeds of the runs at the best one; none of them is one of the former.
        methods: the methods, in the order in which they are run.
        groups: named sets of the tests, whose means the tables give.
        headline: the group that stands for accuracy in pictures and in paired differences first.
        compare: a method, and those it is compared with, pair by pair of seeds.
        spectrum: numbers of the layers whose change is looked at along the singular directions of the base, in the runs
            with the first of ``seeds``.
    """

    name: str
    kind: Literal["text", "pictures"]
    model: str
    output: str
    methods: tuple[Variant, ...]
    groups: dict[str, list[str]]
    headline: str
    data: dict = field(default_factory=dict)
    conversation: str | None = None
    training: Training = Training()
    search_seeds: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    compare: dict[str, list[str]] = field(default_factory=dict)
    spectrum: tuple[int, ...] = ()

    def variant(self, name: str) -> Variant:
        """The method of this name.

        Raises:
            EvidenceError: there is none.
        """
        for variant in self.methods:
            if variant.name == name:
                return variant
        raise EvidenceError(
            f"{self.name} has no method {name!r}, only {', '.join(variant.name for variant in self.methods)}"
        )

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def settings(self, variant: Variant | None, data: str) -> str:
        """What a run's result depends on, besides its learning rate and seed, as 12 letters.

        Args:
            variant: the method, or None for the base as it is.
            data: the fingerprint of the data.
        """
        said = {"version": VERSION, "data": data, "model": Path(self.model).name}
        if variant is not None:
            mine = dataclasses.asdict(variant)
            for name in ("name", "rates", "tier"):
                del mine[name]
            said |= {"training": dataclasses.asdict(self.training), "variant": mine}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def read_study(file: str | Path, **changes) -> Study:
    """A study's configuration.

    Args:
        file: the YAML file.
        changes: other values of fields.

    Raises:
        EvidenceError: there is no such file, or it says something else than a study.
    """
    file = Path(file)
    try:
        said = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise EvidenceError(
            f"{file} cannot be read as a study ({str(error).splitlines()[0]}): name a YAML file of benchmarks/evidence"
        ) from error
    if not isinstance(said, dict):
        raise EvidenceError(f"{file} is no study: name a YAML file of benchmarks/evidence")
    said = {"name": file.stem, "output": f"runs/evidence/{file.stem}"} | said | changes
    methods = said.pop("methods", {})
    variants = []
    for name, one in methods.items():
        one = {"name": name} | one
        rates = one["rates"] = tuple(_number(file, name, rate) for rate in one.get("rates", ()))
        if not rates or list(rates) != sorted(set(rates)):
            raise EvidenceError(f"{file}: the rates of {name} are not in ascending order: sort them, each once")
        variants.append(_made(Variant, one, f"{file}, method {name}"))
    training = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.pop("training", {}).items()
    }
    lists = {key: tuple(value) for key, value in said.items() if key in ("search_seeds", "seeds", "spectrum")}
    study = _made(
        Study,
        said | lists | {"methods": tuple(variants), "training": _made(Training, training, f"{file}, training")},
        str(file),
    )
    _check(study, file)
    return study


def _check(study: Study, file: Path) -> None:
    if set(study.seeds) & set(study.search_seeds):
        raise EvidenceError(f"{file}: a seed is in search_seeds and in seeds: choose others for one of them")
    names = {variant.name for variant in study.methods}
    for variant in study.methods:
        if variant.method not in get_args(Method):
            raise EvidenceError(
                f"{file}: {variant.name} has the method {variant.method}, and there are only "
                f"{', '.join(get_args(Method))}"
            )
    for name, others in study.compare.items():
        for missing in {name, *others} - names:
            raise EvidenceError(f"{file}: compare names {missing}, which is none of the methods: add it, or remove it")
    if study.headline not in study.groups:
        raise EvidenceError(f"{file}: the headline {study.headline!r} is none of the groups {', '.join(study.groups)}")


def _number(file: Path, name: str, rate) -> float:
    try:
        return float(rate)  # YAML takes 1e-4 for a word
    except (TypeError, ValueError) as error:
        raise EvidenceError(f"{file}: {rate!r} among the rates of {name} is no number") from error


def _made(cls: type, said: dict, where: str):
    known = {each.name for each in dataclasses.fields(cls)}
    for key in said:
        if key not in known:
            raise EvidenceError(f"{where}: there is no setting {key!r}, only {', '.join(sorted(known))}")
    try:
        return cls(**said)
    except TypeError as error:
        raise EvidenceError(f"{where}: a setting is missing ({error})") from error
