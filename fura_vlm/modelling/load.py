"""Loading a LLaVA, its processor and an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from fura_vlm.errors import first_line
from fura_vlm.fura import plot_spectrum, spectrum_report, spectrum_table  # registers FuRA with PEFT, too
from fura_vlm.modelling.config import InspectConfig
from fura_vlm.modelling.processor import make_processor
from fura_vlm.modelling.shards import ModelError, WeightFiles

PROJECT = Path(__file__).parents[2]


def load_processor(path: str) -> LlavaProcessor:
    """The processor of a LLaVA as LLaVA v1.5 trains and evaluates; Pillow does the image work, as in its own code.

    Published llava-hf checkpoints come with another one, which crops the centre of a picture instead of padding it,
    does not know of the tower's class token, and renders conversations without the system sentence. Of such a one
    the tokenizer and the sizes are taken.

    Raises:
        ModelError: if there is none at ``path``, or it does not belong to the model there.
    """
    check_folder(path)
    alone = Path(path).is_dir() and not (Path(path) / "config.json").is_file()  # as in a run folder
    config = None if alone else _config(path, "processor")
    try:
        processor = AutoProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, ImportError) as error:  # the last: of another model, with parts that Pillow has not
        raise ModelError(f"No usable processor at {path}: {_first_line(error)}") from error
    if not isinstance(processor, LlavaProcessor):
        raise ModelError(
            f"{path} has a {type(processor).__name__} where a LlavaProcessor belongs: take the files that were "
            "published with the model"
        )
    size, patch = processor.image_processor.crop_size["height"], processor.patch_size
    if config is not None:
        _check_processor(path, processor, config)
        patch = config.vision_config.patch_size
    if not getattr(processor.image_processor, "do_pad", False) or processor.num_additional_image_tokens != 1:
        processor = make_processor(processor.tokenizer, size, patch)
    if config is not None:
        _check_image_tokens(path, processor, config)
    return processor


def _config(path: str, what: str) -> LlavaConfig:
    """The model's configuration.

    Args:
        what: how messages call what is wanted.

    Raises:
        ModelError: there is none, it contradicts itself, or it is that of another family.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"No usable {what} at {path}: {_first_line(error)}") from error
    if not isinstance(config, LlavaConfig):
        raise ModelError(
            f"{path} is a model of the type {config.model_type!r}: what is trained here is LLaVA-1.5 (type 'llava'), "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    return config


def _check_processor(path: str, processor: LlavaProcessor, config: LlavaConfig) -> None:
    tokenizer, token = processor.tokenizer, processor.image_token
    if token not in tokenizer.get_vocab():
        raise ModelError(
            f"{path}: its tokenizer has no token {token}: take the tokenizer that was published with the model, or put "
            "the model together with fura-vlm assemble"
        )
    known = tokenizer.convert_tokens_to_ids(token)
    if known != config.image_token_id:
        raise ModelError(
            f"{path}: {token} is token {known} of its tokenizer and {config.image_token_id} of its config.json: its "
            "files belong to different models"
        )
    size, seen = processor.image_processor.crop_size["height"], config.vision_config.image_size
    if size != seen:
        raise ModelError(
            f"{path}: its processor makes pictures of {size} pixels and its vision tower sees {seen}: its files belong "
            "to different models"
        )


def _check_image_tokens(path: str, processor: LlavaProcessor, config: LlavaConfig) -> None:
    """Training relies on it: it has no time to compare features and tokens in every batch."""
    strategies = processor.vision_feature_select_strategy, config.vision_feature_select_strategy
    sizes = processor.patch_size, config.vision_config.patch_size
    patches = [(config.vision_config.image_size // size) ** 2 for size in sizes]
    class_token = config.vision_config.model_type.startswith("clip")
    tokens = patches[0] + processor.num_additional_image_tokens - (strategies[0] == "default")
    features = patches[1] + class_token - (strategies[1] == "default")
    if tokens != features:
        raise ModelError(
            f"{path}: a picture is {tokens} tokens to its processor and {features} features to its model "
            f"(vision_feature_select_strategy {strategies[0]!r} and {strategies[1]!r}): its files belong to different "
            "models"
        )


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
    check_folder(path)
    _config(path, "LLaVA")
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
    """``cls.from_pretrained``, which fills weights that are not in the files, or of another shape there, with random
    numbers; here that is an error.

    Args:
        what: how messages call the model.
        kwargs: for ``from_pretrained``.

    Raises:
        ModelError: if files are missing or damaged, or do not hold all of the weights in the shapes of ``config.json``.
    """
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except ImportError as error:  # bitsandbytes, or what attn_implementation names
        if kwargs.get("quantization_config") is None:
            raise ModelError(
                f"{path} cannot be loaded as asked, because a package is missing: {error} (attn_implementation sdpa "
                "needs none)"
            ) from error
        raise ModelError(f"A base in 4 bits needs the extra package: pip install -e .[quant] ({error})") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        WeightFiles(path, what)  # says which file is missing, cut off or damaged, if one is
        raise ModelError(f"No usable {what} at {path}: {_first_line(error)}") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ModelError(
            f"{path}: {name} is {list(found)} in its files and {list(wanted)} by its config.json: its files belong to "
            "different models"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{path} is not a whole {what}: {len(missing)} weights are missing, first {missing[0]}")
    return model


def load_adapter(model: LlavaForConditionalGeneration, path: str, **kwargs) -> PeftModel:
    """``model`` with the adapter at ``path`` (any PEFT method), for inference. ``kwargs`` are for PEFT.

    Raises:
        ModelError: if there is no adapter, or it belongs to another base.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise ModelError(f"No adapter at {path}: adapter_config.json is missing")
    base = read_adapter_config(path).base_model_name_or_path
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((Path(path) / name).is_file() for name in weights):  # PEFT would look for them on the hub
        raise ModelError(f"The adapter at {path} is not whole: {weights[0]} is missing")
    try:
        return PeftModel.from_pretrained(model, path, **kwargs).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The adapter at {path} cannot be used ({_first_line(error).rstrip('.:')}): it names {base} as its base"
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
            f"{path}/adapter_config.json cannot be read ({first_line(error)}): it is damaged, or of another method "
            "than PEFT has here"
        ) from error


def find_adapter(path: str) -> str | None:
    """The adapter that a path means, be it its own folder or that of a run; None if there is none."""
    folder = Path(path).expanduser()
    folders = (folder / "adapter", folder)
    return next((str(folder) for folder in folders if (folder / "adapter_config.json").is_file()), None)


def find_parts(path: str) -> tuple[str, str | None, str]:
    """What a user means by a path.

    Args:
        path: a run folder, an adapter's folder, or a LLaVA (folder or name on the hub).

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
        if not Path(base).is_dir() and (PROJECT / base).is_dir():  # runs are started there
            base = str(PROJECT / base)
    elif (folder / "model").is_dir():  # of the method full
        base = str(folder / "model")
    elif (folder / "config.yaml").is_file():
        raise ModelError(
            f"{path} is a run without an adapter: it was interrupted; start its command again to finish it"
        )
    else:
        return path, None, path
    processor = folder / "processor"
    return base, adapter, str(processor) if processor.is_dir() else base


def load_any(path: str) -> tuple[LlavaForConditionalGeneration | PeftModel, LlavaProcessor]:
    """What a user means by a path, ready to answer on the GPU if there is one: model and processor.

    Args:
        path: a run folder, an adapter's folder, or a LLaVA (folder or name on the hub).

    Raises:
        ModelError: if it is none of these, or a part of it is missing.
    """
    base, adapter, processor = find_parts(path)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    processor, model = load_processor(processor), load_base(base, dtype)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model.to("cuda" if cuda else "cpu").eval(), processor


def inspect(config: InspectConfig) -> None:
    """Prints the spectra behind a FuRA adapter as a Markdown table and draws them.

    Raises:
        ModelError: if ``model`` has no FuRA adapter, or ``output_path`` is of another format than png, svg or pdf.
    """
    picture = Path(config.output_path or Path(config.model) / "spectrum.png")
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise ModelError(f"{picture} is of no known format: let --output_path end in .png, .svg or .pdf")
    model, _ = load_any(config.model)
    if not isinstance(model, PeftModel) or model.peft_config["default"].peft_type != "FURA":
        raise ModelError(f"{config.model} has no FuRA adapter: there is nothing to inspect")
    spectra = spectrum_report(model)
    print(spectrum_table(spectra))
    picture.parent.mkdir(parents=True, exist_ok=True)
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
        embedded = kwargs.get("inputs_embeds") is not None  # by the training's loss, pictures and all
        if embedded or kwargs.get("pixel_values") is not None or not module.training:
            return None
        embeddings = module.get_input_embeddings()(kwargs.pop("input_ids"))
        blank = torch.zeros(1, 3, size, size, device=embeddings.device, dtype=embeddings.dtype)
        features = module.get_image_features(pixel_values=blank, return_dict=True).pooler_output
        kwargs["inputs_embeds"] = embeddings + 0 * torch.cat(features).sum()
        return args, kwargs

    llava.register_forward_pre_hook(blank_picture, with_kwargs=True)


def check_folder(path: str) -> None:
    """Refuses a path that cannot be a name on the hub and is no folder, before the network is asked for it.

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
    """The first line of its message; where that announces a list, with the first of it."""
    lines = (str(error).strip() or type(error).__name__).split("\n")
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
