"""The Vicuna v1 conversation, as text, as tokens, and as labels.

What LLaVA v1.5 makes of a record in ``preprocess_multimodal`` and ``preprocess_v1``::

    <s>A chat between ... questions. USER: <image>\\nWhat is this? ASSISTANT: A cat.</s>USER: Why? ...
                                                                             supervised

The ``<image>`` of a question moves to its front, on a line of its own. Labels are on each answer and its
``</s>``. The space before an answer is part of it, because a Llama token carries the space before its word:
the prompt ends with ``ASSISTANT:`` and the first token that the model has to say is ``▁A``.

The text is tokenized in one piece, by the call that a processor makes when the model answers, so that
training and inference see the same ids. LLaVA's scripts cut the text at ``<image>`` and tokenize the parts
one by one, which gives a lone ``▁`` more between the image and its line break. What follows a special token
depends on the tokenizer: with ``legacy=False`` no space is added (``</s>``, ``USER``), with ``legacy=True``
one is (``</s>``, ``▁USER``).

Special tokens that somebody has typed into a text are read as LLaVA's tokenizer reads them: ``<s>`` is the token;
``<pad>``, and ``<image>`` in a record without image, are no tokens of Vicuna and so are text. With ``</s>`` or
``<unk>``, LLaVA's labels do not match its tokens and it drops all of them ("tokenization mismatch"), so such a
record cannot be encoded here. Page and table of all points: docs/llava-preprocessing.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fura_vlm.data.messages import IMAGE, Record, Turn
from fura_vlm.errors import FuraVLMError

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CHAT_TEMPLATE = Path(__file__).with_name("vicuna_v1.jinja").read_text(encoding="utf-8")
"""The conversation as a chat template of transformers, with the answers marked by ``{% generation %}``.

It takes text, or lists of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``, and writes what
``render`` and ``prompt`` write. It leaves ``<s>`` to the tokenizer, as the templates of published LLaVAs do.
"""

IGNORE = -100
"""The label of tokens without supervision."""


class EncodingError(FuraVLMError):
    """A conversation that cannot become tokens. The message is the reason, fit for a list of problems."""


class Rendered(NamedTuple):
    """A conversation as text, and the character ranges ``[start, end)`` that are supervised."""

    text: str
    spans: list[tuple[int, int]]


class Tokens(NamedTuple):
    """An encoded conversation in which an image is still one token.

    Args:
        ids: (n,) int64.
        supervised: (n,) bool.
    """

    ids: np.ndarray
    supervised: np.ndarray


# ------------------------------------------------------------------------------------------------------ text


def render(record: Record | Sequence[Turn], eos: str = "</s>") -> Rendered:
    """The whole conversation, without the ``<s>`` that the tokenizer adds.

    Args:
        record: a record, or turns of human and gpt alternating.
        eos: the token that ends an answer.
    """
    text, spans = SYSTEM_PROMPT + " ", []
    for turn in _turns(record):
        if turn.role == "human":
            text += f"USER: {turn.value if _is_text_only(record) else _image_first(turn.value)} "
        else:
            text += "ASSISTANT:"
            answer = f" {turn.value}{eos}"
            spans.append((len(text), len(text) + len(answer)))
            text += answer
    return Rendered(text, spans)


def render_plain(record: Record | Sequence[Turn], eos: str = "</s>") -> Rendered:
    """The bare picture and its caption, as LLaVA v1.5 pretrains the projector (``preprocess_plain``)::

        <s><image>A cat on a sofa.\\n
                  supervised: the caption and its line break

    What was asked is dropped, and no ``</s>`` ends the caption. LLaVA tokenizes the caption by itself, so that its
    first word has the space that begins a text; here that space is written.

    Raises:
        EncodingError: if it is not one question about an image, and its answer.
    """
    turns = _turns(record)
    if len(turns) != 2:
        raise EncodingError(f"it has {len(turns)} turns, and a plain conversation is a picture and its caption")
    if IMAGE not in turns[0].value:
        raise EncodingError("it has no image, and a plain conversation is a picture and its caption")
    text = f"{IMAGE} {turns[1].value}\n"
    return Rendered(text, [(len(IMAGE), len(text))])


RENDER = {"v1": render, "plain": render_plain}
"""The kinds of conversation by name."""


def prompt(record: Record | Sequence[Turn], eos: str = "</s>") -> str:
    """What the model is given to answer the last question: all before the answer, up to ``ASSISTANT:``."""
    turns = list(_turns(record))
    while turns and turns[-1].role == "gpt":
        turns.pop()
    return render(turns, eos).text + "ASSISTANT:"


def _turns(record: Record | Sequence[Turn]) -> Sequence[Turn]:
    if not isinstance(record, Record):
        return record
    if any(message.role == "system" for message in record.messages):
        raise EncodingError("it has a system turn, and LLaVA-1.5's conversation has a system sentence of its own")
    pictures = record.pictures
    if len(pictures) > 1:
        raise EncodingError(f"it has {len(pictures)} pictures, and LLaVA-1.5 takes one")
    if pictures and any(IMAGE in message.text for message in record.messages):
        raise EncodingError(f"{IMAGE} stands in its text, beside a picture that has its own place: take it out")
    return record.conversations


def _is_text_only(record: Record | Sequence[Turn]) -> bool:
    """In a record without image, ``<image>`` is text that somebody has typed. Turns alone do not tell."""
    return isinstance(record, Record) and not record.pictures


def _image_first(question: str) -> str:
    if IMAGE not in question:
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


# ---------------------------------------------------------------------------------------------------- tokens


def encode(
    record: Record | Sequence[Turn], tokenizer, num_image_tokens: int, max_length: int, conversation: str = "v1"
) -> dict[str, list[int]]:
    """Input ids and labels of one conversation, the image spread over its tokens.

    Args:
        record: a record, or turns of human and gpt alternating.
        tokenizer: a fast tokenizer that knows ``<image>`` as one token and adds ``<s>``.
        num_image_tokens: tokens of an image.
        max_length: longer conversations are cut on the right, as LLaVA v1.5 does.
        conversation: its kind, a key of ``RENDER``.

    Returns:
        ``input_ids`` and ``labels``, equally long; -100 where there is no supervision.

    Raises:
        EncodingError: if the image does not fit into ``max_length``, if no token of an answer does, or if the
            text has ``</s>`` or ``<unk>``.
    """
    [tokens] = tokenize([record], tokenizer, conversation)
    if isinstance(tokens, EncodingError):
        raise tokens
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    tokens = cut(tokens, image_token_id, num_image_tokens, max_length)
    ids, labels = spread(tokens, image_token_id, num_image_tokens)
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def tokenize(
    records: Sequence[Record | Sequence[Turn]], tokenizer, conversation: str = "v1"
) -> list[Tokens | EncodingError]:
    """Many conversations of one kind at once; an image is one token. Where one fails, its error stands in its place.

    Raises:
        EncodingError: if the tokenizer itself will not do.
    """
    if not tokenizer.is_fast:
        raise EncodingError("the tokenizer cannot tell where its tokens are: use a fast one")
    if tokenizer.encode("x")[:1] != [tokenizer.bos_token_id]:
        raise EncodingError(f"the tokenizer adds no {tokenizer.bos_token}: load it with add_bos_token=True")
    if not records:
        return []
    special = {*tokenizer.all_special_tokens, IMAGE}
    vicunas = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    rendered = [_rendered(record, tokenizer.eos_token, conversation) for record in records]
    texts = ["" if isinstance(made, EncodingError) else made.text for made in rendered]
    encodings = tokenizer(texts, return_attention_mask=False).encodings
    results: list[Tokens | EncodingError] = []
    for record, made, encoding in zip(records, rendered, encodings, strict=True):
        if isinstance(made, EncodingError):
            results.append(made)
            continue
        typed = {token for token in special if any(token in turn.value for turn in _turns(record))}
        if not _is_text_only(record):
            typed.discard(IMAGE)
        unlabelled = typed & vicunas - {tokenizer.bos_token}
        if unlabelled and conversation == "v1":
            reason = f"the text has {min(unlabelled)}: LLaVA v1.5 gives it no labels either"
            results.append(EncodingError(reason))
            continue
        if as_text := typed - vicunas:
            encoding = _without(tokenizer, as_text).encode(made.text)
        supervised = np.zeros(len(encoding.ids), dtype=bool)
        for start, end in made.spans:
            first = encoding.char_to_token(start)
            if first is None:  # tokenizers that do not count the space before a word as part of its token
                first = encoding.char_to_token(start + 1)
            supervised[first : encoding.char_to_token(end - 1) + 1] = True
        results.append(Tokens(np.array(encoding.ids), supervised))
    return results


def _rendered(record: Record | Sequence[Turn], eos: str, conversation: str) -> Rendered | EncodingError:
    try:
        return RENDER[conversation](record, eos)
    except EncodingError as reason:
        return reason


def _without(tokenizer, tokens: set[str]) -> Tokenizer:
    """A tokenizer that reads ``tokens`` as text. They keep their ids under names that no text has: the ids of
    added tokens follow from their number."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] in tokens:
            token["content"] = "\0" + token["content"]
    return Tokenizer.from_str(json.dumps(state))


def cut(tokens: Tokens, image_token_id: int, num_image_tokens: int, max_length: int) -> Tokens:
    """The first tokens, as many as fit into ``max_length`` once the image is spread.

    Raises:
        EncodingError: if the image would be cut, or if no supervised token is left.
    """
    images = np.flatnonzero(tokens.ids == image_token_id)
    surplus = len(images) * (num_image_tokens - 1)  # what spreading adds
    if len(images) and images[-1] + 1 + surplus > max_length:
        needed = images[-1] + 1 + surplus
        raise EncodingError(f"the image ends at token {needed}, beyond the maximum length of {max_length}")
    kept = Tokens(*(part[: max_length - surplus] for part in tokens))
    if not kept.supervised.any():
        first = tokens.supervised.argmax() + surplus + 1
        raise EncodingError(f"the answer begins at token {first}, beyond the maximum length of {max_length}")
    return kept


def spread(tokens: Tokens, image_token_id: int, num_image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and labels, int64, with ``num_image_tokens`` copies of each image token."""
    copies = np.where(tokens.ids == image_token_id, num_image_tokens, 1)
    labels = np.where(tokens.supervised, tokens.ids, IGNORE)
    return np.repeat(tokens.ids, copies), np.repeat(labels, copies)
