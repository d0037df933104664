"""What stands between the network and the page: who may ask, from where, how much at once, and what is said if not.

The page itself is Gradio's. ``Guard`` is ASGI middleware around all of it, ``Page`` is Gradio's ``Blocks`` with what
requests must not do. Both refuse with one sentence.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import mimetypes
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
from gradio_client.utils import is_file_obj, is_file_obj_with_meta, is_http_url_like, traverse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fura_vlm.errors import first_line

logger = logging.getLogger(__name__)

UPLOAD = "/gradio_api/upload"
MAX_UPLOAD = 50_000_000
"""Bytes of one picture's file."""
MAX_UPLOADS = 60_000_000
"""Bytes that one request may bring when it uploads."""
MAX_BODY = 4_000_000
"""Bytes of any other request: the longest question in any script, ten times."""
MAX_PARTS = 8
"""Files and fields of one upload; a question takes one picture. Gradio keeps a file open for each."""
BODY_SECONDS = 120
"""In which a request must have come."""
PAUSE, SLOWEST = 10, 20_000
"""Seconds that a request may pause in all, and bytes a second of the slowest connection: what comes slower holds the
place of others."""
UPLOADING = 16
"""Requests that may bring pictures at the same time; more wait."""
UPLOAD_SECONDS = 30
"""How long a request waits until it may bring its pictures."""
ROOM = 2_000_000_000
"""Bytes of all pictures that are kept. Where there are more, the oldest go first."""
MAX_FILES = 10_000
"""Pictures that are kept."""

# Gradio runs events' JavaScript through ``new Function`` and has its configuration in an inline script. What matters
# here is that no answer of a model can make the browser ask another server.
SECURITY = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; frame-src 'none'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}

OPEN = {"/", "/login", "/login/", "/health", "/favicon.ico", "/theme.css", "/gradio_api/theme.css", "/manifest.json"}
OPEN |= {"/robots.txt"}
OPEN_FOLDERS = "/assets/", "/static/", "/svelte/"
"""What the login page is made of, and what watches over the server: all that is open before login."""

CLOSED = re.compile(
    r"/monitoring|/docs|/redoc|/openapi\.json|/gradio_api/(proxy=|vibe|undo-vibe|starter|dev/|deep_link|process_recording"
    r"|profiling|stream/|runs?/?$|run-history|mcp|component_server)"
)
"""Routes of Gradio that this page has no use for."""

API_INFO = re.compile(rb"window\.gradio_api_info = .*?;</script>", re.DOTALL)


class Refused(Exception):
    """A request that is not carried out: the HTTP status and the sentence."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.response = JSONResponse({"detail": sentence}, status, headers)


class Hosts:
    """The names that a browser may call this server by.

    A page of another site can have its name lead to this machine (DNS rebinding); the browser then takes the chat for
    a part of that site, but the request still says whose name it was sent to. So any address in figures is allowed,
    which cannot be such a name, and of names only this machine's own and those that were given. Starlette's
    ``TrustedHostMiddleware`` knows no addresses as a kind.
    """

    def __init__(self, names: Iterable[str]):
        machine = socket.gethostname().lower()
        self.names = {"localhost", machine, f"{machine.partition('.')[0]}.local", *(name.lower() for name in names)}

    def allow(self, host: str) -> bool:
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        name = name.rstrip(".")
        if name in self.names or name.endswith(".localhost"):
            return True
        if any(known.startswith("*.") and name.endswith(known[1:]) for known in self.names):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Guesses:
    """Slows down who guesses passwords: after a few wrong ones an address waits, twice as long each time.

    Args:
        free: wrong passwords that cost nothing.
        longest: seconds of the longest wait; so long without a wrong one, and the first ones are free again.
        clock: seconds.
    """

    def __init__(self, free: int = 5, longest: float = 900, clock: Callable[[], float] = time.monotonic):
        self._free, self._longest, self._clock = free, longest, clock
        self._wrong: dict[str, tuple[int, float]] = {}  # how many, and when the last one was; the newest at the end

    def wait(self, address: str) -> float:
        """Seconds until this address may try again."""
        count, last = self._wrong.get(self._network(address), (0, 0.0))
        pause = min(2.0 ** (count - self._free + 1), self._longest) if count >= self._free else 0.0
        return max(last + pause - self._clock(), 0.0)

    def wrong(self, address: str) -> None:
        network, now = self._network(address), self._clock()
        count, last = self._wrong.pop(network, (0, now))
        self._wrong[network] = (count + 1 if now - last <= 2 * self._longest else 1, now)
        while len(self._wrong) > 10_000:
            del self._wrong[next(iter(self._wrong))]

    def right(self, address: str) -> None:
        self._wrong.pop(self._network(address), None)

    @staticmethod
    def _network(address: str) -> str:
        """Of IPv6 who has one address has 2 to the power of 64."""
        try:
            known = ipaddress.ip_address(address)
        except ValueError:
            return address
        return str(known if known.version == 4 else ipaddress.ip_network((known, 64), strict=False))


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        hosts: the names that it may be called by.
        signed_in: whether the sender of a request has logged in, or need not.
        uploads: the folder in which Gradio keeps what is uploaded.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, signed_in: Callable[[Scope], bool], uploads: Path):
        self.app, self.hosts, self.signed_in, self.uploads = app, hosts, signed_in, uploads
        self.reading = 0  # requests that have not come in full
        self._uploading = asyncio.Semaphore(UPLOADING)
        self._guesses = Guesses()
        # Behind a proxy the address is what the request says it is: of all together some are free, then one in a while.
        self._all_guesses = Guesses(free=100, longest=10)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            exchange = _Exchange(self, scope, receive, send)
            try:
                self._check(scope)
                await self._run(exchange)
            except Refused as refused:
                await exchange.refuse(refused)
            except Exception as error:  # said in one line: what a stranger sends must not fill the log
                logger.warning("%s %s failed: %s", scope["method"], scope["path"][:100], _place(error))
                await exchange.refuse(Refused(500, "The request cannot be carried out: check what it holds"))

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if not self.hosts.allow(headers.get("host", "")):
            raise Refused(
                400,
                f"This chat does not answer to the name {headers.get('host', '')[:100]}: open it by its IP address,"
                " or start it with --allowed_hosts and this name",
            )
        if not self._own(scope["method"], headers):
            raise Refused(403, "Another site asks for this: open the chat by its own address")
        if CLOSED.match(path):
            raise Refused(404, "There is no such page")
        if re.match(r"/gradio_api/file[=/]https?:", path):
            raise Refused(403, "Files are not fetched from the network")
        if not (path in OPEN or path.startswith(OPEN_FOLDERS) or self.signed_in(scope)):
            raise Refused(401, "Log in first")
        seconds = max(self._guesses.wait(_client(scope)), self._all_guesses.wait(""))
        if path.rstrip("/") == "/login" and seconds:
            whole = int(seconds) + 1
            raise Refused(429, f"Too many wrong passwords: try again in {whole} seconds", **{"retry-after": str(whole)})

    async def _run(self, exchange: _Exchange) -> None:
        scope = exchange.scope
        if scope["path"].rstrip("/") == "/login" and scope["method"] == "POST":
            await self._login(exchange)
        elif scope["path"].rstrip("/") == UPLOAD:
            try:
                await asyncio.wait_for(self._uploading.acquire(), UPLOAD_SECONDS)
            except asyncio.TimeoutError:
                raise Refused(503, "Too many pictures are being uploaded: send it again later") from None
            try:
                await asyncio.to_thread(make_room, self.uploads, ROOM - MAX_UPLOADS, MAX_FILES)
                await exchange.run(self.app)
            finally:
                self._uploading.release()
        else:
            await exchange.run(self.app)

    async def _login(self, exchange: _Exchange) -> None:
        address = _client(exchange.scope)
        self._guesses.wrong(address)  # before it is known: of many at once no more than a few are tried
        self._all_guesses.wrong("")
        await exchange.run(self.app)
        if exchange.status == 200:
            self._guesses.right(address)
            self._all_guesses.right("")

    def _own(self, method: str, headers: Headers) -> bool:
        """Whether a request comes from this chat's own page, or from no page at all.

        A browser sends what any site's page asks it to, with the cookie of who has logged in here; of another site's
        page nothing but links to the chat is followed. Browsers say where a request comes from (``Sec-Fetch-Site``),
        and to servers without encryption only its origin.
        """
        link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return link
        if "origin" not in headers or headers.get("sec-fetch-site") == "same-origin":
            return True
        origin = urlsplit(headers["origin"])
        return origin.netloc == headers.get("host") or (origin.hostname or "") in self.hosts.names


class _Exchange:
    """One request and its answer, with limits on what comes and headers on what goes."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send):
        self.scope, self.status = scope, None
        self._guard, self._receive, self._send = guard, receive, send
        upload = scope["path"].rstrip("/") == UPLOAD
        self._most = MAX_UPLOADS if upload else MAX_BODY
        self._began, self._bytes = time.monotonic(), 0
        self._parts = Parts(scope) if upload else None
        self._complete, self._refused = scope["method"] in ("GET", "HEAD", "OPTIONS"), None
        self._page: list[bytes] | None = None

    async def run(self, app: ASGIApp) -> None:
        if int(Headers(scope=self.scope).get("content-length") or 0) > self._most:
            raise self._too_large()
        if self.scope["path"] == "/" and not self._guard.signed_in(self.scope):
            # Gradio's login page describes the API, with the models' names.
            self._page = []
            headers = [pair for pair in self.scope["headers"] if pair[0] != b"accept-encoding"]
            self.scope = {**self.scope, "headers": headers}
        self._guard.reading += not self._complete
        try:
            await app(self.scope, self.receive, self.send)
        finally:
            self._came()
        if self._refused is not None:
            raise self._refused

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            seconds = min(BODY_SECONDS, PAUSE + self._bytes / SLOWEST)
            message = await asyncio.wait_for(self._receive(), max(self._began + seconds - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            self._refused = Refused(408, f"The request did not come in full within {seconds:.0f} seconds")
            raise self._refused from None
        body = message.get("body", b"")
        self._bytes += len(body)
        if self._bytes > self._most:
            self._refused = self._too_large()
            raise self._refused
        if self._parts is not None and self._parts.count(body) > MAX_PARTS:
            self._refused = Refused(413, f"More than {MAX_PARTS} files at once: send fewer")
            raise self._refused
        if not message.get("more_body"):
            self._came()
        return message

    async def send(self, message: Message) -> None:
        if self._refused is not None:
            return  # another answer goes instead
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers[name] = value
            if self._page is not None:
                self._start = message
                return
            self.status = message["status"]
        elif self._page is not None:
            self._page.append(message.get("body", b""))
            if message.get("more_body"):
                return
            empty = b'window.gradio_api_info = {"named_endpoints": {}, "unnamed_endpoints": {}};</script>'
            body = API_INFO.sub(empty, b"".join(self._page))
            if self.scope["method"] != "HEAD":
                MutableHeaders(scope=self._start)["content-length"] = str(len(body))
            self.status = self._start["status"]
            await self._send(self._start)
            message = {"type": "http.response.body", "body": body}
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answers with the sentence, unless an answer has begun."""
        if self.status is None:
            self._refused = self._page = None
            if not self._complete:
                refused.response.headers["connection"] = "close"  # what still comes is not waited for
            await refused.response(self.scope, self._receive, self.send)

    def _came(self) -> None:
        self._guard.reading -= not self._complete
        self._complete = True

    def _too_large(self) -> Refused:
        return Refused(413, f"The request is larger than {self._most // 1_000_000} MB: send less at once")


class Parts:
    """Counts the parts of a ``multipart/form-data`` body while it comes."""

    def __init__(self, scope: Scope):
        _, options = parse_options_header(Headers(scope=scope).get("content-type"))
        self._mark = b"--" + options.get(b"boundary", b"")
        self._end, self._found = b"", 0

    def count(self, body: bytes) -> int:
        """How many there are with this piece of the body. One that has only begun counts."""
        body = self._end + body
        self._found += body.count(self._mark)
        self._end = body[max(len(body) - len(self._mark) + 1, 0) :]
        return self._found - 1  # the last mark ends the body


class Page(gr.Blocks):
    """Blocks that take pictures as uploads only, and answer what cannot be read with a sentence.

    Attributes:
        pictures: the example pictures by the name that the browser knows them by.
    """

    def get_config_file(self):
        """Gradio's, but without the server's paths: the example pictures go by names of their own."""
        self.pictures: dict[str, bytes] = {}

        def name(found: dict) -> dict:
            path = Path(found["path"])
            if not path.is_absolute():
                return found
            known = f"{len(self.pictures)}{path.suffix}"
            self.pictures[known] = path.read_bytes()
            return {**found, "path": known, "url": f"/examples/{known}", "mime_type": mimetypes.guess_type(path)[0]}

        config = super().get_config_file()
        return {**config, "components": traverse(config["components"], name, is_file_obj_with_meta)}

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        files = 0

        def check(found: dict) -> dict:
            nonlocal files
            files += 1
            if files > MAX_PARTS:  # Gradio would look at each, and do nothing else meanwhile
                raise gr.Error(f"More than {MAX_PARTS} files at once: send fewer", print_exception=False)
            if is_http_url_like(found["path"]):  # Gradio would fetch it
                raise gr.Error("Pictures are not fetched from the network: upload the file", print_exception=False)
            return found

        traverse(inputs, check, lambda value: isinstance(value, dict) and isinstance(value.get("path"), str))
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

    async def process_api(self, block_fn, inputs, *args, event_data: gr.EventData | None = None, **kwargs):
        try:
            inputs = traverse(inputs, _whole, lambda value: isinstance(value, str))
            if event_data is not None:
                # Nothing is taken from files that a browser names with a click: an example's has a name of our own.
                data = traverse(event_data._data, lambda found: None, is_file_obj)
                event_data._data = traverse(data, _whole, lambda value: isinstance(value, str))
            return await super().process_api(block_fn, inputs, *args, event_data=event_data, **kwargs)
        except gr.Error as error:
            error.print_exception = False  # a sentence for who asked; the log is not theirs to fill
            raise
        except (StopAsyncIteration, StopIteration):
            raise
        except Exception as error:
            logger.warning("A request failed: %s", _place(error))
            sentence = "The request cannot be carried out: check its values against the page's API"
            raise gr.Error(sentence, print_exception=False) from error


def _whole(text: str) -> str:
    """Without halves of characters, which JSON may have and UTF-8 has not."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def make_room(folder: Path, most_bytes: int, most_files: int) -> None:
    """Removes the oldest files of a folder until it has at most so many, with so many bytes in all."""
    found = []
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:  # another request has removed it
            continue
        if path.is_file():
            found.append((status.st_mtime, status.st_size, path))
    found.sort(key=lambda file: file[0])
    total, count = sum(size for _, size, _ in found), len(found)
    for _, size, path in found:
        if total <= most_bytes and count < most_files:
            return
        path.unlink(missing_ok=True)
        total, count = total - size, count - 1
        try:
            path.parent.rmdir()  # Gradio gives each picture a folder
        except OSError:
            pass


def _client(scope: Scope) -> str:
    return (scope.get("client") or ("",))[0]


def _place(error: Exception) -> str:
    """An error in one line, with where it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return json.dumps(f"{type(error).__name__} at {where}: {first_line(error)[:300]}", ensure_ascii=False)[1:-1]
