"""Expected tokens are written out by hand. The tokenizer knows the words of the prompt; all else is bytes."""

import copy
import re

import pytest
from fura_vlm.data.conversation import (
    CHAT_TEMPLATE,
    IGNORE,
    SYSTEM_PROMPT,
    EncodingError,
    encode,
    prompt,
    render,
    tokenize,
)
from made_records import llava_record

from fura_vlm.data.messages import Turn

SYSTEM = [
    *("<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant.").split(),
    *("▁The ▁assistant ▁gives ▁helpful, ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions.").split(),
]
NEWLINE = "<0x0A>"


def turns(*values):
    return [Turn(("human", "gpt")[n % 2], value) for n, value in enumerate(values)]


def messages(*values):
    return [{"role": ("user", "assistant")[n % 2], "content": value} for n, value in enumerate(values)]


def encoded(conversation, tokenizer, num_image_tokens=4, max_length=2048):
    """The tokens after the system prompt, those with a label in square brackets."""
    row = encode(conversation, tokenizer, num_image_tokens, max_length)
    assert len(row["input_ids"]) == len(row["labels"])
    assert all(isinstance(value, int) for value in row["input_ids"] + row["labels"])
    assert all(label in (IGNORE, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    names = tokenizer.convert_ids_to_tokens(row["input_ids"])
    shown = [n if label == IGNORE else f"[{n}]" for n, label in zip(names, row["labels"], strict=True)]
    assert shown[: len(SYSTEM)] == SYSTEM
    return shown[len(SYSTEM) :]


CONVERSATIONS = {
    "image first": ("<image>\nWhat is this?", "A cat"),
    "image last": ("What is this?\n<image>", "A cat"),
    "image in the middle": ("Look: <image> What is this?", "A cat"),
    "image alone": ("<image>", "A cat"),
    "image in the second question": ("What is this?", "No", "And that? <image>", "Yes"),
    "text only": ("What is this?", "A cat"),
    "several turns": ("<image>\nWhat is this?", "A cat", "A dog.", "No", "Is this red", "Yes"),
    "other scripts and lines": ("猫?\n<image>", "猫\n\n1. é", " two  spaces ", "\nYes "),
}


# ------------------------------------------------------------------------------------------------------- text


def test_render_writes_what_llava_writes():
    text, spans = render(turns("What is this?\n<image>", "A cat.", "Sure?", "Yes"))
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes</s>"
    )
    assert [text[start:end] for start, end in spans] == [" A cat.</s>", " Yes</s>"]


def test_render_takes_records():
    record = llava_record("1", ["What is this?", "A cat."])
    assert render(record) == render(record.conversations)


def test_questions_without_image_and_answers_keep_their_spaces():
    text, _ = render(turns(" a <image> ", " b ", " c ", " d "))
    assert text == f"{SYSTEM_PROMPT} USER: <image>\na ASSISTANT:  b </s>USER:  c  ASSISTANT:  d </s>"


def test_prompt_ends_where_the_answer_begins():
    conversation = turns("<image>\nWhat is this?", "A cat.", "Sure?", "Yes")
    whole = render(conversation).text
    for asked in (conversation, conversation[:3]):
        assert prompt(asked) == whole.removesuffix(" Yes</s>")
    first = f"{SYSTEM_PROMPT} USER: <image>\nWhat is this? ASSISTANT:"
    assert prompt(conversation[:1]) == prompt(conversation[:2]) == first


# ----------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("question", ["<image>\nWhat is this?", "What is this?\n<image>", "What <image>\nis this?"])
def test_image_anywhere_in_the_first_question(tokenizer, question):
    words = "What ▁is ▁this?".split()
    if question == "What <image>\nis this?":
        words = ["What", "▁", NEWLINE, "is", "▁this?"]
    expected = ["▁USER:", "▁", *["<image>"] * 4, NEWLINE, *words, "▁ASSISTANT:", "[▁A]", "[▁cat]", "[</s>]"]
    assert encoded(turns(question, "A cat"), tokenizer) == expected


def test_text_only(tokenizer):
    expected = "▁USER: ▁What ▁is ▁this? ▁ASSISTANT: [▁A] [▁cat] [</s>]".split()
    assert encoded(turns("What is this?", "A cat"), tokenizer) == expected


def test_several_turns(tokenizer):
    conversation = turns("<image>\nWhat is this?", "A cat", "A dog.", "No", "Red", "Yes")
    first = ["▁USER:", "▁", "<image>", "<image>", NEWLINE, *"What ▁is ▁this? ▁ASSISTANT:".split()]
    second = "[▁A] [▁cat] [</s>] USER: ▁A ▁dog. ▁ASSISTANT: [▁No] [</s>]".split()
    third = "USER: ▁ R ed ▁ASSISTANT: [▁Yes] [</s>]".split()
    assert encoded(conversation, tokenizer, num_image_tokens=2) == first + second + third


def test_ids_and_labels_are_numbers_of_the_vocabulary(tokenizer):
    row = encode(turns("<image>\nWhat", "No"), tokenizer, 3, 2048)
    image, what, assistant, no = tokenizer.convert_tokens_to_ids(["<image>", "What", "▁ASSISTANT:", "▁No"])
    assert row["input_ids"][0] == 1  # <s>
    assert row["input_ids"][-8:] == [image, image, image, 0x0A + 3, what, assistant, no, 2]
    assert row["labels"] == [-100] * (len(row["labels"]) - 2) + [no, 2]


def test_an_answer_without_a_token_for_its_first_word(tokenizer):
    """The lone space belongs to the answer: the prompt ends before it, so that the model has to say it."""
    expected = "▁USER: ▁What ▁ASSISTANT: [▁] [<0xE7>] [<0x8C>] [<0xAB>] [</s>]".split()
    assert encoded(turns("What", "猫"), tokenizer) == expected


def test_a_legacy_tokenizer_adds_a_space_after_special_tokens(legacy_tokenizer):
    shown = encoded(turns("<image>\nWhat", "No", "What", "Yes"), legacy_tokenizer, num_image_tokens=1)
    assert shown == [
        *["▁USER:", "▁", "<image>", "▁", NEWLINE, "What", "▁ASSISTANT:", "[▁No]", "[</s>]"],
        *"▁USER: ▁What ▁ASSISTANT: [▁Yes] [</s>]".split(),
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_where_the_training_row_begins(tokenizer, name):
    """What the model is given to answer has the ids that it was trained on."""
    conversation = turns(*CONVERSATIONS[name])
    row = encode(conversation, tokenizer, 1, 2048)
    asked = tokenizer(prompt(conversation)).input_ids
    assert row["input_ids"][: len(asked)] == asked
    answer = row["input_ids"][len(asked) :]
    assert row["labels"][len(asked) :] == answer
    assert tokenizer.decode(asked + answer).endswith(conversation[-1].value + "</s>")


# ------------------------------------------------------------------------------------------------- max_length


def test_cut_on_the_right(tokenizer):
    conversation = turns("<image>\nWhat is this?", "A cat", "A dog.", "No")
    whole = encoded(conversation, tokenizer)
    assert whole[11:14] == ["[▁A]", "[▁cat]", "[</s>]"]
    for kept in range(12, len(whole) + 3):
        assert encoded(conversation, tokenizer, max_length=len(SYSTEM) + kept) == whole[:kept]


def test_a_row_that_keeps_no_answer_is_refused(tokenizer):
    conversation = turns("<image>\nWhat is this?", "A cat")
    first = len(SYSTEM) + 11 + 1  # USER: ▁ 4 x image, newline, three words, ASSISTANT: and then the answer
    assert encoded(conversation, tokenizer, max_length=first)[-1] == "[▁A]"
    with pytest.raises(EncodingError, match=f"the answer begins at token {first}, beyond the maximum length of"):
        encode(conversation, tokenizer, 4, first - 1)


def test_an_image_is_never_cut(tokenizer):
    conversation = turns("<image>\nWhat is this?", "A cat")
    end = len(SYSTEM) + 2 + 4
    for length in (1, len(SYSTEM) + 3, end - 1):
        with pytest.raises(EncodingError, match=f"the image ends at token {end}, beyond the maximum length"):
            encode(conversation, tokenizer, 4, length)
    later = turns("What", "Yes", "<image>", "No")  # the first answer would fit
    with pytest.raises(EncodingError, match="the image ends"):
        encode(later, tokenizer, 4, len(SYSTEM) + 7)


# ------------------------------------------------------------------------------------- what cannot be encoded


@pytest.mark.parametrize("token", ["</s>", "<unk>"])
def test_tokens_that_leave_llava_without_labels_are_refused(tokenizer, token):
    good, bad, worse = tokenize(
        [turns("What", "Yes"), turns(f"What is {token}?", "No"), turns("What", f"A {token} cat")], tokenizer
    )
    assert len(good.ids) == len(good.supervised)
    for error in (bad, worse):
        assert isinstance(error, EncodingError) and f"the text has {token}" in str(error)


def test_a_beginning_within_the_text_is_a_token(tokenizer):
    shown = encoded(turns("What", "A <s> cat"), tokenizer)
    assert shown == "▁USER: ▁What ▁ASSISTANT: [▁A] [▁] [<s>] [▁cat] [</s>]".split()


def test_other_tokens_typed_into_a_text_are_text(tokenizer):
    """What the model has been given besides Vicuna's tokens means nothing there."""

    def said(shown):
        text = "".join(shown).replace("[", "").replace("]", "").replace("▁", " ")
        return re.sub("<0x(..)>", lambda found: chr(int(found[1], 16)), text)

    shown = encoded(turns("<image>\nWhat is <pad>", "A <pad>"), tokenizer, num_image_tokens=1)
    assert shown[2] == "<image>" and "<pad>" not in shown and "[<pad>]" not in shown
    assert said(shown[3:]) == "\nWhat is <pad> ASSISTANT: A <pad></s>"
    record = llava_record("1", ["What is <image> here?", "An <image>"])
    shown = encoded(record, tokenizer)
    assert "<image>" not in shown and "[<image>]" not in shown
    assert said(shown) == " USER: What is <image> here? ASSISTANT: An <image></s>"


def test_a_tokenizer_without_a_beginning_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_bos_token = False
    with pytest.raises(EncodingError, match="add_bos_token=True"):
        encode(turns("What", "Yes"), other, 4, 2048)


# ---------------------------------------------------------------------------------------------- chat template


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_writes_what_render_writes(tokenizer, name):
    values = CONVERSATIONS[name]
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    assert tokenizer.apply_chat_template(messages(*values), **options) == render(turns(*values)).text
    asked = tokenizer.apply_chat_template(messages(*values[:-1]), add_generation_prompt=True, **options)
    assert asked == prompt(turns(*values))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_marks_what_has_labels(tokenizer, name):
    values = CONVERSATIONS[name]
    marked = tokenizer.apply_chat_template(
        messages(*values),
        chat_template=CHAT_TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    [tokens] = tokenize([turns(*values)], tokenizer)
    assert marked["input_ids"] == tokens.ids.tolist()[1:]  # <s> is not the template's business
    assert marked["assistant_masks"] == tokens.supervised.astype(int).tolist()[1:]


def test_the_template_takes_lists_of_parts(tokenizer):
    image, text = {"type": "image"}, {"type": "text", "text": "What is this?"}
    answer = [{"type": "text", "text": "A cat"}]
    expected = render(turns("<image>\nWhat is this?", "A cat")).text
    for content in ([image, text], [text, image]):
        chat = messages(content, answer)
        assert tokenizer.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=False) == expected


def test_the_template_takes_several_parts_and_images(tokenizer):
    image, a, b = {"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    written = tokenizer.apply_chat_template(messages([a, image, b, image]), chat_template=CHAT_TEMPLATE, tokenize=False)
    assert written == f"{SYSTEM_PROMPT} USER: <image>\n<image>\na\nb "


def test_the_template_takes_a_system_message(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, *messages("What?")]
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    assert tokenizer.apply_chat_template(chat, **options) == "Be brief. USER: What? "
    with pytest.raises(Exception, match="the roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], **options)


# ----------------------------------------------------------------------------------------------------- plain

CAPTION = (Turn("human", "Describe the picture.\n<image>"), Turn("gpt", "A red cat."))


@pytest.mark.parametrize("kind", ["tokenizer", "legacy_tokenizer"])
def test_plain_is_picture_and_caption(kind, request):
    """LLaVA tokenizes the caption and its line break by themselves and takes off their <s>."""
    tokenizer = request.getfixturevalue(kind)
    caption = tokenizer("A red cat.\n").input_ids[1:]
    row = encode(CAPTION, tokenizer, 3, 50, conversation="plain")
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert row["input_ids"] == [tokenizer.bos_token_id, image, image, image, *caption]
    assert row["labels"] == [IGNORE] * 4 + caption
    assert tokenizer.eos_token_id not in caption


def test_plain_takes_captions_only(tokenizer):
    with pytest.raises(EncodingError, match="4 turns"):
        encode(CAPTION * 2, tokenizer, 3, 50, conversation="plain")
    with pytest.raises(EncodingError, match="no image"):
        encode((Turn("human", "What?"), CAPTION[1]), tokenizer, 3, 50, conversation="plain")


def test_plain_is_cut_where_it_is_full(tokenizer):
    whole = encode(CAPTION, tokenizer, 3, 50, conversation="plain")
    short = encode(CAPTION, tokenizer, 3, 6, conversation="plain")
    assert short["input_ids"] == whole["input_ids"][:6] and short["labels"] == whole["labels"][:6]
