"""Small random models of the real classes, each with its real processor classes, saved as users have them.

The chat templates are written here in the shape that the published ones give a conversation; tokenizers know a few
words and the special tokens of the family.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "What is this ? A cat and a red dog . Yes No how many are there three 3 in the picture describe it please\n"
    "system user assistant User Assistant : You help people model thank you"
)

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['content'] is \
string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}\
{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SMOL = """<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if \
message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for part in \
message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
<end_of_utterance>\\n{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == \
'assistant' else 'user') + '\\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}\
{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}\
{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<start_of_turn>model\\n' }}{% endif %}"""


def bpe(special: list[str], **named) -> PreTrainedTokenizerFast:
    """A byte-level BPE over ``WORDS``. ``named``: arguments of the tokenizer, special tokens by name among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(WORDS.split("\n") * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _text(**settings) -> dict:
    """Shapes of a small Llama-like language model."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    } | settings


def _ids(tokenizer, **names) -> dict:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def llava(folder: Path) -> None:
    """The embedded model's processor and a smaller model of its classes."""
    root = Path(__file__).parents[2] / "data" / "tiny-llava"
    processor = transformers.AutoProcessor.from_pretrained(root, backend="pil")
    config = transformers.AutoConfig.from_pretrained(root)
    for part, sizes in (
        (config.text_config, {"num_key_value_heads": 2, "head_dim": 8}),
        (config.vision_config, {"projection_dim": 16}),
    ):
        sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        for name, value in sizes.items():
            setattr(part, name, value)
    _save(folder, transformers.LlavaForConditionalGeneration, config, processor, processor.tokenizer)


def llava_next(folder: Path) -> None:
    tokenizer = bpe(["<image>", "<|im_start|>", "<|im_end|>", "<pad>"], eos_token="<|im_end|>", pad_token="<pad>")
    images = transformers.models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "'<image>\\n'"),
    )
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28,
            patch_size=14, projection_dim=32,
        ),
        text_config=transformers.MistralConfig(vocab_size=len(tokenizer), **_text()),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        **_ids(tokenizer, image_token_id="<image>"),
    )  # fmt: skip
    _save(folder, transformers.LlavaNextForConditionalGeneration, config, processor, tokenizer)


def _qwen_tokens() -> list[str]:
    return ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]  # fmt: skip


def _qwen(folder: Path, version: str, config_class, model_class, processor_class, vision: dict) -> None:
    tokenizer = bpe(_qwen_tokens(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * 28 * 28 // 4, "longest_edge": 16 * 28 * 28},
    )
    videos = getattr(transformers, "Qwen3VLVideoProcessor" if version == "3" else "Qwen2VLVideoProcessor")(
        patch_size=vision["patch_size"], merge_size=2
    )
    processor = processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos,
        chat_template=CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'"),
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    if version == "3":
        rope |= {"mrope_interleaved": True}
    tokens = _ids(
        tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
    )  # fmt: skip
    text = _text(rope_parameters=rope, vocab_size=len(tokenizer), head_dim=8)
    config = config_class(vision_config=vision, text_config=text, **tokens)
    _save(folder, model_class, config, processor, tokenizer)


def qwen2_5_vl(folder: Path) -> None:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1], "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    _qwen(folder, "2.5", transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration,
          transformers.Qwen2_5_VLProcessor, vision)  # fmt: skip


def qwen3_vl(folder: Path) -> None:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    _qwen(folder, "3", transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration,
          transformers.Qwen3VLProcessor, vision)  # fmt: skip


def smolvlm(folder: Path) -> None:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = bpe(
        ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>", "<pad>",
         "<video>", *tiles],
        bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<pad>",
    )  # fmt: skip
    images = transformers.models.smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    videos = transformers.SmolVLMVideoProcessor(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28},
        video_sampling={"fps": 1, "max_frames": 2, "video_size": {"longest_edge": 28}},
    )  # fmt: skip
    processor = transformers.SmolVLMProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, image_seq_len=4, chat_template=SMOL
    )
    config = transformers.SmolVLMConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 7,
        },
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **_text()),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **_ids(tokenizer, image_token_id="<image>"),
    )  # fmt: skip
    _save(folder, transformers.SmolVLMForConditionalGeneration, config, processor, tokenizer)


def gemma3(folder: Path) -> None:
    tokenizer = bpe(
        ["<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>", "<start_of_image>", "<end_of_image>",
         "<image_soft_token>"],
        bos_token="<bos>", eos_token="<end_of_turn>", pad_token="<pad>",
        extra_special_tokens={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
    )  # fmt: skip
    images = transformers.models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56}
    )
    processor = transformers.Gemma3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_length=4, chat_template=GEMMA
    )
    config = transformers.Gemma3Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        text_config=_text(
            vocab_size=len(tokenizer), head_dim=8, sliding_window=16, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        **_ids(tokenizer, image_token_id="<image_soft_token>", boi_token_id="<start_of_image>",
               eoi_token_id="<end_of_image>"),
    )  # fmt: skip
    _save(folder, transformers.Gemma3ForConditionalGeneration, config, processor, tokenizer)


def internvl(folder: Path) -> None:
    tokenizer = bpe(
        ["<|im_start|>", "<|im_end|>", "<pad>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        eos_token="<|im_end|>", pad_token="<pad>",
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )  # fmt: skip
    images = transformers.models.got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = transformers.InternVLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "'<IMG_CONTEXT>\\n'"),
    )
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [28, 28], "patch_size": [7, 7],
        },
        text_config=transformers.Qwen2Config(vocab_size=len(tokenizer), **_text()),
        downsample_ratio=0.5,
        image_seq_length=4,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    _save(folder, transformers.InternVLForConditionalGeneration, config, processor, tokenizer)


def text(folder: Path) -> None:
    tokenizer = bpe(
        ["<|im_start|>", "<|im_end|>", "<pad>"], eos_token="<|im_end|>", pad_token="<pad>",
        chat_template=CHATML.replace("IMAGE", "''"),
    )  # fmt: skip
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **_text())
    _save(folder, transformers.LlamaForCausalLM, config, tokenizer, tokenizer)


BUILDERS = {
    builder.__name__: builder for builder in (llava, llava_next, qwen2_5_vl, qwen3_vl, smolvlm, gemma3, internvl, text)
}


def _save(folder: Path, model_class, config, processor, tokenizer) -> None:
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for part in (config, config.get_text_config()):
        part.update(ids | {"bos_token_id": tokenizer.bos_token_id})
    model = model_class(config)
    for parameter in model.parameters():  # larger than usual, so that answers differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
