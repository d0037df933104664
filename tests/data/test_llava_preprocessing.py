"""Tokens, labels and pixels against LLaVA v1.5's published preprocessing, worked out here by its rules.

The rules are written down again from their description (docs/llava-preprocessing.md has the table): SentencePiece cuts
the text at special tokens and at ``<image>``, a round of question and answer ends with ``</s>``, labels begin after
"ASSISTANT:". The tokenizer under test is what transformers makes of the same SentencePiece model.
"""

import io
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
from made_records import llava_record
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.data.messages import Record
from fura_vlm.families.base import IGNORE, EncodingError
from fura_vlm.families.vicuna import SYSTEM_PROMPT

REAL = Path(__file__).parents[3] / "shared/real/real_mixture.json"
IMAGE = -200  # LLaVA's number for the place of an image
LENGTH = 2048


@pytest.fixture(scope="module")
def model() -> bytes:
    """A SentencePiece model with Llama's settings. As in Llama's, "USER" is one piece, and after a space it is two."""
    text = [f"{SYSTEM_PROMPT} ASSISTANT: A cat is on the mat. What is this? Yes No red", "é猫 is"]
    text += ["US " * 20, " ".join(f"{letter}USER" for letter in "aeiou/-(1"), "ER of ER"]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 4),
        model_writer=trained,
        model_type="bpe",
        vocab_size=430,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return trained.getvalue()


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def legacy(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(model, legacy, tmp_path_factory):
    """From the files of a Vicuna, with the tokens that llava-hf adds."""
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "tokenizer.model").write_bytes(model)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in ("<image>", "<pad>"):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


@pytest.fixture(scope="module")
def llava(tokenizer, llava_of):
    return llava_of(tokenizer)


class Said(NamedTuple):
    """Questions and answers in turn, in LLaVA's form."""

    values: tuple[str, ...]
    image: str | None

    @property
    def record(self) -> Record:
        return llava_record("1", self.values, self.image)


def make(*values, image=None):
    return Said(values, image)


class Published:
    """LLaVA v1.5's tokenizer: SentencePiece between special tokens.

    ``legacy``: every part gets a space before it. Otherwise only the first does; transformers before 4.34 took the
    space's mark off the pieces of the others, later versions never put it there.
    """

    def __init__(self, model: bytes, legacy: bool, stripped: bool = False):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.legacy, self.stripped = legacy, stripped

    def __call__(self, text: str) -> list[int]:
        ids = [1]
        for number, part in enumerate(re.split("(<s>|</s>|<unk>)", text)):
            if part in ("<s>", "</s>", "<unk>"):
                ids.append(self.pieces.piece_to_id(part))
            elif part:
                ids += self.part(part, number == 0)
        return ids

    def part(self, text: str, first: bool) -> list[int]:
        if self.legacy or first:
            return self.pieces.encode(text)
        if self.stripped:
            found = self.pieces.encode(text, out_type=str)
            if not text.startswith(" ") and found[0].startswith("▁"):
                found = ([found[0][1:]] if len(found[0]) > 1 else []) + found[1:]
            return [self.pieces.piece_to_id(piece) for piece in found]
        # Without a space before it: what comes after a line break that is taken off again.
        mark = self.pieces.encode("\n")
        found = self.pieces.encode("\n" + text)
        assert found[: len(mark)] == mark
        return found[len(mark) :]

    def with_images(self, text: str) -> list[int]:
        """The parts around ``<image>`` are tokenized by themselves, each losing its ``<s>``."""
        first, *rest = (self(part) if part else [1] for part in text.split("<image>"))
        for part in rest:
            first = [*first, IMAGE, *part[1:]]
        return first


def published(said: Said, tokenizer: Published, image_tokens: int, length: int) -> tuple[list[int], list[int]]:
    """Input ids and labels of ``preprocess_multimodal``, ``preprocess_v1`` and the spreading of the image."""
    turns = [(("human", "gpt")[number % 2], value) for number, value in enumerate(said.values)]
    if said.image:
        count = tokenizer.with_images
        turns = [
            (role, ("<image>\n" + value.replace("<image>", "").strip()).strip() if "<image>" in value else value)
            for role, value in turns
        ]
    else:
        count = tokenizer
    text = SYSTEM_PROMPT + " "
    for role, value in turns:
        text += f"USER: {value} " if role == "human" else f"ASSISTANT: {value}</s>"
    ids = count(text) if said.image else count(text)[:length]
    labels, at = list(ids), 1
    labels[0] = IGNORE
    for number, round_ in enumerate(text.split("</s>")):
        parts = round_.split(" ASSISTANT: ")
        if not round_ or len(parts) != 2:
            break
        size, asked = len(count(round_)), len(count(parts[0] + " ASSISTANT: ")) - 2
        if number and not tokenizer.legacy and not tokenizer.stripped:
            size, asked = size - 1, asked - 1  # USER is one token less there than at the beginning of a text
        labels[at : at + asked] = [IGNORE] * len(labels[at : at + asked])
        at += size
    labels[at:] = [IGNORE] * len(labels[at:])
    if at < length and at != sum(token != 0 for token in ids):  # <unk>, which is 0, also pads
        labels = [IGNORE] * len(ids)
    spread = [
        (token, label)
        for token, label in zip(ids, labels, strict=True)
        for _ in range(image_tokens if token == IMAGE else 1)
    ]
    spread = [(token, IGNORE if token == IMAGE else label) for token, label in spread][:length]
    return [token for token, _ in spread], [label for _, label in spread]


def ours(said, llava, length=LENGTH):
    record = said.record
    [made] = llava.encode([(record.messages, [(0, 0)] * len(record.pictures))])
    if isinstance(made, EncodingError):
        raise made
    ids, labels = llava.spread(llava.cut(made, length))
    return [IMAGE if token == llava.run_id else token for token in ids.tolist()], labels.tolist()


def without_the_mark(ids, labels, mark, image_tokens=4):
    """As one text has it: no lone "▁" between the image and its line break."""
    if IMAGE not in ids:
        return ids, labels
    after = ids.index(IMAGE) + image_tokens
    assert ids[after] == mark
    return ids[:after] + ids[after + 1 :], labels[:after] + labels[after + 1 :]


CONVERSATIONS = {
    "image first": make("<image>\nWhat is this?", "A cat", image="1.png"),
    "image last": make("What is this?\n<image>", "A cat", image="1.png"),
    "image in the middle": make("Look: <image> What is this?", "A cat.", image="1.png"),
    "several images in a question": make("<image>\n<image>\nWhat is this?", "A cat.", image="1.png"),
    "several turns": make("<image>\nWhat is this?", "A cat", "Is it red?", "No", "Yes?", "Yes.", image="1.png"),
    "text only": make("What is this?", "A cat"),
    "text only, several turns": make("What is this?", "A cat", "Is it red?", "No"),
    "other scripts": make("猫ですか? É", "はい、猫です。😀", "Да?", "Нет, это кот", "שלום", "مرحبا"),
    "white space": make(" What \n\n  is\tthis?", "  two spaces \n", "\n", "\n\n1. A\n2. B"),
    "code": make("```html\n<b>x</b>\n```", "```python\nif a < b:\n    pass\n```"),
    "a beginning": make("What is <s>this", "A <s>cat", "Is it?", "Yes <s>"),
    "a pad": make("What is <pad>?", "A <pad>"),
    "an image as text": make("What does <image> mean in HTML?", "<image> is a tag"),
    "long": make("What is this? " * 300, "A cat. " * 300, "Is it? ", "Yes " * 600),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_labels(model, legacy, llava, name):
    said = CONVERSATIONS[name]
    reference = Published(model, legacy)
    ids, labels = published(said, reference, 4, LENGTH + 1)  # for the "▁" that is taken off below
    assert any(label != IGNORE for label in labels)
    if not legacy:
        ids, labels = without_the_mark(ids, labels, reference.pieces.piece_to_id("▁"))
    assert ours(said, llava) == (ids[:LENGTH], labels[:LENGTH])


@pytest.mark.parametrize("length", [60, 70, 100])
@pytest.mark.parametrize("name", ["image first", "several turns", "text only, several turns", "long"])
def test_cut_to_a_length(model, legacy, llava, name, length):
    said = CONVERSATIONS[name]
    reference = Published(model, legacy)
    more = length + (not legacy and bool(said.image))
    ids, labels = published(said, reference, 4, more)
    if not legacy:
        ids, labels = without_the_mark(ids, labels, reference.pieces.piece_to_id("▁"))
    if all(label == IGNORE for label in labels):  # LLaVA goes through such rows and learns nothing from them
        with pytest.raises(EncodingError, match="beyond the maximum length"):
            ours(said, llava, length=length)
    else:
        assert ours(said, llava, length=length) == (ids, labels)


def test_random_texts(model, legacy, llava):
    rng = random.Random(0)
    alphabet = [
        "cat ",
        "What",
        " is",
        "\n",
        "  ",
        "é",
        "猫",
        "😀",
        ".",
        "USER: ",
        "</b>",
        "<",
        "\t",
        "ER",
        "▁",
        "\u200b",
    ]
    reference = Published(model, legacy)
    for _ in range(200):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(2 * rng.randint(1, 3))]
        said = make(*[text if text.strip() else "x" for text in texts])
        assert ours(said, llava) == published(said, reference, 4, LENGTH), texts


def test_what_transformers_4_31_made_of_a_second_question(model, legacy, llava):
    """LLaVA v1.5 was trained with it. Only the pieces of "USER" after </s> differ, not the text nor the labels."""
    if legacy:
        pytest.skip("legacy tokenizers have not changed")
    reference = Published(model, False, stripped=True)
    ids, labels = published(CONVERSATIONS["text only, several turns"], reference, 4, LENGTH)
    new_ids, new_labels = ours(CONVERSATIONS["text only, several turns"], llava)
    names = [reference.pieces.id_to_piece(token) for token in ids]
    at = names.index("</s>") + 1
    assert names[at : at + 3] == ["US", "ER", ":"]
    assert llava.tokenizer.convert_ids_to_tokens(new_ids[at : at + 2]) == ["USER", ":"]
    assert ids[:at] + ids[at + 2 :] == new_ids[:at] + new_ids[at + 1 :]
    assert labels[:at] + labels[at + 2 :] == new_labels[:at] + new_labels[at + 1 :]


@pytest.mark.parametrize(
    "said",
    [
        make("What is </s>?", "A cat"),
        make("What is this?", "The end is </s> here"),
        make("What is <unk>?", "A cat"),
        make("What is this?", "A cat", "Is it?", "<unk> yes"),
        make("What is this</s>?", "A cat", image="1.png"),
    ],
)
def test_where_llava_keeps_no_labels_there_is_no_row(model, legacy, llava, said):
    _, labels = published(said, Published(model, legacy), 4, LENGTH)
    assert set(labels) == {IGNORE}
    with pytest.raises(EncodingError, match="LLaVA v1.5 does not train"):
        ours(said, llava)


def test_where_llava_loses_labels_without_need(model, legacy, llava):
    """Its search for the answer takes the words " ASSISTANT: " in a text for a role. We label the answer."""
    said = make("Write USER: Hi ASSISTANT: Yes", "USER: Hi ASSISTANT: No")
    ids, labels = published(said, Published(model, legacy), 4, LENGTH)
    assert set(labels) == {IGNORE}
    our_ids, our_labels = ours(said, llava)
    assert our_ids == ids and any(label != IGNORE for label in our_labels)


# ---------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def llava_336(tokenizer, llava_of):
    return llava_of(tokenizer, 336)


def test_an_image_has_576_positions(llava_336, legacy, model):
    assert llava_336.image_tokens == 24 * 24 == 576
    said = CONVERSATIONS["several turns"]
    reference = Published(model, legacy)
    ids, _ = published(said, reference, 576, LENGTH)
    if not legacy:
        ids, _ = without_the_mark(ids, ids, reference.pieces.piece_to_id("▁"), 576)
    assert ours(said, llava_336)[0] == ids and ids.count(IMAGE) == 576


MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (336, 336), (500, 333), (40, 301), (1000, 1000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "grey", "GIF"])
def test_pixels_at_336(llava_336, tmp_path, size, kind):
    """Square with CLIP's mean colour, the picture in its middle; Pillow's bicubic; rescaled and normalised."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 7 % 256, y * 5 % 256, (x * y) % 251], -1).astype(np.uint8)
    image = Image.fromarray(pixels).convert("L" if kind == "grey" else "RGB")
    path = tmp_path / "picture.jpg"
    image.save(path, "PNG" if kind == "grey" else kind)

    opened = Image.open(path).convert("RGB")
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(opened, ((side - width) // 2, (side - height) // 2))
    resized = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC), np.float64)
    expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)

    said = make("<image>\nWhat?", "Yes", image=str(path))
    [row] = ConversationDataset([said.record], llava_336, LENGTH)
    [pixels] = row["pictures"]["pixel_values"]
    assert pixels.shape == (3, 336, 336)
    assert np.abs(pixels.numpy() - expected).max() < 1e-6


def test_the_padding_is_the_mean_colour_cut_to_whole_numbers():
    assert tuple(int(value * 255) for value in MEAN) == (122, 116, 104)


@pytest.mark.skipif(not REAL.is_file(), reason="the real mixture is not here")
def test_real_mixture(model, legacy, llava):
    for item in json.loads(REAL.read_text()):
        said = make(*[turn["value"] for turn in item["conversations"]], image=item.get("image"))
        reference = Published(model, legacy)
        ids, labels = published(said, reference, 4, LENGTH)
        if not legacy:
            ids, labels = without_the_mark(ids, labels, reference.pieces.piece_to_id("▁"))
        assert ours(said, llava) == (ids, labels)
