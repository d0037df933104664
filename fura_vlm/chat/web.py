"""The chat in the browser, with Gradio.

A session's conversation lives on the server (``gr.State``) and what the browser shows is made from it: a browser can
send text and pictures that it has uploaded, and nothing else about a conversation is taken from it.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
import numpy as np
from markdown_it import MarkdownIt
from PIL import Image, ImageDraw

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError, Engine, Generation, Sampling
from fura_vlm.chat.guard import Page
from fura_vlm.chat.models import BASE, Models, describe, examples
from fura_vlm.chat.prompt import Exchange, build_prompt, encode, is_animation, picture_size, read_image
from fura_vlm.chat.readers import Readers

# How often the browser gets what has been written. For each time, Gradio keeps the interpreter busy for milliseconds,
# in which the engine cannot launch what the next token needs.
POLL_SECONDS = 0.1
KEEP_SECONDS = 4 * 3600  # how long an uploaded picture is kept
NOTHING = "nothing"
JOINER = "\u2060"  # takes no room and breaks no line
MARKDOWN = MarkdownIt("commonmark").disable("inline")  # only where code begins and ends is asked
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container {width: 100% !important; max-width: 72rem !important; margin: auto}
/* Share would send the picture to another site. */
button[aria-label="Share"], .icon-button-wrapper:not(:has(button:not([aria-label="Share"]))) {display: none}
@media (hover: hover) { .image-container:not(:hover, :focus-within) [aria-label="Fullscreen"] {opacity: 0} }
footer .divider {display: none}
#inside th, #inside td {overflow-wrap: normal; word-break: normal}
#left, #right {height: calc(100dvh - 27rem) !important; min-height: 20rem}
@media (max-width: 640px) {
  #left, #right {height: 54dvh !important; min-height: 14rem}
  #left .example:nth-child(n + 3) {display: none}
}
"""


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
            yield number, {"role": "user", "content": _literal(turn.question)}
            answer = turn.answers[beside is not None] if turn.asked(beside) else "*was not asked*"
            yield number, {"role": "assistant", "content": _literal(answer or "")}

    def stop(self) -> None:
        for generation in self.running:
            generation.cancel()


class Chat:
    """Conversations over one engine, for any number of sessions."""

    def __init__(self, models: Models, max_users: int):
        self.models = models
        self.engine = Engine(models.model, max_rows=max_users)
        self.readers = Readers()

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
            inputs, notices = await self.readers.run(self._read, session, turn, sampling)
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


def build(models: Models, config: ChatConfig, folder: Path) -> Page:
    """The page, with its events and the API.

    Args:
        folder: where example pictures are kept while the page is served.
    """
    chat = Chat(models, config.max_users)
    labels = list(models.adapters)
    samples = examples(models, folder)
    longest = max(1, min(1024, models.context // 2))

    with Page(title="FuRA-VLM", analytics_enabled=False, delete_cache=(600, KEEP_SECONDS), fill_width=True) as page:
        session = gr.State(Session())
        gr.Markdown(f"### FuRA-VLM · {html.escape(Path(models.path).name)}")
        with gr.Row():
            left = gr.Chatbot(
                label=labels[0],
                elem_id="left",
                editable="user",
                group_consecutive_messages=False,  # Gradio cannot edit a text that is grouped with a picture
                allow_tags=False,
                min_width=280,
                buttons=["copy"],
                allow_file_downloads=False,
                placeholder="Add a picture and ask about it.",
                examples=[{"text": question, "files": [path]} for path, question in samples] or None,
            )
            right = gr.Chatbot(
                label=BASE,
                elem_id="right",
                allow_tags=False,
                group_consecutive_messages=False,
                min_width=280,
                buttons=["copy"],
                allow_file_downloads=False,
                visible=False,
            )
        box = gr.MultimodalTextbox(
            show_label=False,
            file_types=["image"],
            max_plain_text_length=1_000_000,  # a long text stays text
            placeholder="Ask; drop or paste a picture",
            elem_id="question",
            autofocus=True,
        )
        speed = gr.Markdown(elem_id="speed")
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                model = gr.Dropdown(labels, value=labels[0], label="Model", elem_id="model")
                other = gr.Dropdown([NOTHING, *labels], value=NOTHING, label="Side by side with", elem_id="other")
            with gr.Row():
                temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: the likeliest word")
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="1: any word")
                usual = min(config.max_new_tokens, longest)
                length = gr.Slider(1, longest, value=usual, step=1, label="Longest answer", info="in tokens")
        with gr.Accordion("Camera", open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", show_label=False, height=240)
        with gr.Accordion("Look inside", open=False, elem_id="inside") as inside, gr.Row():
            gr.Markdown(describe(models))
            with gr.Column():
                seen = gr.Image(label="What the model sees", interactive=False, height=240, buttons=[])
                padding = gr.Markdown(elem_id="padding")

        settings = [model, other, temperature, top_p, length]
        shown = [left, right, box, speed]

        async def answer(session, question, image, model, other, temperature, top_p, length, instead=()):
            """Yields values for ``shown``. ``instead``: turns that come back if the question cannot be answered."""
            sides = [model] if other == NOTHING else [model, other]
            taken = False
            try:
                sampling = _sampling(temperature, top_p, length, longest)
                async for running in chat.ask(session, question, image, sides, sampling):
                    yield (
                        session.messages(),
                        session.messages(other),
                        gr.skip() if taken else gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True),
                        _speed(sides, running),
                    )
                    taken = True
            except ChatError as error:
                session.turns += instead
                value = {} if instead else {"value": {"text": question, "files": [image] if image else []}}
                message = gr.MultimodalTextbox(**value, submit_btn=True, stop_btn=False)
                yield session.messages(), session.messages(other), message, ""
                raise _shown_error(error) from error
            yield gr.skip(), gr.skip(), gr.MultimodalTextbox(submit_btn=True, stop_btn=False), gr.skip()

        def image_of(message) -> str | None:
            files = message.get("files") or []
            if len(files) > 1:
                raise _shown_error(ChatError("One picture goes with a question: send the others with the next ones"))
            return files[0] if files else None

        async def submit(session, message, *settings):
            image = image_of(message)
            if image is None and not any(turn.image for turn in session.turns):
                gr.Info("There is no picture yet: the model answers from words alone.")
            async for values in answer(session, message["text"], image, *settings):
                yield values

        async def retry(session, *settings):
            await _idle(session)
            if session.turns:
                turn = session.turns.pop()
                async for values in answer(session, turn.question, turn.image, *settings, instead=[turn]):
                    yield values

        async def edit(session, event: gr.EditData, *settings):
            await _idle(session)
            index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
            number = session.turn_of(int(index))
            before, session.turns = session.turns[number:], session.turns[:number]
            text = str(event.value).replace(JOINER, "")
            async for values in answer(session, text, before[0].image, *settings, instead=before):
                yield values

        async def example(session, event: gr.SelectData, *settings):
            image, question = samples[int(event.index)]  # by number: what the browser says of the file is not used
            async for values in answer(session, question, str(Path(image).absolute()), *settings):
                yield values

        async def undo(session, other):
            await _idle(session)
            turn = session.turns.pop() if session.turns else Turn("", None)
            message = {"text": turn.question, "files": [turn.image] if turn.image else []}
            return session.messages(), session.messages(other), message

        async def start_over(session):
            await _idle(session)
            session.turns.clear()
            return [], [], ""

        def compare(session, model, other):
            return (
                gr.Chatbot(label=model),
                gr.Chatbot(session.messages(other), label=other, visible=other != NOTHING),
            )

        def look(session):
            image = next((turn.image for turn in reversed(session.turns) if turn.image), None)
            try:
                return as_seen(image, models.processor) if image else (None, "")
            except ChatError as error:
                return None, _literal(str(error))

        async def api(session, message, model, temperature, top_p, max_new_tokens):
            """Asks a question, with a picture or about the one sent before; yields the answer as it grows."""
            sampling = _sampling(temperature, top_p, max_new_tokens, longest)
            try:
                async for _ in chat.ask(session, message["text"], image_of(message), [model], sampling):
                    yield session.turns[-1].answers[0]
            except ChatError as error:
                raise _shown_error(error) from error

        async def forget(session):
            """Forgets the conversation."""
            await _idle(session)
            session.turns.clear()

        private = {"api_visibility": "private", "show_progress": "hidden"}
        # All that use the model share one limit; more of them wait in Gradio's queue, first come, first served.
        slow = private | {"concurrency_id": "answers", "concurrency_limit": config.max_users}
        asking = [
            box.submit(submit, [session, box, *settings], shown, **slow),
            left.retry(retry, [session, *settings], shown, **slow),
            left.edit(edit, [session, *settings], shown, **slow),
            *([left.example_select(example, [session, *settings], shown, **slow)] if samples else []),
            left.undo(undo, [session, other], [left, right, box], **private),
            gr.on([left.clear, right.clear], start_over, session, [left, right, speed], **private),
        ]
        box.stop(Session.stop, session, None, queue=False, **private)
        gr.on([model.change, other.change], compare, [session, model, other], [left, right], **private)
        # Also when it is opened: a closed accordion does not keep the picture that it was sent.
        for then in [inside.expand, *(event.then for event in asking)]:
            then(look, session, [seen, padding], **private)
        camera.input(lambda path, message: message | {"files": [path] if path else []}, [camera, box], box, **private)

        answered = gr.Textbox(label="answer", visible=False)
        asked = gr.Button(visible=False)
        asked.click(
            api,
            [session, box, model, temperature, top_p, length],
            answered,
            api_name="chat",
            concurrency_id="answers",
            concurrency_limit=config.max_users,
        )
        asked.click(forget, session, None, api_name="clear", queue=False)
    page.chat = chat
    page.queue(max_size=config.max_waiting, default_concurrency_limit=config.max_users)
    return page


def as_seen(path: str, processor) -> tuple[Image.Image, str]:
    """The picture as the model gets it, its own part framed, and a sentence about what was padded."""
    image, settings = read_image(path), processor.image_processor
    pixels = settings(images=image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    seen = Image.fromarray(((pixels * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    width, height = picture_size(path)
    size = f"{width} x {height} pixels become {seen.width} x {seen.height}"
    if width == height:
        return seen, f"{size}; nothing is padded."
    where = "left and right" if width < height else "above and below"
    share = 1 - min(width, height) / max(width, height)
    margin = round(share / 2 * seen.width)
    box = (margin, 0) if width < height else (0, margin)
    ImageDraw.Draw(seen).rectangle((*box, seen.width - 1 - box[0], seen.height - 1 - box[1]), outline="red")
    return seen, f"{size}; {share:.0%} of it is padding, {where}."


async def _idle(session: Session) -> None:
    """Stops what is being written and waits until it has ended."""
    while session.busy:
        session.stop()
        await asyncio.sleep(POLL_SECONDS)


def _sampling(temperature: float, top_p: float, length: int, longest: int) -> Sampling:
    """Within bounds, whatever a client sends."""
    return Sampling(min(max(temperature, 0.0), 2.0), min(max(top_p, 0.01), 1.0), int(min(max(length, 1), longest)))


def _speed(sides: list[str], running: list[Generation]) -> str:
    parts = []
    for side, generation in zip(sides, running, strict=True):
        if generation.began:
            count, rate = len(generation.tokens), generation.tokens_per_second
            parts.append(
                f"{html.escape(side)}: {count} {'token' if count == 1 else 'tokens'}, first after "
                f"{generation.began - generation.asked:.2f} s" + (f", then {rate:.0f} per second" if rate else "")
            )
    return " · ".join(parts)


def _literal(text: str) -> str:
    """Markdown without HTML and pictures. Gradio would show all tags but scripts, some of them over the whole page, and
    the browser would fetch whatever picture an answer names. In blocks of code both are text already, and stay as they
    are: code is copied.
    """
    text = re.sub(r"<(?=[a-zA-Z/!?])|!(?=\[)", rf"\g<0>{JOINER}", re.sub(r"\r\n?", "\n", text))
    if JOINER not in text:  # nearly always, and this is called for the whole conversation with each token
        return text
    lines = text.split("\n")
    for block in MARKDOWN.parse(text):
        if block.type == "fence" and block.level == 0:
            first, end = block.map
            lines[first + 1 : end] = [line.replace(JOINER, "") for line in lines[first + 1 : end]]
    return "\n".join(lines)


def _shown_error(error: ChatError) -> gr.Error:
    return gr.Error(html.escape(str(error)), print_exception=False)
