"""A small Llama tokenizer and a LLaVA processor for images of 28 x 28 pixels, which take 4 tokens."""

import json

import pytest
from fura_vlm.data.conversation import CHAT_TEMPLATE, SYSTEM_PROMPT
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

WORDS = "USER: ASSISTANT: What is this? A cat Yes No red dog. And that?"


def make_tokenizer(**kwargs) -> LlamaTokenizer:
    """Knows each word of the system prompt and of WORDS as one token, all else as bytes."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([f" {SYSTEM_PROMPT} {WORDS}", *WORDS.split()], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="<pad>", add_bos_token=True, **kwargs)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def legacy_tokenizer():
    return make_tokenizer(legacy=True)


@pytest.fixture(scope="session")
def processor(tokenizer):
    images = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def mixture(tmp_path):
    """Writes records, or the given text or bytes, and returns the path."""

    def write(content, name="mixture.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            path.write_text(json.dumps(content), "utf-8")
        return path

    return write
