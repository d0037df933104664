"""A LLaVA in transformers' form from the parts LLaVA v1.5 is published in: Vicuna, CLIP and a projector.

What llava-hf's published models are, from the same sources: ``<image>`` and ``<pad>`` follow the tokens of the
language model (ids 32000 and 32001 for Vicuna), the vocabulary is filled up to a multiple of 64 (32064), image
features are those of the last but one layer of the tower without its class token. The new rows of both embeddings are
the mean of the others; no row of them is ever looked at, because image features take the place of ``<image>`` and
padding is masked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fura_vlm.modelling.config import AssembleConfig
from fura_vlm.modelling.load import ModelError, load_pretrained
from fura_vlm.modelling.processor import make_processor

# LLaVA's names in mm_projector.bin, and those of transformers.
PROJECTOR_KEYS = {
    f"model.mm_projector.{layer}.{kind}": f"linear_{number}.{kind}"
    for layer, number in ((0, 1), (2, 2))
    for kind in ("weight", "bias")
}
VOCABULARY_MULTIPLE = 64


def assemble(config: AssembleConfig) -> None:
    """Writes the assembled model and its processor to ``config.output_dir``.

    The parts are held in memory once, in ``config.dtype``.

    Raises:
        ModelError: a part is missing, damaged or does not fit the others; or ``output_dir`` exists.
    """
    target = Path(config.output_dir)
    if target.exists():
        raise ModelError(f"{target} exists already: choose another --output_dir")
    text_config = _part_config(config.language_model, "llama", "language model")
    vision_config = _part_config(config.vision_tower, "clip_vision_model", "vision tower")
    projector = read_projector(config.mm_projector)
    _check_fit(config, text_config, vision_config, projector)
    tokenizer = _tokenizer(config.language_model, text_config)

    dtype = getattr(torch, config.dtype)
    language_model = load_pretrained(LlamaForCausalLM, config.language_model, "language model", dtype=dtype)
    size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    _grow(language_model, text_config.vocab_size, size)
    tower = load_pretrained(CLIPVisionModel, config.vision_tower, "vision tower", dtype=dtype)

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config.update({"vocab_size": size, "pad_token_id": tokenizer.pad_token_id, **ids})
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    llava_config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config)
    for part, weights in (
        (model.model.language_model, language_model.model.state_dict()),
        (model.lm_head, language_model.lm_head.state_dict()),
        (model.model.vision_tower, tower.state_dict()),
        (model.model.multi_modal_projector, {name: weight.to(dtype) for name, weight in projector.items()}),
    ):
        part.load_state_dict(weights, assign=True)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)

    building = target.with_name(target.name + ".tmp")
    model.save_pretrained(building)
    make_processor(tokenizer, vision_config.image_size, vision_config.patch_size).save_pretrained(building)
    building.rename(target)
    print(f"The model is in {target}: {model.num_parameters():,} parameters, {patches} tokens an image")


def read_projector(path: str) -> dict[str, torch.Tensor]:
    """LLaVA's ``mm_projector.bin``, under the names of transformers: ``linear_1.weight (text, vision)`` and so on.

    Raises:
        ModelError: the file is missing, is not a file of tensors, or holds other keys.
    """
    if not Path(path).is_file():
        raise ModelError(f"There is no projector at {path}: LLaVA publishes one as mm_projector.bin")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive raises as it likes
        raise ModelError(
            f"{path} is not a whole file of tensors: download it again ({type(error).__name__})"
        ) from error
    if not isinstance(weights, dict) or set(weights) != set(PROJECTOR_KEYS):
        found = ", ".join(sorted(weights)[:4]) if isinstance(weights, dict) else type(weights).__name__
        raise ModelError(
            f"{path} is not LLaVA's two-layer projector: it holds {found}; wanted {', '.join(PROJECTOR_KEYS)}"
        )
    return {PROJECTOR_KEYS[name]: weight for name, weight in weights.items()}


def _part_config(path: str, model_type: str, what: str):
    """The configuration of a part; of a whole CLIP, that of its vision tower."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"No {what} at {path}: {str(error).strip().splitlines()[0]}") from error
    if model_type == "clip_vision_model" and config.model_type == "clip":
        config = config.vision_config
    if config.model_type != model_type:
        raise ModelError(f"{path} is a {config.model_type!r}, where the {what} has to be a {model_type!r}")
    return config


def _check_fit(config: AssembleConfig, text_config, vision_config, projector: dict[str, torch.Tensor]) -> None:
    wide, high = vision_config.hidden_size, text_config.hidden_size
    shapes = {name: tuple(weight.shape) for name, weight in projector.items()}
    wanted = {
        "linear_1.weight": (high, wide),
        "linear_1.bias": (high,),
        "linear_2.weight": (high, high),
        "linear_2.bias": (high,),
    }
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ModelError(
                f"{config.mm_projector} does not fit: its {name} is {shapes[name]}, but {config.vision_tower} of width "
                f"{wide} and {config.language_model} of width {high} need {shape}"
            )
    beside = Path(config.mm_projector).with_name("config.json")  # published with the projector
    trained_with = json.loads(beside.read_text()).get("mm_vision_tower", "") if beside.is_file() else ""
    resolution = re.search(r"-(\d{3})(px)?$", trained_with)
    if resolution and int(resolution[1]) != vision_config.image_size:
        raise ModelError(
            f"{config.mm_projector} was trained with {trained_with}, but {config.vision_tower} sees "
            f"{vision_config.image_size} pixels: take the tower that its config.json names"
        )


def _tokenizer(path: str, text_config):
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"No tokenizer at {path}: {str(error).strip().splitlines()[0]}") from error
    if len(tokenizer) != text_config.vocab_size:
        raise ModelError(
            f"{path} holds a tokenizer of {len(tokenizer)} tokens for a model of {text_config.vocab_size}: the files "
            "belong to different models"
        )
    for token in ("<image>", "<pad>"):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


@torch.no_grad()
def _grow(model: LlamaForCausalLM, known: int, size: int) -> None:
    """Rows for new tokens in both embeddings; no draw of random numbers, as ``mean_resizing`` would make."""
    model.resize_token_embeddings(size, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight[known:] = embedding.weight[:known].float().mean(0).to(embedding.weight.dtype)
