"""What training raises."""

from fura_vlm.errors import FuraVLMError


class TrainingError(FuraVLMError):
    """A run that cannot start or go on; the message says why and what to do."""
