"""What FuRA refuses."""

from fura_vlm.errors import FuraVLMError


class FuraError(FuraVLMError, ValueError):
    """An adapter cannot be made, loaded or merged as asked. A ValueError, as PEFT's own refusals are."""
