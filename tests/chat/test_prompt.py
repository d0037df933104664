"""The prompt of a chat, held to what training makes of the same conversation."""

import random
import sys

import numpy as np
import pytest
from chat_server import TINY, bad_files
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fura_vlm.chat import prompt as prompt_module
from fura_vlm.chat.engine import ChatError
from fura_vlm.chat.prompt import (
    MAX_CONVERSATION,
    MAX_QUESTION,
    Exchange,
    build_prompt,
    encode,
    is_animation,
    picture_size,
    read_image,
)
from fura_vlm.data.images import load_image
from fura_vlm.families.base import IGNORE, Family
from fura_vlm.families.llava import Llava
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.modelling.load import load_family


@pytest.fixture(scope="module")
def family():
    return load_family(TINY)


def test_tokens_are_those_of_training(family, scenes):
    """A conversation with a second picture on the way, against the labels that training would compute."""
    turns = [("What is this?", "A <b>card</b>."), ("Sure?", "Yes"), ("Where?", "left")]
    exchanges = [
        Exchange(question, scenes[0] if n == 0 else None, answer) for n, (question, answer) in enumerate(turns)
    ]
    exchanges[-1].answer = None
    record = []
    for n, (question, answer) in enumerate(turns):
        shown = (Picture(scenes[0]),) if n == 0 else ()
        record += [Message("user", (*shown, Text(question))), Message("assistant", (Text(answer),))]
    [trained] = family.encode([(record, [(64, 64)])])
    wanted, labels = (made.tolist() for made in family.spread(trained))
    ids = encode(build_prompt(exchanges, family, 900), family)["input_ids"][0].tolist()
    assert wanted[: len(ids)] == ids
    assert labels[len(ids)] != IGNORE  # and there the last answer begins
    assert labels[len(ids) :] == wanted[len(ids) :]


def test_each_picture_stands_with_its_question(family, scenes):
    exchanges = [Exchange("One?", scenes[0], "1"), Exchange("Two?", scenes[1])]
    prompt = build_prompt(exchanges, family, 900)
    assert prompt.images == scenes[:2]
    assert prompt.text.endswith("USER: <image>\nOne? ASSISTANT: 1</s>USER: <image>\nTwo? ASSISTANT:")
    assert encode(prompt, family)["pixel_values"].shape == (2, 3, 112, 112)


@pytest.mark.parametrize(
    "typed",
    [
        "What<image> is this?",
        "What<<image>image> is this?",
        "What is</s> this?",
        "What<im</s>age> is this?",
        "What is<unk><s> this?<pad>",
    ],
)
def test_special_tokens_that_a_user_types_are_no_tokens(family, scenes, typed):
    prompt = build_prompt([Exchange(typed, scenes[0])], family, 900)
    assert prompt.text == build_prompt([Exchange("What is this?", scenes[0])], family, 900).text


def test_a_long_question_is_cut_at_its_end(family, scenes):
    long = "Where is the red circle? " + "very " * 10_000
    prompt = build_prompt([Exchange(long, scenes[0])], family, 512)
    assert "only its beginning" in prompt.notice
    assert "Where is the red circle? very" in prompt.text and prompt.text.endswith(" ASSISTANT:")
    assert 500 < encode(prompt, family)["input_ids"].shape[1] <= 512


def test_a_long_conversation_forgets_its_beginning_but_not_the_picture(family, scenes):
    exchanges = [Exchange(f"Question {n}?", scenes[0] if n == 0 else None, "yes " * 20) for n in range(30)]
    exchanges.append(Exchange("And now?"))
    prompt = build_prompt(exchanges, family, 512)
    assert "forgotten" in prompt.notice and prompt.images == scenes[:1]
    assert "Question 0?" not in prompt.text and "Question 29?" in prompt.text
    assert prompt.text.count("<image>") == 1 and "questions. USER: <image>\nQuestion" in prompt.text
    assert encode(prompt, family)["input_ids"].shape[1] <= 512


LONG = {
    "chinese": "请问这张图片里有什么？龘" * 3000,
    "thai": "ภาพนี้มีอะไร" * 3000,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466" * 5000,
    "accents": "e" + "\u0301" * (MAX_QUESTION - 1),
    "zero width": "\u200b" * MAX_QUESTION,
    "one word": "a" * MAX_QUESTION,
    "lone bytes": "\U00013000\U0010fffd" * 20_000,
}


def byte_tokenizer(normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer of another kind: every byte is a token, and all bytes of a character end at one place."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<unk>", "<pad>", "<image>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture(scope="module", params=["llama", "bytes", "bytes without accents"])
def any_family(request):
    """The embedded model's family, with its own tokenizer and with others."""
    family = load_family(TINY)
    if request.param == "llama":
        return family
    removes = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    family.processor.tokenizer = byte_tokenizer(removes if "without" in request.param else None)
    return Llava(family.processor, family.config)


@pytest.mark.parametrize("script", LONG)
def test_a_long_question_is_cut_in_any_script(any_family, scenes, script, monkeypatch):
    """In as many passes as the number of characters has binary digits, and to nearly all that fits."""
    passes = []
    measure = Family.prompt_length
    monkeypatch.setattr(Family, "prompt_length", lambda *arguments: passes.append(1) or measure(*arguments))
    question = LONG[script][:MAX_QUESTION]
    prompt = build_prompt([Exchange(question, scenes[0])], any_family, 512)
    assert len(passes) <= 20
    kept = prompt.text.partition("<image>\n")[2].removesuffix(" ASSISTANT:")
    assert kept and question.startswith(kept)
    size = len(any_family.tokenizer(prompt.text)["input_ids"]) + 63  # the picture is 64 tokens
    assert size <= 512
    if kept != question.strip():  # one more character of up to four bytes, some of which make two tokens, is too much
        assert size > 512 - 12 and "only its beginning" in prompt.notice


def test_what_is_far_too_long_is_refused(family, scenes):
    with pytest.raises(ChatError, match=f"has 100,001 characters, and at most {MAX_QUESTION:,}"):
        build_prompt([Exchange("a" * (MAX_QUESTION + 1), scenes[0])], family, 900)
    exchanges = [Exchange("a" * MAX_QUESTION, None, "yes")] * 4 + [Exchange("And now?")]
    with pytest.raises(ChatError, match=f"at most {MAX_CONVERSATION:,} are kept: start a new one"):
        build_prompt(exchanges, family, 900)


def test_of_a_long_conversation_little_is_read(family, monkeypatch):
    """A thousand short questions are measured in a few passes over what may fit, not over all of it each time."""
    passes = []
    measure = Family.prompt_length
    monkeypatch.setattr(Family, "prompt_length", lambda *arguments: passes.append(1) or measure(*arguments))
    prompt = build_prompt([Exchange("?", None, "!")] * 1000 + [Exchange("And now?")], family, 512)
    assert len(passes) <= 10
    assert 480 < len(family.tokenizer(prompt.text)["input_ids"]) <= 512


@pytest.mark.parametrize("text", ["<ima" * 4000 + "ge>" * 4000, "<image>" * 4000, "<" * 4000 + "</s>" * 3000])
def test_special_tokens_are_taken_out_in_time_in_line_with_the_text(family, text):
    """Twice the text takes twice the lines of Python, each of which looks at no more than one token's characters."""

    def lines(text: str) -> int:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line" and frame.f_code is prompt_module.plain.__code__
            return trace if frame.f_code is prompt_module.plain.__code__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            prompt_module.plain(text, family.reserved())
        finally:
            sys.settrace(before)
        return count

    assert len(text) < lines(text + text) < 2.1 * lines(text)


def test_special_tokens_are_taken_out_as_if_one_by_one(family):
    """Against taking out one after the other until none is left, on random nestings."""
    draw = random.Random(0)
    pieces = ["<image>", "</s>", "<s>", "<", "im", "age>", "</", "s>", "a", " "]
    for _ in range(500):
        text = expected = "".join(draw.choices(pieces, k=12))
        special = {"<image>", *family.tokenizer.all_special_tokens}
        while found := [token for token in special if token in expected]:
            expected = expected.replace(min(found, key=expected.index), "", 1)
        assert prompt_module.plain(text, family.reserved()) == expected.strip()


def test_special_tokens_go_however_many_there_are():
    """As many as Gemma 3 has, which all end alike; each step looks at a node of the tree, so steps are counted."""
    tokens, steps = {f"<unused{number}>" for number in range(6242)}, []

    class Counted(list):
        def __getitem__(self, node):
            steps.append(node)
            return super().__getitem__(node)

    for text, plain in (
        ("<unused1>" + ">" * 99_990, ">" * 99_990),
        ("<unused1>" * 11_000, ""),
        ("<unused" * 5_000 + "6241>" * 5_000, ""),
        ("<unused" * 12_000, "<unused" * 12_000),
        ("<unused6242><unused7>", "<unused6242>"),
    ):
        tree = Counted(prompt_module._tree(frozenset(tokens)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompt_module, "_tree", lambda tokens, tree=tree: tree)
            assert prompt_module.plain(text, tokens) == plain
    assert len(steps) < 6 * 500_000


@pytest.mark.parametrize("question", ["", "  ", "<image>", "</s>\n"])
def test_no_question(family, scenes, question):
    with pytest.raises(ChatError, match="type one"):
        build_prompt([Exchange(question, scenes[0])], family, 900)


def test_bad_files_are_named_without_the_servers_folder(family, tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(ChatError, match=reason) as caught:
            read_image(str(tmp_path / name), family)
        assert str(caught.value).startswith(name) and str(tmp_path) not in str(caught.value)


def test_only_meant_formats_are_opened(family, tmp_path):
    for name in ("picture.ppm", "picture.tga", "picture.ico", "picture.pcx"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
        with pytest.raises(ChatError, match="not an image"):
            read_image(str(tmp_path / name), family)
    for name in ("picture.png", "picture.jpg", "picture.webp", "picture.gif", "picture.bmp", "picture.tif"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
        assert read_image(str(tmp_path / name), family).getpixel((20, 20))[0] > 250


@pytest.mark.parametrize("name", ["large.jpg", "large.png", "turned.jpg"])
def test_a_large_picture_is_read_smaller(family, tmp_path, name):
    """Three times what is enough, as JPEG (which can be decoded to a half) and as PNG; the middle of it is blue."""
    width, height = 3 * Llava.enough[0], 3 * Llava.enough[1] + 300
    picture = Image.new("RGB", (width, height), "red")
    picture.paste((0, 0, 255), (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6
    picture.save(tmp_path / name, exif=exif)
    seen = read_image(str(tmp_path / name), family)
    upright = (height, width) if name == "turned.jpg" else (width, height)
    assert picture_size(str(tmp_path / name)) == upright
    factor = 3 if name == "large.png" else 2
    assert seen.size == tuple(-(-side // factor) for side in upright)
    assert np.allclose(seen.getpixel((seen.width // 2, seen.height // 2)), (0, 0, 255), atol=3)
    assert np.allclose(seen.getpixel((9, 9)), (255, 0, 0), atol=3)


def test_a_picture_of_the_usual_size_is_read_as_for_training(family, scenes, tmp_path):
    Image.effect_noise((2 * Llava.enough[0] - 1, 2 * Llava.enough[1] - 1), 90).convert("RGB").save(
        tmp_path / "noise.jpg"
    )
    assert np.array_equal(read_image(str(tmp_path / "noise.jpg"), family), load_image(tmp_path / "noise.jpg"))


def test_a_picture_that_is_kept_no_longer(family, tmp_path):
    prompt = build_prompt([Exchange("One?", str(tmp_path / "gone.png"), "1"), Exchange("Two?")], family, 900)
    with pytest.raises(ChatError, match="no longer kept: start a new conversation"):
        encode(prompt, family)


def test_animations_are_known(family, tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    assert is_animation(str(tmp_path / "moving.gif")) and not is_animation(str(tmp_path / "still.gif"))
    assert read_image(str(tmp_path / "moving.gif"), family).getpixel((5, 5)) == (255, 0, 0)


def test_of_many_pictures_few_are_measured(family, tmp_path, monkeypatch):
    """Some processors have to make each to say how long it is; eight fit into 512 tokens."""
    measured = []
    expansion = family.expansion
    monkeypatch.setattr(family, "_expansion", lambda *size: measured.append(size) or expansion(*size))
    monkeypatch.setattr(type(family), "needs_sizes", True)
    exchanges = []
    for number in range(100):
        Image.new("RGB", (40 + number, 40)).save(tmp_path / f"{number}.png")
        exchanges.append(Exchange("And this?", str(tmp_path / f"{number}.png"), "yes"))
    exchanges[-1].answer = None
    prompt = build_prompt(exchanges, family, 512)
    assert 5 <= len(prompt.images) <= 8 and prompt.images[-1] == exchanges[-1].image
    assert {size[0] for size in measured} <= set(range(40 + 90, 40 + 100))
