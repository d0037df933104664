"""The base class of the project's own errors, and the message that a user gets for any error."""

from __future__ import annotations

import errno


class FuraVLMError(Exception):
    """Something that the user can fix. The message is one sentence that names the place, the reason and the way out."""


class ModelError(FuraVLMError):
    """A model, processor or adapter that cannot be used; the message says which and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def sentence(error: BaseException) -> str | None:
    """The message for the user instead of a traceback; None if the error is a fault of the program."""
    if isinstance(error, FuraVLMError):
        return str(error)
    if _disk_is_full(error):
        return "the disk is full: make room and start the same command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}: check the path and its permissions"
    return None


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether the disk is full, as Python, safetensors or torch's writer of checkpoints report it."""
    while error is not None:
        words = ("No space left on device", "file write failed", "unexpected pos")
        if getattr(error, "errno", None) == errno.ENOSPC or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
