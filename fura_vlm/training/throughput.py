"""How fast a run is: tokens and samples a second, the share of padding, MFU, memory, the time left.

MFU (PaLM, arXiv 2204.02311, appendix B) is the arithmetic that the model needs, divided by what the device could have
done. Needed are, for each weight of the language model and each token:

- 2 floating-point operations for the product and 2 for the gradient of its input, which every method needs on its
  way down to the projector; 2 more for the gradient of the weight only where it is trained. So a frozen base takes 4
  and not the usual 6.
- The head takes part at supervised positions only; attention with 6 t^2 d a layer for t tokens of width d (causal, so
  half of the pairs; forward and twice that backward); a frozen vision tower forward only, 2 a weight and patch and
  4 n^2 d a layer, for its n patches and class token.

Not counted are padding, what gradient checkpointing computes a second time, additions and norms.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers.trainer_callback import ProgressCallback

from fura_vlm.families.base import IGNORE, Family, Parts

# Dense bfloat16 with float32 accumulation, TFLOP/s, from NVIDIA's data sheets. The first that the name contains.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A40": 150,
    "A30": 165,
    "L4": 121,
    "RTX 4090": 165,
}


def peak_flops(device_name: str) -> float | None:
    """The peak of a device, in floating-point operations a second, or None if it is not in the table."""
    words = f"{device_name} ".replace("-", " ")
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if f"{name} " in words), None)


@dataclass(frozen=True)
class Work:
    """The floating-point operations that a training step needs, by the contents of its batch."""

    token: float
    token_pair: float  # times the sum of the rows' squared lengths
    picture_token: float
    label: float

    @classmethod
    def of(cls, model: nn.Module, family: Family) -> Work:
        """Of a model of this family, as it is or within a PEFT model."""
        parts = family.parts(model)
        text = family.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            token=_cost(parts.decoder, 4),
            token_pair=6 * head_dim * text.num_attention_heads * text.num_hidden_layers,
            picture_token=0.0 if parts.tower is None else _seeing(family, parts),
            label=_cost(parts.head, 4),
        )


def _seeing(family: Family, parts: Parts) -> float:
    """Of a picture's token: the patches that it stands for in the tower, and itself in the projector."""
    vision, patches = family.config.vision_config, family.patches()
    projector = [_weights(each) for each in parts.projectors]
    within = {id(m) for m in parts.tower.modules()}
    inside = [weights for weights, each in zip(projector, parts.projectors, strict=True) if id(each) in within]
    fixed, trained = (
        all_of_it - sum(weights[kind] for weights in inside) for kind, all_of_it in enumerate(_weights(parts.tower))
    )
    layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0)
    attention = 4 * patches.together * vision.hidden_size * layers
    tower = (4 if trained else 2) * fixed + 6 * trained + attention
    trains = any(trained for _, trained in projector)
    return patches.per_token * tower + sum((4 if trains else 2) * fixed + 6 * trained for fixed, trained in projector)


def _cost(module: nn.Module, frozen: int) -> float:
    fixed, trained = _weights(module)
    return frozen * fixed + 6 * trained


def _weights(module: nn.Module) -> tuple[int, int]:
    """Frozen and trained weights that multiply a token: of linear layers and of adapters, counted by their shapes,
    since 4-bit weights are packed and ZeRO-3 holds them in parts."""
    counts = [0, 0]
    linear = {id(m.weight): m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear)}
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        unused = id(parameter) in embedded or "original_module" in name  # of what PEFT trains a copy in full
        if not unused and (len(shape) > 1 or id(parameter) in linear):
            counts[parameter.requires_grad] += linear.get(id(parameter), torch.Size(shape).numel())
    return tuple(counts)


class Meter:
    """Counts what goes into the steps. It counts on the device, without waiting for it, until the figures are read.

    Args:
        model: as it is or within a PEFT model.
        family: that of the model.
        device: where batches are.
    """

    COUNTS = ("tokens", "pairs", "labels", "pictures", "places", "rows")

    def __init__(self, model: nn.Module, family: Family, device: torch.device):
        self.work, self.device, self.run_id = Work.of(model, family), device, family.run_id
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.started = self.first = None
        self.begun = 0
        self._clear()

    def _clear(self) -> None:
        self.counts = torch.zeros(len(self.COUNTS), dtype=torch.float64, device=self.device)

    def start(self, step: int) -> None:
        """The clock starts with the first batch that is waited for, after ``step`` steps (of the run that is resumed);
        later calls change nothing."""
        if self.started is None:
            self.started, self.begun = time.perf_counter(), step

    def add(self, batch: dict[str, torch.Tensor]) -> None:
        """Takes note of a batch as ``Collator`` makes it."""
        lengths = batch["attention_mask"].sum(1).double()
        labels = (batch["labels"][:, 1:] != IGNORE).sum()
        pictures = (batch["input_ids"] == self.run_id).sum()
        shapes = [batch["input_ids"].numel(), len(lengths)]
        on_device = torch.stack([lengths.sum(), lengths.square().sum(), labels.double(), pictures.double()])
        self.counts[:4] += on_device.to(self.device)
        self.counts[4:] += torch.tensor(shapes, dtype=torch.float64).to(self.device, non_blocking=True)

    def read(self, step: int, max_steps: int) -> dict[str, float]:
        """The figures since the last time, of all processes together; every process has to call this.

        Returns:
            ``tokens_per_second`` and ``samples_per_second`` (without padding), ``padding`` (a share), ``mfu`` (a
            share, of devices that are known), ``peak_memory_gib`` (of this process, on the device or else resident),
            ``seconds_left``.
        """
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes > 1:
            dist.all_reduce(self.counts)
        count = dict(zip(self.COUNTS, self.counts.tolist(), strict=True))
        now = time.perf_counter()
        seconds = now - self.started
        figures = {
            "tokens_per_second": count["tokens"] / seconds,
            "samples_per_second": count["rows"] / seconds,
            "padding": 1 - count["tokens"] / max(count["places"], 1),
            "peak_memory_gib": _peak_memory(self.device) / 2**30,
        }
        if self.peak:
            work = self.work
            asked = work.token * count["tokens"] + work.token_pair * count["pairs"]
            asked += work.picture_token * count["pictures"] + work.label * count["labels"]
            figures["mfu"] = asked / (seconds * processes * self.peak)
        # The first steps compile and warm up, so they do not show how fast later steps are.
        since, at = self.first or (self.begun, self.started)
        figures["seconds_left"] = (now - at) / max(step - since, 1) * (max_steps - step)
        self.first = self.first or (step, now)
        self.started = now
        self._clear()
        return figures


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Progress(ProgressCallback):
    """transformers' progress bar, with the logged figures on a readable line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in (logs or {}):
            return
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
        parts.append(f"lr {logs['learning_rate']:.2e}")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{logs['samples_per_second']:.3g} samples/s")
            parts.append(f"padding {100 * logs['padding']:.1f} %")
            if "mfu" in logs:
                parts.append(f"MFU {100 * logs['mfu']:.1f} %")
            parts.append(f"{logs['peak_memory_gib']:.1f} GiB")
            parts.append(f"{self.training_bar.format_interval(logs['seconds_left'])} left")
        self.training_bar.write("  ".join(parts))
