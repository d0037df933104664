"""The processor of LLaVA v1.5."""

from __future__ import annotations

from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fura_vlm.data.conversation import CHAT_TEMPLATE


def make_processor(tokenizer: PreTrainedTokenizerBase, image_size: int, patch_size: int) -> LlavaProcessor:
    """Images padded to a square with CLIP's mean colour and resized by Pillow; the Vicuna v1 conversation.

    Args:
        tokenizer: with ``<image>`` among its tokens.
        image_size: edge of the square that the vision tower sees, in pixels.
        patch_size: edge of one of its patches, in pixels.
    """
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=True,
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )
