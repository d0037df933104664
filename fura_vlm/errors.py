"""The root of the project's own errors."""


class FuraVLMError(Exception):
    """Something the user can mend. The message is one sentence that names the place, the reason and the way out."""


class ModelError(FuraVLMError):
    """A model, processor or adapter that cannot be used; the message says which and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
