"""The page, with its events and the API, in Gradio.

A session's conversation lives on the server (``gr.State``) and what the browser shows is made from it: a browser can
send text and pictures that it has uploaded, and nothing else about a conversation is taken from it.
"""

from __future__ import annotations

import html
import logging
import math
import traceback
from pathlib import Path

import gradio as gr

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.guard import Page
from fura_vlm.chat.markdown import JOINER, literal
from fura_vlm.chat.partner import BASE, ChatError, Generation, Partner, Sampling
from fura_vlm.chat.session import KEEP_SECONDS, Chat, Session, Turn
from fura_vlm.errors import FuraVLMError

logger = logging.getLogger(__name__)

NOTHING = "nothing"
HEAD = (Path(__file__).parent / "head.html").read_text(encoding="utf-8")
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    block_border_width="1px",
    block_border_color="*neutral_300",
    block_border_color_dark="*neutral_700",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)


def build(partner: Partner, config: ChatConfig, folder: Path) -> Page:
    """The page, with its events and the API.

    Args:
        folder: where example pictures are kept while the page is served.
    """
    chat = Chat(partner, config.max_users)
    labels = list(partner.adapters)
    samples = partner.examples(folder)
    longest, sees = partner.longest, partner.sees

    with Page(title="FuRA-VLM", analytics_enabled=False, delete_cache=(600, KEEP_SECONDS), fill_width=True) as page:
        session = gr.State(Session())
        kept = gr.BrowserState("", storage_key="fura-vlm-chat")  # the conversation's key: all else stays on the server
        gr.Markdown(f"### FuRA-VLM · {html.escape(Path(partner.path).name)}")
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
                placeholder="Add a picture and ask about it." if sees else "Ask.",
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
        notice = gr.HTML(elem_id="notice", padding=False)
        box = gr.MultimodalTextbox(
            show_label=False,
            file_count="multiple",
            file_types=["image"],
            sources=["upload"] if sees else [],
            max_plain_text_length=1_000_000,  # a long text stays text
            placeholder="Ask; drop or paste a picture" if sees else "Ask",
            elem_id="question",
            autofocus=True,
        )
        speed = gr.Markdown(elem_id="speed")
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                model = gr.Dropdown(labels, value=labels[0], label="Model", elem_id="model")
                other = gr.Dropdown([NOTHING, *labels], value=NOTHING, label="Side by side with", elem_id="other")
            with gr.Row():
                temperature = gr.Slider(
                    0, 2, value=0, step=0.05, label="Temperature", info="0: always the most likely word"
                )
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="1: all words are possible")
                usual = min(config.max_new_tokens, longest)
                length = gr.Slider(1, longest, value=usual, step=1, label="Longest answer", info="in tokens")
        with gr.Accordion("Camera", open=False, visible=sees):
            camera = gr.Image(sources=["webcam"], type="filepath", show_label=False, height=240)
        with gr.Accordion("Look inside", open=False, elem_id="inside") as inside, gr.Row():
            gr.Markdown(partner.describe())
            with gr.Column(visible=sees):
                seen = gr.Image(label="What the model sees", interactive=False, height=240, buttons=[])
                padding = gr.Markdown(elem_id="padding")

        settings = [model, other, temperature, top_p, length]
        shown = [left, right, box, speed, notice]

        async def answer(session, question, image, model, other, temperature, top_p, length, instead=(), says=()):
            """Yields values for ``shown``.

            Args:
                instead: turns that come back if the question cannot be answered.
                says: notices of before the question was read.
            """
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
                        _notice([*says, *session.notices]),
                    )
                    taken = True
            except Exception as error:
                session.turns += instead
                back = {"text": question, "files": [image] if image else []}
                value = {"value": back} if taken and not instead else {}
                message = gr.MultimodalTextbox(**value, submit_btn=True, stop_btn=False)
                yield session.messages(), session.messages(other), message, "", _notice([_words(error)], wrong=True)
            else:
                message = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
                yield session.messages(), session.messages(other), message, gr.skip(), gr.skip()

        async def submit(session, message, *settings):
            try:
                image = _image_of(message)
            except ChatError as error:
                yield *[gr.skip()] * 4, _notice([error], wrong=True)
                return
            alone = sees and image is None and not any(turn.image for turn in session.turns)
            says = ["There is no picture yet: the model answers from the text alone."] if alone else []
            async for values in answer(session, message["text"], image, *settings, says=says):
                yield values

        async def retry(session, *settings):
            await session.idle()
            if session.turns:
                turn = session.turns.pop()
                async for values in answer(session, turn.question, turn.image, *settings, instead=[turn]):
                    yield values

        async def edit(session, event: gr.EditData, *settings):
            await session.idle()
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
            await session.idle()
            turn = session.turns.pop() if session.turns else Turn("", None)
            message = {"text": turn.question, "files": [turn.image] if turn.image else []}
            return session.messages(), session.messages(other), message, ""

        async def start_over(session):
            await session.idle()
            session.turns.clear()
            return [], [], "", ""

        def beside(session, other):
            return gr.Chatbot(session.messages(other), label=other, visible=other != NOTHING)

        async def restore(session, key):
            """After a reload: the conversation that this browser had, with the models that were asked last."""
            chat.restore(session, key)
            if not session.turns:
                return session.key, *[gr.skip()] * 4
            last, other = [*session.turns[-1].models, NOTHING][:2]
            return session.key, gr.Chatbot(session.messages(), label=last), beside(session, other), last, other

        async def look(session):
            image = next((turn.image for turn in reversed(session.turns) if turn.image), None)
            try:
                return await chat.readers.run(partner.as_seen, image) if image and sees else (None, "")
            except FuraVLMError as error:
                return None, literal(str(error))

        async def api(session, message, model, temperature, top_p, max_new_tokens):
            """Asks a question, with a picture or about the one sent before; yields the answer as it grows."""
            try:
                sampling = _sampling(temperature, top_p, max_new_tokens, longest)
                async for running in chat.ask(session, message["text"], _image_of(message), [model], sampling):
                    if running:
                        yield session.turns[-1].answers[0]
            except ChatError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from error

        async def forget(session):
            """Forgets the conversation."""
            await session.idle()
            session.turns.clear()

        async def stop(session):
            await session.idle()

        def take(picture, message):
            return {"text": message["text"], "files": [picture["path"]] if picture else []}

        private = {"api_visibility": "private", "show_progress": "hidden"}
        # What does not use the model is answered by itself, and not by way of the queue.
        quick = private | {"queue": False}
        # All that use the model share one limit; more of them wait in Gradio's queue, first come, first served.
        # Beside the speed Gradio shows how long the queue is and how long it takes.
        slow = private | {
            "concurrency_id": "answers",
            "concurrency_limit": config.max_users,
            "show_progress": "minimal",
            "show_progress_on": speed,
        }
        asking = [
            box.submit(submit, [session, box, *settings], shown, **slow),
            left.retry(retry, [session, *settings], shown, **slow),
            left.edit(edit, [session, *settings], shown, **slow),
            *([left.example_select(example, [session, *settings], shown, **slow)] if samples else []),
            left.undo(undo, [session, other], [left, right, box, notice], **private),
            gr.on([left.clear, right.clear], start_over, session, [left, right, speed, notice], **private),
        ]
        box.stop(stop, session, None, **quick)
        page.load(restore, [session, kept], [kept, left, right, model, other], **quick)
        # Replies to two requests may come in any order, so each of the two settings changes a conversation of its own.
        # What ``restore`` sets is no input of a user's, and starts no request that could undo what was restored.
        last = quick | {"trigger_mode": "always_last"}
        model.input(lambda model: gr.Chatbot(label=model), model, left, **last)
        other.input(beside, [session, other], right, **last)
        # Also when it is opened: a closed accordion does not keep the picture that it was sent.
        for then in [inside.expand, *(event.then for event in asking)]:
            then(look, session, [seen, padding], **quick)
        camera.input(take, [camera, box], box, preprocess=False, **private)  # Gradio would open whatever is sent

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


def _sampling(temperature: float, top_p: float, length: int, longest: int) -> Sampling:
    """Within bounds, whatever a client sends.

    Raises:
        ChatError: if one of them is no number.
    """
    if not all(math.isfinite(number) for number in (temperature, top_p, length)):
        raise ChatError("Temperature, top-p and the longest answer are numbers: set them again")
    return Sampling(min(max(temperature, 0.0), 2.0), min(max(top_p, 0.01), 1.0), int(min(max(length, 1), longest)))


def _speed(sides: list[str], running: list[Generation]) -> str:
    parts = []
    for side, generation in zip(sides, running, strict=False):  # none is running while the question is read
        if generation.began:
            count, rate = generation.count, generation.tokens_per_second
            parts.append(
                f"{html.escape(side)}: {count} {'token' if count == 1 else 'tokens'}, first after "
                f"{generation.began - generation.asked:.2f} s" + (f", then {rate:.0f} per second" if rate else "")
            )
    return " · ".join(parts)


def _image_of(message: dict) -> str | None:
    files = message.get("files") or []
    if len(files) > 1:
        raise ChatError("A question takes one picture: remove the others, and send them with the next questions")
    return files[0] if files else None


def _words(error: Exception) -> str:
    """What is said of an error. One that nobody foresaw goes to the server's log."""
    if isinstance(error, ChatError):
        return str(error)
    logger.error("A question failed:\n%s", "".join(traceback.format_exception(error)))
    return "Something went wrong on the server, whose log has the details. Ask again"


def _notice(sentences: list, wrong: bool = False) -> str:
    """The line above the question box."""
    role = "alert" if wrong else "status"
    return "".join(f'<p role="{role}">{html.escape(str(sentence))}</p>' for sentence in sentences)
