"""Where the images of a mixture are, when they are not where it says."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from fura_vlm.data.columns import address

_LOOKED_AT = 200  # folders


def image_hint(folder: str | os.PathLike, missing: Sequence[str]) -> str:
    """What to do about images that are not in their folder.

    Looks for ten of them above the folder, in its folders, and under shortened names. A place counts if all are there.

    Args:
        folder: the image folder.
        missing: paths from the folder, at least one, with ``/`` in them.

    Returns:
        The end of a sentence: the ``--image_folder`` to pass, or the link to make, or what to look for.
    """
    folder = Path(os.path.abspath(folder))
    names = list(missing[:: max(1, len(missing) // 10)])[:10]
    bases = [folder.parent, folder.parent.parent, *_folders_in(folder)]
    for base in bases:
        if all((base / name).is_file() for name in names):
            return f"{names[0]} is in {base}: pass --image_folder {quote(str(base))}"
    parts = Path(names[0]).parts
    for base, dropped in itertools.product([folder, *bases], range(1, len(parts))):
        if not all(base.joinpath(*Path(name).parts[dropped:]).is_file() for name in names):
            continue
        # The first folder that the shortened name still has is to be seen under the full name.
        link = folder.joinpath(*parts[: min(dropped + 1, len(parts) - 1)])
        target = base / parts[dropped] if dropped < len(parts) - 1 else base
        make = "" if link.parent.is_dir() else f"mkdir -p {quote(str(link.parent))} && "
        link_it = f"{make}ln -s {quote(str(target))} {quote(str(link))}"
        return f"{names[0]} is there as {base.joinpath(*parts[dropped:])}: {link_it}"
    return f"pass the folder that holds {names[0]} as --image_folder"


def source_of(image: str) -> str:
    """The data set that an image belongs to: the first folder of its path in the mixture; "." without one. Of an image
    that is stored in a column it is the column."""
    if stored := address(image):
        return stored.column
    head, _, rest = image.partition("/")
    return head if rest else "."


def _folders_in(folder: Path) -> list[Path]:
    """Those one and two levels below, up to a number."""
    below = _subfolders(folder)
    return [*below, *(inner for outer in below[:_LOOKED_AT] for inner in _subfolders(outer))][:_LOOKED_AT]


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in entries if entry.is_dir())
    except OSError:
        return []
