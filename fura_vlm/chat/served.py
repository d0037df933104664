"""Models of a server to chat with. Pictures are read here, as for a model in this process, and sent as pixels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.partner import LOOK, ChatError, Generation, Partner, Sampling, Writer, short_name
from fura_vlm.chat.pictures import MAX_PIXELS
from fura_vlm.chat.prompt import Exchange, check_kept, check_length, picture_size, plain, read_image
from fura_vlm.data.messages import IMAGE
from fura_vlm.errors import FuraVLMError
from fura_vlm.remote.server import Server, ServerError, message

LONGEST = 1024
MOST_PIXELS = 2 * MAX_PIXELS
"""Of the pictures of a conversation together: each question brings all of them to the server again."""


def find_served(config: ChatConfig) -> Served:
    """The server's models, with ``config.model`` first; by default the first one that it lists.

    Raises:
        ChatError: a setting is for models in this process.
        ServerError: the server or the model does not answer.
    """
    if config.adapters:
        raise ChatError("--adapters are for a model in this process: of a server choose among its own models")
    server = Server(config.server, config.server_key)
    try:
        listed = server.wait(server.models())
        if config.model is None and not listed:
            raise ServerError(f"The server at {server.url} lists no models: name the one that it serves with --model")
        first = config.model or next(iter(listed))
        return Served(server, first, listed, server.wait(server.sees(first)), public=config.web)
    except BaseException:
        server.close()
        raise


class Served(Partner):
    """A server's models.

    Args:
        server: where they are.
        first: the name of the default one.
        listed: names of all, as ``Server.models`` finds them.
        sees: whether the first takes pictures.
        public: whether users are not to see the server's address.
    """

    def __init__(self, server: Server, first: str, listed: dict[str, int | None], sees: bool, public: bool = False):
        self.path, self.sees, self._server, self._public = first, sees, server, public
        self.adapters: dict[str, str | None] = {}
        for name in dict.fromkeys([first, *listed]):
            self.adapters[short_name(name, self.adapters)] = name
        self._context = listed.get(first)
        self.longest = max(1, min(LONGEST, (self._context or 2 * LONGEST) // 2))
        self._seeing = {first: sees}

    def writer(self, max_rows: int) -> ServedWriter:
        """The server itself decides how many answers it writes at the same time."""
        return ServedWriter(self._server, self._seeing, self._public)

    def read(self, exchanges: Sequence[Exchange], sampling: Sampling) -> tuple[list[dict], str | None]:
        """Messages as the server takes them. Nothing is left out: the server knows what its model can read."""
        check_length(exchanges)
        check_kept([exchange.image for exchange in exchanges if exchange.image])
        messages, pixels = [], 0
        for exchange in exchanges:
            shown = [read_image(exchange.image)] if exchange.image else []
            pixels += sum(picture.width * picture.height for picture in shown)
            if pixels > MOST_PIXELS:
                raise ChatError(
                    f"The pictures of this conversation have more than {MOST_PIXELS:,} pixels together: start a new one"
                )
            # A mark of a picture that is typed would be counted as one.
            messages.append(message("user", plain(exchange.question, {IMAGE}), shown))
            if exchange.answer is not None:
                messages.append(message("assistant", plain(exchange.answer, {IMAGE})))
        if not plain(exchanges[-1].question, {IMAGE}):
            raise ChatError("There is no question: type one")
        return messages, None

    def text(self, generation: Generation) -> str:
        return "".join(generation.tokens).strip()

    def check_picture(self, path: str) -> None:
        read_image(path)

    def as_seen(self, path: str) -> tuple[Image.Image, str]:
        """The picture as it is sent, smaller if it is large."""
        picture = read_image(path)
        picture.thumbnail(LOOK)
        width, height = picture_size(path)
        return picture, f"{width} x {height} pixels are sent to the server, which makes of them what its model takes."

    def describe(self) -> str:
        reads = f", a context of {self._context:,} tokens" if self._context else ""
        where = "" if self._public else f" `{self._server.url}`"
        lines = [f"**A server's models**{where}{reads}. Questions and pictures go to the server.", ""]
        return "\n".join([*lines, *(f"- {name}" for name in self.adapters)])

    def examples(self, folder: Path) -> list[tuple[str, str]]:
        return []


@dataclass(eq=False)
class _Asked(Generation):
    """An answer that a server writes.

    Attributes:
        work: what waits for it; ended by ``cancel``, wherever it is at.
        counted: tokens, as the server counts them, or ``None`` before it has said so.
    """

    work: Future | None = None
    counted: int | None = None

    def cancel(self) -> None:
        super().cancel()
        if self.work is not None:
            self.work.cancel()

    @property
    def count(self) -> int:
        return self.counted or len(self.tokens)


class ServedWriter(Writer):
    """Has a server write answers, each by a request of its own.

    Args:
        server: which is closed with this.
        seeing: whether a model takes pictures, of those of which it is known.
        public: whether errors leave out where the server is.
    """

    def __init__(self, server: Server, seeing: dict[str, bool], public: bool = False):
        self._server, self._seeing, self._public = server, seeing, public
        self._writing: set[_Asked] = set()
        self._closed = False

    def submit(self, inputs: list[dict], adapter: str | None, sampling: Sampling) -> Generation:
        if self._closed:
            raise ChatError("The chat is closing")
        generation = _Asked(inputs, adapter, sampling)
        self._writing.add(generation)
        generation.work = self._server.start(self._write(generation))
        generation.work.add_done_callback(lambda work: self._finish(generation, work))
        return generation

    @property
    def load(self) -> tuple[int, int]:
        return len(self._writing), 0

    def close(self, seconds: float | None = None) -> None:
        self._closed = True
        for generation in list(self._writing):
            generation.cancel()
        self._server.close(seconds)

    async def _write(self, generation: _Asked) -> None:
        messages, model, sampling = generation.inputs, generation.adapter, generation.sampling
        if any(not isinstance(each["content"], str) for each in messages):
            if model not in self._seeing:
                self._seeing[model] = await self._server.sees(model)
            if not self._seeing[model]:
                raise ServerError("This model takes text alone: ask without a picture")
        settings = sampling.temperature, sampling.top_p
        async for piece in self._server.answer(model, messages, sampling.max_new_tokens, *settings):
            generation.began = generation.began or time.monotonic()
            generation.counted = piece.tokens or generation.counted
            if piece.text:
                generation.tokens.append(piece.text)

    def _finish(self, generation: _Asked, work: Future) -> None:
        self._writing.discard(generation)
        generation.inputs = None  # the pictures are needed no longer
        error = None if work.cancelled() else work.exception()
        if error is not None:
            known = isinstance(error, FuraVLMError)
            said = str(error) if known else f"The question failed ({type(error).__name__}): ask again"
            generation.error = said.replace(f" at {self._server.url}", "") if self._public else said
        generation.ended = time.monotonic()
        generation.done = True  # last: a reader who sees it finds all the rest in place
