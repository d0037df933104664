"""Conversations: what one browser tab talks about, and the questions that it asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import gradio as gr

from fura_vlm.chat.engine import ChatError, Engine, Generation, Sampling
from fura_vlm.chat.markdown import literal
from fura_vlm.chat.models import Models
from fura_vlm.chat.prompt import Exchange, build_prompt, encode, is_animation, read_image

# How often the browser gets what has been written. For each time, Gradio keeps the interpreter busy for milliseconds,
# in which the engine cannot launch what the next token needs.
POLL_SECONDS = 0.1


@dataclass
class Turn:
    """A question with the answers of the left and the right side; ``None`` where a side was not asked.

    Attributes:
        models: the names of what was asked, of one side or two.
    """

    question: str
    image: str | None
    models: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=lambda: [None, None])

    def asked(self, beside: str | None) -> bool:
        """Whether the left side (``None``), or this model on the right side, was asked."""
        return beside is None or self.models[1:] == [beside]


@dataclass
class Session:
    """What one user's browser tab talks about.

    Attributes:
        busy: a question is being read or answered.
        running: the answers that are being written.
    """

    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    running: list[Generation] = field(default_factory=list)

    def history(self, beside: str | None) -> list[Exchange]:
        """The conversation as one side knows it; what it was not asked, the left side answered."""
        return [Exchange(t.question, t.image, t.answers[beside is not None and t.asked(beside)]) for t in self.turns]

    def messages(self, beside: str | None = None) -> list[dict]:
        """The conversation as a Chatbot shows it. A picture is a message of its own: Gradio edits no others.

        Args:
            beside: the model of the right side, or ``None`` for the left side.
        """
        return [message for _, message in self._numbered(beside)]

    def turn_of(self, message: int) -> int:
        """The number of the turn that a message of the left Chatbot belongs to."""
        return [number for number, _ in self._numbered(None)][message]

    def _numbered(self, beside: str | None) -> Iterator[tuple[int, dict]]:
        for number, turn in enumerate(self.turns):
            if turn.image:
                yield number, {"role": "user", "content": {"path": turn.image, "alt_text": "the picture"}}
            yield number, {"role": "user", "content": literal(turn.question)}
            answer = turn.answers[beside is not None] if turn.asked(beside) else "*was not asked*"
            yield number, {"role": "assistant", "content": literal(answer or "")}

    def stop(self) -> None:
        for generation in self.running:
            generation.cancel()

    async def idle(self) -> None:
        """Stops what is being written and waits until it has ended."""
        while self.busy:
            self.stop()
            await asyncio.sleep(POLL_SECONDS)


class Chat:
    """Conversations over one engine, for any number of sessions."""

    def __init__(self, models: Models, max_users: int):
        self.models = models
        self.engine = Engine(models.model, max_rows=max_users)

    async def ask(
        self, session: Session, question: str, image: str | None, sides: list[str], sampling: Sampling
    ) -> AsyncIterator[list[Generation]]:
        """Adds a turn to a session and writes its answers into it, yielding from time to time.

        Args:
            image: path of the picture that comes with the question, or ``None``.
            sides: one or two of the adapters' names, left and right.

        Raises:
            ChatError: if the question cannot be answered; the session is then as it was before.
        """
        if session.busy:
            raise ChatError("An answer is still being written: wait for it or stop it")
        turn, running = Turn(question, image, sides), session.running
        session.busy = True
        try:
            inputs, notices = await asyncio.to_thread(self._read, session, turn, sampling)
            for notice in notices:
                gr.Warning(notice)
            session.turns.append(turn)
            for tensors, side in zip(inputs, sides, strict=True):
                running.append(self.engine.submit(tensors, self.models.adapters[side], sampling))
            seen, done = None, False
            while not done:
                done = all(generation.done for generation in running)
                written = sum(len(generation.tokens) for generation in running)
                if done or written != seen:
                    seen = written
                    self._copy(running, turn)
                    yield running
                if not done:
                    await asyncio.sleep(POLL_SECONDS if written else POLL_SECONDS / 5)
        finally:  # also when the browser is gone
            session.stop()
            session.busy, session.running = False, []
            self._copy(running, turn)
        failed = next((generation.error for generation in running if generation.error), None)
        if failed:
            session.turns = [other for other in session.turns if other is not turn]
            raise ChatError(failed)

    def _read(self, session: Session, turn: Turn, sampling: Sampling) -> tuple[list[dict], list[str]]:
        notices, prompts = [], []
        if turn.image:
            read_image(turn.image)
            if is_animation(turn.image):
                notices.append("The picture is an animation: its first frame is used.")
        room = self.models.context - sampling.max_new_tokens
        for beside in [None, *turn.models[1:]]:
            exchanges = [*session.history(beside), Exchange(turn.question, turn.image)]
            prompts.append(build_prompt(exchanges, self.models.processor, room))
        notices += [prompts[0].notice] if prompts[0].notice else []
        return [encode(prompt, self.models.processor) for prompt in prompts], notices

    def _copy(self, running: list[Generation], turn: Turn) -> None:
        for side, generation in enumerate(running):
            text = self.models.processor.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
            # A character of several tokens is not whole before its last one.
            turn.answers[side] = text if generation.done else text.rstrip("\ufffd")
