"""The chat in the browser: the command that serves the page."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.routing import Route

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError
from fura_vlm.chat.models import Models, load_models
from fura_vlm.chat.page import CSS, HEAD, THEME, Page, build

MAX_UPLOAD = "50mb"
URLS = "/gradio_api/file=http{rest:path}", "/gradio_api/file/http{rest:path}"  # where Gradio would fetch an address


def launch(models: Models, config: ChatConfig, folder: Path, block: bool = True) -> Page:
    """Serves the page. With ``block`` it returns when the server ends, on Ctrl-C or SIGTERM.

    Raises:
        ChatError: if the address cannot be used.
    """
    page = build(models, config, folder)

    async def health(request):
        writing, waiting = page.chat.engine.load
        waiting += len(page._queue)  # those that have not reached the engine
        return JSONResponse({"status": "ok", "model": Path(models.path).name, "writing": writing, "waiting": waiting})

    async def not_fetched(request):
        return JSONResponse({"detail": "Files are not fetched from the network"}, 403)

    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            auth=tuple(config.auth.split(":", 1)) if config.auth else None,
            max_file_size=MAX_UPLOAD,
            max_threads=config.max_users + 16,
            state_session_capacity=1000,
            prevent_thread_lock=not block,
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            app_kwargs={"routes": [Route("/health", health), *(Route(path, not_fetched) for path in URLS)]},
            theme=THEME,
            css=CSS,
            head=HEAD,
        )
    except OSError as error:
        raise ChatError(f"Cannot listen on {config.host} port {config.port}: name another --host or --port") from error
    return page


def serve(config: ChatConfig) -> None:
    """The command: loads the model and serves the chat until it is stopped.

    Raises:
        ChatError: before the model is loaded, if a setting cannot be used; or if the address cannot be.
        ModelError: if a model cannot be used.
    """
    for name, most in (("port", 65535), ("max_users", None), ("max_waiting", None), ("max_new_tokens", None)):
        value = getattr(config, name)
        if value < 1 or most and value > most:
            raise ChatError(f"{name} is {value}: give a number from 1{f' to {most}' if most else ''}")
    if config.auth and not all(config.auth.partition(":")):
        raise ChatError("auth must be NAME:PASSWORD")
    folder = Path(tempfile.mkdtemp(prefix="fura-chat-"))
    # A folder of our own: Gradio's is shared with all other Gradio applications of this machine.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # it ends as on Ctrl-C, and users' pictures are removed
    try:
        models = load_models(config.model, config.adapters)
        print(f"Talking with {models.path}", flush=True)
        launch(models, config, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
