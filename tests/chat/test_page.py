"""The page in a real browser. What it shows is held to ``generate`` on the same prompt."""

import base64
import http.server
import re
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from answers_that_fetch import attempts
from chat_server import bad_files, free_port, serving
from playwright.sync_api import expect

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.models import load_models
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.chat.server import listen, make_server
from fura_vlm.chat.session import Turn
from fura_vlm.modelling.load import load_any

PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def reference(run):
    """What ``generate`` answers to the last question of a conversation, without this project's engine."""
    model, family = load_any(run)

    @torch.inference_mode()
    def answer(exchanges, adapter=True, length=24):
        inputs = encode(build_prompt(exchanges, family, 1024 - length), family)
        with nullcontext() if adapter else model.disable_adapter():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=length)
        return family.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return answer


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """The page, served in this process: a test may put a conversation on the server, with answers of its choice."""
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        config = ChatConfig(port=free_port(), max_users=4)
        page, server, _ = make_server(load_models(run, []), config, folder)
        thread = threading.Thread(target=server.run, args=(listen(config.host, config.port),), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        page.address = f"http://{config.host}:{config.port}"
        yield page
        server.should_exit = True
        thread.join(30)
        page.chat.engine.close()


@pytest.fixture(scope="module")
def address(served) -> str:
    return served.address


def open_settings(page, length=24):
    page.get_by_role("button", name="Settings").click()
    number = page.get_by_label("number input for Longest answer")
    while number.input_value() != str(length):  # what is typed while Gradio builds the slider is lost
        number.fill(str(length))
        number.press("Tab")


def choose(page, label, option):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)


def ask(page, question, *files):
    if files:
        page.set_input_files("#question input[type=file]", list(files))
        page.locator("#question .thumbnail-item, #question img").first.wait_for()
    page.locator("#question textarea").fill(question)
    page.get_by_label("Submit").click()


def bot(page, side="left"):
    return page.locator(f"#{side} .bot.message")


def user(page, side="left"):
    return page.locator(f"#{side} .user.message")


def idle(page):
    """Until the question was taken, which empties its box, and nothing is being written any more."""
    expect(page.locator("#question textarea")).to_have_value("")
    expect(page.get_by_label("Submit")).to_be_visible()


def notice(page):
    """What is said above the question box."""
    return page.locator("#notice")


def words(text):
    """As text that Markdown may have laid out otherwise."""
    return re.sub(r"\s+", " ", text).strip()


def shows(page, answer, number=0, side="left"):
    idle(page)
    expect(bot(page, side).nth(number)).to_contain_text(words(answer)[:40])


def test_two_turns_retry_edit_undo_and_clear(page, reference, scenes):
    open_settings(page)
    choose(page, "Model", "base")
    ask(page, "What is this?", scenes[0])
    first = [Exchange("What is this?", scenes[0])]
    shows(page, reference(first, adapter=False))
    expect(page.locator("#left .user img")).to_have_count(1)
    expect(page.locator("#speed")).to_contain_text(re.compile(r"base: \d+ tokens, first after [\d.]+ s"))

    first[0].answer = reference(first, adapter=False)
    ask(page, "And below it?")
    expect(bot(page)).to_have_count(2)
    shows(page, reference([*first, Exchange("And below it?")], adapter=False), 1)

    page.get_by_label("Retry").click()
    expect(bot(page)).to_have_count(2)
    shows(page, reference([*first, Exchange("And below it?")], adapter=False), 1)

    page.get_by_label("Undo", exact=True).click()
    expect(bot(page)).to_have_count(1)
    expect(page.locator("#question textarea")).to_have_value("And below it?")

    page.get_by_label("Edit").click()
    page.locator("#left textarea").fill("Where is the sign?")
    page.get_by_label("Submit").first.click()
    shows(page, reference([Exchange("Where is the sign?", scenes[0])], adapter=False))
    expect(user(page).last).to_contain_text("Where is the sign?")

    page.get_by_label("Clear").first.click()
    expect(bot(page)).to_have_count(0)


def test_an_edit_that_cannot_be_asked_loses_nothing(page):
    open_settings(page, 2)
    for number, question in enumerate(("One?", "Two?")):
        ask(page, question)
        idle(page)
        expect(bot(page)).to_have_count(number + 1)
    page.get_by_label("Edit").first.click()
    page.locator("#left textarea").fill("<image>")
    page.get_by_label("Submit").first.click()
    expect(notice(page)).to_contain_text("type one")
    expect(bot(page)).to_have_count(2)
    expect(user(page).first).to_contain_text("One?")


def test_side_by_side(page, reference, scenes):
    open_settings(page)
    ask(page, "Anything?")
    idle(page)
    choose(page, "Side by side with", "base")
    expect(bot(page, "right")).to_have_text("was not asked")
    page.get_by_label("Clear").first.click()
    expect(bot(page)).to_have_count(0)
    ask(page, "What is this?", scenes[1])
    exchange = Exchange("What is this?", scenes[1])
    tuned, base = reference([exchange]), reference([exchange], adapter=False)
    assert tuned != base
    shows(page, base, side="right")
    assert words(bot(page, "right").inner_text()) != words(bot(page).inner_text())
    # The random adapter writes all kinds of signs, which Markdown shows in its own way: letters only.
    letters = re.sub(r"[^a-zA-Z]", "", tuned)
    assert re.sub(r"[^a-zA-Z]", "", bot(page).inner_text()).startswith(letters[:20])


def test_stop(page, scenes):
    """The base goes on about this scene until it is stopped."""
    open_settings(page, 512)
    choose(page, "Model", "base")
    ask(page, "What is this?", scenes[2])
    expect(bot(page)).to_contain_text(re.compile(r"\w+ \w+"))  # it streams: words come before the end
    page.get_by_label("Stop").click()
    idle(page)
    text = bot(page).inner_text()
    page.wait_for_timeout(500)
    assert bot(page).inner_text() == text
    assert int(re.search(r"(\d+) tokens", page.locator("#speed").inner_text())[1]) < 512


def test_bad_files_leave_the_chat_as_it_was(page, tmp_path, reference, scenes):
    reasons = bad_files(tmp_path)
    for name in ("text.png", "drawing.svg", "huge.png", "cut.png"):
        ask(page, "What is this?", str(tmp_path / name))
        expect(notice(page)).to_contain_text(reasons[name])
        expect(notice(page)).to_contain_text(name)
        expect(bot(page)).to_have_count(0)
        expect(page.locator("#question textarea")).to_have_value("What is this?")
        page.reload()
    open_settings(page)
    choose(page, "Model", "base")
    ask(page, "What is this?", scenes[0])
    shows(page, reference([Exchange("What is this?", scenes[0])], adapter=False))


def test_what_a_user_types_is_text(page, scenes):
    typed = "<script>document.title='caught'</script><img src=x onerror=\"document.title='caught'\"><image> <b>bold</b>"
    typed += " ![picture](http://127.0.0.1:9/a.png)"
    open_settings(page)
    ask(page, typed, scenes[0])
    idle(page)
    expect(bot(page)).to_have_count(1)
    shown = typed.replace("![picture](http://127.0.0.1:9/a.png)", "!picture")  # a link, and nothing is fetched
    assert user(page).last.inner_text().replace("\u2060", "").strip() == shown
    assert page.locator("#left .user script, #left .user b").count() == 0
    assert page.title() == "FuRA-VLM"


def test_markdown_and_code_are_shown(page):
    open_settings(page, 1)
    ask(page, "Some **bold** and\n\n```python\nprint(1)\n```")
    idle(page)
    expect(page.locator("#left .user strong")).to_have_text("bold")
    expect(page.locator("#left .user pre code")).to_contain_text("print(1)")


def within(page, locator) -> bool:
    """Whether all of it is in sight without scrolling the page."""
    box, size = locator.bounding_box(), page.viewport_size
    page.evaluate("scrollTo(0, 0)")
    return (
        box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and box["y"] + box["height"] <= size["height"]
    )


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_phone(page, reference, scenes):
    open_settings(page)
    choose(page, "Model", "base")
    page.get_by_role("button", name="Settings").click()
    ask(page, "What is this?", scenes[0])
    shows(page, reference([Exchange("What is this?", scenes[0])], adapter=False))
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.evaluate("scrollTo(0, 0)")
    assert within(page, page.locator("#question"))
    small = page.evaluate(
        """() => [...document.querySelectorAll('.gradio-container .contain button')]
            .filter((button) => button.checkVisibility())
            .map((button) => [button.ariaLabel || button.innerText, button.getBoundingClientRect()])
            .filter(([_, box]) => box.width < 40 || box.height < 40).map(([name]) => name)"""
    )
    assert small == []

    page.get_by_role("button", name="Settings").click()
    choose(page, "Side by side with", "tuned")
    page.get_by_role("button", name="Settings").click()
    ask(page, "And?")
    idle(page)
    page.evaluate("scrollTo(0, 0)")
    assert all(within(page, page.locator(part)) for part in ("#left", "#right", "#question"))


def test_an_error_stands_above_the_question(page, served, scenes):
    open_settings(page, 2)
    ask(page, "What is this?", scenes[0])
    idle(page)
    page.locator("#question textarea").press("Enter")
    expect(notice(page).get_by_role("alert")).to_have_text("There is no question: type one")
    bot(page).click(trial=True)  # nothing lies over the conversation
    session = next(reversed(served.chat.kept.values()))
    Path(session.turns[0].image).unlink()
    ask(page, "And below it?")
    expect(notice(page)).to_contain_text("no longer kept")
    expect(page.locator("#question textarea")).to_have_value("And below it?")
    expect(user(page).first).to_contain_text("no longer kept")
    expect(bot(page)).to_have_count(1)
    bot(page).click(trial=True)
    page.get_by_label("Clear").first.click()
    expect(notice(page)).to_be_hidden()
    page.get_by_label("Submit").click()
    idle(page)
    expect(bot(page)).to_have_count(1)


def test_what_nobody_foresaw_is_an_error_too(page, served, monkeypatch):
    """The words of such an exception stay in the server's log."""
    open_settings(page, 2)
    ask(page, "One?")
    idle(page)
    monkeypatch.setattr(served.chat.partner, "adapters", {})
    ask(page, "Two?")
    expect(notice(page).get_by_role("alert")).to_contain_text("Something went wrong on the server")
    expect(page.get_by_label("Submit")).to_be_visible()
    expect(page.locator("#question textarea")).to_have_value("Two?")
    expect(bot(page)).to_have_count(1)
    bot(page).click(trial=True)


def test_a_reload_keeps_the_conversation(page, reference, scenes):
    open_settings(page)
    choose(page, "Model", "base")
    choose(page, "Side by side with", "tuned")
    ask(page, "What is this?", scenes[0])
    expect(bot(page, "right")).to_have_count(1)  # the button alone is as before until the answers begin
    idle(page)
    seen = [page.locator(f"#{side} [role=log]").inner_text() for side in ("left", "right")]
    requests = []
    page.on("request", lambda request: requests.append(request.post_data) if "/run/predict" in request.url else None)
    for _ in range(2):
        requests.clear()
        page.reload()
        expect(bot(page, "right")).to_have_count(1)
        page.wait_for_timeout(500)
        # What was restored asks for nothing more, so no reply that comes late can change what is shown.
        assert len(requests) == 1, requests
        assert [page.locator(f"#{side} [role=log]").inner_text() for side in ("left", "right")] == seen
        expect(page.locator("#left .user img")).to_have_count(1)
        expect(page.locator("#left label").first).to_have_text("base")
    open_settings(page)
    ask(page, "And below it?")
    first = Exchange("What is this?", scenes[0])
    first.answer = reference([first], adapter=False)
    expect(bot(page)).to_have_count(2)
    shows(page, reference([first, Exchange("And below it?")], adapter=False), 1)

    page.get_by_label("Clear").first.click()
    expect(bot(page)).to_have_count(0)
    page.reload()
    page.locator("#question textarea").wait_for()
    expect(page.locator("#left .example").first).to_be_visible()
    expect(bot(page)).to_have_count(0)


def test_a_tab_does_not_change_what_another_shows(page, address):
    """Two tabs of one browser begin with the same conversation, and go on apart."""
    open_settings(page, 2)
    ask(page, "One?")
    idle(page)
    other = page.context.new_page()
    other.goto(address)
    expect(bot(other)).to_have_count(1)
    open_settings(other, 2)
    ask(other, "Two?")
    idle(other)
    expect(bot(other)).to_have_count(2)
    ask(page, "Three?")
    idle(page)
    expect(bot(page)).to_have_count(2)
    expect(page.locator("#left")).not_to_contain_text("Two?")


def test_something_moves_until_the_answer_is_there(page, scenes):
    moving = "document.querySelector('#left').getAnimations({subtree: true}).some((a) => a.animationName == 'pulse')"
    open_settings(page, 512)
    choose(page, "Model", "base")
    ask(page, "What is this?", scenes[2])
    page.get_by_label("Stop").wait_for()
    page.wait_for_function(moving)
    expect(bot(page)).to_contain_text(re.compile(r"\w+ \w+"))
    page.wait_for_function(moving)
    page.get_by_label("Stop").click()
    idle(page)
    page.wait_for_function(f"!({moving})")


def test_the_name_covers_no_message_and_the_light_theme_has_edges(page, scenes):
    open_settings(page, 1)
    choose(page, "Side by side with", "base")
    ask(page, "word " * 60)
    idle(page)
    for side in ("left", "right"):
        name, message = (page.locator(f"#{side} {part}").first.bounding_box() for part in ("label", ".message"))
        assert name["y"] + name["height"] <= message["y"]
    styles = page.evaluate(
        """() => ['#left', '#right', '.form:has(> #question)']
            .map((part) => getComputedStyle(document.querySelector(part)))
            .map((s) => [s.borderTopWidth, s.borderTopStyle, s.borderTopColor, s.backgroundColor])"""
    )
    inside = styles[0][3]
    for width, style, edge, _ in styles:
        light, dark = (max(map(int, re.findall(r"\d+", colour)[:3])) for colour in (inside, edge))
        assert width == "1px" and style == "solid" and light - dark > 30, styles


def test_what_is_copied_is_what_was_written(page, served):
    text = "So <b>:\n\n```html\n<b>![x](y)</b>\n```\n\n```mermaid\ngraph TD\n```"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    show(page, served, [Turn("?", None, ["tuned"], [text, None])])
    copied = "navigator.clipboard.readText()"
    bot(page).locator("pre").first.hover()
    for button in (
        bot(page).locator(".code_wrap button").first,
        page.locator("#left").get_by_label("Copy message").last,
    ):
        page.evaluate("navigator.clipboard.writeText('')")
        button.click()
        page.wait_for_function(f"{copied}.then((text) => text.length)")
        assert page.evaluate(copied).strip() in (text, "<b>![x](y)</b>")
    bot(page).locator("pre").first.click(click_count=3)
    page.keyboard.press("Control+C")
    page.wait_for_function(f"{copied}.then((text) => !text.includes('So'))")
    assert page.evaluate(copied).strip() == "<b>![x](y)</b>"


def test_look_inside(page, tmp_path):
    """Opened before a question or after it, it shows the picture as the model gets it."""
    from PIL import Image

    for name, size in (("wide.png", (300, 150)), ("high.png", (50, 200))):
        Image.new("RGB", size, "blue").save(tmp_path / name)
    open_settings(page, 1)
    ask(page, "What is this?", str(tmp_path / "wide.png"))
    idle(page)
    page.get_by_role("button", name="Look inside").click()
    expect(page.locator("#padding")).to_contain_text("50% of it is padding, above and below")
    expect(page.locator("#inside img")).to_have_count(1)
    expect(page.locator("#inside")).to_contain_text("402,368")
    ask(page, "And this?", str(tmp_path / "high.png"))
    expect(page.locator("#padding")).to_contain_text("75% of it is padding, left and right")


def give(page, files, how="drop", onto="#question textarea") -> bool:
    """Pastes or drops files. Whether the page took them: what it leaves alone, the browser opens in its place."""
    return page.evaluate(
        """async ([scenes, how, onto]) => {
            const data = new DataTransfer(), usual = {bubbles: true, cancelable: true};
            for (const [name, scene] of scenes)
                data.items.add(new File([await (await fetch(scene)).blob()], name, {type: 'image/png'}));
            return !document.querySelector(onto).dispatchEvent(
                how == 'paste'
                    ? new ClipboardEvent('paste', {clipboardData: data, ...usual})
                    : new DragEvent('drop', {dataTransfer: data, ...usual}));
        }""",
        [
            [
                (Path(file).name, "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode())
                for file in files
            ],
            how,
            onto,
        ],
    )


@pytest.mark.parametrize(
    "how, onto",
    [
        ("paste", "#question textarea"),
        ("drop", "#question textarea"),
        ("drop", "#left"),
        ("drop", "h3"),
        ("drop", "body"),
        ("drop", "html"),
    ],
)
def test_a_picture_is_pasted_or_dropped(page, scenes, how, onto):
    taken = give(page, scenes[:1], how, onto)
    assert taken or how == "paste"
    expect(page.locator("#question img")).to_have_count(1)
    if onto != "#left":
        return
    open_settings(page, 1)
    page.locator("#question textarea").fill("What is this?")
    page.get_by_label("Submit").click()
    idle(page)
    expect(page.locator("#left .user img")).to_have_count(1)


@pytest.mark.parametrize("onto", ["#question textarea", "#left"])
def test_two_pictures_at_once(page, scenes, onto):
    """Both are shown, and a sentence says that one goes with a question."""
    open_settings(page, 1)
    give(page, scenes[:2], onto=onto)
    expect(page.locator("#question img")).to_have_count(2)
    page.locator("#question textarea").fill("What is this?")
    page.get_by_label("Submit").click()
    expect(notice(page).get_by_role("alert")).to_contain_text("A question takes one picture")
    expect(page.locator("#question textarea")).to_have_value("What is this?")
    page.locator("#question").get_by_label("Remove").first.click()
    expect(page.locator("#question img")).to_have_count(1)
    page.get_by_label("Submit").click()
    idle(page)
    expect(page.locator("#left .user img")).to_have_count(1)


def test_two_tabs_know_nothing_of_each_other(page, browser, address, scenes):
    open_settings(page, 4)
    ask(page, "My secret question?", scenes[0])
    idle(page)
    other = browser.new_page()
    other.goto(address)
    other.locator("#question textarea").wait_for()
    expect(other.locator("#left")).not_to_contain_text("secret")
    expect(bot(other)).to_have_count(0)
    other.close()


def test_camera(page):
    page.get_by_role("button", name="Camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.currentTime > 0.2")
    page.get_by_label("capture photo").click()
    expect(page.locator("#question img")).to_have_count(1)
    open_settings(page, 1)
    page.locator("#question textarea").fill("What is this?")
    page.get_by_label("Submit").click()
    idle(page)
    expect(page.locator("#left .user img")).to_have_count(1)


@pytest.fixture(scope="module")
def elsewhere():
    """Another server, which answers everything, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}", asked
        server.shutdown()


def show(page, served, turns: list[Turn]) -> None:
    """Puts these turns in place of a tab's conversation on the server, as if they had been asked, and reloads it."""
    open_settings(page, 1)
    ask(page, "Hello?")
    idle(page)
    session = next(reversed(served.chat.kept.values()))
    session.turns[:] = turns
    page.reload()
    expect(bot(page)).to_have_count(len(turns))


def test_no_answer_makes_the_browser_fetch(browser, served, address, elsewhere):
    """Each form of picture, tag and diagram, as a question and as an answer, in a browser that would fetch them."""
    host, asked = elsewhere
    names = {f"{host}/{number}": form for number, form in enumerate(attempts())}
    texts = [text.replace("NAME", name) for name, text in zip(names, attempts().values(), strict=True)]
    context = browser.new_context()
    page = context.new_page()
    foreign, refused = [], []
    page.on("request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else foreign.append(r.url))
    page.on("console", lambda line: refused.append(line.text) if "Content Security" in line.text else None)
    page.set_content(f"<img src={host}/control>")  # this one would be seen
    page.wait_for_function("document.images[0].complete")
    assert asked == ["/control"] and foreign == [f"{host}/control"]
    asked.clear(), foreign.clear()

    page.goto(address)
    show(page, served, [Turn(text, None, ["tuned"], [text, None]) for text in texts])
    page.evaluate("fetch('/health').then((answer) => answer.text())")  # what the answers asked for, they asked before
    said = [names[url] for url in dict.fromkeys(foreign) if url in names]
    assert not foreign and not asked, said
    assert not refused  # nothing was there to be refused
    assert page.locator("#left .mermaid, #left iframe, #left .message img, #left .message svg svg").count() == 0
    context.close()


def test_a_model_of_text_alone_has_no_place_for_a_picture(browser, folder_of):
    with serving("--model", str(folder_of("text")), "--max_new_tokens", "8") as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.locator("#question textarea").fill("What is this?")
        expect(page.locator("#question textarea")).to_have_attribute("placeholder", "Ask")
        expect(page.locator("#question input[type=file]")).to_have_count(0)
        expect(page.get_by_text("Camera")).to_have_count(0)
        page.locator("#question textarea").press("Enter")
        expect(page.locator("#speed")).to_contain_text("8 tokens", timeout=60_000)
        expect(page.locator("#notice")).not_to_contain_text("picture")
        page.get_by_text("Look inside").click()
        expect(page.get_by_text("a context of 2,048 tokens")).to_be_visible()
        expect(page.get_by_text("What the model sees")).to_have_count(0)
        page.close()
