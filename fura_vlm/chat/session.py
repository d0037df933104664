"""Conversations: what one browser tab talks about, and the questions that it asks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fura_vlm.chat.markdown import literal
from fura_vlm.chat.partner import ChatError, Generation, Partner, Sampling
from fura_vlm.chat.prompt import Exchange, is_animation
from fura_vlm.chat.readers import Readers

# How often the browser gets what has been written. For each time, Gradio keeps the interpreter busy for milliseconds,
# in which the engine cannot launch what the next token needs.
POLL_SECONDS = 0.1
KEEP_SECONDS = 4 * 3600  # how long pictures, and conversations that nobody goes on with, are kept
KEEP_SESSIONS = 1000


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
        key: by which the browser finds the conversation again after a reload; empty for a program's session.
        used: when a question was asked last, by the monotonic clock, in seconds.
        notices: what the user should know about the last question.
        busy: a question is being read or answered.
        running: the answers that are being written.
    """

    turns: list[Turn] = field(default_factory=list)
    key: str = ""
    used: float = 0.0
    notices: list[str] = field(default_factory=list)
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
                shown = {"path": turn.image, "alt_text": "the picture"}
                content = shown if Path(turn.image).is_file() else "*this picture is no longer kept*"
                yield number, {"role": "user", "content": content}
            yield number, {"role": "user", "content": literal(turn.question)}
            if turn.asked(beside):
                written = self.busy and number == len(self.turns) - 1
                answer = literal(turn.answers[beside is not None] or "") or ("" if written else "*no answer*")
            else:
                answer = "*was not asked*"
            yield number, {"role": "assistant", "content": answer}

    def stop(self) -> None:
        for generation in self.running:
            generation.cancel()

    async def idle(self) -> None:
        """Stops what is being written and waits until it has ended."""
        while self.busy:
            self.stop()
            await asyncio.sleep(POLL_SECONDS)


class Chat:
    """Conversations with one partner, for any number of sessions."""

    def __init__(self, partner: Partner, max_users: int):
        self.partner = partner
        self.engine = partner.writer(max_rows=max_users)
        self.readers = Readers()
        self.kept: dict[str, Session] = {}  # by key, the one used last at the end

    def restore(self, session: Session, key: str | None) -> None:
        """Gives a new session the conversation that a browser had under ``key``, if it is kept.

        It becomes a copy under a key of its own: the tab that it comes from may still be open.
        """
        old = self.kept.get(key) if isinstance(key, str) else None
        session.key = secrets.token_urlsafe(16)
        if old and not session.turns:
            session.turns += [replace(turn, answers=list(turn.answers)) for turn in old.turns]
            self._keep(session)

    def _keep(self, session: Session) -> None:
        session.used = time.monotonic()
        if session.key:
            self.kept.pop(session.key, None)
            self.kept[session.key] = session
        for key, other in list(self.kept.items()):
            if len(self.kept) <= KEEP_SESSIONS and session.used - other.used <= KEEP_SECONDS:
                break
            del self.kept[key]

    async def ask(
        self, session: Session, question: str, image: str | None, sides: list[str], sampling: Sampling
    ) -> AsyncIterator[list[Generation]]:
        """Adds a turn to a session and writes its answers into it, yielding from time to time.

        Yields:
            The answers that are being written: none while the question is being read.

        Args:
            image: path of the picture that comes with the question, or ``None``.
            sides: one or two of the adapters' names, left and right.

        Raises:
            ChatError: if the question cannot be answered; the session is then as it was before.
        """
        if session.busy:
            raise ChatError("An answer is still being written: wait for it or stop it")
        if not question.strip():
            raise ChatError("There is no question: type one")
        turn, running = Turn(question, image, sides), session.running
        session.busy, session.notices = True, []
        self._keep(session)
        session.turns.append(turn)
        try:
            yield running
            inputs = await self.readers.run(self._read, session, sampling)
            for prompt, side in zip(inputs, sides, strict=True):
                running.append(self.engine.submit(prompt, self.partner.adapters[side], sampling))
            seen, done = None, False
            while not done:
                done = all(generation.done for generation in running)
                written = sum(generation.count for generation in running)
                if done or written != seen:
                    seen = written
                    self._copy(running, turn)
                    yield running
                if not done:
                    await asyncio.sleep(POLL_SECONDS if written else POLL_SECONDS / 5)
            failed = next((generation.error for generation in running if generation.error), None)
            if failed:
                raise ChatError(failed)
        except Exception:  # the browser's leaving is none: what was written until then stays
            session.turns = [other for other in session.turns if other is not turn]
            raise
        finally:
            session.stop()
            session.busy, session.running = False, []
            self._copy(running, turn)

    def _read(self, session: Session, sampling: Sampling) -> list:
        """The prompts of the last turn of a session, for each side that is asked."""
        turn = session.turns[-1]
        if turn.image and self.partner.sees:
            self.partner.check_picture(turn.image)
            if is_animation(turn.image):
                session.notices.append("The picture is an animation: its first frame is used.")
        read = [self.partner.read(session.history(beside), sampling) for beside in [None, *turn.models[1:]]]
        session.notices += [read[0][1]] if read[0][1] else []
        return [inputs for inputs, _ in read]

    def _copy(self, running: list[Generation], turn: Turn) -> None:
        for side, generation in enumerate(running):
            turn.answers[side] = self.partner.text(generation)
