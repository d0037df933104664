"""Loading a model, its processor and an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from fura_vlm.errors import ModelError, first_line
from fura_vlm.extras import require
from fura_vlm.families.base import Family, model_class
from fura_vlm.families.registry import family_class
from fura_vlm.modelling.shards import WeightFiles
from fura_vlm.shipped import SHARE


def load_family(path: str, base: str | None = None, conversation: str | None = None) -> Family:
    """The family of a model, with the processor at ``path``.

    Args:
        path: a model, or a folder with only a processor, such as a run has.
        base: the model, if ``path`` is only a processor.
        conversation: the form of a conversation, as in the family's ``conversations``; by default its own.

    Raises:
        ModelError: if there is none, or it does not belong to the model, or cannot be used here.
    """
    check_folder(path)
    config = read_config(base or path)
    cls = family_class(config)
    try:
        processor = cls.load_processor(path, config)
    except ImportError as error:
        raise ModelError(
            f"The processor at {path} needs a package that is not installed: {_first_line(error)}"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        # What a processor raises whose files are missing, damaged, or those of another class.
        _refuse_code(path, error)
        raise ModelError(f"No usable processor at {path}: {_first_line(error)}") from error
    try:
        family = cls(processor, config, _ends(base or path, config, processor), conversation)
        family.path = path
        family.check_belongs(path)
    except AttributeError as error:
        raise ModelError(
            f"{path} has a {type(processor).__name__}, which does not belong to a model of the type "
            f"{config.model_type} ({error}): take the processor that was published with the model"
        ) from error
    if cls is Family:  # nobody has looked at this kind of model before
        family.check()
    return family


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a model of transformers' own.

    Raises:
        ModelError: there is none, it contradicts itself, or it is of a kind that transformers does not have.
    """
    check_folder(path)
    try:
        # If it is not given, transformers asks the user at a terminal.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        _refuse_code(path, error)
        what = "usable model" if isinstance(error, StrictDataclassError) else "model"
        where = path if Path(path).is_dir() else f"{path} (not a folder here, so it was looked up on the hub)"
        raise ModelError(f"No {what} at {where}: {_first_line(error)}") from error
    except (AttributeError, TypeError) as error:  # a dtype that PyTorch has not, text in the place of an object, ...
        raise ModelError(
            f"{path}/config.json cannot be used ({_first_line(error)}): correct it, or download it again"
        ) from error


def _refuse_code(path: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{path} brings Python code of its own, which is never run here: use the form of the model that "
            "transformers supports itself (its name often ends in -hf)"
        ) from error


def _ends(path: str, config: PretrainedConfig, processor) -> list[str]:
    """The tokens that may end an answer: those of generation_config.json, config.json and the tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = [config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    try:
        ids.append(GenerationConfig.from_pretrained(path).eos_token_id)
    except OSError:  # it has none
        pass
    flat = [number for each in ids for number in (each if isinstance(each, list) else [each]) if number is not None]
    known = dict.fromkeys(number for number in flat if number < len(tokenizer))
    return tokenizer.convert_ids_to_tokens(list(known))


def load_base(
    path: str,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base model, all parameters frozen: on the CPU, or wherever ZeRO-3 puts its parts or the quantiser wants it.

    Args:
        attn_implementation: as in transformers; ``"sdpa"`` is eager attention for a model that has no other.

    Raises:
        ModelError: if ``path`` holds no model or its files are damaged.
    """
    config = read_config(path)
    auto = model_class(config)
    eager = attn_implementation == "sdpa" and not auto._model_mapping[type(config)]._supports_sdpa
    model = load_pretrained(
        auto,
        path,
        "model",
        dtype=dtype,
        attn_implementation="eager" if eager else attn_implementation,
        quantization_config=quantization_config,
    )
    return model.requires_grad_(False)


def load_pretrained(cls: type[PreTrainedModel], path: str, what: str, **kwargs) -> PreTrainedModel:
    """``cls.from_pretrained``, which fills weights that are not in the files, or of another shape there, with random
    numbers; here that is an error.

    Args:
        what: how messages call the model.
        kwargs: for ``from_pretrained``.

    Raises:
        ModelError: if files are missing or damaged, do not hold all of the weights in the shapes of ``config.json``, or
            hold quantised ones of which it says nothing.
        MissingExtra: if a base in 4 bits is asked for and bitsandbytes is not installed.
    """
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except ImportError as error:  # bitsandbytes, or what attn_implementation names
        if kwargs.get("quantization_config") is None:
            raise ModelError(
                f"{path} cannot be loaded as asked, because a package is missing: {error} (attn_implementation sdpa "
                "needs none)"
            ) from error
        require("quant")
        raise ModelError(f"{path} cannot be loaded in 4 bits: {error}") from error
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        WeightFiles(path, what)  # names the file that is missing, cut off or damaged, if there is one
        raise ModelError(f"No usable {what} at {path}: {_first_line(error)}") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ModelError(
            f"{path}: {name} is {list(found)} in its files and {list(wanted)} in its config.json: its files belong to "
            "different models"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{path} is not a complete {what}: {len(missing)} weights are missing, first {missing[0]}")
    # Those that config.json describes, transformers reads with their scales.
    if not (hasattr(read_config(path), "quantization_config") and getattr(model, "hf_quantizer", None)):
        WeightFiles(path, what).refuse_quantised()
    return model


def load_adapter(model: PreTrainedModel, path: str, **kwargs) -> PeftModel:
    """``model`` with the adapter at ``path`` (any PEFT method), for inference. ``kwargs`` are for PEFT.

    Raises:
        ModelError: if there is no adapter, or it belongs to another base.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise ModelError(f"No adapter at {path}: adapter_config.json is missing")
    base = read_adapter_config(path).base_model_name_or_path
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((Path(path) / name).is_file() for name in weights):  # PEFT would look for them on the hub
        raise ModelError(f"The adapter at {path} is not complete: {weights[0]} is missing")
    try:
        return PeftModel.from_pretrained(model, path, **kwargs).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The adapter at {path} cannot be used ({_first_line(error).rstrip('.:')}): it was trained over {base}"
        ) from error


def read_adapter_config(path: str) -> PeftConfig:
    """PEFT's configuration of the adapter at ``path``.

    Raises:
        ModelError: if it is damaged, or of a method that PEFT does not know.
    """
    try:
        return PeftConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}/adapter_config.json cannot be read ({first_line(error)}): it is damaged, or of a method "
            "that PEFT does not have here"
        ) from error


def find_adapter(path: str) -> str | None:
    """The adapter at a path, which is its own folder or that of a run; None if there is no adapter."""
    folder = Path(path).expanduser()
    folders = (folder / "adapter", folder)
    return next((str(folder) for folder in folders if (folder / "adapter_config.json").is_file()), None)


def find_parts(path: str) -> tuple[str, str | None, str]:
    """What a user means by a path.

    Args:
        path: a run folder, an adapter's folder, or a model (folder or name on the hub).

    Returns:
        The base, the adapter or None, and the processor; each is a folder or a name on the hub.

    Raises:
        ModelError: if the run has not finished, or the adapter names no base.
    """
    folder, adapter = Path(path).expanduser(), find_adapter(path)
    if adapter is not None:
        base = read_adapter_config(adapter).base_model_name_or_path
        if not base:
            raise ModelError(
                f"{adapter}/adapter_config.json names no base: write the folder or hub name of the model that the "
                "adapter was trained over into its base_model_name_or_path"
            )
        base = _base_folder(base, adapter)
    elif (folder / "model").is_dir():  # of the method full
        base = str(folder / "model")
    elif (folder / "config.yaml").is_file():
        raise ModelError(
            f"{path} is a run without an adapter, because it was interrupted: start its command again to finish it"
        )
    else:
        return path, None, path
    processor = folder / "processor"
    return base, adapter, str(processor) if processor.is_dir() else base


def _base_folder(base: str, adapter: str) -> str:
    """A relative path of a base as it is from here: it starts where the run was started, in a folder above the adapter,
    or in the package, which has the embedded model. Unchanged where there is none: it is a name on the hub."""
    if Path(base).is_dir():
        return base
    folders = (place / base for place in (*Path(adapter).resolve().parents, SHARE))
    return next((str(folder.resolve()) for folder in folders if (folder / "config.json").is_file()), base)


def load_any(path: str) -> tuple[PreTrainedModel | PeftModel, Family]:
    """What a user means by a path, ready to answer on the GPU if there is one: model and family.

    Args:
        path: a run folder, an adapter's folder, or a model (folder or name on the hub).

    Raises:
        ModelError: if there is nothing of that kind, or a part of it is missing.
    """
    base, adapter, processor = find_parts(path)
    family, model = load_family(processor, base), load_base(base, default_dtype())
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), family


def default_dtype() -> torch.dtype:
    """The dtype in which a model is loaded by default: bfloat16 if the GPU supports it, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def check_folder(path: str) -> None:
    """Refuses a path that is not a folder and cannot be a name on the hub, before the network is asked.

    Raises:
        ModelError: there is none.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(
            f"There is no model at {path}: give a folder, or a name on the Hugging Face hub such as "
            "llava-hf/llava-1.5-7b-hf"
        )


def _first_line(error: Exception) -> str:
    """The first line of an error's message; if that line introduces a list, with the first item of the list."""
    lines = (str(error).strip() or type(error).__name__).split("\n")
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
