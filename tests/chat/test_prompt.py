"""The prompt of a chat, held to what training makes of the same conversation."""

import pytest
from chat_server import TINY, bad_files
from PIL import Image

from fura_vlm.chat.engine import ChatError
from fura_vlm.chat.prompt import Exchange, build_prompt, encode, is_animation, read_image
from fura_vlm.data import conversation
from fura_vlm.data.records import Turn
from fura_vlm.modelling.load import load_processor


@pytest.fixture(scope="module")
def processor():
    return load_processor(TINY)


def test_tokens_are_those_of_training(processor, scenes):
    """A conversation with a second picture on the way, against the labels that training would compute."""
    turns = [("What is this?", "A <b>card</b>."), ("Sure?", "Yes"), ("Where?", "left")]
    exchanges = [
        Exchange(question, scenes[0] if n == 0 else None, answer) for n, (question, answer) in enumerate(turns)
    ]
    exchanges[-1].answer = None
    record = []
    for n, (question, answer) in enumerate(turns):
        record += [Turn("human", ("<image>\n" if n == 0 else "") + question), Turn("gpt", answer)]
    trained = conversation.encode(record, processor.tokenizer, num_image_tokens=64, max_length=900)
    ids = encode(build_prompt(exchanges, processor, 900), processor)["input_ids"][0].tolist()
    assert trained["input_ids"][: len(ids)] == ids
    assert trained["labels"][len(ids)] != conversation.IGNORE  # and there the last answer begins
    assert set(trained["labels"][len(ids) :]) == {*trained["input_ids"][len(ids) :]}


def test_each_picture_stands_with_its_question(processor, scenes):
    exchanges = [Exchange("One?", scenes[0], "1"), Exchange("Two?", scenes[1])]
    prompt = build_prompt(exchanges, processor, 900)
    assert prompt.images == scenes[:2]
    assert prompt.text.endswith("USER: <image>\nOne? ASSISTANT: 1</s>USER: <image>\nTwo? ASSISTANT:")
    assert encode(prompt, processor)["pixel_values"].shape == (2, 3, 112, 112)


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
def test_special_tokens_that_a_user_types_are_no_tokens(processor, scenes, typed):
    prompt = build_prompt([Exchange(typed, scenes[0])], processor, 900)
    assert prompt.text == build_prompt([Exchange("What is this?", scenes[0])], processor, 900).text


def test_a_long_question_is_cut_at_its_end(processor, scenes):
    long = "Where is the red circle? " + "very " * 10_000
    prompt = build_prompt([Exchange(long, scenes[0])], processor, 512)
    assert "only its beginning" in prompt.notice
    assert "Where is the red circle? very" in prompt.text and prompt.text.endswith(" ASSISTANT:")
    assert 500 < encode(prompt, processor)["input_ids"].shape[1] <= 512


def test_a_long_conversation_forgets_its_beginning_but_not_the_picture(processor, scenes):
    exchanges = [Exchange(f"Question {n}?", scenes[0] if n == 0 else None, "yes " * 20) for n in range(30)]
    exchanges.append(Exchange("And now?"))
    prompt = build_prompt(exchanges, processor, 512)
    assert "forgotten" in prompt.notice and prompt.images == scenes[:1]
    assert "Question 0?" not in prompt.text and "Question 29?" in prompt.text
    assert prompt.text.count("<image>") == 1 and "questions. USER: <image>\nQuestion" in prompt.text
    assert encode(prompt, processor)["input_ids"].shape[1] <= 512


@pytest.mark.parametrize("question", ["", "  ", "<image>", "</s>\n"])
def test_no_question(processor, scenes, question):
    with pytest.raises(ChatError, match="type one"):
        build_prompt([Exchange(question, scenes[0])], processor, 900)


def test_bad_files_are_named_without_the_servers_folder(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(ChatError, match=reason) as caught:
            read_image(str(tmp_path / name))
        assert str(caught.value).startswith(name) and str(tmp_path) not in str(caught.value)


def test_a_picture_that_is_kept_no_longer(processor, tmp_path):
    prompt = build_prompt([Exchange("One?", str(tmp_path / "gone.png"), "1"), Exchange("Two?")], processor, 900)
    with pytest.raises(ChatError, match="kept no longer: start a new conversation"):
        encode(prompt, processor)


def test_animations_are_known(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    assert is_animation(str(tmp_path / "moving.gif")) and not is_animation(str(tmp_path / "still.gif"))
    assert read_image(str(tmp_path / "moving.gif")).getpixel((5, 5)) == (255, 0, 0)
