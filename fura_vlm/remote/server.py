"""A server that speaks OpenAI's interface, such as vLLM, SGLang or ``transformers serve``, through the openai client.

All that is asked runs in one thread of its own, any number of questions at a time. Neither torch nor a model's files
are needed. The key is taken from an environment variable and stands in no message; of what the environment holds for
OpenAI itself (key, organization, project) nothing is sent.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import openai
from PIL import Image

from fura_vlm.errors import FuraVLMError

T = TypeVar("T")
SECONDS = 120
"""In which a server must send the next piece of an answer. Behind a long queue the first one takes its time."""
CONNECT_SECONDS = 10
WORDS = 200
"""Characters that are quoted of what a server says."""


class ServerError(FuraVLMError):
    """A server that cannot be asked, or that does not answer. The message names it."""


class Piece(NamedTuple):
    """What a server has written since the piece before; ``tokens`` is their number so far where the server says it."""

    text: str
    tokens: int | None = None


class Server:
    """A server's models. Thread-safe.

    Args:
        url: where it listens, such as ``http://localhost:8000``; without a path, ``/v1`` is meant.
        key_variable: the name of the environment variable that holds the key, or ``None`` where none is asked for.
        retries: how often a question is asked again after an error that may pass.
        seconds: in which the next piece of an answer must come.

    Attributes:
        url: as messages show it.

    Raises:
        ServerError: ``url`` is no address, or ``key_variable`` names no variable. A key that was given instead of a
            name is not repeated.
    """

    def __init__(self, url: str, key_variable: str | None = None, retries: int = 0, seconds: float = SECONDS):
        self.url = url
        self._seconds = seconds
        self._listed: list[str] = []
        self._key = _key(key_variable)
        self._client = openai.AsyncOpenAI(
            base_url=_base(url),
            api_key=self._key or "none",
            admin_api_key="",
            organization="",
            project="",
            default_headers={"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit},
            max_retries=retries,
            timeout=openai.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins one of the coroutines below, in the server's thread. Cancelling the future ends the request, and with
        it the server's work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of one of the coroutines below."""
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self, seconds: float | None = None) -> None:
        """Ends all that is under way, or stops waiting for its end after so long."""
        if self._loop.is_running():
            with contextlib.suppress(FutureTimeout):
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(seconds or CONNECT_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(seconds or CONNECT_SECONDS)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def models(self) -> dict[str, int | None]:
        """The names of its models with the tokens that each reads at most, or ``None`` where the server does not say;
        none if it lists none.

        Raises:
            ServerError: it cannot be reached, or refuses the key.
        """
        try:
            listed = [model async for model in self._client.models.list()]
            found = {str(model.id): getattr(model, "max_model_len", None) for model in listed}
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
            raise self._said(error, None, begun=False) from error
        except (openai.APIError, AttributeError, TypeError, ValueError):  # some lists are not there, or of another form
            found = {}
        self._listed = list(found)
        return found

    async def answer(
        self,
        model: str,
        messages: Sequence[dict],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> AsyncIterator[Piece]:
        """Yields the answer to the last message, piece by piece. Closing the iterator ends the server's work.

        Args:
            messages: as :func:`message` makes them.

        Raises:
            ServerError: there is no answer, or not all of it.
        """
        settings = {"top_p": top_p} if temperature > 0 and top_p < 1 else {}
        begun = ended = False
        try:
            stream = await self._client.chat.completions.create(
                model=model,
                messages=list(messages),
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,
                stream_options={"include_usage": True},
                **settings,
            )
            async with stream:
                async for chunk in stream:
                    count = chunk.usage.completion_tokens if chunk.usage else None
                    choice = chunk.choices[0] if chunk.choices else None
                    text = (choice.delta.content or "") if choice else ""
                    begun, ended = begun or bool(text), ended or bool(choice and choice.finish_reason)
                    if text or count is not None:
                        yield Piece(text, count)
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            raise self._said(error, model, begun) from error
        if not ended:
            raise ServerError(f"The server at {self.url} has broken off its answer: see its log, and ask again")

    async def sees(self, model: str) -> bool:
        """Whether a model takes pictures.

        Some servers refuse one, and some drop it and answer the words alone: so a question is asked with a small
        picture and without, and the lengths of the prompts are compared.

        Raises:
            ServerError: the question without a picture has no answer: the server is not there, or has no such model.
        """
        alone = await self.prompt_length(model, message("user", "Hello"))
        try:
            beside = await self.prompt_length(model, message("user", "Hello", [Image.new("RGB", (64, 64), "gray")]))
        except ServerError as error:
            if isinstance(error.__cause__, (openai.BadRequestError, openai.UnprocessableEntityError)):
                return False
            raise
        return alone is None or beside is None or beside > alone + 1

    async def prompt_length(self, model: str, asked: dict) -> int | None:
        """Tokens of the prompt that one message makes, or ``None`` if the server does not say.

        Raises:
            ServerError: there is no answer.
        """
        try:
            made = await self._client.chat.completions.create(
                model=model, messages=[asked], max_tokens=1, temperature=0
            )
            return made.usage.prompt_tokens if made.usage else None
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            raise self._said(error, model, begun=False) from error

    def _said(self, error: Exception, model: str | None, begun: bool) -> ServerError:
        """What a user is told of an error."""
        where = f"The server at {self.url}"
        if isinstance(error, openai.APITimeoutError):
            return ServerError(
                f"{where} has sent nothing for {self._seconds:.0f} seconds: see what it is doing, or ask again later"
            )
        if isinstance(error, openai.APIConnectionError):
            if begun:
                return ServerError(f"{where} has broken off its answer: see its log, and ask again")
            return ServerError(f"No server can be reached at {self.url}: start it, or give its address with --server")
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):  # it may repeat the key
            return ServerError(
                f"{where} {'refuses the' if self._key else 'asks for a'} key: export the right one as an environment "
                "variable, and name that with --server_key"
            )
        if not isinstance(error, openai.APIError):
            return ServerError(f"What answers at {self.url} does not speak OpenAI's interface: check --server")
        words, status = self._quoted(error), getattr(error, "status_code", None)
        if status == 404:
            known = f"its models are {', '.join(self._listed)}" if self._listed else "it lists no models"
            return ServerError(f"{where} knows no model {model} ({words}): {known}; check --model and --server")
        if status == 413:
            return ServerError(f"{where} takes no question of this size ({words}): send a smaller picture")
        if status == 429:
            return ServerError(f"{where} has too much to do ({words}): ask again later")
        if status == 400 and re.search(r"context|too long|too many tokens", words, re.IGNORECASE):
            return ServerError(f"{where} cannot read so much ({words}): start a new conversation, or ask for a shorter "
                               "answer")  # fmt: skip
        if status is not None and status < 500:
            return ServerError(f"{where} refuses the question ({words}): ask another one, or name another model")
        return ServerError(f"{where} has failed ({words}): see its log")

    def _quoted(self, error: openai.APIError) -> str:
        """The server's own words, on one line, without brackets and without the key."""
        body: Any = error.body
        while isinstance(body, dict):
            body = next((body[name] for name in ("message", "detail", "error") if body.get(name)), None)
        lines = str(body or error.message).strip().splitlines() or [type(error).__name__]
        words = lines[0].replace(self._key, "...") if self._key else lines[0]
        words = words.translate({ord("("): "[", ord(")"): "]"})
        return words if len(words) <= WORDS else words[:WORDS] + " ..."


def message(role: str, text: str, pictures: Sequence[Image.Image] = ()) -> dict:
    """A message. Its pictures stand before its words, as in training. They are sent as PNG, pixel by pixel as they are:
    nothing is lost, and nothing of a file but its pixels goes along."""
    if not pictures:
        return {"role": role, "content": text}
    shown = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def _data_url(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.convert("RGB").save(held, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def _base(url: str) -> str:
    """The address that the client takes."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        raise ServerError(f"{url} is no address of a server: give one such as http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise ServerError("The address of a server must not hold a password: export the key as an environment "
                          "variable, and name that with --server_key")  # fmt: skip
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip() if re.fullmatch(r"[A-Za-z_]\w*", variable) else ""
    if not key:  # what was given may be the key itself
        raise ServerError("--server_key names no environment variable that is set: export the key, and give the "
                          "variable's name, never the key itself")  # fmt: skip
    return key
