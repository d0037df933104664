"""What the server refuses, how it says it, and what it bounds; around a small application in this process."""

import asyncio
import contextlib
import logging
import os
import socket
import threading

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from fura_vlm.chat import guard as guard_module
from fura_vlm.chat import readers as readers_module
from fura_vlm.chat import server as server_module
from fura_vlm.chat.engine import ChatError
from fura_vlm.chat.guard import MAX_BODY, MAX_UPLOADS, UPLOAD, Guard, Guesses, Hosts, make_room
from fura_vlm.chat.readers import Readers
from fura_vlm.chat.server import Connection, FewLines, listen


async def echo(request):
    return JSONResponse({"bytes": len(await request.body())})


async def fail(request):
    raise KeyError("a\nb")


async def login(request):
    right = await request.body() == b"right"
    return JSONResponse({"success": right}, 200 if right else 400)


async def stream(request):
    async def pieces():
        try:
            while True:
                yield bytes(100_000)
                await asyncio.sleep(0)
        finally:
            request.app.state.ended.set()

    return StreamingResponse(pieces())


def guarded(tmp_path, names=(), signed_in=True) -> Guard:
    paths = {"/echo": echo, "/gradio_api/upload": echo, "/fail": fail, "/login": login, "/stream": stream, "/": echo}
    routes = [Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in paths.items()]
    app = FastAPI(routes=routes, **server_module.APP)
    app.state.ended = threading.Event()
    return Guard(app, Hosts(names), lambda scope: signed_in, tmp_path)


def ask(guard: Guard, *requests, client=("9.9.9.9", 1)) -> list[httpx.Response]:
    """The answers to (method, path, settings)."""

    async def answers():
        transport = httpx.ASGITransport(guard, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as http:
            return [await http.request(method, path, **settings) for method, path, settings in requests]

    return asyncio.run(answers())


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("127.0.0.1:7860", True),
        ("192.168.1.5", True),
        ("[::1]:7860", True),
        ("localhost:7860", True),
        ("LOCALHOST.", True),
        ("chat.localhost", True),
        ("chat.example.org", True),
        ("a.example.net:443", True),
        ("evil.example", False),
        ("example.net", False),
        ("localhost.evil.example:7860", False),
        ("127.0.0.1.evil.example", False),
        ("chat.example.org.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("", False),
    ],
)
def test_names_that_the_server_goes_by(tmp_path, host, allowed):
    guard = guarded(tmp_path, ["chat.example.org", "*.example.net"])
    [answer] = ask(guard, ("GET", "/echo", {"headers": {"host": host}}))
    assert answer.status_code == (200 if allowed else 400)
    assert allowed or "--allowed_hosts" in answer.json()["detail"]


def test_every_answer_has_the_headers(tmp_path):
    requests = [("GET", path, {}) for path in ("/echo", "/fail", "/nothing", "/monitoring")]
    for answer in ask(guarded(tmp_path), *requests, ("GET", "/echo", {"headers": {"host": "evil.example"}})):
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["frame-ancestors"] == "'none'" and policy["default-src"] == "'self'"
        sources = {source for sources in policy.values() for source in sources.split()}
        assert sources == {"'self'", "'none'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}  # no other origin
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"


def test_nothing_but_the_login_page_is_open_before_login(tmp_path):
    guard = guarded(tmp_path, signed_in=False)
    closed = "/echo", "/config", "/gradio_api/info", "/gradio_api/user", "/gradio_api/heartbeat/a", "/examples/0.png"
    answers = ask(guard, *(("GET", path, {}) for path in closed), ("POST", "/gradio_api/cancel", {}), ("GET", "/", {}))
    assert [answer.status_code for answer in answers] == [401] * (len(closed) + 1) + [200]


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring",
        "/monitoring/summary",
        "/monitoring/key",
        "/docs",
        "/gradio_api/proxy=http://a",
        "/gradio_api/vibe-code/",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
    ],
)
def test_routes_that_nothing_uses_are_closed(tmp_path, path):
    assert ask(guarded(tmp_path), ("GET", path, {}))[0].status_code == 404


def test_a_failure_is_one_sentence_and_one_line(tmp_path, caplog):
    guard = guarded(tmp_path)
    failed, after = ask(guard, ("GET", "/fail", {}), ("GET", "/echo", {}))
    assert failed.status_code == 400 and "check what it holds" in failed.json()["detail"] and after.status_code == 200
    [line] = [record.getMessage() for record in caplog.records if record.name == guard_module.__name__]
    assert "KeyError at test_guard.py" in line and "\n" not in line


@pytest.mark.parametrize("path, most", [("/echo", MAX_BODY), ("/gradio_api/upload", MAX_UPLOADS)])
def test_too_large_a_request_is_refused(tmp_path, path, most):
    """Whether it says its length or not; and one of the largest size is taken."""
    sent = []

    async def pieces():
        for _ in range(most // 1_000_000 + 50):
            sent.append(1)
            yield bytes(1_000_000)

    guard = guarded(tmp_path)
    whole, said, unsaid = ask(
        guard,
        ("POST", path, {"content": bytes(most)}),
        ("POST", path, {"content": b"", "headers": {"content-length": str(most + 1)}}),
        ("POST", path, {"content": pieces()}),
    )
    assert whole.json() == {"bytes": most}
    for answer in (said, unsaid):
        assert answer.status_code == 413 and f"larger than {most // 1_000_000} MB" in answer.json()["detail"]
    assert len(sent) <= most // 1_000_000 + 2  # the rest is not read
    assert guard.reading == 0


def test_a_request_that_does_not_come_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.05)
    guard, seen = guarded(tmp_path), []

    async def slow():
        yield b"a"
        seen.append(guard.reading)
        await asyncio.sleep(3600)

    [answer] = ask(guard, ("POST", "/gradio_api/upload", {"content": slow()}))
    assert answer.status_code == 408 and "did not come in full" in answer.json()["detail"]
    assert seen == [1] and guard.reading == 0


def test_of_many_uploads_at_once_some_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "UPLOADING", 2)
    monkeypatch.setattr(guard_module, "UPLOAD_SECONDS", 0.2)
    guard = guarded(tmp_path)

    async def answers():
        go = asyncio.Event()

        async def waits():
            yield b"a"
            await go.wait()

        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            first = [asyncio.create_task(http.post("/gradio_api/upload", content=waits())) for _ in range(2)]
            while guard.reading < 2:
                await asyncio.sleep(0)
            third = await http.post("/gradio_api/upload", content=b"a")
            go.set()
            return [third, *(await asyncio.gather(*first)), await http.post("/gradio_api/upload", content=b"a")]

    assert [answer.status_code for answer in asyncio.run(answers())] == [503, 200, 200, 200]


def test_a_request_that_comes_drop_by_drop_ends(tmp_path, monkeypatch):
    """Long before one that comes at the rate of a slow line has to end."""
    monkeypatch.setattr(guard_module, "PAUSE", 0.05)
    guard = guarded(tmp_path)

    async def drops():
        while True:
            yield b"a"
            await asyncio.sleep(0.01)

    for path in ("/gradio_api/upload", "/echo"):
        [answer] = ask(guard, ("POST", path, {"content": drops()}))
        assert answer.status_code == 408
    assert guard.reading == 0


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_an_upload_of_many_files_is_refused(tmp_path, size):
    """However it comes in pieces; Gradio would keep a file open for each."""

    def body(files: int) -> bytes:
        head = b'--xy\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        return (head + b"--x\r\n") * files + b"--xy--\r\n"

    async def pieces(content):
        for start in range(0, len(content), size):
            yield content[start : start + size]

    guard, headers = guarded(tmp_path), {"content-type": 'multipart/form-data; boundary="xy"'}
    requests = [("POST", UPLOAD, {"content": pieces(body(files)), "headers": headers}) for files in (1, 8, 9, 500)]
    answers = ask(guard, *requests)
    assert [answer.status_code for answer in answers] == [200, 200, 413, 413]
    assert "More than 8 files" in answers[-1].json()["detail"]


@pytest.mark.parametrize(
    "method, headers, own",
    [
        ("POST", {}, True),  # a program
        ("POST", {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:7860"}, True),
        ("POST", {"origin": "http://127.0.0.1:7860"}, True),
        ("POST", {"origin": "https://chat.example.org"}, True),  # behind a proxy that keeps another name
        ("GET", {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),  # a link to the chat
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ("GET", {"origin": "https://evil.example"}, False),
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),  # a form
        ("POST", {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:9000"}, False),
        ("POST", {"origin": "https://evil.example"}, False),
        ("POST", {"origin": "http://6.6.6.6"}, False),
        ("POST", {"origin": "null"}, False),
    ],
)
def test_pages_of_other_sites_are_not_served(tmp_path, method, headers, own):
    """They could upload in a user's name, and with a user's login read what the user sees."""
    [answer] = ask(guarded(tmp_path, ["chat.example.org"]), (method, "/echo", {"headers": headers}))
    assert answer.status_code == (200 if own else 403)


def test_uploads_have_room_for_the_newest(tmp_path):
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").write_bytes(bytes(100))
        os.utime(tmp_path / str(number) / "a.png", (number, number))
    make_room(tmp_path, 500, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6", "7", "8", "9"]
    make_room(tmp_path, 500, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8", "9"]


def test_who_guesses_waits(tmp_path):
    """With a clock of our own: how many of a million passwords are tried in a day."""
    now = [0.0]
    guesses = Guesses(clock=lambda: now[0])
    tried = 0
    while now[0] < 24 * 3600:
        now[0] += guesses.wait("9.9.9.9")
        assert guesses.wait("9.9.9.9") == 0
        guesses.wrong("9.9.9.9")
        tried += 1
    assert tried < 120
    assert guesses.wait("9.9.9.8") == 0  # others do not wait
    for number in range(6):
        guesses.wrong(f"2001:db8::{number}")
    assert guesses.wait("2001:db8::ffff:1") > 0 and guesses.wait("2001:db8:0:1::1") == 0
    guesses.right("9.9.9.9")
    assert guesses.wait("9.9.9.9") == 0


def test_wrong_passwords_are_slowed_down(tmp_path):
    guard = guarded(tmp_path, signed_in=False)
    answers = ask(guard, *[("POST", "/login", {"content": b"wrong"})] * 8, ("POST", "/login", {"content": b"right"}))
    assert [answer.status_code for answer in answers] == [400] * 5 + [429] * 4
    assert "try again in" in answers[-1].json()["detail"] and int(answers[-1].headers["retry-after"]) > 0
    assert ask(guard, ("POST", "/login", {"content": b"right"}), client=("8.8.8.8", 1))[0].status_code == 200


def test_who_guesses_from_ever_new_addresses_waits_too(tmp_path):
    """As somebody who says so in X-Forwarded-For. Who logs in meanwhile is not kept out for good."""
    guard = guarded(tmp_path, signed_in=False)
    tried = []
    for number in range(150):
        [answer] = ask(guard, ("POST", "/login", {"content": b"wrong"}), client=(f"9.9.{number}.9", 1))
        tried.append(answer.status_code)
    assert tried[:100] == [400] * 100 and tried[101:] == [429] * 49
    assert int(answer.headers["retry-after"]) <= 11


def test_the_log_is_bounded():
    now = [0.0]
    few, logger, written = FewLines(20, clock=lambda: now[0]), logging.Logger("test"), []
    logger.addFilter(few)
    logger.addHandler(handler := logging.Handler())
    handler.emit = written.append
    for _ in range(10_000):
        try:
            raise OSError("too many open files")
        except OSError:
            logger.exception("x" * 10_000)
    assert len(written) == 20 and sum(len(logging.Formatter().format(record)) for record in written) < 12_000
    assert "left out" in written[-1].getMessage()
    now[0] = 61
    logger.error("later")
    assert written[-1].getMessage() == "later"


@contextlib.contextmanager
def listening(guard: Guard):
    """The small application on a socket, as the chat is served. Yields the port."""
    [opened] = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(guard, http=Connection, backlog=8, timeout_graceful_shutdown=0))
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    try:
        yield opened.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(sent)
    return connection


REQUEST = b"GET /echo HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", REQUEST[:20], REQUEST, REQUEST + REQUEST[:20]])
def test_a_connection_that_brings_nothing_ends(tmp_path, monkeypatch, sent):
    """At its beginning, in the middle of a request, and after an answer."""
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.2)
    with listening(guarded(tmp_path)) as port, connect(port, sent) as connection:
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(10_000):
                got += piece
    assert got.count(b"200 OK") == sent.count(b"\r\n\r\n")


def test_a_client_that_takes_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "SEND_SECONDS", 0.2)
    guard = guarded(tmp_path)
    with listening(guard) as port, connect(port, REQUEST.replace(b"echo", b"stream")):
        assert guard.app.state.ended.wait(60)


def test_idle_connections_make_room(tmp_path, monkeypatch):
    """Ten times as many as may be: whoever asks is answered, and who was answering stays."""
    monkeypatch.setattr(Connection, "most", 5)
    with listening(guarded(tmp_path)) as port, contextlib.ExitStack() as stack:
        busy = stack.enter_context(connect(port, REQUEST.replace(b"echo", b"stream")))
        assert busy.recv(1000)
        for _ in range(50):
            stack.enter_context(connect(port))
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/echo", timeout=60).json() == {"bytes": 0}
        for _ in range(1000):
            assert busy.recv(10_000)


@pytest.mark.parametrize("sent", [REQUEST.replace(b"echo", b"stream"), POST + b"a"])
def test_busy_connections_make_room(tmp_path, monkeypatch, sent):
    """Ten times as many as may be, each in the middle of an answer or of its request: whoever asks is answered."""
    monkeypatch.setattr(Connection, "most", 5)
    with listening(guarded(tmp_path)) as port, contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connect(port, sent))
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/echo", timeout=60).json() == {"bytes": 0}


def test_the_address_with_most_connections_makes_room():
    """And there what is not answered yet; connections as far as this is asked of them."""

    class Known:
        def __init__(self, address, more_body):
            self.client, self.cycle = (address, 1), self
            self.more_body = more_body

    few = [Known("1.1.1.1", True), Known("2.2.2.2", False)]
    many = [Known("6.6.6.6", False) for _ in range(5)]
    for _ in range(50):
        assert Connection._busy([*few, *many]) in many
    bringing = Known("6.6.6.6", True)
    assert Connection._busy([*few, *many, bringing]) is bringing


def test_an_address_in_use_is_refused():
    [opened] = listen("127.0.0.1", 0)
    port = opened.getsockname()[1]
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ChatError, match=f"Cannot listen on {host} port {port}"):
            listen(host, port)
    with pytest.raises(ChatError, match="Cannot listen on nowhere.invalid"):
        listen("nowhere.invalid", port)
    opened.close()


def test_a_question_that_is_read_for_ever(monkeypatch):
    """It gets a sentence; others are read meanwhile; when no thread is left, the server says that it is stuck."""
    readers, hold = Readers(threads=2, seconds=0.1), threading.Event()

    async def read():
        with pytest.raises(ChatError, match="was not read within"):
            await readers.run(hold.wait)
        assert await readers.run(lambda: "read") == "read" and not readers.stuck
        with pytest.raises(ChatError, match="was not read within"):
            await readers.run(hold.wait)
        with pytest.raises(ChatError, match="was not read within"):
            await readers.run(lambda: "not read")
        assert readers.stuck and readers.waiting == 0
        monkeypatch.setattr(readers_module, "MAX_WAITING", 0)
        with pytest.raises(ChatError, match="Too many questions"):
            await readers.run(lambda: "not read")
        monkeypatch.undo()
        hold.set()
        assert await readers.run(lambda: "read") == "read" and not readers.stuck

    asyncio.run(read())
