"""Chatting with a server's models: transformers serve with the merged embedded model, and servers that fail."""

import asyncio
import io
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from chat_server import ROOT, serving
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from odd_server import KEY, Odd, odd_server
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.models import load_models
from fura_vlm.chat.partner import ChatError, Sampling
from fura_vlm.chat.served import Served, find_served
from fura_vlm.chat.session import Chat, Session
from fura_vlm.chat.terminal import chat
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.families.vicuna import SYSTEM_PROMPT
from fura_vlm.modelling.load import load_family
from fura_vlm.remote.server import Server, ServerError, message

SAMPLING = Sampling(max_new_tokens=16)
QUESTION = "What is this?"
CLIP_DEVIATION = 0.26862954, 0.26130258, 0.27577711


@pytest.fixture(scope="module")
def reference(merged):
    """What transformers writes itself: the prompt by hand, pixels by Pillow."""
    processor = AutoProcessor.from_pretrained(merged, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval()

    def answer(said: str, *pictures: Image.Image) -> str:
        inputs = processor(text=f"{SYSTEM_PROMPT} {said} ASSISTANT:", images=pictures or None, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    return answer


def in_a_loop(work) -> None:
    """The driver of the browser, where other tests have started it, has a loop of its own in this thread."""
    with ThreadPoolExecutor() as pool:
        pool.submit(asyncio.run, work).result()


def talk(
    chat: Chat, *turns: tuple[str, str | None], models: list[str] | None = None, sampling: Sampling = SAMPLING
) -> tuple[Session, list[list[str]]]:
    """A session with these questions, and what of the answers was seen when."""
    session, seen = Session(), []

    async def ask() -> None:
        for question, picture in turns:
            sides = models or [next(iter(chat.partner.adapters))]
            async for _ in chat.ask(session, question, picture, sides, sampling):
                seen.append(list(session.turns[-1].answers))

    in_a_loop(ask())
    return session, seen


@pytest.fixture(scope="module")
def served(model_server, merged):
    chat = Chat(find_served(ChatConfig(server=model_server, model=merged)), max_users=4)
    yield chat
    chat.engine.close()


def turned(path: str, folder: Path) -> str:
    """A JPEG that lies on its side, and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
    return str(folder / "turned.jpg")


def test_text_pictures_and_several_turns(served, reference, scenes, tmp_path):
    """As transformers itself: a picture that is padded, one that lies on its side, words alone, what follows."""
    session, _ = talk(served, (QUESTION, scenes[0]), ("And below it?", None), ("And this?", scenes[1]))
    first, second = (Image.open(path) for path in scenes[:2])
    assert first.width != first.height
    one = reference(f"USER: <image>\n{QUESTION}", first)
    before = f"USER: <image>\n{QUESTION} ASSISTANT: {one}</s>USER: And below it?"
    two = reference(before, first)
    three = reference(f"{before} ASSISTANT: {two}</s>USER: <image>\nAnd this?", first, second)
    assert [turn.answers[0] for turn in session.turns] == [one, two, three] and len({one, two, three}) == 3
    session, seen = talk(served, (QUESTION, scenes[0]), sampling=Sampling(max_new_tokens=200))  # longer than one look
    [turn] = session.turns
    assert turn.answers[0].startswith(one) and len(turn.answers[0]) > 4 * len(one)
    grown = [answers[0] for answers in seen if answers[0] and turn.answers[0].startswith(answers[0])]
    assert len(set(grown)) > 1  # it came in pieces

    [turn] = talk(served, (QUESTION, turned(scenes[2], tmp_path)))[0].turns
    upright = Image.open(tmp_path / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    assert turn.answers[0] == reference(f"USER: <image>\n{QUESTION}", upright)
    [turn] = talk(served, ("Who are you?", None))[0].turns
    assert turn.answers[0] == reference("USER: Who are you?")


def test_as_the_model_answers_in_this_process(served, merged, scenes):
    """Marks of pictures that are typed are no pictures, here and there."""
    turns = [(f"<image> {QUESTION} <image>", scenes[3]), ("<image>Why?", None)]
    local = Chat(load_models(merged, []), max_users=1)
    here = talk(local, *turns)[0]
    local.engine.close()
    assert [turn.answers[0] for turn in talk(served, *turns)[0].turns] == [turn.answers[0] for turn in here.turns]
    with pytest.raises(ChatError, match="There is no question"):
        talk(served, ("<image>", None))


@pytest.mark.parametrize("shown", ["parts", "text"])
def test_the_template_for_engines_that_add_no_first_token(merged, shown):
    """That of docs/serving.md: a text with the token in it, tokenized as it is, has the ids of training."""
    processor, family = AutoProcessor.from_pretrained(merged), load_family(merged, merged)
    page = (ROOT / "docs/serving.md").read_text("utf-8")
    [before] = re.findall(r'printf "(\{\{.*\}\})"; cat models/mine/chat_template.jinja', page)
    template = before + (Path(merged) / "chat_template.jinja").read_text("utf-8")
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    first = {"role": "user", "content": parts if shown == "parts" else f"<image>\n{QUESTION}"}
    turns = [first, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And that?"}]
    text = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
    messages = [
        Message("user", (Picture(""), Text(QUESTION))),
        Message("assistant", (Text("A cat."),)),
        Message("user", (Text("And that?"),)),
    ]
    ids = family.inputs(messages, [Image.new("RGB", (50, 80))])["input_ids"][0]
    text = text.replace("<image>", "<image>" * family.image_tokens)
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_servers_scale_pictures_a_step_apart(merged, scenes):
    """With torchvision, and not at all apart where nothing is scaled."""
    apart = []
    for size in ((112, 90), (400, 230)):
        picture = Image.open(scenes[0]).convert("RGB").resize(size)
        theirs, ours = (
            AutoProcessor.from_pretrained(merged, backend=backend).image_processor(picture, return_tensors="pt")
            for backend in ("torchvision", "pil")
        )
        deviation = torch.tensor(CLIP_DEVIATION)[:, None, None]
        apart.append(float(((theirs["pixel_values"] - ours["pixel_values"]).abs() * deviation).max() * 255))
    assert apart[0] < 1e-3 and 0.5 < apart[1] < 1.01


def test_nothing_of_a_model_is_loaded(model_server, merged, scenes, reference):
    """In the terminal, by a process that says what it has imported."""
    script = (
        "import sys\nfrom fura_vlm.cli import main\nmain(sys.argv[1:])\n"
        "sys.exit(str({'torch', 'transformers', 'peft'} & set(sys.modules) or 0))"
    )
    asked = ["chat", scenes[0], "--server", model_server, "--model", merged, "--max_new_tokens", "16"]
    done = subprocess.run(
        [sys.executable, "-c", script, *asked, "--question", QUESTION], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stderr, done.stdout.strip()) == ("0\n", reference(f"USER: <image>\n{QUESTION}", Image.open(scenes[0])))


def test_the_page(model_server, merged, scenes, reference):
    """By its API, which works as the page does; torch is not mapped into its process."""
    with serving("--server", model_server, "--model", merged) as (address, process):
        user = Client(address, verbose=False)
        settings = {"model": Path(merged).name, "temperature": 0, "top_p": 1, "max_new_tokens": 16, "api_name": "/chat"}
        said = user.predict({"text": QUESTION, "files": [handle_file(scenes[0])]}, **settings)
        assert said == reference(f"USER: <image>\n{QUESTION}", Image.open(scenes[0]))
        (Path(scenes[0]).parent / "text.png").write_text("not a picture")
        with pytest.raises(AppError, match=r"text\.png is not an image"):
            user.predict({"text": QUESTION, "files": [handle_file(Path(scenes[0]).parent / "text.png")]}, **settings)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        assert model_server not in httpx.get(f"{address}/config").text  # where the server is, users need not know


# ---------------------------------------------------------------------------------------------- servers that fail


@pytest.fixture(scope="module")
def odd() -> str:
    with odd_server() as address:
        yield address


def test_two_models_side_by_side(odd):
    """Where the server keeps them is not shown; a name that it does not list is asked, too."""
    partner = find_served(ChatConfig(server=f"{odd}/named/v1", model="other"))
    assert partner.adapters == {"other": "other", "left": "left", "right": "/srv/right"}
    assert "/srv" not in partner.describe() and "- right" in partner.describe()
    chat = Chat(partner, max_users=2)
    [turn] = talk(chat, (QUESTION, None), models=["left", "right"])[0].turns
    assert turn.answers == ["One two three"] * 2 and chat.engine.load == (0, 0)
    generation = chat.engine.submit([message("user", QUESTION)], "left", SAMPLING)
    while not generation.done:
        time.sleep(0.01)
    assert generation.count == 7 and generation.tokens_per_second > 0  # the server's own count
    chat.engine.close()
    with pytest.raises(ChatError, match="closing"):
        chat.engine.submit([message("user", QUESTION)], "left", SAMPLING)


def test_a_model_is_named_or_listed(odd):
    partner = find_served(ChatConfig(server=f"{odd}/named/v1"))
    assert next(iter(partner.adapters)) == "left"
    with pytest.raises(ServerError, match="lists no models: name the one that it serves with --model"):
        find_served(ChatConfig(server=f"{odd}/nothing/v1"))
    with pytest.raises(ServerError, match="knows no model model .The model `model` does not exist.*: its models are m"):
        find_served(ChatConfig(server=f"{odd}/unknown/v1"))


def test_another_model_of_a_server_with_one(model_server):
    with pytest.raises(ServerError, match=r"refuses the question \(Server is pinned to .*; requested 'other'\.\): ask"):
        find_served(ChatConfig(server=model_server, model="other"))


@pytest.mark.parametrize("way", ["blind", "dropping"])
def test_a_model_that_takes_no_pictures(odd, scenes, way):
    """Whether the server says so, or answers as if there were no picture."""
    partner = find_served(ChatConfig(server=f"{odd}/{way}/v1"))
    assert not partner.sees
    with pytest.raises(ChatError, match="takes text alone: ask without a picture"):
        talk(Chat(partner, max_users=1), (QUESTION, scenes[0]))
    with pytest.raises(ChatError, match="takes text alone: name no picture"):
        chat(ChatConfig(image=scenes[0], server=f"{odd}/{way}/v1"))


@pytest.mark.parametrize(
    "way, said",
    [
        ("failing", r"has failed \(CUDA is lost \[device 0\]\): see its log"),
        ("gateway", r"has failed \(.+\): see its log"),
        ("full", r"has too much to do \(queue full\): ask again later"),
        ("large", r"takes no question of this size \(.+\): send a smaller picture"),
        ("long", r"cannot read so much \(The maximum context length is 9 .+\): start a new conversation"),
        ("strict", r"refuses the question \(This model reads 5 tokens; key \.\.\.\): ask another one"),
        ("breaking", "has broken off its answer: see its log, and ask again"),
        ("erring", "does not speak OpenAI's interface: check --server"),
        ("silent", "has sent nothing for 1 seconds: see what it is doing"),
        ("stalling", "has sent nothing for 1 seconds: see what it is doing"),
    ],
)
def test_each_failure_is_one_sentence(odd, way, said, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server = Server(f"{odd}/{way}/v1", "MY_KEY", seconds=1)
    chat = Chat(Served(server, "model", {"model": None}, sees=True), max_users=1)
    with pytest.raises(ChatError, match=f"{odd}/{way}/v1 {said}") as caught:
        talk(chat, (QUESTION, None))
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    chat.engine.close()


def test_users_of_the_page_are_not_told_where_the_server_is(odd):
    server = Server(f"{odd}/failing/v1")
    partner = Served(server, "model", {"model": None}, sees=True, public=True)
    chat = Chat(partner, max_users=1)
    with pytest.raises(ChatError, match=r"^The server has failed \(CUDA is lost \[device 0\]\): see its log$"):
        talk(chat, (QUESTION, None))
    assert odd not in partner.describe()
    chat.engine.close()


def test_keys(odd, monkeypatch, capsys):
    """What is given in place of a name may be the key: it is not repeated."""
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("WRONG", "sk-wrong")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # for OpenAI, and for nobody else
    assert find_served(ChatConfig(server=f"{odd}/key/v1", server_key="MY_KEY")).sees
    for name, said in (("WRONG", "refuses the key: export the right one"), (None, "asks for a key: export the right")):
        with pytest.raises(ServerError, match=said) as caught:
            find_served(ChatConfig(server=f"{odd}/key/v1", server_key=name))
        assert "sk-" not in str(caught.value)
    for name in ("sk-wrong", "NOT_SET"):
        with pytest.raises(ServerError, match="names no environment variable that is set") as caught:
            find_served(ChatConfig(server=f"{odd}/key/v1", server_key=name))
        assert name not in str(caught.value)
    with pytest.raises(ChatError, match="--server_key is the key of a server"):
        chat(ChatConfig(server_key="MY_KEY"))
    assert "sk-" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "address, said",
    [
        ("localhost:8000", "is no address of a server: give one such as http://localhost:8000"),
        ("http://", "is no address of a server"),
        ("http://localhost:99999", "is no address of a server"),
        ("ftp://localhost", "is no address of a server"),
        ("http://me:sk-secret@localhost", "must not hold a password"),
    ],
)
def test_addresses_that_cannot_be(address, said):
    with pytest.raises(ServerError, match=said) as caught:
        find_served(ChatConfig(server=address))
    assert "sk-" not in str(caught.value)


def test_no_server_and_no_such_interface(odd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=f"No server can be reached at {nowhere}: start it"):
        find_served(ChatConfig(server=nowhere, model="model"))
    with pytest.raises(ServerError, match="does not speak OpenAI's interface: check --server"):
        find_served(ChatConfig(server=f"{odd}/html/v1", model="model"))
    with pytest.raises(ChatError, match="--adapters are for a model in this process"):
        find_served(ChatConfig(server=odd, adapters=["runs/one"]))


def test_pictures_that_are_too_large_together(odd, scenes, monkeypatch):
    monkeypatch.setattr("fura_vlm.chat.served.MOST_PIXELS", 30_000)  # of two scenes and not of three
    chat = Chat(find_served(ChatConfig(server=f"{odd}/named/v1")), max_users=1)
    turns = [(QUESTION, scene) for scene in scenes[:3]]
    assert talk(chat, *turns[:2])[0].turns[1].answers[0] == "One two three"
    with pytest.raises(ChatError, match="more than 30,000 pixels together: start a new one"):
        talk(chat, *turns)
    chat.engine.close()


@pytest.mark.parametrize("way", ["endless", "silent"])
def test_stopping_ends_the_servers_work(odd, way):
    """At once, also where nothing has come yet; what is written stays."""
    Odd.left.clear()
    chat = Chat(Served(Server(f"{odd}/{way}/v1"), "model", {"model": None}, sees=True), max_users=1)
    session = Session()

    async def ask_and_stop() -> None:
        async for running in chat.ask(session, QUESTION, None, ["model"], SAMPLING):
            if running and (way == "silent" or "more" in (session.turns[-1].answers[0] or "")):
                session.stop()

    in_a_loop(asyncio.wait_for(ask_and_stop(), 30))
    assert session.turns[0].answers[0].startswith("One two three more" if way == "endless" else "")
    assert not session.busy and chat.engine.load == (0, 0)
    assert way == "silent" or Odd.left.wait(30)
    chat.engine.close()


def test_a_question_is_forgotten_in_the_terminal(odd, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\n"))
    chat(ChatConfig(server=f"{odd}/full/v1"))
    assert "has too much to do (queue full): ask again later\n> " in capsys.readouterr().out
