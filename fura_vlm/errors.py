"""The root of the project's own errors."""


class FuraVLMError(Exception):
    """Something the user can mend. The message is one sentence that names the place, the reason and the way out."""
