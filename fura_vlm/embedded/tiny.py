"""The embedded model: a LLaVA of the 7B's own classes and files, small enough to live in a repository.

=================  ==========================  =============================
part               embedded                    LLaVA-1.5-7B
=================  ==========================  =============================
vision tower       CLIP, 5 layers x 192,       CLIP ViT-L, 24 layers x 1024,
                   112 px, 64 patches          336 px, 576 patches
projector          192 -> 256, GELU, 2 layers  1024 -> 4096, GELU, 2 layers
language model     Llama, 8 layers x 256       Llama, 32 layers x 4096
vocabulary         2,048                       32,064
=================  ==========================  =============================
"""

from __future__ import annotations

import json
import random
import re

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fura_vlm.embedded.captions import caption, text
from fura_vlm.embedded.scenes import WORDS, make_scene
from fura_vlm.embedded.words import EVERYDAY

IMAGE_SIZE, PATCH_SIZE, VOCAB_SIZE, CONTEXT = 112, 14, 2048, 1024


def is_embedded(config) -> bool:
    """Whether a model's configuration is that of the embedded one, whatever it was trained on since."""
    if not isinstance(config, LlavaConfig):
        return False
    return config.vision_config.image_size == IMAGE_SIZE and config.text_config.vocab_size == VOCAB_SIZE


def train_tokenizer(seed: int, lines: int = 20_000) -> LlamaTokenizer:
    """A Llama tokenizer (BPE over metaspaces, byte fallback) trained on the captions and texts.

    Ids: ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, the 256 bytes, the pieces; ``<image>`` and ``<pad>`` come last, where
    llava-hf adds them.
    """
    rng = random.Random(f"{seed}/tokenizer")
    scenes = (make_scene(seed, "train", i) for i in range(lines // 2))
    corpus = [line for scene in scenes for line in (caption(scene, rng, 4), text(rng, 4))]
    corpus += [" ".join(rng.sample(EVERYDAY, 12)) for _ in range(lines // 4)]  # these words stay whole
    # The words of signs are spelled by letters: as pieces of their own, the model did not learn to read them.
    signs = re.compile(rf"\b({'|'.join(WORDS)})\b")
    corpus = [signs.sub(lambda word: " ".join(word[0]), line) for line in corpus]
    # Half of the lines begin without a space, as words do after <image> and after a line break. Line breaks
    # themselves stay out, so that they are bytes, as in Llama's vocabulary.
    corpus = [" " * rng.randrange(2) + part for line in corpus for part in line.split("\n") if part]

    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Digits(individual_digits=True),
    ])  # fmt: skip
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    if bpe.get_vocab_size() != VOCAB_SIZE - 2:
        raise ValueError(f"the corpus gave {bpe.get_vocab_size()} pieces, not {VOCAB_SIZE - 2}: make it longer")

    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = LlamaTokenizer(
        vocab=trained["vocab"], merges=merges, pad_token="<pad>", model_max_length=CONTEXT, add_bos_token=True
    )
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def make_model(tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    """The model in float32 with random weights."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=192,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            pad_token_id=tokenizer.pad_token_id,
            **ids,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    return model
