"""Loading a LLaVA, its processor and an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from fura_vlm.errors import FuraVLMError
from fura_vlm.fura import plot_spectrum, spectrum_report, spectrum_table  # registers FuRA with PEFT, too
from fura_vlm.modelling.config import InspectConfig, MergeConfig


class ModelError(FuraVLMError):
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


def load_base(
    path: str,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    quantization_config: BitsAndBytesConfig | None = None,
) -> LlavaForConditionalGeneration:
    """The base model, all parameters frozen: on the CPU, or wherever ZeRO-3 puts its parts or the quantiser wants it.

    Raises:
        ModelError: if ``path`` holds no LLaVA or its files are damaged.
    """
    _check_folder(path)
    model = load_pretrained(
        LlavaForConditionalGeneration,
        path,
        "LLaVA",
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    return model.requires_grad_(False)


def load_pretrained(cls: type[PreTrainedModel], path: str, what: str, **kwargs) -> PreTrainedModel:
    """``cls.from_pretrained``, which fills weights that are not in the files with random numbers; here that is an
    error.

    Args:
        what: how messages call the model.
        kwargs: for ``from_pretrained``.

    Raises:
        ModelError: if files are missing or damaged, or do not hold all of the weights.
    """
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    except ImportError as error:  # bitsandbytes
        raise ModelError(f"A base in 4 bits needs the extra package: pip install -e .[quant] ({error})") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"No usable {what} at {path}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{path} is not a whole {what}: {len(missing)} weights are missing, first {missing[0]}")
    return model


def load_adapter(model: LlavaForConditionalGeneration, path: str) -> PeftModel:
    """``model`` with the adapter at ``path`` (any PEFT method), for inference.

    Raises:
        ModelError: if there is no adapter, or it belongs to another base.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise ModelError(f"No adapter at {path}: adapter_config.json is missing")
    try:
        return PeftModel.from_pretrained(model, path).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
        raise ModelError(
            f"The adapter at {path} cannot be used ({_first_line(error).rstrip('.:')}): it names {base} as its base"
        ) from error


def load_any(path: str) -> tuple[LlavaForConditionalGeneration | PeftModel, LlavaProcessor]:
    """What a user means by a path, ready to answer on the GPU if there is one: model and processor.

    Args:
        path: a run folder, an adapter's folder, or a LLaVA (folder or name on the hub).

    Raises:
        ModelError: if it is none of these, or a part of it is missing.
    """
    folder = Path(path)
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    if (adapter / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        model = load_adapter(load_base(base, dtype), str(adapter))
        processor = load_processor(str(folder / "processor") if (folder / "processor").is_dir() else base)
    elif (folder / "model").is_dir():
        model, processor = load_base(str(folder / "model"), dtype), load_processor(str(folder / "processor"))
    elif (folder / "config.yaml").is_file():
        raise ModelError(
            f"{path} is a run without an adapter: it was interrupted; start its command again to finish it"
        )
    else:
        model, processor = load_base(path, dtype), load_processor(path)
    return model.to("cuda" if cuda else "cpu").eval(), processor


def merge(config: MergeConfig) -> None:
    """Writes base and adapter merged into one plain LLaVA with its processor.

    Raises:
        ModelError: if ``output_dir`` exists, or ``model`` has no adapter.
    """
    target = Path(config.output_dir)
    if target.exists():
        raise ModelError(f"{target} exists already: choose another --output_dir")
    model, processor = load_any(config.model)
    if not isinstance(model, PeftModel):
        raise ModelError(f"{config.model} is a model without an adapter: there is nothing to merge")
    building = target.with_name(target.name + ".tmp")
    model.merge_and_unload(safe_merge=True).save_pretrained(building)
    processor.save_pretrained(building)
    building.rename(target)


def inspect(config: InspectConfig) -> None:
    """Prints the spectra behind a FuRA adapter as a Markdown table and draws them.

    Raises:
        ModelError: if ``model`` has no FuRA adapter.
    """
    model, _ = load_any(config.model)
    if not isinstance(model, PeftModel) or model.peft_config["default"].peft_type != "FURA":
        raise ModelError(f"{config.model} has no FuRA adapter: there is nothing to inspect")
    spectra = spectrum_report(model)
    print(spectrum_table(spectra))
    picture = Path(config.output_path or Path(config.model) / "spectrum.png")
    building = picture.with_name("." + picture.name)
    plot_spectrum(spectra, building)
    building.replace(picture)
    print(f"\ndrawn in {picture}")


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
    """The first line of its message; where that announces a list, with the first of it."""
    lines = str(error).strip().split("\n")
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
