"""Small helpers for files."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in UTF-8 under a temporary name and renames it, so that nobody ever reads half of it.

    Its folder is made. The temporary name is another one each time: processes may write the same file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, "utf-8", errors="backslashreplace")  # half a surrogate pair, escaped again
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
