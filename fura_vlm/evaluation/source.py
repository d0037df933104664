"""The model that a path names: the base, the adapter over it, the processor, and a hash of all three."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from fura_vlm.families.base import Family
from fura_vlm.modelling.load import (
    ModelError,
    find_adapter,
    find_parts,
    load_adapter,
    load_base,
    load_family,
    read_config,
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``base`` and ``processor`` are folders or hub names, ``adapter`` a folder."""

    base: str
    adapter: str | None
    processor: str

    @property
    def without_adapter(self) -> Source:
        """The base alone, with the processor of the tuned model."""
        return Source(self.base, None, self.processor)

    def load(self, dtype: torch.dtype, attn_implementation: str = "sdpa") -> tuple[PreTrainedModel | PeftModel, Family]:
        """Model, on the CPU, and family.

        Raises:
            ModelError: if a part is missing or damaged, or the adapter belongs to another base.
        """
        family = load_family(self.processor, self.base)
        model = load_base(self.base, dtype, attn_implementation)
        return (load_adapter(model, self.adapter) if self.adapter else model).eval(), family

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
