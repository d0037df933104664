"""From a conversation to what the model reads: exactly the text that training makes of the same turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fura_vlm.chat.engine import ChatError
from fura_vlm.data.conversation import prompt
from fura_vlm.data.dataset import count_image_tokens
from fura_vlm.data.images import ImageError, load_image
from fura_vlm.data.records import IMAGE, Turn


@dataclass
class Exchange:
    """A question with its answer.

    Args:
        question: as the user typed it.
        image: the picture that came with it, or ``None``.
        answer: ``None`` while there is none.
    """

    question: str
    image: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        text: the conversation up to ``ASSISTANT:``, with ``<image>`` where a picture stands.
        images: the paths of the pictures, in order.
        notice: what was left out to keep within the context, or ``None``.
    """

    text: str
    images: list[str]
    notice: str | None = None


def build_prompt(exchanges: list[Exchange], processor, max_tokens: int) -> Prompt:
    """The prompt for the last question of a conversation.

    Too long a conversation loses its oldest exchanges first, but never the latest picture, which moves to the oldest
    question that is kept; then the last question is cut at its end.

    Args:
        exchanges: the conversation; the last one has no answer yet.
        processor: a ``LlavaProcessor`` with a fast tokenizer.
        max_tokens: tokens the prompt may have, image tokens included.

    Raises:
        ChatError: if there is no question, or if ``max_tokens`` has no room even for the picture.
    """
    tokenizer = processor.tokenizer
    kept = [
        Exchange(_plain(e.question, tokenizer), e.image, e.answer and _plain(e.answer, tokenizer)) for e in exchanges
    ]
    if not kept[-1].question:
        raise ChatError("There is no question: type one")
    image_tokens, dropped, cut = count_image_tokens(processor), 0, False
    while (excess := _length(kept, tokenizer, image_tokens) - max_tokens) > 0:
        if len(kept) > 1:
            oldest = kept.pop(0)
            if oldest.image and not any(exchange.image for exchange in kept):
                kept[0].image = oldest.image
            dropped += 1
            continue
        ends = [end for _, end in tokenizer(kept[0].question, return_offsets_mapping=True)["offset_mapping"] if end]
        if len(ends) <= excess:
            raise ChatError(
                f"The picture and the question do not fit into {max_tokens} tokens: ask for a shorter answer"
            )
        kept[0].question = kept[0].question[: ends[-excess - 1]].strip()
        cut = True
    notice = None
    if cut:
        notice = "The question is longer than the model can read: only its beginning was used."
    elif dropped:
        notice = (
            f"The conversation is longer than the model can read: the oldest {dropped} of its questions are forgotten."
        )
    return Prompt(_text(kept, tokenizer), [exchange.image for exchange in kept if exchange.image], notice)


def encode(prompt: Prompt, processor) -> dict:
    """The tensors of a prompt: ``input_ids``, ``attention_mask`` (1, n) int64, ``pixel_values`` (images, 3, h, w).

    Raises:
        ChatError: if a picture is no longer there.
    """
    if not all(Path(path).is_file() for path in prompt.images):
        raise ChatError("A picture of this conversation is kept no longer: start a new conversation")
    images = [read_image(path) for path in prompt.images]
    return dict(processor(text=prompt.text, images=images or None, return_tensors="pt"))


def read_image(path: str) -> Image.Image:
    """A user's picture as 8-bit RGB.

    Raises:
        ChatError: if it cannot be used. The message has the file's name, and not where the server keeps it.
    """
    try:
        return load_image(path)
    except ImageError as error:
        raise ChatError(str(error).replace(str(path), Path(path).name)) from error


def is_animation(path: str) -> bool:
    """Whether a picture that can be read has more than one frame."""
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1) > 1


def _plain(text: str, tokenizer) -> str:
    """Without the tokenizer's special tokens: what a user types is text, neither an image nor the end of a turn."""
    special = {IMAGE, *tokenizer.all_special_tokens}
    while found := [token for token in special if token in text]:
        for token in found:  # again and again: taking one out may join the pieces of another
            text = text.replace(token, "")
    return text.strip()


def _text(exchanges: list[Exchange], tokenizer) -> str:
    turns = []
    for exchange in exchanges:
        turns.append(Turn("human", (IMAGE + "\n" if exchange.image else "") + exchange.question))
        if exchange.answer is not None:
            turns.append(Turn("gpt", exchange.answer))
    return prompt(turns, tokenizer.eos_token)


def _length(exchanges: list[Exchange], tokenizer, image_tokens: int) -> int:
    pictures = sum(exchange.image is not None for exchange in exchanges)
    return len(tokenizer(_text(exchanges, tokenizer))["input_ids"]) + pictures * (image_tokens - 1)
