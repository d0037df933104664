"""From a conversation to what the model reads: exactly the text that training makes of the same turns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from PIL import Image

from fura_vlm.chat.partner import ChatError
from fura_vlm.chat.pictures import Pictures
from fura_vlm.data.images import ImageError
from fura_vlm.errors import FuraVLMError, first_line
from fura_vlm.families.messages import Message, Picture, Text, pictures

if TYPE_CHECKING:  # it imports torch
    from fura_vlm.families.base import Family

MAX_QUESTION = 100_000
"""Characters of a question; no model here reads half as many."""
MAX_CONVERSATION = 400_000
"""Characters of a conversation: all of it goes to the browser with every piece of an answer."""
_pictures = Pictures()


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
        messages: the conversation up to the question.
        text: the same up to where the answer begins, with the family's mark where a picture stands.
        notice: what was left out to keep within the context, or ``None``.
    """

    messages: list[Message]
    text: str
    notice: str | None = None

    @property
    def images(self) -> list[str]:
        """The paths of the pictures, in order."""
        return pictures(self.messages)


def build_prompt(exchanges: list[Exchange], family: Family, max_tokens: int) -> Prompt:
    """The prompt for the last question of a conversation.

    Too long a conversation loses its oldest exchanges first, but never the latest picture, which moves to the oldest
    question that is kept; then the last question is cut at its end. The work is bounded by what is kept and by
    ``MAX_QUESTION``, whatever the tokenizer makes of the text.

    Args:
        exchanges: the conversation; the last one has no answer yet.
        family: that of the model.
        max_tokens: tokens the prompt may have, those of pictures included.

    Raises:
        ChatError: if there is no question, if the question or the conversation has too many characters, if
            ``max_tokens`` has no room even for the picture, or if the model takes no such picture or conversation.
    """
    check_length(exchanges)
    if not family.sees and any(exchange.image for exchange in exchanges):
        raise ChatError("This model takes text alone: ask without a picture")
    measure = _Measure(family)

    def fits(exchanges: list[Exchange]) -> bool:
        return measure.conversation(exchanges) <= max_tokens

    newest = _newest(exchanges, family, max_tokens, measure)
    if not newest[-1].question:
        raise ChatError("There is no question: type one")

    def last(number: int) -> list[Exchange]:
        return _with_latest_picture(newest[len(newest) - number :], exchanges)

    number = _most(len(newest), lambda number: fits(last(number)))
    kept, cut = last(max(number, 1)), number == 0
    if cut:
        question = kept[0].question

        def beginning(characters: int) -> list[Exchange]:
            return [replace(kept[0], question=question[:characters].strip())]

        kept = beginning(_most(len(question), lambda characters: fits(beginning(characters))))
        if not kept[0].question:
            raise ChatError(
                f"The picture and the question do not fit into {max_tokens} tokens: ask for a shorter answer"
            )
    dropped = len(exchanges) - len(kept)
    notice = None
    if cut:
        notice = "The question is longer than the model can read: only its beginning was used."
    elif dropped:
        notice = (
            f"The conversation is longer than the model can read: the oldest {dropped} of its questions are forgotten."
        )
    messages = _messages(kept)
    return Prompt(messages, family.prompt(messages), notice)


def check_length(exchanges: Sequence[Exchange]) -> None:
    """Raises ``ChatError`` if the question or the conversation has too many characters."""
    asked, characters = len(exchanges[-1].question), sum(len(e.question) + len(e.answer or "") for e in exchanges)
    if asked > MAX_QUESTION:
        raise ChatError(f"The question has {asked:,} characters, and at most {MAX_QUESTION:,} are allowed: shorten it")
    if characters > MAX_CONVERSATION:
        raise ChatError(
            f"The conversation has {characters:,} characters, and at most {MAX_CONVERSATION:,} are kept: start "
            "a new one"
        )


def check_kept(paths: Sequence[str]) -> None:
    """Raises ``ChatError`` if a picture is no longer there."""
    if not all(Path(path).is_file() for path in paths):
        raise ChatError("A picture of this conversation is no longer kept: start a new conversation")


def encode(prompt: Prompt, family: Family) -> dict:
    """The tensors of a prompt, as ``Family.inputs``.

    Raises:
        ChatError: if a picture is no longer there.
    """
    check_kept(prompt.images)
    return family.inputs(prompt.messages, [read_image(path, family) for path in prompt.images])


def read_image(path: str, family: Family | None = None) -> Image.Image:
    """A user's picture as 8-bit RGB, upright, at a fraction of its size if it is larger than ``family.enough``.

    Raises:
        ChatError: if it cannot be used. The message has the file's name, and not where the server keeps it.
    """
    try:
        return _pictures.read(path, family and family.enough)
    except ImageError as error:
        raise ChatError(str(error)) from error


def picture_size(path: str) -> tuple[int, int]:
    """Width and height of a picture that can be read, upright, from its header."""
    return _pictures.header(path).size


def is_animation(path: str) -> bool:
    """Whether a picture that can be read has more than one frame."""
    return _pictures.header(path).animation


def _newest(exchanges: list[Exchange], family: Family, max_tokens: int, measure: _Measure) -> list[Exchange]:
    """Of the newest exchanges at least as many as fit into ``max_tokens``, without special tokens; one at least.

    They are measured one by one, by their words and pictures alone, so that what is far too old is not read at all.
    Where words meet what stands around them, their tokens may join: a few of each are not counted.
    """
    kept, room, reserved = [], max_tokens, family.reserved()
    for exchange in reversed(exchanges):
        answer = exchange.answer and plain(exchange.answer, reserved)
        exchange = Exchange(plain(exchange.question, reserved), exchange.image, answer)
        words = family.tokenizer([exchange.question, answer or ""], add_special_tokens=False)["input_ids"]
        room -= max(sum(len(ids) - 4 for ids in words), 1)
        room -= measure.picture(exchange) if room >= 0 else 0
        if kept and room < 0:
            break
        kept.append(exchange)
    return kept[::-1]


def _with_latest_picture(kept: list[Exchange], exchanges: list[Exchange]) -> list[Exchange]:
    """The latest picture moves to the oldest question that is kept, unless a kept one has a picture."""
    image = next((exchange.image for exchange in reversed(exchanges) if exchange.image), None)
    if image is None or any(exchange.image for exchange in kept):
        return kept
    return [replace(kept[0], image=image), *kept[1:]]


def _most(number: int, fits) -> int:
    """The largest count from 1 to ``number`` that fits, by bisection; 0 if none does. What it returns was found to fit.

    It ends after as many passes as ``number`` has binary digits, whatever the tokenizer does. Where tokens end is not
    asked: several can end in one place (the bytes of a Chinese character or an emoji), and some texts have none.
    """
    if fits(number):
        return number
    low, high = 0, number
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plain(text: str, reserved: set[str]) -> str:
    """Without ``reserved`` tokens: what a user types is text, neither an image nor the end of a turn.

    In one pass: whenever the text so far ends in such a token, the longest of them goes. So none is left, not even one
    whose pieces came together when another was taken out of it. Each character takes as many steps as the longest
    token has characters at most, however many tokens there are (Gemma 3 has thousands).
    """
    if not any(token in text for token in reserved):
        return text.strip()
    tree = _tree(frozenset(reserved))
    plain: list[str] = []
    nodes = [0]  # for each beginning of ``plain``, where in the tree its end is
    for character in text:
        node = nodes[-1]
        while node and character not in tree[node].next:
            node = tree[node].shorter
        nodes.append(tree[node].next.get(character, 0))
        plain.append(character)
        if length := tree[nodes[-1]].token:
            del plain[-length:], nodes[-length:]
    return "".join(plain).strip()


@dataclass
class _Node:
    """A beginning of some tokens, in the automaton of Aho and Corasick (1975).

    Attributes:
        next: the nodes that are one character longer.
        shorter: the node of the longest beginning that this one ends in.
        token: characters of the longest token that it ends in, 0 if it ends in none.
    """

    next: dict[str, int] = field(default_factory=dict)
    shorter: int = 0
    token: int = 0


@functools.lru_cache(maxsize=4)
def _tree(tokens: frozenset[str]) -> list[_Node]:
    tree = [_Node()]
    for token in tokens:
        node = 0
        for character in token:
            if character not in tree[node].next:
                tree[node].next[character] = len(tree)
                tree.append(_Node())
            node = tree[node].next[character]
        tree[node].token = len(token)
    level = list(tree[0].next.values())
    for node in level:  # which grows: the shorter ones first
        for character, longer in tree[node].next.items():
            shorter = tree[node].shorter
            while shorter and character not in tree[shorter].next:
                shorter = tree[shorter].shorter
            tree[longer].shorter = tree[shorter].next.get(character, 0)
            tree[longer].token = tree[longer].token or tree[tree[longer].shorter].token
            level.append(longer)
    return tree


def _messages(exchanges: list[Exchange]) -> list[Message]:
    """A picture stands before the words, as in training."""
    messages = []
    for exchange in exchanges:
        shown = (Picture(exchange.image),) if exchange.image else ()
        messages.append(Message("user", (*shown, Text(exchange.question))))
        if exchange.answer is not None:
            messages.append(Message("assistant", (Text(exchange.answer),)))
    return messages


class _Measure:
    """Counts tokens as the family does. It looks at the header of each picture once."""

    def __init__(self, family: Family):
        self._family = family
        self._sizes: dict[str, tuple[int, int]] = {}

    def picture(self, exchange: Exchange) -> int:
        """Tokens of the picture of an exchange, 0 without one."""
        if not exchange.image:
            return 0
        with _refusals([exchange]):
            return self._family.picture_length(*self._size(exchange.image))

    def conversation(self, exchanges: list[Exchange]) -> int:
        """Tokens of the prompt that exchanges make."""
        messages = _messages(exchanges)
        with _refusals(exchanges):
            return self._family.prompt_length(messages, [self._size(path) for path in pictures(messages)])

    def _size(self, path: str) -> tuple[int, int]:
        if path not in self._sizes:
            known = self._family.needs_sizes and Path(path).is_file()  # one that is missing is noticed when it is read
            self._sizes[path] = picture_size(path) if known else (64, 64)
        return self._sizes[path]


@contextlib.contextmanager
def _refusals(exchanges: list[Exchange]):
    """What the family or its template raises, as sentences for the user."""
    try:
        yield
    except FuraVLMError as error:
        said, out = str(error), "send another picture" if exchanges[-1].image else "start a new conversation"
        raise ChatError(f"{said[:1].upper()}{said[1:]}: {out}") from error
    except (TemplateError, TypeError, ValueError) as error:  # a template may raise what it likes, with its reason
        raise ChatError(
            f"The model's chat template refuses the conversation ({first_line(error)}): start a new one"
        ) from error
