"""LLaVA 1.5 (arXiv 2310.03744): a CLIP tower, a two-layer projector, a Llama; the Vicuna v1 conversation.

Tokens, labels and pixels are those of LLaVA v1.5's own scripts, point by point: docs/llava-preprocessing.md. The text
is tokenized in one piece, by the call that a processor makes when the model answers, so that training and inference
see the same ids.

Special tokens that somebody has typed are read as LLaVA's tokenizer reads them: ``<s>`` is the token; ``<pad>``, and
``<image>`` in a record without picture, are no tokens of Vicuna and so are text. With ``</s>`` or ``<unk>``, LLaVA's
labels do not match its tokens and it drops all of them ("tokenization mismatch"), so such a record is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fura_vlm.errors import ModelError
from fura_vlm.families import vicuna
from fura_vlm.families.base import Encoded, EncodingError, Family, Patches, Rendered
from fura_vlm.families.messages import Message, pictures
from fura_vlm.families.vicuna import IMAGE

PUBLISHED = {"7b": (4096, 11_008, 32), "13b": (5120, 13_824, 40)}
"""The published sizes: width, width of the MLP, layers."""


class Llava(Family):
    """LLaVA 1.5.

    Its conversations are ``"v1"``, Vicuna's, and ``"plain"``, a picture and its caption.
    """

    model_types = ("llava",)
    conversations = ("v1", "plain")
    projector_names = ("multi_modal_projector",)
    needs_sizes = False
    enough = (1344, 1344)
    """Four times the 336 pixels of the published towers."""
    bare_head = True

    @classmethod
    def load_processor(cls, path: str, config) -> LlavaProcessor:
        """The processor as LLaVA v1.5 trains and evaluates; Pillow does the image work, as in its own code.

        Published llava-hf checkpoints come with another one, which crops the centre of a picture instead of padding
        it, does not know of the tower's class token, and renders conversations without the system sentence. From such a
        processor only the tokenizer and the sizes are used.
        """
        processor = super().load_processor(path, config)
        if not isinstance(processor, LlavaProcessor):
            raise ModelError(
                f"{path} has a {type(processor).__name__}, but needs a LlavaProcessor: take the files that were "
                "published with the model"
            )
        _check_sizes(path, processor, config)
        images = processor.image_processor
        if not getattr(images, "do_pad", False) or processor.num_additional_image_tokens != 1:
            processor = make_processor(processor.tokenizer, images.crop_size["height"], config.vision_config.patch_size)
        _check_image_tokens(path, processor, config)
        return processor

    def render(self, messages: Sequence[Message]) -> Rendered:
        if pictures(messages) and any(IMAGE in message.text for message in messages):
            raise EncodingError(f"the text has {IMAGE} besides its pictures: take it out")
        render = vicuna.render if self.conversation == "v1" else vicuna.render_plain
        return render(messages, self.tokenizer.eos_token)

    def prompt(self, messages: Sequence[Message]) -> str:
        return vicuna.prompt(messages, self.tokenizer.eos_token)

    def adds_special_tokens(self, texts: Sequence[str]) -> bool:
        return True

    def expansion(self, width: int, height: int) -> str:
        """As many tokens as the tower's picture has patches, whatever the size."""
        return IMAGE * self.image_tokens

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(self.processor.image_processor(list(images), return_tensors="pt")) if images else {}

    @property
    def image_tokens(self) -> int:
        size, patch = self.processor.image_processor.crop_size, self.processor.patch_size
        dropped = self.processor.vision_feature_select_strategy == "default"  # the tower's class token
        patches = (size["height"] // patch) * (size["width"] // patch)
        return patches + self.processor.num_additional_image_tokens - dropped

    def encode(self, conversations) -> list[Encoded | EncodingError]:
        """As ``Family.encode``; what is typed is text or refused, as above.

        Raises:
            EncodingError: if the tokenizer itself will not do.
        """
        if not self.tokenizer.is_fast:
            raise EncodingError("the tokenizer cannot say where its tokens are in the text: use a fast one")
        if self.tokenizer.encode("x")[:1] != [self.tokenizer.bos_token_id]:
            raise EncodingError(f"the tokenizer adds no {self.tokenizer.bos_token}: load it with add_bos_token=True")
        made = super().encode(conversations)
        for number, (messages, _) in enumerate(conversations):
            if not isinstance(made[number], EncodingError) and (typed := self._typed_in(messages)):
                made[number] = self._as_text(messages, typed)
        return made

    def _typed_in(self, messages: Sequence[Message]) -> set[str]:
        special = {*self.tokenizer.all_special_tokens, IMAGE}
        return {token for token in special if any(token in message.text for message in messages)}

    def _as_text(self, messages: Sequence[Message], typed: set[str]) -> Encoded | EncodingError:
        tokenizer = self.tokenizer
        vicunas = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
        unlabelled = typed & vicunas - {tokenizer.bos_token}
        if unlabelled and self.conversation == "v1":
            return EncodingError(
                f"the text has the special token {min(unlabelled)}, on which LLaVA v1.5 does not train: remove it"
            )
        sources = pictures(messages)
        rendered, runs = self._expanded(self.render(messages), sources, [(0, 0)] * len(sources))
        if as_text := typed - vicunas:
            return self._encoded(rendered, runs, _without(tokenizer, as_text).encode(rendered.text))
        return self._encoded(rendered, runs, tokenizer(rendered.text).encodings[0])

    def seen(self, image: Image.Image) -> tuple[Image.Image, str]:
        """The square that the tower gets, the picture's own part framed, and what was padded."""
        settings = self.processor.image_processor
        pixels = settings(images=image, return_tensors="np")["pixel_values"][0]
        mean, std = (np.array(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        seen = Image.fromarray(((pixels * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
        size = f"become {seen.width} x {seen.height}"
        if image.width == image.height:
            return seen, f"{size}; nothing is padded."
        where = "left and right" if image.width < image.height else "above and below"
        share = 1 - min(image.size) / max(image.size)
        margin = round(share / 2 * seen.width)
        box = (margin, 0) if image.width < image.height else (0, margin)
        ImageDraw.Draw(seen).rectangle((*box, seen.width - 1 - box[0], seen.height - 1 - box[1]), outline="red")
        return seen, f"{size}; {share:.0%} of it is padding, {where}."

    def embed(self, model, input_ids, places, of_pictures) -> torch.Tensor:
        """As ``LlavaModel`` makes it.

        Raises:
            ValueError: the pictures have more or fewer features than there are tokens for them.
        """
        words = model.get_input_embeddings()(input_ids)
        features = torch.cat(self.picture_features(model, of_pictures))
        if len(features) != places.shape[1]:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {places.shape[1]}, features: {len(features)}"
            )
        return words.index_put(tuple(places), features.to(words))

    def patches(self) -> Patches:
        vision = self.config.vision_config
        number = (vision.image_size // vision.patch_size) ** 2
        return Patches((number + 1) / number, number + 1)  # with the class token


def named_config(name: str) -> LlavaConfig:
    """LLaVA-1.5's configuration, ``"7b"`` or ``"13b"``."""
    hidden, intermediate, layers = PUBLISHED[name]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32_064,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def published(name: str) -> tuple[str, LlavaConfig] | None:
    """Size and configuration of LLaVA-1.5 by ``7b``, ``13b`` or a name on the hub; None for other names."""
    found = re.match(r"(?:.*llava-v?1\.5-)?(7b|13b)\b", PurePath(name).name.lower())
    return found and (found[1], named_config(found[1]))


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
        chat_template=vicuna.CHAT_TEMPLATE,
    )


def _check_sizes(path: str, processor: LlavaProcessor, config) -> None:
    size, seen = processor.image_processor.crop_size["height"], config.vision_config.image_size
    if size != seen:
        raise ModelError(
            f"{path}: its processor makes pictures of {size} pixels, its vision tower expects {seen}: its files belong "
            "to different models"
        )


def _check_image_tokens(path: str, processor: LlavaProcessor, config) -> None:
    """Training relies on this, because comparing features and tokens in every batch would take too long."""
    strategies = processor.vision_feature_select_strategy, config.vision_feature_select_strategy
    sizes = processor.patch_size, config.vision_config.patch_size
    patches = [(config.vision_config.image_size // size) ** 2 for size in sizes]
    class_token = config.vision_config.model_type.startswith("clip")
    tokens = patches[0] + processor.num_additional_image_tokens - (strategies[0] == "default")
    features = patches[1] + class_token - (strategies[1] == "default")
    if tokens != features:
        raise ModelError(
            f"{path}: a picture is {tokens} tokens in its processor and {features} features in its model "
            f"(vision_feature_select_strategy {strategies[0]!r} and {strategies[1]!r}): its files belong to different "
            "models"
        )


def _without(tokenizer, tokens: set[str]) -> Tokenizer:
    """A tokenizer that reads ``tokens`` as text. They keep their ids under names that no text has: the ids of
    added tokens follow from their number."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] in tokens:
            token["content"] = "\0" + token["content"]
    return Tokenizer.from_str(json.dumps(state))
