"""Chat in the terminal, about one picture or, with a model of text alone, about none."""

from __future__ import annotations

import time

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError, Engine, Sampling
from fura_vlm.chat.models import Models, decoded, default_model, load_models
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.data.images import load_image
from fura_vlm.families.registry import family_class
from fura_vlm.modelling.load import find_parts, read_config

POLL_SECONDS = 0.02


def chat(config: ChatConfig) -> None:
    """Answers ``config.question``, or question after question until an empty line; tokens appear as they come.

    Ctrl-C ends an answer. A question that cannot be answered is forgotten, and the reason is printed.

    Raises:
        ChatError: if there is no picture, or one that the model does not take, or if ``config.question`` cannot be
            answered.
        ImageError: if the picture cannot be used.
    """
    if config.max_new_tokens < 1:
        raise ChatError("max_new_tokens must be at least 1")
    if config.image is not None:
        load_image(config.image)  # a bad one is said before the model is loaded
    path = config.model or default_model()
    sees = family_class(read_config(find_parts(path)[0])).sees
    if sees and config.image is None:
        raise ChatError("Name a picture to talk about, or open the chat in the browser with --web")
    if not sees and config.image is not None:
        raise ChatError("This model takes text alone: name no picture")
    models = load_models(path, [])
    engine = Engine(models.model, models.family, max_rows=1)
    try:
        _talk(config, models, engine)
    finally:
        engine.close()


def _talk(config: ChatConfig, models: Models, engine: Engine) -> None:
    exchanges: list[Exchange] = []
    while question := config.question or _ask():
        exchanges.append(Exchange(question, None if exchanges else config.image))
        try:
            exchanges[-1].answer = _answer(exchanges, models, engine, config.max_new_tokens)
        except KeyboardInterrupt:
            print()
            exchanges.pop()
        except ChatError as error:
            if config.question:
                raise
            print(error)
            exchanges.pop()
        if config.question:
            return


def _answer(exchanges: list[Exchange], models: Models, engine: Engine, max_new_tokens: int) -> str:
    """Prints the answer to the last question while it is written, and returns it."""
    prompt = build_prompt(exchanges, models.family, models.context - max_new_tokens)
    if prompt.notice:
        print(prompt.notice)
    adapter = next(iter(models.adapters.values()))
    generation = engine.submit(encode(prompt, models.family), adapter, Sampling(max_new_tokens=max_new_tokens))
    printed, done = "", False
    try:
        while not done:
            time.sleep(POLL_SECONDS)
            done = generation.done  # before the text is read: it is whole then
            text = decoded(models, generation)
            if text.startswith(printed):
                print(text[len(printed) :], end="", flush=True)
                printed = text
    finally:
        generation.cancel()
    if generation.error:
        raise ChatError(generation.error)
    print()
    return text


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
