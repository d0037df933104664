"""The server as programs use it: API, safety, many users at once."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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
from fura_vlm.chat.models import load_models
from fura_vlm.chat.page import as_seen
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.chat.session import Chat, Session, Turn
from fura_vlm.modelling.load import load_any, load_processor

LENGTH = 12
QUESTION = "What is this?"
PLAIN = {"model": "base", "max_new_tokens": LENGTH, "api_name": "/chat"}


@pytest.fixture(scope="module")
def expected(run, scenes):
    """What ``generate`` answers about each scene, without the adapter."""
    model, processor = load_any(run)
    answers = {}
    with torch.inference_mode(), model.disable_adapter():
        for scene in scenes:
            inputs = encode(build_prompt([Exchange(QUESTION, scene)], processor, 1000), processor)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
            answers[scene] = processor.tokenizer.decode(
                ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
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
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "tuned", "writing": 0, "waiting": 0}


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


def test_password_address_and_end(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving("--model", TINY, "--auth", "anna:secret") as (address, process):
        assert httpx.get(f"{address}/config").status_code == 401
        with pytest.raises(Exception, match="[Aa]uth|credentials|login"):
            client(address)
        assert ask(client(address, auth=("anna", "secret")), scenes[0])
        listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        port = address.rpartition(":")[2]
        second = [sys.executable, "-m", "fura_vlm.cli", "chat", "--web", "--model", TINY, "--port", port]
        done = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and f"Cannot listen on 127.0.0.1 port {port}" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.glob("fura-chat-*/uploads/*/*.png"))
    assert process.returncode == 0 and not list(tmp_path.glob("fura-chat-*"))  # nothing of the user is left


def test_a_plain_model_has_examples(browser, scenes):
    with serving("--model", TINY) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.locator("#left .example").first.click()
        page.locator("#left .bot.message").wait_for()
        assert page.locator("#left .user img").count() == 1
        page.close()


def test_the_queue_is_bounded():
    """One answer at a time and two that wait: of eight long ones the last are turned away, the first are answered."""
    data = {"data": [{"text": "Tell me all.", "files": []}, "base", 0, 1, 512]}
    with serving("--model", TINY, "--max_users", "1", "--max_waiting", "2") as (address, _):
        with httpx.Client(base_url=address, timeout=120) as http:
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
    seen, words = as_seen(str(tmp_path / "wide.png"), load_processor(TINY))
    assert words == "300 x 150 pixels become 112 x 112; 50% of it is padding, above and below."
    assert seen.getpixel((56, 5)) == (122, 116, 104) and seen.getpixel((56, 56)) == (0, 0, 255)
    assert seen.getpixel((56, 28)) == (255, 0, 0)  # the frame
