"""A server's model in an evaluation: many questions at once, each a request of its own.

lmms-eval has models of its own for servers (``openai``, ``async_openai``). They write a request that failed down as the
model's answer, which then counts as wrong, and they keep nothing for a second start; so the answers come from here.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import aclosing
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from fura_vlm.data.messages import IMAGE
from fura_vlm.errors import first_line
from fura_vlm.evaluation.base import SuiteError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.generation import EvaluationError, Question, batch_limit, cut
from fura_vlm.evaluation.lmms_model import Answering
from fura_vlm.remote.server import Server, message

TOGETHER = 32
"""Questions that ``auto`` asks at once: a server makes batches of its own of them."""
RETRIES = 4
"""Of a question after an error that may pass; the client waits longer each time."""
KNOWN = {"until", "max_new_tokens", "do_sample", "temperature", "top_p"}


@dataclass(frozen=True)
class ServedSource:
    """Which model of which server; what ``Source`` is for a model in this process."""

    server: Server
    model: str
    sees: bool
    adapter: None = None

    @property
    def base(self) -> str:
        return f"{self.model} of {self.server.url}"

    def config(self) -> None:
        """A server does not tell its model's configuration."""

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits, of the names and of what the model says to a question: what serves another model
        under this name should not go on with the answers of this one.

        Raises:
            ServerError: there is no answer.
        """
        question = Question("", "Describe a red circle beside a blue square.", tuple, {"max_new_tokens": 24})
        said = self.server.wait(_answer(self.server, self.model, question, []))
        return hashlib.sha256(f"{self.base} {said}".encode()).hexdigest()[:16]


def find_served(config: EvalConfig) -> ServedSource:
    """The model ``config.model`` of the server, which has answered.

    Raises:
        SuiteError: a setting does not go with a server.
        ServerError: the server or the model does not answer.
    """
    if config.suite != "visual":
        raise SuiteError(
            f"The suite {config.suite} puts its questions in a form of its own or asks for likelihoods, which this "
            "interface does not have: leave --server out, or take --suite visual"
        )
    for name, given in (("adapter", config.adapter is not None), ("dtype", config.dtype != "auto")):
        if given:
            raise SuiteError(f"{name} is for a model in this process, and with --server the server has loaded it: "
                             "leave it out")  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SuiteError("With --server one process asks as much as several: start it with NUM_PROCESSES=1")
    server = Server(config.server, config.server_key, retries=RETRIES)
    try:
        server.wait(server.models())
        return ServedSource(server, config.model, server.wait(server.sees(config.model)))
    except BaseException:
        server.close()
        raise


class Served(Answering):
    """A server's model for lmms-eval.

    Args:
        source: the model.
        batch_size: questions asked at once, or ``"auto"``.
        cache: a folder for finished answers, or ``None``.
    """

    def __init__(self, source: ServedSource, batch_size: int | str = "auto", cache: str | None = None):
        super().__init__()
        self.answer_with(ServedAnswerer(source, batch_size), cache, [source.fingerprint()])


class ServedAnswerer:
    """Answers questions as ``Answerer`` does, by a server.

    Raises:
        EvaluationError: ``batch_size`` is no number above 0 and not ``"auto"``.
    """

    def __init__(self, source: ServedSource, batch_size: int | str = "auto"):
        self.batch_size = batch_limit(batch_size, TOGETHER)
        self._server, self._source = source.server, source

    def answers(self, questions: Sequence[Question], progress: bool = True) -> Iterator[dict[int, str]]:
        """Yields answers when they are there, by the number of the question.

        Raises:
            EvaluationError: if a question cannot be answered; the message names it.
        """
        order, running = iter(range(len(questions))), {}
        try:
            with tqdm(total=len(questions), desc="answers", disable=not progress, mininterval=1) as bar:
                while True:
                    for number in itertools.islice(order, self.batch_size - len(running)):
                        running[self._start(questions[number])] = number
                    if not running:
                        return
                    done = wait(running, return_when=FIRST_COMPLETED).done
                    failed = [future for future in done if future.exception()]
                    if good := done.difference(failed):
                        yield {running.pop(future): future.result() for future in good}
                        bar.update(len(good))
                    for future in failed:
                        error = future.exception()
                        raise EvaluationError(f"{questions[running[future]].name}: {first_line(error)}") from error
        finally:
            for future in running:
                future.cancel()

    def _start(self, question: Question) -> Future[str]:
        unknown = [name for name in question.arguments.keys() - KNOWN if question.arguments[name] not in (None, 1)]
        if unknown:
            raise EvaluationError(f"{question.name}: its task asks for {unknown[0]}, which a server does not take: "
                                  "choose another task, or leave --server out")  # fmt: skip
        try:
            pictures = list(question.pictures())
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise TypeError("it has a video or a sound, and only pictures are used")
        except Exception as error:  # whatever a task's own code raises
            raise EvaluationError(f"{question.name}: {first_line(error)}") from error
        if pictures and not self._source.sees:
            raise EvaluationError(f"{question.name}: it has a picture, and {self._source.base} takes none: choose "
                                  "another model, or tasks without pictures")  # fmt: skip
        return self._server.start(_answer(self._server, self._source.model, question, pictures))


async def _answer(server: Server, model: str, question: Question, pictures: Sequence[Image.Image]) -> str:
    """As ``Answerer`` would write it, up to the first of the strings that end it."""
    arguments, until, text = question.arguments, question.arguments.get("until") or [], ""
    drawn = (arguments["temperature"], arguments.get("top_p") or 1.0) if arguments.get("do_sample") else ()
    asked = message("user", question.text.replace(IMAGE, "").strip(), pictures)
    async with aclosing(server.answer(model, [asked], arguments["max_new_tokens"], *drawn)) as pieces:
        async for piece in pieces:
            text += piece.text
            if any(end in text for end in until):
                break
    return cut(text, until)
