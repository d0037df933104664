"""Chat in the terminal, about one picture or, with a model of text alone, about none."""

from __future__ import annotations

import time
from dataclasses import replace

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.partner import ChatError, Partner, Sampling, Writer, find_partner
from fura_vlm.chat.prompt import Exchange
from fura_vlm.data.images import load_image

POLL_SECONDS = 0.02


def chat(config: ChatConfig) -> None:
    """Answers ``config.question``, or question after question until an empty line; tokens appear as they come.

    Ctrl-C ends an answer. A question that cannot be answered is forgotten, and the reason is printed.

    Raises:
        ChatError: if there is no picture for a model in this process that takes any, or one that the model does not
            take, or if ``config.question`` cannot be answered.
        ImageError: if the picture cannot be used.
    """
    if config.max_new_tokens < 1:
        raise ChatError("max_new_tokens must be at least 1")
    if config.image is not None:
        load_image(config.image)  # a bad one is said before the model is loaded
    if config.server is None and config.server_key is None:
        _check_picture(config)
    partner = find_partner(replace(config, adapters=[]) if config.server is None else config)
    writer = partner.writer(max_rows=1)
    try:
        if config.image is not None and not partner.sees:
            raise ChatError("This model takes text alone: name no picture")
        _talk(config, partner, writer)
    finally:
        writer.close()


def _check_picture(config: ChatConfig) -> None:
    """Whether there is a picture if the model takes any, by its configuration alone.

    Raises:
        ChatError: there is none, or the model takes none.
    """
    from fura_vlm.chat.models import default_model
    from fura_vlm.families.registry import family_class
    from fura_vlm.modelling.load import find_parts, read_config

    sees = family_class(read_config(find_parts(config.model or default_model())[0])).sees
    if sees and config.image is None:
        raise ChatError("Name a picture to talk about, or open the chat in the browser with --web")
    if not sees and config.image is not None:
        raise ChatError("This model takes text alone: name no picture")


def _talk(config: ChatConfig, partner: Partner, writer: Writer) -> None:
    exchanges: list[Exchange] = []
    while question := config.question or _ask():
        exchanges.append(Exchange(question, None if exchanges else config.image))
        try:
            exchanges[-1].answer = _answer(exchanges, partner, writer, config.max_new_tokens)
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


def _answer(exchanges: list[Exchange], partner: Partner, writer: Writer, max_new_tokens: int) -> str:
    """Prints the answer to the last question while it is written, and returns it."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    inputs, notice = partner.read(exchanges, sampling)
    if notice:
        print(notice)
    generation = writer.submit(inputs, next(iter(partner.adapters.values())), sampling)
    printed, done = "", False
    try:
        while not done:
            time.sleep(POLL_SECONDS)
            done = generation.done  # before the text is read: it is whole then
            text = partner.text(generation)
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
