"""A LLaVA in transformers' form from the parts LLaVA v1.5 is published in: Vicuna, CLIP and a projector.

The result is like llava-hf's published models, from the same sources: ``<image>`` and ``<pad>`` follow the tokens of
the
language model (ids 32000 and 32001 for Vicuna), the vocabulary is filled up to a multiple of 64 (32064), image
features are those of the last but one layer of the tower without its class token. The new rows of both embeddings are
the mean of the others. No new row is ever used, because image features take the place of ``<image>`` and padding is
masked. A head that is tied to the embedding, as small language models have it, becomes a weight of its own, and a
tokenizer that begins a text with no token of its own begins it with its BOS, as LLaVA's conversations do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from fura_vlm.errors import first_line
from fura_vlm.families.llava import make_processor
from fura_vlm.modelling.config import AssembleConfig
from fura_vlm.modelling.shards import (
    ModelError,
    WeightFiles,
    building,
    parameter_names,
    refuse_existing,
    size_of,
    write_sharded,
)

# LLaVA's names in mm_projector.bin, and those of transformers.
PROJECTOR_KEYS = {
    f"model.mm_projector.{layer}.{kind}": f"linear_{number}.{kind}"
    for layer, number in ((0, 1), (2, 2))
    for kind in ("weight", "bias")
}
VOCABULARY_MULTIPLE = 64


def assemble(config: AssembleConfig) -> None:
    """Writes the assembled model and its processor to ``config.output_dir``.

    The parts are read tensor by tensor; no more than one file of the result is held in memory.

    Raises:
        ModelError: a part is missing, damaged or does not fit the others; ``output_dir`` exists; the disk has no room.
    """
    refuse_existing(Path(config.output_dir))
    text_config = _part_config(config.language_model, "llama", "language model")
    vision_config = _part_config(config.vision_tower, "clip_vision_model", "vision tower")
    if config.mm_projector is None:
        projector = new_projector(vision_config.hidden_size, text_config.hidden_size, config.seed)
    else:
        projector = read_projector(config.mm_projector)
        _check_fit(config, text_config, vision_config, projector)
    tokenizer = _tokenizer(config.language_model, text_config)
    language_model = WeightFiles(config.language_model, "language model")
    tower = WeightFiles(config.vision_tower, "vision tower")
    with torch.device("meta"):  # for the parts, to know what their files must hold
        language_names = parameter_names(LlamaForCausalLM(text_config), language_model)
        tower_names = parameter_names(CLIPVisionModel(vision_config), tower)

    size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tied = text_config.tie_word_embeddings
    text_config.update(
        {"vocab_size": size, "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False, **ids}
    )
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
        dtype=getattr(torch, config.dtype),
    )
    llava_config.architectures = [LlavaForConditionalGeneration.__name__]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config).to(llava_config.dtype)

    sources: dict[str, Callable[[], torch.Tensor]] = {}  # by parameter
    for parameter, name in language_names.items():
        grown = parameter in ("model.embed_tokens.weight", "lm_head.weight")
        read = partial(_grown, language_model, name, size) if grown else partial(language_model.read, name)
        sources[re.sub("^model", "model.language_model", parameter)] = read
    if tied:  # LLaVA's head is a weight of its own
        read = partial(_grown, language_model, language_names["model.embed_tokens.weight"], size)
        sources["lm_head.weight"] = read
    for parameter, name in tower_names.items():
        sources[f"model.vision_tower.{parameter}"] = partial(tower.read, name)
    for name, weight in projector.items():
        sources[f"model.multi_modal_projector.{name}"] = partial(torch.clone, weight)

    state = model.state_dict()
    tensors = revert_weight_conversion(model, state)  # by the names that transformers writes
    parameters = {id(weight): parameter for parameter, weight in state.items()}
    names = {name: parameters[id(weight)] for name, weight in tensors.items()}
    with building(config.output_dir, size_of(tensors)) as folder:
        write_sharded(folder, tensors, lambda name: sources[names[name]](), config.max_shard_size)
        llava_config.save_pretrained(folder)
        GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids).save_pretrained(folder)
        make_processor(tokenizer, vision_config.image_size, vision_config.patch_size).save_pretrained(folder)
    print(f"The model is in {config.output_dir}: {model.num_parameters():,} parameters, {patches} tokens an image")
    if config.mm_projector is None:
        print("Its projector is new, with random weights: pretrain it (stage 1) before anything else")


def new_projector(vision_size: int, text_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Random weights for a projector, as LLaVA begins its stage 1: those that ``torch.nn.Linear`` draws.

    Returns: ``linear_1.weight (text, vision)``, ``linear_1.bias (text)``, ``linear_2.weight (text, text)``,
        ``linear_2.bias (text)`` in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"linear_1": nn.Linear(vision_size, text_size), "linear_2": nn.Linear(text_size, text_size)}
    return {
        f"{name}.{kind}": weight.data for name, layer in layers.items() for kind, weight in layer.named_parameters()
    }


def read_projector(path: str) -> dict[str, torch.Tensor]:
    """LLaVA's ``mm_projector.bin``, or the same in safetensors, under the names of transformers:
    ``linear_1.weight (text, vision)`` and so on.

    Raises:
        ModelError: the file is missing, is not a file of tensors, or holds other keys.
    """
    if not Path(path).is_file():
        raise ModelError(
            f"There is no projector at {path}: LLaVA publishes one as mm_projector.bin, stage 1 leaves "
            "mm_projector.safetensors"
        )
    try:
        weights = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a broken archive raises as it likes
        raise ModelError(
            f"{path} is not a complete file of tensors: download it again ({type(error).__name__})"
        ) from error
    tensors = isinstance(weights, dict) and all(isinstance(weight, torch.Tensor) for weight in weights.values())
    if not tensors or set(weights) != set(PROJECTOR_KEYS):
        found = ", ".join(sorted(weights)[:4]) if isinstance(weights, dict) else type(weights).__name__
        raise ModelError(
            f"{path} is not LLaVA's two-layer projector: it holds {found}; it needs {', '.join(PROJECTOR_KEYS)}"
        )
    return {PROJECTOR_KEYS[name]: weight for name, weight in weights.items()}


def _part_config(path: str, model_type: str, what: str):
    """The configuration of a part; of a whole CLIP, that of its vision tower."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"No {what} at {path}: {first_line(error)}") from error
    if model_type == "clip_vision_model" and config.model_type == "clip":
        config = config.vision_config
    if config.model_type != model_type:
        raise ModelError(f"{path} is a {config.model_type!r}, but the {what} has to be a {model_type!r}")
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
    try:
        trained_with = json.loads(beside.read_text())["mm_vision_tower"]
        resolution = re.search(r"-(\d{3})(px)?$", trained_with)
    except (OSError, ValueError, KeyError, TypeError):  # nothing to compare with
        return
    if resolution and int(resolution[1]) != vision_config.image_size:
        raise ModelError(
            f"{config.mm_projector} was trained with {trained_with}, but {config.vision_tower} sees "
            f"{vision_config.image_size} pixels: take the tower that its config.json names"
        )


def _tokenizer(path: str, text_config):
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.bos_token and tokenizer.encode("x")[:1] != [tokenizer.bos_token_id]:
            tokenizer = AutoTokenizer.from_pretrained(path, add_bos_token=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"No tokenizer at {path}: {first_line(error)}") from error
    if len(tokenizer) != text_config.vocab_size:
        raise ModelError(
            f"{path} holds a tokenizer of {len(tokenizer)} tokens and a model of {text_config.vocab_size}: the files "
            "belong to different models"
        )
    for token in ("<image>", "<pad>"):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


def _grown(files: WeightFiles, name: str, size: int) -> torch.Tensor:
    """An embedding with rows for new tokens, each the mean of the others."""
    known = files.read(name)
    mean = known.float().mean(0, keepdim=True).to(known.dtype)
    return torch.cat([known, mean.expand(size - len(known), -1)])
