"""Expected tokens are written out by hand. The tokenizer knows the words of the prompt; all else is bytes."""

import copy
import re

import pytest
import torch
from PIL import Image

from fura_vlm.families.base import IGNORE, EncodingError
from fura_vlm.families.messages import Message, Picture, Text, pictures
from fura_vlm.families.vicuna import CHAT_TEMPLATE, SYSTEM_PROMPT, prompt, render

SYSTEM = [
    *("<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant.").split(),
    *("▁The ▁assistant ▁gives ▁helpful, ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions.").split(),
]
NEWLINE = "<0x0A>"
ROLES = ("user", "assistant")


def parts(value: str) -> tuple[Text | Picture, ...]:
    """``<image>`` stands for a picture."""
    made = [Picture("1.png") if piece == "<image>" else Text(piece) for piece in re.split("(<image>)", value)]
    return tuple(part for part in made if part[0])


def turns(*values):
    return [Message(ROLES[n % 2], parts(value)) for n, value in enumerate(values)]


def typed(*values):
    """Where ``<image>`` is text."""
    return [Message(ROLES[n % 2], (Text(value),)) for n, value in enumerate(values)]


def messages(*values):
    return [{"role": ROLES[n % 2], "content": value} for n, value in enumerate(values)]


def encode(conversation, llava, max_length=2048):
    """Input ids and labels, lists."""
    [made] = llava.encode([(conversation, [(0, 0)] * len(pictures(conversation)))])
    if isinstance(made, EncodingError):
        raise made
    ids, labels = llava.spread(llava.cut(made, max_length))
    return ids.tolist(), labels.tolist()


def encoded(conversation, llava, max_length=2048):
    """The tokens after the system prompt, those with a label in square brackets."""
    ids, labels = encode(conversation, llava, max_length)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    names = llava.tokenizer.convert_ids_to_tokens(ids)
    shown = [n if label == IGNORE else f"[{n}]" for n, label in zip(names, labels, strict=True)]
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


def test_questions_without_image_and_answers_keep_their_spaces():
    text, _ = render(turns(" a <image> ", " b ", " c ", " d "))
    assert text == f"{SYSTEM_PROMPT} USER: <image>\na ASSISTANT:  b </s>USER:  c  ASSISTANT:  d </s>"


def test_prompt_ends_where_the_answer_begins():
    conversation = turns("<image>\nWhat is this?", "A cat.", "Sure?", "Yes")
    whole = render(conversation).text
    assert prompt(conversation[:3]) == whole.removesuffix(" Yes</s>")
    assert prompt(conversation[:1]) == f"{SYSTEM_PROMPT} USER: <image>\nWhat is this? ASSISTANT:"


# ----------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("question", ["<image>\nWhat is this?", "What is this?\n<image>", "What <image>\nis this?"])
def test_image_anywhere_in_the_first_question(llava, question):
    words = "What ▁is ▁this?".split()
    if question == "What <image>\nis this?":
        words = ["What", "▁", NEWLINE, "is", "▁this?"]
    expected = ["▁USER:", "▁", *["<image>"] * 4, NEWLINE, *words, "▁ASSISTANT:", "[▁A]", "[▁cat]", "[</s>]"]
    assert encoded(turns(question, "A cat"), llava) == expected


def test_text_only(llava):
    expected = "▁USER: ▁What ▁is ▁this? ▁ASSISTANT: [▁A] [▁cat] [</s>]".split()
    assert encoded(turns("What is this?", "A cat"), llava) == expected


def test_several_turns(llava):
    conversation = turns("<image>\nWhat is this?", "A cat", "A dog.", "No", "Red", "Yes")
    first = ["▁USER:", "▁", *["<image>"] * 4, NEWLINE, *"What ▁is ▁this? ▁ASSISTANT:".split()]
    second = "[▁A] [▁cat] [</s>] USER: ▁A ▁dog. ▁ASSISTANT: [▁No] [</s>]".split()
    third = "USER: ▁ R ed ▁ASSISTANT: [▁Yes] [</s>]".split()
    assert encoded(conversation, llava) == first + second + third


def test_ids_and_labels_are_numbers_of_the_vocabulary(llava):
    ids, labels = encode(turns("<image>\nWhat", "No"), llava)
    names = ["<image>", "What", "▁ASSISTANT:", "▁No"]
    image, what, assistant, no = llava.tokenizer.convert_tokens_to_ids(names)
    assert ids[0] == 1  # <s>
    assert ids[-9:] == [image, image, image, image, 0x0A + 3, what, assistant, no, 2]
    assert labels == [-100] * (len(labels) - 2) + [no, 2]


def test_an_answer_without_a_token_for_its_first_word(llava):
    """The lone space belongs to the answer: the prompt ends before it, so that the model has to say it."""
    expected = "▁USER: ▁What ▁ASSISTANT: [▁] [<0xE7>] [<0x8C>] [<0xAB>] [</s>]".split()
    assert encoded(turns("What", "猫"), llava) == expected


def test_a_legacy_tokenizer_adds_a_space_after_special_tokens(legacy_tokenizer, llava_of):
    shown = encoded(turns("<image>\nWhat", "No", "What", "Yes"), llava_of(legacy_tokenizer, 14))
    assert shown == [
        *["▁USER:", "▁", "<image>", "▁", NEWLINE, "What", "▁ASSISTANT:", "[▁No]", "[</s>]"],
        *"▁USER: ▁What ▁ASSISTANT: [▁Yes] [</s>]".split(),
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_where_the_training_row_begins(tokenizer, llava_of, name):
    """What the model is given to answer has the ids that it was trained on."""
    conversation = turns(*CONVERSATIONS[name])
    ids, labels = encode(conversation, llava_of(tokenizer, 14))
    asked = tokenizer(prompt(conversation[:-1])).input_ids
    assert ids[: len(asked)] == asked
    assert labels[len(asked) :] == ids[len(asked) :]
    assert tokenizer.decode(ids).endswith(conversation[-1].text + "</s>")


# ------------------------------------------------------------------------------------------------- max_length


def test_cut_on_the_right(llava):
    conversation = turns("<image>\nWhat is this?", "A cat", "A dog.", "No")
    whole = encoded(conversation, llava)
    assert whole[11:14] == ["[▁A]", "[▁cat]", "[</s>]"]
    for kept in range(12, len(whole) + 3):
        assert encoded(conversation, llava, max_length=len(SYSTEM) + kept) == whole[:kept]


def test_a_row_that_keeps_no_answer_is_refused(llava):
    conversation = turns("<image>\nWhat is this?", "A cat")
    first = len(SYSTEM) + 11 + 1  # USER: ▁ 4 x image, newline, three words, ASSISTANT: and then the answer
    assert encoded(conversation, llava, max_length=first)[-1] == "[▁A]"
    with pytest.raises(EncodingError, match=f"the answer begins at token {first}, beyond the maximum length of"):
        encode(conversation, llava, first - 1)


def test_an_image_is_never_cut(llava):
    conversation = turns("<image>\nWhat is this?", "A cat")
    end = len(SYSTEM) + 2 + 4
    for length in (1, len(SYSTEM) + 3, end - 1):
        with pytest.raises(EncodingError, match=f"the image ends at token {end}, beyond the maximum length"):
            encode(conversation, llava, length)
    later = turns("What", "Yes", "<image>", "No")  # the first answer would fit
    with pytest.raises(EncodingError, match="the image ends"):
        encode(later, llava, len(SYSTEM) + 7)


# ------------------------------------------------------------------------------------- what cannot be encoded


@pytest.mark.parametrize("token", ["</s>", "<unk>"])
def test_tokens_that_leave_llava_without_labels_are_refused(llava, token):
    said = [("What", "Yes"), (f"What is {token}?", "No"), ("What", f"A {token} cat")]
    good, bad, worse = llava.encode([(turns(*values), []) for values in said])
    assert len(good.ids) == len(good.supervised)
    for error in (bad, worse):
        assert isinstance(error, EncodingError) and f"the special token {token}" in str(error)


def test_a_beginning_within_the_text_is_a_token(llava):
    shown = encoded(turns("What", "A <s> cat"), llava)
    assert shown == "▁USER: ▁What ▁ASSISTANT: [▁A] [▁] [<s>] [▁cat] [</s>]".split()


def test_other_tokens_typed_into_a_text_are_text(tokenizer, llava_of):
    """What the model has been given besides Vicuna's tokens means nothing there."""

    def said(shown):
        text = "".join(shown).replace("[", "").replace("]", "").replace("▁", " ")
        return re.sub("<0x(..)>", lambda found: chr(int(found[1], 16)), text)

    llava = llava_of(tokenizer, 14)
    shown = encoded(turns("<image>\nWhat is <pad>", "A <pad>"), llava)
    assert shown[2] == "<image>" and "<pad>" not in shown and "[<pad>]" not in shown
    assert said(shown[3:]) == "\nWhat is <pad> ASSISTANT: A <pad></s>"
    shown = encoded(typed("What is <image> here?", "An <image>"), llava)
    assert "<image>" not in shown and "[<image>]" not in shown
    assert said(shown) == " USER: What is <image> here? ASSISTANT: An <image></s>"


def test_a_tokenizer_without_a_beginning_is_refused(tokenizer, llava_of):
    other = copy.deepcopy(tokenizer)
    other.add_bos_token = False
    with pytest.raises(EncodingError, match="add_bos_token=True"):
        encode(turns("What", "Yes"), llava_of(other))


def test_what_is_no_conversation_here_is_refused(llava):
    shown, system = turns("<image>\nWhat is this?", "A cat"), Message("system", (Text("Be brief."),))
    for conversation, reason in [
        ([*shown, system, *shown], "a system turn within the conversation"),
        (turns("What?", "<image>"), "a picture in an answer or a system turn"),
        ([system._replace(parts=parts("Like <image>")), *shown], "a picture in an answer or a system turn"),
        ([*shown, *typed("What is <image>?", "A tag")], "the text has <image> besides its pictures: take it out"),
    ]:
        with pytest.raises(EncodingError, match=reason):
            encode(conversation, llava)


# ---------------------------------------------------------------------------------------------- chat template


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_writes_what_render_writes(tokenizer, name):
    values = CONVERSATIONS[name]
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    assert tokenizer.apply_chat_template(messages(*values), **options) == render(turns(*values)).text
    asked = tokenizer.apply_chat_template(messages(*values[:-1]), add_generation_prompt=True, **options)
    assert asked == prompt(turns(*values[:-1]))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_marks_what_has_labels(tokenizer, llava, name):
    values = CONVERSATIONS[name]
    marked = tokenizer.apply_chat_template(
        messages(*values),
        chat_template=CHAT_TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    [tokens] = llava.encode([(turns(*values), [(0, 0)] * "".join(values).count("<image>"))])
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
    assert written == f"{SYSTEM_PROMPT} USER: <image>\n<image>\nab "


def test_the_template_takes_a_system_message(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, *messages("What?")]
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    assert tokenizer.apply_chat_template(chat, **options) == "Be brief. USER: What? "
    with pytest.raises(Exception, match="the roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], **options)


# ---------------------------------------------------------------------------------- several pictures, a system turn

SEVERAL = {
    "together": ("<image><image>\nWhat is this?", "A cat"),
    "at both ends": ("<image>What is this?<image>", "A cat"),
    "in two questions": ("<image>\nWhat is this?", "A cat", "And <image> that?", "Yes", "Red?", "No"),
    "alone": ("<image><image><image>", "A cat"),
}


def test_several_pictures_stand_at_the_front_each_on_its_line():
    text, spans = render(turns("What is <image>this? <image>", "A cat.", "<image>And that?", "Yes"))
    assert text == (
        f"{SYSTEM_PROMPT} USER: <image>\n<image>\nWhat is this? ASSISTANT: A cat.</s>"
        "USER: <image>\nAnd that? ASSISTANT: Yes</s>"
    )
    assert [text[start:end] for start, end in spans] == [" A cat.</s>", " Yes</s>"]


def test_tokens_of_several_pictures(llava):
    shown = encoded(turns("<image> What is this? <image>", "A cat", "And that? <image>", "Yes"), llava)
    one = [*["<image>"] * 4, NEWLINE]
    first = ["▁USER:", "▁", *one, *one, *"What ▁is ▁this? ▁ASSISTANT: [▁A] [▁cat] [</s>]".split()]
    assert shown == [*first, "USER:", "▁", *one, *"And ▁that? ▁ASSISTANT: [▁Yes] [</s>]".split()]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_pictures_are_what_the_processor_makes(llava, name):
    """Of the text that its chat template writes; the prompt of each answer is where its labels begin."""
    values = SEVERAL[name]
    conversation, images = turns(*values), [Image.new("RGB", (9, 30))] * "".join(values).count("<image>")
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in conversation
    ]
    text = llava.processor.apply_chat_template(chat)
    assert text == render(conversation).text
    made = llava.processor(text=text, images=images, return_tensors="pt")
    ids, labels = encode(conversation, llava)
    assert made["input_ids"][0].tolist() == ids and ids.count(llava.run_id) == 4 * len(images)
    pixels = llava.pixels(images)["pixel_values"]
    assert torch.equal(pixels, made["pixel_values"]) and len(pixels) == len(images)
    for number in range(1, len(conversation), 2):
        asked = llava.inputs(conversation[:number], images[: len(pictures(conversation[:number]))])
        length = asked["input_ids"].shape[1]
        assert asked["input_ids"][0].tolist() == ids[:length]
        assert labels[length - 1] == IGNORE and labels[length] == ids[length]


def test_no_picture_of_several_is_cut(llava):
    conversation = turns("<image>\nWhat is this?", "A cat", "<image><image>\nAnd that?", "No")
    ids, labels = encode(conversation, llava)
    end = len(ids) - ids[::-1].index(llava.run_id)
    for length in range(1, len(ids)):
        if length < end:
            with pytest.raises(EncodingError, match=f"the image ends at token {end}, beyond the maximum length"):
                encode(conversation, llava, length)
        else:
            assert encode(conversation, llava, length) == (ids[:length], labels[:length])


def test_a_system_turn_takes_the_place_of_the_introduction(llava):
    brief = Message("system", (Text("Be brief."),))
    conversation = [brief, *turns("<image>\nWhat is this?", "A cat")]
    assert render(conversation).text == "Be brief. USER: <image>\nWhat is this? ASSISTANT: A cat</s>"
    assert prompt(conversation[:2]) == "Be brief. USER: <image>\nWhat is this? ASSISTANT:"
    ids, labels = encode(conversation, llava)
    begun = llava.tokenizer("Be brief.").input_ids
    assert ids[: len(begun)] == begun and SYSTEM[1] not in llava.tokenizer.convert_ids_to_tokens(ids[: len(begun)])
    shown = llava.tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORE])
    assert shown == ["▁A", "▁cat", "</s>"]
    with_introduction = encode(conversation[1:], llava)
    assert ids[len(begun) :] == with_introduction[0][len(SYSTEM) :]


# ----------------------------------------------------------------------------------------------------- plain

CAPTION = turns("Describe the picture.\n<image>", "A red cat.")


@pytest.mark.parametrize("kind", ["tokenizer", "legacy_tokenizer"])
def test_plain_is_picture_and_caption(kind, llava_of, request):
    """LLaVA tokenizes the caption and its line break by themselves and takes off their <s>."""
    tokenizer = request.getfixturevalue(kind)
    caption = tokenizer("A red cat.\n").input_ids[1:]
    ids, labels = encode(CAPTION, llava_of(tokenizer, conversation="plain"), 50)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids == [tokenizer.bos_token_id, image, image, image, image, *caption]
    assert labels == [IGNORE] * 5 + caption
    assert tokenizer.eos_token_id not in caption


@pytest.fixture
def plain(tokenizer, llava_of):
    return llava_of(tokenizer, conversation="plain")


def test_plain_takes_captions_only(plain):
    with pytest.raises(EncodingError, match="4 turns"):
        encode(CAPTION * 2, plain)
    with pytest.raises(EncodingError, match="no image"):
        encode(turns("What?", "A red cat."), plain)
    with pytest.raises(EncodingError, match="2 images"):
        encode(turns("<image><image>", "A red cat."), plain)


def test_plain_is_cut_where_it_is_full(plain):
    ids, labels = encode(CAPTION, plain, 50)
    assert encode(CAPTION, plain, 7) == (ids[:7], labels[:7])
