"""Reads and writes model files one tensor at a time, so that a model need not fit into memory."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.hub import cached_file

from fura_vlm.errors import ModelError, first_line
from fura_vlm.files import whole_folder

# The names under which transformers looks for weights, in its order.
SINGLE, INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"
MAX_SHARD_SIZE = "5GB"


class WeightFiles:
    """The weights of a model in safetensors or pickled files, sharded or not; a tensor is read when asked for.

    Pickled files are mapped into memory and read with ``weights_only=True``.

    Args:
        path: a folder, or a name on the hub.
        what: how messages call the model.

    Attributes:
        tensors: the names in the files, in natural order, and on the meta device the shape and dtype of each.

    Raises:
        ModelError: a file is missing, cut off or damaged, or has a dtype that PyTorch does not have.
    """

    def __init__(self, path: str, what: str):
        self.path, self.what = path, what
        self._file_of: dict[str, str] = {}
        self._open: dict[str, object] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        found = {}
        for file in self._files():
            found |= self._look_into(file)
        for name in sorted(found, key=dot_natural_key):
            self.tensors[name] = found[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, backed by its file: do not write to it."""
        opened = self._open[self._file_of[name]]
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def refuse_quantised(self) -> None:
        """Refuses 8-bit and 4-bit weights, which are numbers without their scales.

        Raises:
            ModelError: there are such.
        """
        for name, stored in self.tensors.items():
            if name.endswith("weight") or stored.is_floating_point():
                self.check_unquantised(name)

    def check_unquantised(self, name: str) -> None:
        """Refuses one weight if it is quantised: ``refuse_quantised``."""
        stored = self.tensors[name]
        if stored.itemsize < 2 or not stored.is_floating_point():
            dtype = str(stored.dtype).removeprefix("torch.")
            raise ModelError(
                f"{self.path} is quantised: {name} is {dtype} there, which means nothing without its scales: name the "
                "model it was made from"
            )

    def _files(self) -> list[str]:
        for single in SINGLE:
            index = self._find(single + INDEX)
            if index is not None:
                try:
                    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
                    if not names or not all(isinstance(name, str) for name in names):
                        raise ValueError("no names of files")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ModelError(f"{index} is damaged: download it again") from error
                files = {name: self._find(name) for name in names}
                missing = [name for name, file in files.items() if file is None]
                if missing:
                    raise ModelError(
                        f"{self.path} is not a complete {self.what}: {len(missing)} of its {len(names)} files are "
                        f"missing, first {missing[0]}: finish the download"
                    )
                return list(files.values())
            file = self._find(single)
            if file is not None:
                return [file]
        raise ModelError(
            f"No weights of a {self.what} at {self.path}: it has neither {' nor '.join(SINGLE)}, whole or in shards"
        )

    def _find(self, name: str) -> str | None:
        try:
            return cached_file(self.path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:  # no such repository, no connection
            raise ModelError(f"No usable {self.what} at {self.path}: {first_line(error)}") from error

    def _look_into(self, file: str) -> dict[str, torch.Tensor]:
        try:
            if file.endswith(".safetensors"):
                opened = safe_open(file, "pt")
                parts = {name: opened.get_slice(name) for name in opened.keys()}
                found = {name: _on_meta(part, f"{name} in {file}") for name, part in parts.items()}
            else:
                mapped = zipfile.is_zipfile(file)  # torch's form since 1.6; older ones cannot be mapped
                opened = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
                found = {name: tensor.to("meta") for name, tensor in opened.items()}
        except ModelError:
            raise
        except Exception as error:  # a broken file raises as it likes
            raise ModelError(f"{file} is cut off or damaged: download it again ({first_line(error)})") from error
        self._open[file] = opened
        self._file_of |= dict.fromkeys(found, file)
        return found


def parameter_names(model: PreTrainedModel, files: WeightFiles) -> dict[str, str]:
    """For each parameter of ``model``, its name in ``files``. The files may have any of the layouts that transformers
    has used over time. A parameter that is tied to another need not be in them.

    Raises:
        ModelError: a parameter is missing in the files, is quantised there, or has another shape.
    """
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for name in files.tensors:
        parameter, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        found[parameter] = name
    tied = {name for name, other in model.all_tied_weights_keys.items() if other in found}
    missing = sorted(set(wanted) - set(found) - tied)
    if missing:
        raise ModelError(
            f"{files.path} is not a complete {files.what}: {len(missing)} weights are missing, first {missing[0]}"
        )
    for parameter, tensor in ((parameter, wanted[parameter]) for parameter in wanted if parameter in found):
        if tensor.is_floating_point():
            files.check_unquantised(found[parameter])
        shape = files.tensors[found[parameter]].shape
        if shape != tensor.shape:
            raise ModelError(
                f"{files.path} does not fit its config.json: {found[parameter]} is {tuple(shape)} and has to be "
                f"{tuple(tensor.shape)}: its files belong to different models"
            )
    return {parameter: found[parameter] for parameter in wanted if parameter in found}


def write_sharded(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes weights as transformers does, ``model.safetensors`` or shards of it with an index.

    Never holds more than the tensors of one shard.

    Args:
        tensors: names, and on the meta device the shape and dtype in which each is written.
        read: makes a tensor, given its name; it is cast.
        max_shard_size: such as ``"5GB"``.

    Raises:
        ModelError: ``max_shard_size`` is no size.
    """
    try:
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ModelError(f"max_shard_size {max_shard_size!r} is not a size: give one such as 5GB or 500MB") from error
    bar = tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, desc="written")
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = read(name).to(tensors[name].dtype).contiguous()
            shard[name] = tensor
            bar.update(tensor.numel() * tensor.element_size())
        save_file(shard, folder / file, {"format": "pt"})
    bar.close()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / ("model.safetensors" + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def building(output_dir: str, size: int) -> Iterator[Path]:
    """A folder to write in, which becomes ``output_dir`` when the block ends well, and vanishes otherwise.

    Args:
        size: the bytes that are going to be written.

    Raises:
        ModelError: ``output_dir`` exists, or the disk has no room.
    """
    target = Path(output_dir)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise ModelError(
            f"{target} will take {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left: make room, or choose "
            "another folder"
        )
    with whole_folder(target) as folder:
        yield folder
        refuse_existing(target)  # made in the meantime, by somebody else


def refuse_existing(target: Path) -> None:
    if target.exists():
        raise ModelError(f"{target} exists already: choose another folder")


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# The names of the format, https://github.com/huggingface/safetensors#format, and PyTorch's. It has had some for a short
# time only, and a few (F6_E2M3) not yet.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def _on_meta(part, what: str) -> torch.Tensor:
    """The shape and dtype of a tensor of a safetensors file, as `read` gives it."""
    name, shape = part.get_dtype(), part.get_shape()
    dtype = getattr(torch, DTYPES.get(name, ""), None)
    if dtype is None:
        raise ModelError(
            f"{what} is stored as {name}, which PyTorch {torch.__version__} does not have: name another model"
        )
    if name == "F4":  # PyTorch's has two numbers in each entry
        shape = [*shape[:-1], shape[-1] // 2]
    return torch.empty(shape, dtype=dtype, device="meta")
