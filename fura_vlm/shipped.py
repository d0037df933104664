"""The files that the package brings: recipes, DeepSpeed configurations, tasks, the embedded model.

They are in ``share/``, by the paths that they have in a checkout. There ``share/`` holds links to the folders in which
people edit them; in an installed package it holds the files themselves.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fura_vlm.errors import FuraVLMError

SHARE = Path(__file__).parent / "share"
MODEL = Path("data/tiny-llava")
"""The embedded model: in ``SHARE``, and where the embedded recipe looks for it in the working folder."""

KINDS = {
    "recipe": "scripts/configs/*.yaml",
    "DeepSpeed configuration": "scripts/zero*.json",
    "data recipe": "data/*.yaml",
}
"""What has a name, and where it is in ``SHARE``. The name is that of the file without its ending."""


class ShippedError(FuraVLMError):
    """There is no file of this path or name."""


def named(kind: str) -> dict[str, Path]:
    """The package's files of a kind by their names; ``kind`` is a key of ``KINDS``."""
    return {file.stem: file for file in sorted(SHARE.glob(KINDS[kind]), key=lambda file: file.stem)}


def find(kind: str, given: str) -> Path:
    """The file that a user means: the one at this path or, if there is none, the one of this name in the package.

    Args:
        kind: a key of ``KINDS``.
        given: a path, or a name such as ``llava-1.5-7b`` or ``zero2``.

    Raises:
        ShippedError: there is neither.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    files = named(kind)
    if given not in files:
        raise ShippedError(
            f"There is no {kind} at {given}, and none has that name: give the path of a file, or one of the names "
            f"{', '.join(files)}"
        )
    return files[given]


def copy_model() -> bool:
    """Copies the embedded model to ``MODEL`` in the working folder unless it is there. Returns whether it did."""
    if MODEL.is_dir():
        return False
    building = MODEL.with_name(f"{MODEL.name}.{os.getpid()}.tmp")
    shutil.copytree(SHARE / MODEL, building)
    building.rename(MODEL)
    return True
