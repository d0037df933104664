"""Whether answers are written with vLLM, and why not."""

from __future__ import annotations

from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fura_vlm.families.base import Family
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.methods import method_of

WITHOUT = "leave --use_vllm out, and transformers writes the answers"


def choose_vllm(config: GrpoConfig, family: Family) -> tuple[bool, str]:
    """Whether vLLM writes the answers, and what is to be said about it.

    Raises:
        TrainingError: it is asked for and cannot be used.
    """
    if config.use_vllm is False:
        return False, ""
    wrong = version_that_does_not_fit()
    if config.use_vllm is None:
        usable = torch.cuda.is_available() and not method_of(config).four_bits and not family.sees
        if not usable or installed() is None:
            return False, ""
        return wrong is None, f"{wrong}: transformers writes the answers" if wrong else ""
    if installed() is None:
        raise TrainingError(f'vLLM is not installed: pip install "vllm{fitting()}", or {WITHOUT}')
    if wrong:
        raise TrainingError(f"{wrong}: install one of these, or {WITHOUT}")
    if not torch.cuda.is_available():
        raise TrainingError(f"vLLM writes answers on a GPU, and there is none: {WITHOUT}")
    if method_of(config).four_bits:
        raise TrainingError(f"{config.method} keeps its base in 4 bits, where vLLM gets no merged weights: {WITHOUT}")
    return True, ""


def version_that_does_not_fit() -> str | None:
    """A phrase about the installed version of vLLM if TRL does not take it."""
    there = installed()
    if there is None or Version(there.base_version) in fitting():
        return None
    return f"vLLM {there} is installed, and TRL {metadata.version('trl')} works with vLLM {fitting()}"


def installed() -> Version | None:
    """The version of vLLM that is installed, if any."""
    try:
        return Version(metadata.version("vllm"))
    except metadata.PackageNotFoundError:
        return None


def fitting() -> SpecifierSet:
    """The versions of vLLM that the installed TRL says it works with."""
    named = (Requirement(line) for line in metadata.requires("trl") or [])
    return next((each.specifier for each in named if each.name == "vllm"), SpecifierSet())
