"""The server as programs use it: API, safety, many users at once."""

import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from chat_server import ROOT, TINY, bad_files, serving
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from markdown_it import MarkdownIt
from PIL import Image

from fura_vlm.chat.engine import ChatError, Sampling
from fura_vlm.chat.models import as_seen, load_models
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.chat.session import Chat, Session, Turn
from fura_vlm.cli import main
from fura_vlm.modelling.load import load_any, load_family

LENGTH = 12
QUESTION = "What is this?"
HEALTH = {"status": "ok", "reading": 0, "writing": 0, "waiting": 0}
PLAIN = {"model": "base", "max_new_tokens": LENGTH, "api_name": "/chat"}


@pytest.fixture(scope="module")
def expected(run, scenes):
    """What ``generate`` answers about each scene, without the adapter."""
    model, family = load_any(run)
    answers = {}
    with torch.inference_mode(), model.disable_adapter():
        for scene in scenes:
            inputs = encode(build_prompt([Exchange(QUESTION, scene)], family, 1000), family)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
            answers[scene] = family.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {scene: answer.strip() for scene, answer in answers.items()}


def client(address, **settings) -> Client:
    return Client(address, verbose=False, **settings)


def ask(user: Client, scene: str | None, question=QUESTION, **settings) -> str:
    return user.predict({"text": question, "files": [handle_file(scene)] if scene else []}, **PLAIN | settings)


def raw(address: str, data: list) -> str:
    """A request that no client library has looked at; the events it gets."""
    with httpx.Client(base_url=address, timeout=60) as http:
        event = http.post("/gradio_api/call/chat", json={"data": data}).json()["event_id"]
        return http.get(f"/gradio_api/call/chat/{event}").text


def test_twenty_users_at_once(address, scenes, expected):
    """Each about its own picture, three times: no error and no answer that belongs to another."""
    wrong, count = [], []

    def talk(scene):
        user = client(address)
        for _ in range(3):
            try:
                answer = ask(user, scene)
                count.append(1)
                if answer != expected[scene]:
                    wrong.append((scene, answer, expected[scene]))
                user.predict(api_name="/clear")
            except Exception as error:
                wrong.append((scene, repr(error)))

    users = [threading.Thread(target=talk, args=(scene,)) for scene in scenes]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong
    assert len(count) == 3 * len(scenes) and len(set(expected.values())) > 8
    assert httpx.get(f"{address}/health").json() == HEALTH | {"model": "tuned"}


def test_a_user_who_leaves_frees_the_model(address):
    """Of two long answers the one begun later would end later. Its reader leaves, and it ends first."""
    data = {"data": [{"text": "Tell me all.", "files": []}, "base", 0, 1, 512]}  # the base goes on until it is stopped

    @contextlib.contextmanager
    def reading(http):
        event = http.post("/gradio_api/call/chat", json=data).json()["event_id"]
        with http.stream("GET", f"/gradio_api/call/chat/{event}") as stream:
            yield (line for line in stream.iter_lines() if line.startswith("data"))

    with httpx.Client(base_url=address, timeout=120) as stays, httpx.Client(base_url=address, timeout=120) as leaves:
        with reading(stays) as answer:
            while len(next(answer)) < 400:
                pass
            with reading(leaves) as other:
                next(other)
                assert httpx.get(f"{address}/health").json()["writing"] == 2
            for _ in answer:
                pass
        assert httpx.get(f"{address}/health").json()["writing"] == 0


def test_conversations_are_apart(address, scenes, expected):
    one, other = client(address), client(address)
    assert ask(one, scenes[0]) == expected[scenes[0]]
    assert ask(other, scenes[1]) == expected[scenes[1]]
    again = ask(one, None)
    assert again != ask(client(address), None)  # it is about the picture of before
    one.predict(api_name="/clear")
    assert ask(one, None) == ask(client(address), None)


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), f"{TINY}/config.json", "../README.md"])
def test_no_file_of_the_server_is_read(address, path, scenes):
    for asked in (path, f"file://{path}"):
        events = raw(
            address, [{"text": "?", "files": [{"path": asked, "meta": {"_type": "gradio.FileData"}}]}, "base", 0, 1, 4]
        )
        assert "event: error" in events and "event: complete" not in events
    assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)


def test_a_picture_elsewhere_on_the_server_is_not_read_either(address, scenes):
    events = raw(
        address, [{"text": "?", "files": [{"path": scenes[0], "meta": {"_type": "gradio.FileData"}}]}, "base", 0, 1, 4]
    )
    assert "event: error" in events


def test_no_url_is_fetched(address, scenes):
    """A server of our own that would know."""
    import http.server

    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_address[1]}/a.png"
        for key in ("path", "url"):
            file = {"path": "a.png", key: url, "meta": {"_type": "gradio.FileData"}}
            assert "event: error" in raw(address, [{"text": "?", "files": [file]}, "base", 0, 1, 4])
        assert "not fetched" in raw(address, [{"text": "?", "files": [{"path": url}]}, "base", 0, 1, 4])
        listening.shutdown()
    assert not seen


@pytest.mark.parametrize("route", ["file=", "file/"])
def test_no_url_is_fetched_as_a_file(address, route):
    """An address that Gradio would ask: it is not one of a private network. Nothing listens on the port."""
    answer = httpx.get(f"{address}/gradio_api/{route}http://8.8.8.8:1/a.png", timeout=60)
    assert answer.status_code == 403 and "not fetched" in answer.text


def test_forgetting_while_an_answer_is_written(address, scenes):
    user = client(address)
    message = {"text": "Tell me all.", "files": [handle_file(scenes[0])]}
    running = user.submit(message, **PLAIN | {"max_new_tokens": 512})
    while not running.outputs():
        time.sleep(0.01)
    user.predict(api_name="/clear")
    assert running.result(timeout=60)  # what was written until then, and no error
    assert httpx.get(f"{address}/health").json()["writing"] == 0
    assert ask(user, None) == ask(client(address), None)


def test_one_question_at_a_time(run, scenes):
    """Of two of one session the second is refused, also while the first is still being read; clearing waits for it."""
    chat, session = Chat(load_models(run, []), max_users=2), Session()

    async def answers(question):
        async for _ in chat.ask(session, question, scenes[0], ["base"], Sampling(max_new_tokens=4)):
            pass

    async def talk():
        first = asyncio.create_task(answers("One?"))
        await asyncio.sleep(0)
        with pytest.raises(ChatError, match="still being written"):
            await answers("Two?")
        await session.idle()
        assert [turn.question for turn in session.turns] == ["One?"]
        await first

    with ThreadPoolExecutor() as pool:  # the driver of the browser has a loop of its own in this thread
        pool.submit(asyncio.run, talk()).result()
    assert not session.busy and not session.running
    chat.engine.close()


def test_bad_files_get_one_sentence(address, tmp_path):
    reasons = bad_files(tmp_path)
    user = client(address)
    for name in ("text.png", "drawing.svg", "huge.png", "cut.png"):
        with pytest.raises(AppError, match=reasons[name]) as caught:
            ask(user, str(tmp_path / name))
        assert "/tmp" not in str(caught.value)
    with pytest.raises(AppError, match="type one"):
        ask(user, None, question="<image>")


def test_an_animation_and_a_question_of_ten_thousand_words(address, tmp_path, scenes):
    first = Image.open(scenes[0]).convert("RGB")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", first.size)])
    user = client(address)
    assert ask(user, str(tmp_path / "moving.gif"))
    assert ask(user, scenes[0], question="word " * 10_000)


@pytest.mark.parametrize(
    "settings", [["base", 0, 1, 10**9], ["base", 0, 1, -5], ["base", 3, 1, 4], ["no such model", 0, 1, 4], ["base"], []]
)
def test_settings_out_of_range_are_refused(address, settings):
    events = raw(address, [{"text": "Hello", "files": []}, *settings])
    assert "event: error" in events and "event: complete" not in events


def test_example_of_the_readme(address, scenes):
    done = subprocess.run(
        [sys.executable, "demo/client.py", scenes[0], "--address", address], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


@pytest.mark.parametrize(
    "path, body",
    [
        ("call/chat", b"{"),
        ("call/chat", b"[]"),
        ("call/chat", b'{"data": "x"}'),
        ("call/nothing", b'{"data": []}'),
        ("call/v2/nothing", b"{}"),
        ("run/nothing", b'{"data": []}'),
        ("queue/join", b'{"data": [], "fn_index": 999, "session_hash": "a"}'),
        ("queue/join", b'{"data": [], "fn_index": "x", "session_hash": 3}'),
        ("cancel", b"\xff"),
        ("upload", b"not multipart"),
    ],
)
def test_a_bad_payload_gets_a_sentence(address, path, body):
    answer = httpx.post(
        f"{address}/gradio_api/{path}", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert 400 <= answer.status_code < 500
    assert len(answer.text) < 500 and "Traceback" not in answer.text and ".py" not in answer.text


@pytest.mark.parametrize("message", [None, "text", [], {"text": None, "files": []}, {"files": 3}, {"text": {}}])
def test_a_bad_question_gets_a_sentence(address, message):
    events = raw(address, [message, "base", 0, 1, 4])
    assert "event: error" in events and ("cannot be carried out" in events or "type one" in events)


def queued(http: httpx.Client, event: str, data: list, **more) -> dict:
    """What the page's event of this name, which is no part of the API, answers at the end. It is the first of the name
    that goes through the queue."""
    events = [d for d in http.get("/config").json()["dependencies"] if d["queue"] is not False]
    number = next(d["id"] for d in events if event in [name for _, name in d["targets"]])
    asked = json.dumps({"data": data, "fn_index": number, "session_hash": event} | more)  # NaN and half characters, too
    joined = http.post("/gradio_api/queue/join", content=asked, headers={"content-type": "application/json"})
    assert joined.status_code == 200, joined.text
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": event}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return message["output"]


def test_what_no_page_sends(run, tmp_path):
    """Each gets a sentence, and so does the next one. However often it is sent, the log stays short."""
    picture = {"path": "a.png", "meta": {"_type": "gradio.FileData"}}
    box, settings = {"text": "Hello", "files": []}, ["base", "nothing", 0, 1, 2]
    attempts = [
        ("submit", [None, box, "base", "nothing", math.nan, 1, 2], "are numbers"),
        ("submit", [None, box, "base", "nothing", 0, 1, math.nan], "are numbers"),
        ("submit", [None, box, "base", "nothing", math.inf, 1, 2], "greater than maximum"),
        ("submit", [None, box, None, "nothing", 0, 1, 2], "Something went wrong"),
        ("submit", [None, {"text": "x", "files": [picture] * 20_000}, *settings], "More than 8 files"),
        ("submit", [None, {"text": "\ud83d", "files": ["\ud83d"]}, *settings], "cannot be carried out"),
        ("input", [picture, box], "cannot be carried out"),
        ("input", ["\ud83d", box], "cannot be carried out"),
        ("retry", [None, "base", "nothing", 0, 1], "cannot be carried out"),
    ]
    with serving("--model", run) as (address, process), httpx.Client(base_url=address, timeout=60) as http:
        for event, data, sentence in attempts:
            assert sentence in str(queued(http, event, data)), (event, data)
        Image.new("1", (13_300, 13_300)).save(tmp_path / "huge.png")  # Gradio would make it RGB, and write it again
        sent = http.post("/gradio_api/upload", files={"files": (tmp_path / "huge.png").open("rb")}).json()[0]
        taken = queued(http, "input", [picture | {"path": sent, "orig_name": "huge.pdf"}, box])
        assert [file["path"] for file in taken["data"][0]["files"]] == [sent]
        halves = queued(http, "submit", [None, {"text": "an \ud83d emoji", "files": []}, *settings])
        assert "an \ufffd emoji" in str(halves)
        for _ in range(40):
            queued(http, "submit", attempts[3][1])
        for _ in range(5):  # once more does not break off the end
            process.terminate()
            time.sleep(0.3)
        log = process.communicate(timeout=60)[0]
    assert log.count("Traceback") == 20 and "KeyError" in log and len(log) < 60_000


def test_the_page_tells_nothing_of_the_servers_folders(address):
    """But the example pictures are there."""
    config = httpx.get(f"{address}/config").json()
    strings = []

    def walk(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                walk(part)
        elif isinstance(value, str):
            strings.append(value)

    walk(config)
    folders = tempfile.gettempdir(), str(ROOT), str(Path.home()), sys.prefix
    assert not [text for text in strings if any(folder in text for folder in folders)]
    pictures = [text for text in strings if "/examples/" in text]
    assert pictures and httpx.get(pictures[0]).headers["content-type"] == "image/png"
    assert httpx.get(f"{address}/examples/..%2f..%2fREADME.md").status_code == 404


def test_password_address_and_end(scenes, tmp_path, monkeypatch):
    """One server with a password, few files and many idle connections; ended while it is at everything at once."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving("--model", TINY, "--auth", "anna:secret", files=400) as (address, process):
        for path in ("config", "gradio_api/info", "examples/0.png", "gradio_api/heartbeat/a", "monitoring/summary"):
            assert httpx.get(f"{address}/{path}").status_code in (401, 404)
        assert httpx.get(f"{address}/health").json() == HEALTH
        login = httpx.get(address).text
        assert "auth_required" in login and "max_new_tokens" not in login and "tiny-llava" not in login
        with pytest.raises(Exception, match="[Aa]uth|credentials|login|Log in"):
            client(address)
        user = client(address, auth=("anna", "secret"))
        assert ask(user, scenes[0])
        cookies = httpx.post(f"{address}/login", data={"username": "anna", "password": "secret"}).cookies
        known = {"cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
        assert httpx.get(f"{address}/health", headers=known).json() == HEALTH | {"model": "tiny-llava"}
        assert "max_new_tokens" in httpx.get(address, headers=known).text
        listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        port = address.rpartition(":")[2]
        with pytest.raises(SystemExit, match=f"^fura-vlm chat: Cannot listen on 127.0.0.1 port {port}: name another"):
            main(["chat", "--web", "--model", TINY, "--port", port])
        assert list(tmp_path.glob("fura-chat-*/uploads/*/*.png"))

        with contextlib.ExitStack() as stack:
            for _ in range(450):
                stack.enter_context(socket.create_connection(("127.0.0.1", int(port))))
            assert httpx.get(f"{address}/health", timeout=60).json() == HEALTH
            half = b"POST /gradio_api/upload HTTP/1.1\r\nHost: a.localhost\r\nContent-Length: 9999\r\n"
            half += f"Content-Type: multipart/form-data; boundary=x\r\nCookie: {known['cookie']}\r\n\r\n".encode()
            stack.enter_context(socket.create_connection(("127.0.0.1", int(port)))).sendall(half)
            user.submit({"text": "Tell me all.", "files": []}, **PLAIN | {"max_new_tokens": 512})
            deadline = time.monotonic() + 60
            while (health := httpx.get(f"{address}/health", timeout=60).json())["writing"] < 1 or not health["reading"]:
                assert time.monotonic() < deadline, health
                time.sleep(0.05)
            large = Image.effect_noise((4990, 4990), 99)
            large.save(tmp_path / "large.png", compress_level=1)
            client(address, auth=("anna", "secret")).submit(
                {"text": "What is this?", "files": [handle_file(str(tmp_path / "large.png"))]}, **PLAIN
            )
            process.terminate()
            log = process.communicate(timeout=60)[0]
        assert "Traceback" not in log and len(log) < 20_000
    assert process.returncode == 0 and not list(tmp_path.glob("fura-chat-*"))  # nothing of the user is left


@pytest.fixture(scope="module")
def plain():
    """The address of a model without an adapter, which answers one at a time while two wait."""
    with serving("--model", TINY, "--max_users", "1", "--max_waiting", "2") as (address, _):
        yield address


def test_a_plain_model_has_examples(browser, plain):
    page = browser.new_page()
    page.goto(plain)
    page.locator("#left .example").first.click()
    page.locator("#left .bot.message").wait_for()
    assert page.locator("#left .user img").count() == 1
    page.close()


def test_the_queue_is_bounded(plain):
    """One answer at a time and two that wait: of eight long ones the last are turned away, the first are answered."""
    deadline = time.monotonic() + 60
    while httpx.get(f"{plain}/health", timeout=60).json()["writing"]:  # of the test before
        assert time.monotonic() < deadline
        time.sleep(0.05)
    data = {"data": [{"text": "Tell me all.", "files": []}, "base", 0, 1, 512]}
    with httpx.Client(base_url=plain, timeout=120) as http:
        asked = [http.post("/gradio_api/call/chat", json=data) for _ in range(8)]
        assert asked[-1].status_code == 503 and "Queue is full" in asked[-1].text
        taken = [answer.json()["event_id"] for answer in asked if answer.status_code == 200]
        assert 2 <= len(taken) < 8
        for event in taken:
            assert "event: complete" in http.get(f"/gradio_api/call/chat/{event}").text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("<img src=http://a/b.png>", "&lt;img src=http://a/b.png&gt;"),
        ("</p><div style='position:fixed'>", "&lt;/p&gt;&lt;div style='position:fixed'&gt;"),
        ("<!--", "&lt;!--"),
        ("![x](http://a/b.png)", '!<a href="http://a/b.png">x</a>'),
        ("a < b, 1<2", "a &lt; b, 1&lt;2"),
        ("**bold** `a<b`", "<strong>bold</strong> <code>a&lt;b</code>"),
    ],
)
def test_answers_are_markdown_without_html_and_pictures(text, shown):
    """By another Markdown than the page's: one that passes HTML through, too."""
    question, answer = Session([Turn(text, None, ["base"], [text, None])]).messages()
    for message in (question, answer):
        html = MarkdownIt("commonmark").render(message["content"])
        assert html.replace("\u2060", "").strip() == f"<p>{shown}</p>"


def test_what_the_model_sees(tmp_path):
    """A blue picture twice as wide as high: half of the square is padding, in the mean colour."""
    Image.new("RGB", (300, 150), (0, 0, 255)).save(tmp_path / "wide.png")
    seen, words = as_seen(str(tmp_path / "wide.png"), load_family(TINY))
    assert words == "300 x 150 pixels become 112 x 112; 50% of it is padding, above and below."
    assert seen.getpixel((56, 5)) == (122, 116, 104) and seen.getpixel((56, 56)) == (0, 0, 255)
    assert seen.getpixel((56, 28)) == (255, 0, 0)  # the frame
