"""The optional parts of the package: what is missing of them, and how to get it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from fura_vlm.errors import FuraVLMError
from fura_vlm.shipped import SHARE

NAME = "fura-vlm"


class MissingExtra(FuraVLMError):
    """Packages that are not installed."""


def require(*extras: str) -> None:
    """Refuses to go on without these extras.

    Raises:
        MissingExtra: packages of them are not installed; the message says how to install them.
    """
    names = missing(*extras)
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more packages" if len(names) > 3 else "")
        verb = "is" if len(names) == 1 else "are"
        raise MissingExtra(f"{shown} {verb} not installed: {way_to(*extras)}")


def way_to(*extras: str) -> str:
    """The command that installs these extras."""
    script = SHARE / "scripts/env.sh"
    if script.is_file():  # a checkout, which has versions of its own
        return f"source {script.resolve()} {' '.join(extras)}"
    return f'pip install "{NAME}[{",".join(extras)}]"'


def missing(*extras: str) -> list[str]:
    """The packages of these extras that are not installed; none if this one is not installed itself."""
    try:
        requirements = [Requirement(line) for line in metadata.requires(NAME) or []]
    except metadata.PackageNotFoundError:
        return []
    names = dict.fromkeys(name for extra in extras for name in _packages(requirements, extra))
    return [name for name in names if not _is_installed(name)]


def _packages(requirements: list[Requirement], extra: str) -> Iterator[str]:
    for requirement in requirements:
        marker = requirement.marker
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            if requirement.name == NAME:  # one extra is part of another
                for other in sorted(requirement.extras):
                    yield from _packages(requirements, other)
            else:
                yield requirement.name


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
