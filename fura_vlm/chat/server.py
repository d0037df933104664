"""The command that serves the chat: one process, uvicorn around Gradio's application, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import mimetypes
import os
import random
import resource
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path
from urllib.parse import urlparse

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from gradio import networking
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.guard import MAX_UPLOAD, Guard, Hosts, Page
from fura_vlm.chat.page import CSS, HEAD, THEME, build
from fura_vlm.chat.partner import ChatError, Partner, find_partner
from fura_vlm.errors import first_line

END_SECONDS = 5
"""In which the server has ended after SIGTERM or Ctrl-C, whatever it was at."""
REQUEST_SECONDS = 15
"""In which a connection must bring a request, at its beginning and after each answer."""
SEND_SECONDS = 60
"""In which a client must take what it is sent."""
MAX_CONNECTIONS = 4000
SPARE_FILES = 256
"""Files that are kept for all but connections."""
LINES_A_MINUTE = 20
"""Lines of the log for what strangers can bring about."""


def serve(config: ChatConfig) -> None:
    """The command: loads the model or finds the server's, serves the chat until it is stopped, and ends the process.

    Raises:
        ChatError: before the model is loaded, if a setting or the address cannot be used.
        FuraVLMError: if the model cannot be used.
    """
    for name, most in (("port", 65535), ("max_users", None), ("max_waiting", None), ("max_new_tokens", None)):
        value = getattr(config, name)
        if value < 1 or most and value > most:
            raise ChatError(f"{name} is {value}: give a number from 1{f' to {most}' if most else ''}")
    if config.auth and not all(config.auth.partition(":")):
        raise ChatError("auth must be NAME:PASSWORD")
    sockets = listen(config.host, config.port)
    folder = Path(tempfile.mkdtemp(prefix="fura-chat-"))
    # A folder of our own: Gradio's is shared with all other Gradio applications of this machine.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")

    ending = Ending(folder)

    def end(*_) -> None:  # as on Ctrl-C, and users' pictures are removed
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; again would only break off the end
        ending.begin()
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    try:
        partner = find_partner(config)
        print(f"Talking with {partner.path}" + (f" of {config.server}" if config.server else ""), flush=True)
        launch(partner, config, folder, sockets)
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # Not by way of the interpreter's end: it waits for threads that read, and where it hangs in a library no thread of
    # Python's, that of ``ending`` among them, runs any more.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of a host.

    Raises:
        ChatError: if an address cannot be used.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            sockets.append(socket.socket(family, socket.SOCK_STREAM))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
            sockets[-1].listen()  # so that a second server is refused now
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise ChatError(f"Cannot listen on {host} port {port}: name another --host or --port") from error
    return sockets


def launch(partner: Partner, config: ChatConfig, folder: Path, sockets: list[socket.socket]) -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    page, server, hosts = make_server(partner, config, folder)
    print(f"Open http://{_shown(config.host)}:{config.port} in a browser", flush=True)
    if config.share:
        _share(hosts, config.port)
    server.run(sockets)
    page.chat.engine.close(END_SECONDS / 2)


def make_server(partner: Partner, config: ChatConfig, folder: Path) -> tuple[Page, Server, Hosts]:
    """The page, a server of it that is not started yet, and the names that it answers to."""
    page = build(partner, config, folder)
    page.state_session_capacity = 1000
    page.max_threads = page._queue.max_thread_count = config.max_users + 16
    hosts = Hosts([config.host, *config.allowed_hosts])

    def signed_in(scope: Scope) -> bool:
        if gradio.auth is None:
            return True
        cookies = HTTPConnection(scope).cookies
        names = f"access-token-{gradio.cookie_id}", f"access-token-unsecure-{gradio.cookie_id}"
        return any(cookies.get(name) in gradio.tokens for name in names)

    async def health(request: Request) -> Response:
        writing, waiting = page.chat.engine.load
        waiting += len(page._queue)  # those that have not reached the engine
        known = {"model": Path(partner.path).name} if signed_in(request.scope) else {}
        stuck = page.chat.readers.stuck
        counts = {"reading": guard.reading + page.chat.readers.waiting, "writing": writing, "waiting": waiting}
        return JSONResponse({"status": "stuck" if stuck else "ok", **known, **counts}, 503 if stuck else 200)

    async def example(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in page.pictures:
            return JSONResponse({"detail": "There is no such picture"}, 404)
        return Response(page.pictures[name], media_type=mimetypes.guess_type(name)[0])

    routes = [Route("/health", health), Route("/examples/{name}", example)]
    outer = FastAPI(routes=routes, **APP)
    guard = Guard(outer, hosts, signed_in, folder / "uploads")
    gr.mount_gradio_app(
        outer,
        page,
        "/",
        auth=tuple(config.auth.split(":", 1)) if config.auth else None,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        show_error=False,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs=dict(APP),
        theme=THEME,
        css=CSS,
        head=HEAD,
    )
    gradio = outer.routes[-1].app
    page.has_launched = True  # as ``launch`` says; until then Gradio would take any file of this machine as an upload

    for name in ("asyncio", "uvicorn.error", "fura_vlm.chat.guard"):
        logging.getLogger(name).addFilter(FewLines())
    logging.getLogger("fura_vlm.chat.page").addFilter(FewLines(characters=5000))  # tracebacks
    server = Server(
        uvicorn.Config(
            guard,
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            backlog=64,  # connections that are taken before others are closed to make room for them
            timeout_graceful_shutdown=1,
            server_header=False,
        ),
        folder,
    )
    Connection.most = _connections()
    return page, server, hosts


class Ending:
    """Ends the process some seconds after it was told to, if it has not ended by itself: a thread that reads or
    computes cannot be stopped. ``folder`` is removed then.

    It is told by a signal's handler, which may run in the middle of anything, the interpreter's end among it, when no
    thread can be started any more. So one waits from the beginning.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._told, self._tell = os.pipe()
        threading.Thread(target=self._wait, name="chat-end", daemon=True).start()

    def begin(self) -> None:
        os.write(self._tell, b".")

    def _wait(self) -> None:
        os.read(self._told, 1)
        time.sleep(END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)


class Server(uvicorn.Server):
    """Ends in seconds, whatever it is at; ``folder`` is then removed."""

    def __init__(self, config: uvicorn.Config, folder: Path):
        super().__init__(config)
        self._ending = Ending(folder)

    def handle_exit(self, sig, frame) -> None:
        self._ending.begin()
        super().handle_exit(sig, frame)


class Connection(H11Protocol):
    """A connection that ends when nothing comes, or when nothing is taken.

    Where there are too many, one makes room for the newest: the one that waits for a request for the longest time; or
    else, of the address that has most connections, one that is still bringing a request, or any that is being answered
    (a stream of events lasts as long as the browser likes).
    """

    most = MAX_CONNECTIONS

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._stalled = None
        self._expect_request()
        others = [other for other in self.connections if other is not self]
        if len(others) >= self.most:
            idle = [other for other in others if other.idle]
            (min(idle, key=lambda other: other.since) if idle else self._busy(others)).transport.abort()

    @property
    def idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @staticmethod
    def _busy(others: list[Connection]) -> Connection:
        """By lot: neither who came first nor who came last is the one to blame."""
        [(address, _)] = Counter(other.client and other.client[0] for other in others).most_common(1)
        suspects = [other for other in others if (other.client and other.client[0]) == address]
        return random.choice([other for other in suspects if other.cycle.more_body] or suspects)

    def _expect_request(self) -> None:
        self.since = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._give_up, self.cycle)

    def _give_up(self, before) -> None:
        if self.cycle is before:  # no request has come since
            self.transport.abort()

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._expect_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)


class FewLines(logging.Filter):
    """Lets so many entries a minute into the log, each of so many characters: the disk must not fill."""

    def __init__(self, lines: int = LINES_A_MINUTE, characters: int = 500, clock=time.monotonic):
        super().__init__()
        self._lines, self._characters, self._clock = lines, characters, clock
        self._recent: deque[float] = deque(maxlen=lines)

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        if len(self._recent) == self._lines and now - self._recent[0] < 60:
            return False
        self._recent.append(now)
        record.msg, record.args, record.exc_info = record.getMessage()[: self._characters], (), None
        if len(self._recent) == self._lines and now - self._recent[0] < 60:
            record.msg += " (more such lines are left out for a minute)"
        return True


async def _unreadable(request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": f"The request cannot be read: {where[:100]}: {first['msg'][:200]}"}, 422)


async def _failed(request, error: Exception) -> Response:
    return JSONResponse({"detail": "The request cannot be carried out: check what it holds"}, 400)


APP = {
    "docs_url": None,
    "redoc_url": None,
    "openapi_url": None,
    "exception_handlers": {RequestValidationError: _unreadable, Exception: _failed},
}
"""Settings of an application without pages of documentation, whose errors are sentences."""


def _connections() -> int:
    """How many connections there may be, with this process's limit on open files, which is raised first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(MAX_CONNECTIONS, soft - SPARE_FILES), 16)


def _share(hosts: Hosts, port: int) -> None:
    try:
        url = networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # no network, no tunnel program, ...
        print(f"No public link could be made: {first_line(error)}", flush=True)
        return
    hosts.names.add(urlparse(url).hostname or "")
    print(f"Public link, for anyone who has it: {url}", flush=True)


def _shown(host: str) -> str:
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host.strip("[]"), host)
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
