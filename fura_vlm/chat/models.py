"""A model in this process to chat with: one base, its family and the adapters over it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError

from fura_vlm.chat.engine import Engine
from fura_vlm.chat.partner import BASE, LOOK, Generation, Partner, Sampling, short_name
from fura_vlm.chat.prompt import Exchange, build_prompt, encode, picture_size, read_image
from fura_vlm.embedded.questions import FAMILIES, ask
from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.errors import first_line
from fura_vlm.families.base import Family
from fura_vlm.modelling.load import ModelError, find_adapter, load_adapter, load_any
from fura_vlm.shipped import MODEL, SHARE


@dataclass
class Models(Partner):
    """One copy of the weights and what can be switched over it.

    Attributes:
        model: as it is or within a ``PeftModel``.
        adapters: what a user calls them, and PEFT's names; ``None`` is the base without any. The first is the default.
    """

    path: str
    model: torch.nn.Module
    family: Family
    adapters: dict[str, str | None]

    @property
    def base(self) -> str:
        """Where the base came from."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model.config.name_or_path

    @property
    def context(self) -> int:
        """Tokens the language model reads at most."""
        return self.model.config.get_text_config(decoder=True).max_position_embeddings

    @property
    def sees(self) -> bool:
        return self.family.sees

    @property
    def longest(self) -> int:
        return max(1, min(1024, self.context // 2))

    def writer(self, max_rows: int) -> Engine:
        return Engine(self.model, self.family, max_rows)

    def read(self, exchanges: Sequence[Exchange], sampling: Sampling) -> tuple[dict, str | None]:
        prompt = build_prompt(list(exchanges), self.family, self.context - sampling.max_new_tokens)
        return encode(prompt, self.family), prompt.notice

    def text(self, generation: Generation) -> str:
        text = self.family.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
        # A character of several tokens is not whole before its last one.
        return text if generation.done else text.rstrip("\ufffd")

    def check_picture(self, path: str) -> None:
        read_image(path, self.family)

    def as_seen(self, path: str) -> tuple[Image.Image, str]:
        return as_seen(path, self.family)

    def describe(self) -> str:
        """Base, adapters, methods and sizes."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        sizes = dict.fromkeys(self.adapters, 0)
        for label, name in self.adapters.items():
            if name is not None:
                parts = ((key.split("."), value.numel()) for key, value in self.model.named_parameters())
                sizes[label] = sum(number for key, number in parts if name in key)
        base = Path(self.base).name if Path(self.base).exists() else self.base  # not where the server keeps it
        device, dtype = self.model.device, str(self.model.dtype).removeprefix("torch.")
        lines = [
            f"**Base** `{base}`: {total - sum(sizes.values()):,} parameters, {dtype} on {device}, "
            f"a context of {self.context:,} tokens.",
            "",
            "| adapter | method | trained parameters |",
            "|---|---|---|",
        ]
        for label, name in self.adapters.items():
            if name is not None:
                method = self.model.peft_config[name].peft_type
                lines.append(f"| {label} | {getattr(method, 'value', method)} | {sizes[label]:,} |")
        return "\n".join(lines if len(self.adapters) > 1 else [*lines[:1], "", "No adapter: this is a plain model."])

    def examples(self, folder: Path) -> list[tuple[str, str]]:
        """Pictures with a question each, (path, question), that suit the model.

        Those of a run are its held-out questions, one of each family; without their pictures, and for the embedded
        model, scenes are drawn into ``folder``; for any other model there are none.
        """
        answers = Path(self.path) / "answers-after.jsonl"
        found: dict[str, tuple[str, str]] = {}
        if answers.is_file():
            for line in answers.read_text(encoding="utf-8").splitlines():
                answer = json.loads(line)
                if answer["image"] and Path(answer["image"]).is_file():
                    question = answer["question"].replace("<image>", "").strip()
                    found.setdefault(answer["family"], (answer["image"], question))
        if not found and Path(self.base).name == MODEL.name:
            import random

            for index, family in enumerate(FAMILIES):
                scene = make_scene(0, "eval", index, with_sign=True)
                question = ask(family, scene, random.Random(index)) or ask("gqa", scene, random.Random(index))
                draw(scene).save(folder / f"example-{family}.png")
                found[family] = (str(folder / f"example-{family}.png"), question.text)
        return list(found.values())[:4]


def default_model() -> str:
    """The newest finished run in ``runs/``, or else the embedded model."""
    finished = [path.parents[1] for path in Path("runs").glob("*/adapter/adapter_config.json")]
    newest = max(finished, key=lambda run: (run / "adapter" / "adapter_config.json").stat().st_mtime, default=None)
    return str(newest or (MODEL if MODEL.is_dir() else SHARE / MODEL))


def load_models(path: str | None, adapters: list[str]) -> Models:
    """Loads a run, an adapter or a model, and more adapters over its base.

    Args:
        path: as in :func:`fura_vlm.modelling.load.load_any`; by default :func:`default_model`.
        adapters: run folders or adapters' folders.

    Raises:
        ModelError: if one of them is missing or does not go with the base, or the base has no form of a conversation.
    """
    path = path or default_model()
    model, family = load_any(path)
    if family.conversation == "template":
        family.chat_template()
    names: dict[str, str | None] = {}
    if isinstance(model, PeftModel):
        names[short_name(path, names)] = model.active_adapter
    for other in adapters:
        folder, label = find_adapter(other), short_name(other, names)
        if folder is None:
            raise ModelError(f"No adapter at {other}: adapter_config.json is missing")
        if not isinstance(model, PeftModel):
            model, names[label] = load_adapter(model, folder), "default"
            continue
        name = f"adapter{len(names)}"
        try:
            model.load_adapter(folder, adapter_name=name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"The adapter at {other} does not fit {path}: {first_line(error)}") from error
        names[label] = name
    return Models(path, model.eval(), family, names | {BASE: None})


def as_seen(path: str, family: Family) -> tuple[Image.Image, str]:
    """The picture as the model gets it, and a sentence about what becomes of it.

    Raises:
        FuraVLMError: the picture cannot be used, or the model does not take it.
    """
    seen, words = family.seen(read_image(path, family))
    seen.thumbnail(LOOK)
    width, height = picture_size(path)
    return seen, f"{width} x {height} pixels {words}"
