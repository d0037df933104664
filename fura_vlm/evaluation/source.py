"""The model that a path names: the base, the adapter over it, the processor, and a hash of all three."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from fura_vlm.families.base import Family
from fura_vlm.modelling.load import (
    ModelError,
    default_dtype,
    find_adapter,
    find_parts,
    load_adapter,
    load_base,
    load_family,
    read_config,
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``base`` and ``processor`` are folders or hub names, ``adapter`` a folder.

    ``conversation`` is the form of a conversation, as in the family's ``conversations``; by default its own.
    """

    base: str
    adapter: str | None
    processor: str
    conversation: str | None = None

    @property
    def without_adapter(self) -> Source:
        """The base alone, with the processor of the tuned model."""
        return replace(self, adapter=None)

    def load(self, dtype: torch.dtype, attn_implementation: str = "sdpa") -> tuple[PreTrainedModel | PeftModel, Family]:
        """Model, on the CPU, and family.

        Raises:
            ModelError: if a part is missing or damaged, or the adapter belongs to another base.
        """
        family = load_family(self.processor, self.base, self.conversation)
        model = load_base(self.base, dtype, attn_implementation)
        return (load_adapter(model, self.adapter) if self.adapter else model).eval(), family

    def place(
        self, dtype: str = "auto", device: str | None = None, attn_implementation: str = "sdpa"
    ) -> tuple[PreTrainedModel | PeftModel, Family, torch.dtype]:
        """Model, where it is to run, family, and the model's dtype.

        Args:
            dtype: ``"auto"`` is bfloat16 on a GPU and float32 elsewhere; or the name of a torch dtype.
            device: by default the GPU of this process, or the CPU.

        Raises:
            ModelError: as ``load``.
        """
        cuda = torch.cuda.is_available()
        if device is None:
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            device = PartialState(cpu=not cuda).device if several else "cuda" if cuda else "cpu"
        if dtype == "auto":
            chosen = default_dtype() if torch.device(device).type == "cuda" else torch.float32
        else:
            chosen = getattr(torch, dtype)
        model, family = self.load(chosen, attn_implementation)
        return model.to(device), family, chosen

    def config(self) -> PretrainedConfig:
        """The configuration of the base.

        Raises:
            ModelError: if there is none.
        """
        return read_config(self.base)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits; two models that may answer differently have different ones.

        The adapter and the configurations count with their content. Of the base's weights it is the commit where they
        come from the hub, and the names, sizes and times of the files in a folder: hashing 14 GB takes half a minute.
        """
        digest = hashlib.sha256()
        folder = Path(self.base).expanduser()
        if folder.is_dir():
            for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
                digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
            for path in (folder / "config.json", folder / "generation_config.json"):  # which may name the end token
                digest.update(path.read_bytes() if path.is_file() else b"")
        else:
            digest.update(f"{self.base} {self.config()._commit_hash}".encode())
        if self.adapter:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                path = Path(self.adapter) / name
                if not path.is_file():
                    raise ModelError(f"No adapter at {self.adapter}: {name} is missing")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        family = load_family(self.processor, self.base)
        images = getattr(family.processor, "image_processor", None)
        digest.update(json.dumps(images.to_dict() if images else {}, sort_keys=True, default=str).encode())
        digest.update(str(getattr(family.processor, "chat_template", None)).encode())
        digest.update(family.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()[:16]


def find_model(path: str, adapter: str | None = None) -> Source:
    """What ``path`` names.

    Args:
        path: a run folder, an adapter's folder, or a model, merged or not (a folder or a name on the hub).
        adapter: a folder with an adapter to put over ``path``, which then is a model; a run folder will do.

    Raises:
        ModelError: if ``path`` is a run that has not finished, or an adapter that names no base.
    """
    if adapter:
        return Source(path, find_adapter(adapter) or adapter, path)
    return Source(*find_parts(path))
