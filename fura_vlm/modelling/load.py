"""Loading a LLaVA, its processor and an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import fura_vlm.fura  # noqa: F401  registers FuRA with PEFT


class ModelError(Exception):
    """A base model or adapter that cannot be used; the message says which and what to do."""


def load_processor(path: str) -> LlavaProcessor:
    """The processor of a LLaVA, with Pillow doing the image work as LLaVA's own code does.

    Raises:
        ModelError: if there is none at ``path``.
    """
    _check_folder(path)
    try:
        return AutoProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise ModelError(f"No usable processor at {path}: {_first_line(error)}") from error


def load_base(path: str, dtype: torch.dtype, attn_implementation: str = "sdpa") -> LlavaForConditionalGeneration:
    """The base model on the CPU (or wherever ZeRO-3 puts its parts), all parameters frozen.

    Raises:
        ModelError: if ``path`` holds no LLaVA or its files are damaged.
    """
    _check_folder(path)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"No usable LLaVA at {path}: {_first_line(error)}") from error
    return model.requires_grad_(False)


def load_adapter(model: LlavaForConditionalGeneration, path: str) -> PeftModel:
    """``model`` with the adapter at ``path`` (any PEFT method), for inference.

    Raises:
        ModelError: if there is no adapter, or it belongs to another base.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise ModelError(f"No adapter at {path}: adapter_config.json is missing")
    try:
        return PeftModel.from_pretrained(model, path).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The adapter at {path} cannot be used: {_first_line(error)}") from error


def use_all_parts(model: torch.nn.Module) -> None:
    """Makes a text-only batch pass through vision tower and projector too, with no effect on the result.

    With several processes every one of them must use the same parameters in a step: ZeRO reduces gradients, and
    ZeRO-3 gathers weights, in step with the others. A process whose batch has no picture would leave out the
    projector. It therefore sees a blank picture, whose features enter the sum multiplied by zero.
    """
    llava = next(module for module in model.modules() if hasattr(module, "multi_modal_projector"))
    size = llava.config.vision_config.image_size

    def blank_picture(module, args, kwargs):
        if kwargs.get("pixel_values") is not None or not module.training:
            return None
        embeddings = module.get_input_embeddings()(kwargs.pop("input_ids"))
        blank = torch.zeros(1, 3, size, size, device=embeddings.device, dtype=embeddings.dtype)
        features = module.get_image_features(pixel_values=blank, return_dict=True).pooler_output
        kwargs["inputs_embeds"] = embeddings + 0 * torch.cat(features).sum()
        return args, kwargs

    llava.register_forward_pre_hook(blank_picture, with_kwargs=True)


def _check_folder(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(
            f"There is no model at {path}: give a folder, or a name on the Hugging Face hub such as "
            "llava-hf/llava-1.5-7b-hf, as model_name_or_path"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
