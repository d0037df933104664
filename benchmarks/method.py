"""Step time, memory and size of fine-tuning methods, side by side in one run.

    python benchmarks/method.py --size llama-4       4 layers of Llama-7B, 16 x 1024 tokens (one GPU)
    python benchmarks/method.py --size llama-7b      all 32 layers, 1 x 2048 tokens, with checkpointing (one GPU)
    python benchmarks/method.py --size small         4 layers of 512, float32 (a CPU)
    python benchmarks/method.py --size qwen2.5-vl-7b --forms compiled        pictures and text (one GPU of 80 GB)
    python benchmarks/method.py --size qwen2.5-vl-tiny                       the same way through, on a CPU

A step is forward, backward and AdamW on random weights, random input states and a random gradient of the output: a
loss would take time and memory of its own, the same for every method. "frozen base" trains nothing and sends gradients
to the input only: no method over a frozen base can be faster. PEFT's LoRA keeps its matrices in float32 unless told
otherwise; it is measured so, as transformers' Trainer runs it (under autocast), and with all of it in bfloat16, as
DeepSpeed runs it. Products of float32 may use TF32, as in the recipe. The compiler of each decoder layer may compute
cheap operations again rather than keep their results (--budget below 1), for every method alike.

The sizes of Qwen2.5-VL are the whole model, its tower and head included, run as in training (``train_on_labels_only``):
each record has a picture, and half of its words are an answer, on which the loss is. Adapted are the language model's
linear layers and the projector's.

--profile prints, for each method, which kernels the GPU (or the CPU) spent the time of 3 more steps on. "one by one"
has FuRA's layers that share an input called by themselves, for what it brings to take them together.

Besides this repository it needs torch, transformers, peft, accelerate, pillow; a Q method bitsandbytes, and --output
matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch._functorch import config as compiler
from torch.profiler import ProfilerActivity
from transformers import LlamaConfig, LlamaModel

from fura_vlm.fura import FuraConfig, joint


@dataclass
class Size:
    """A model and a batch.

    ``picture`` is the edge of each record's picture in pixels, of Qwen2.5-VL with the tower ``vision``; 0 is a Llama.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int
    tokens: int
    checkpointing: bool = False
    picture: int = 0
    kv_heads: int = 0
    vocabulary: int = 32
    vision: dict = field(default_factory=dict)


# fmt: off
SIZES = {
    "small": Size(512, 1408, 4, 8, 4, 256),
    "llama-4": Size(4096, 11008, 4, 32, 16, 1024),
    "llama-7b": Size(4096, 11008, 32, 32, 1, 2048, checkpointing=True),
    "qwen2.5-vl-7b": Size(
        3584, 18944, 28, 28, 8, 1024, picture=448, kv_heads=4, vocabulary=152_064,
        vision={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "qwen2.5-vl-tiny": Size(
        128, 256, 2, 4, 2, 96, picture=112, kv_heads=2, vocabulary=512,
        vision={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
        },
    ),
}
# fmt: on
BFLOAT16 = ", bfloat16"
AUTOCAST = ", autocast"
ONE_BY_ONE = ", one by one"
METHODS = {
    "frozen base": None,
    "FuRA": FuraConfig(target_modules="all-linear"),
    # 18,944 columns as 148 blocks of 128 in place of 128 of 148, which a tile of the kernels has no room for
    "FuRA, down_proj in blocks of 128": FuraConfig(target_modules="all-linear", block_size_pattern={"down_proj": 128}),
    "FuRA, down_proj in blocks of 128" + ONE_BY_ONE: FuraConfig(
        target_modules="all-linear", block_size_pattern={"down_proj": 128}
    ),
    "LoRA r=64": LoraConfig(target_modules="all-linear", r=64, lora_alpha=128),
    "LoRA r=128": LoraConfig(target_modules="all-linear", r=128, lora_alpha=256),
    "LoRA r=128" + AUTOCAST: LoraConfig(target_modules="all-linear", r=128, lora_alpha=256),
    "LoRA r=128" + BFLOAT16: LoraConfig(target_modules="all-linear", r=128, lora_alpha=256),
    "DoRA r=128" + BFLOAT16: LoraConfig(target_modules="all-linear", r=128, lora_alpha=256, use_dora=True),
    "full": None,
    "QFuRA": FuraConfig(target_modules="all-linear"),
    "QLoRA r=64": LoraConfig(target_modules="all-linear", r=64, lora_alpha=128),
    "QLoRA r=64" + BFLOAT16: LoraConfig(target_modules="all-linear", r=64, lora_alpha=128),
}


PICTURE_METHODS = ["frozen base", "FuRA", "LoRA r=128" + BFLOAT16]


class Run:
    """One method on the device, ready to step."""

    def __init__(self, method: str, size: Size, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.method, self.size, self.device, self.dtype = method, size, device, dtype
        torch.manual_seed(0)
        base = self._base(method.startswith("Q")).requires_grad_(False)
        _wait(device)
        started = time.perf_counter()
        if method in ("frozen base", "full"):
            self.model = base.requires_grad_(method == "full")
        else:
            self.model = get_peft_model(base, self._adapter(base), autocast_adapter_dtype=not method.endswith(BFLOAT16))
        _wait(device)
        self.setup = time.perf_counter() - started
        self.model.train()
        if size.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self._make_ready(base, compiled)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda") if trained else None
        torch.manual_seed(1)
        self._make_batch()

    def _adapter(self, base: torch.nn.Module) -> PeftConfig:
        return copy.deepcopy(METHODS[self.method])

    def _make_ready(self, base: torch.nn.Module, compiled: bool) -> None:
        if compiled:
            for layer in base.layers:
                layer.compile()

    def _make_batch(self) -> None:
        shape = (self.size.batch, self.size.tokens, self.size.hidden)
        self.inputs = torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()
        self.gradient = torch.randn(shape, device=self.device, dtype=self.dtype) / self.inputs.numel()

    def _base(self, quantized: bool) -> LlamaModel:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=self.size.hidden,
            intermediate_size=self.size.intermediate,
            num_hidden_layers=self.size.layers,
            num_attention_heads=self.size.heads,
            num_key_value_heads=self.size.heads,
            use_cache=False,
        )
        with self.device:
            model = LlamaModel(config).to(self.dtype)
        if quantized:
            _quantize(model, model, self.dtype)
        return model.requires_grad_(False)

    def step(self) -> float:
        """One training step; returns its seconds."""
        _wait(self.device)
        started = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.method.endswith(AUTOCAST)):
            self._forward_and_backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        _wait(self.device)
        return time.perf_counter() - started

    def _forward_and_backward(self) -> None:
        output = self.model(inputs_embeds=self.inputs).last_hidden_state
        output.backward(self.gradient.to(output.dtype))
        self.inputs.grad = None

    def adapter(self) -> tuple[float, float, float] | None:
        """Size of the saved adapter in MiB, seconds to load it, largest relative difference of outputs once merged."""
        if not isinstance(self.model, PeftModel):
            return None
        self.model.eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            self.model.save_pretrained(folder)
            mebibytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**20
            torch.manual_seed(0)  # the same weights again
            base = self._base(self.method.startswith("Q"))
            started = time.perf_counter()
            loaded = PeftModel.from_pretrained(base, folder).eval()
            _wait(self.device)
            seconds = time.perf_counter() - started
            few = self.inputs[:1, :64].detach()
            expected = loaded(inputs_embeds=few).last_hidden_state.float()
            merged = loaded.merge_and_unload()(inputs_embeds=few).last_hidden_state.float()
        return mebibytes, seconds, ((merged - expected).norm() / expected.norm()).item()


class PictureRun(Run):
    """One method over the whole of Qwen2.5-VL, its step a call with labels as in training."""

    def _base(self, quantized: bool) -> torch.nn.Module:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        from fura_vlm.families.registry import family_class

        size = self.size
        # The last ids of the vocabulary stand for pictures.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = {name: size.vocabulary - 1 - number for number, name in enumerate(names)}
        head = size.hidden // size.heads
        sections = [head // 8, head * 3 // 16, head * 3 // 16]  # M-RoPE's: 16, 24, 24 for heads of 128
        config = Qwen2_5_VLConfig(
            vision_config={"patch_size": 14, "window_size": 112, "spatial_merge_size": 2} | size.vision,
            text_config={
                "vocab_size": size.vocabulary,
                "hidden_size": size.hidden,
                "intermediate_size": size.intermediate,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "num_key_value_heads": size.kv_heads,
                "max_position_embeddings": 32_768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
                "bos_token_id": None,
                "eos_token_id": None,
            },
            tie_word_embeddings=False,
            **tokens,
        )
        self.config, self.family = config, family_class(config)(None, config)
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = Qwen2_5_VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if quantized:
            _quantize(model, self.family.parts(model).decoder, self.dtype)
        return model

    def _adapter(self, base: torch.nn.Module) -> PeftConfig:
        from fura_vlm.training.config import TrainConfig
        from fura_vlm.training.methods import adapter_config

        adapter = super()._adapter(base)
        adapter.target_modules = adapter_config(TrainConfig(method="fura"), self.family, base).target_modules
        return adapter

    def _make_ready(self, base: torch.nn.Module, compiled: bool) -> None:
        from fura_vlm.training.loss import train_on_labels_only
        from fura_vlm.training.methods import compile_layers

        if self.method == "frozen base":
            base.enable_input_require_grads()  # else there would be nothing to go backward to
        if compiled:
            compile_layers(self.model, self.family, compiler.activation_memory_budget)
        train_on_labels_only(base, self.family)

    def _make_batch(self) -> None:
        from fura_vlm.training.loss import positions

        size, vision = self.size, self.config.vision_config
        edge = size.picture // vision.patch_size
        merged = edge**2 // vision.spatial_merge_size**2
        ids = torch.randint(0, size.vocabulary - 8, (size.batch, size.tokens), device=self.device)
        ids[:, 1] = self.config.vision_start_token_id
        pictured = slice(2, 2 + merged)
        ids[:, pictured] = self.config.image_token_id
        ids[:, 2 + merged] = self.config.vision_end_token_id
        kinds, labels = torch.zeros_like(ids), ids.clone()
        kinds[:, pictured] = 1
        labels[:, : -((size.tokens - merged) // 2)] = -100
        features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "mm_token_type_ids": kinds,
            "pixel_values": torch.randn(size.batch * edge**2, features, device=self.device, dtype=self.dtype),
            "image_grid_thw": torch.tensor([[1, edge, edge]] * size.batch, device=self.device),
        }
        self.batch |= positions(self.batch, self.config.image_token_id)

    def _forward_and_backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def adapter(self) -> None:
        """Left to the smaller sizes."""


def _quantize(model: torch.nn.Module, part: torch.nn.Module, dtype: torch.dtype) -> None:
    """Puts 4-bit layers (NF4, double quantisation) in the place of a part's linear ones, as transformers does in
    loading."""
    import bitsandbytes as bnb

    for name, layer in list(part.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        small = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        small.weight = weight.to(layer.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, small)
    model.is_loaded_in_4bit = True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    method: str,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    steps: int,
    profiled: bool = False,
) -> dict:
    """A row of the table for one method, alone on the device."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    run = (PictureRun if size.picture else Run)(method, size, device, dtype, compiled)
    together = {"joint_takes": lambda *_: False} if method.endswith(ONE_BY_ONE) else {}
    with mock.patch.multiple(joint, **together) if together else nullcontext():
        for _ in range(3):
            run.step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(run.step() for _ in range(steps))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        if profiled:
            print(f"\n{method}, {'compiled' if compiled else 'eager'}: 3 steps\n{profile(run, device)}", flush=True)
    return {
        "method": method,
        "compiled": compiled,
        "seconds": seconds,
        "tokens_s": size.batch * size.tokens / seconds,
        "peak": peak,
        "trained": run.trained,
        "setup": run.setup,
        "adapter": None if compiled else run.adapter(),
    }


def profile(run: Run, device: torch.device) -> str:
    """The 25 kernels that take most time in 3 steps, of the GPU or else of the CPU."""
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(3):
            run.step()
    order = f"self_{device.type}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=100)


def table(rows: list[dict]) -> str:
    """The rows as Markdown; ratios to the frozen base in the same form."""
    lines = [
        "| method | form | step, ms | of frozen base | of LoRA r=128 | tokens/s | peak, GiB | trained "
        "| set-up, s | adapter, MiB | load, s | merged, rel. diff. |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    limit = {row["compiled"]: row["seconds"] for row in rows if row["method"] == "frozen base"}
    lora = {row["compiled"]: row["seconds"] for row in rows if row["method"] == "LoRA r=128" + BFLOAT16}
    for row in rows:
        form = "compiled" if row["compiled"] else "eager"
        peak = "" if row["peak"] is None else f"{row['peak']:.1f}"
        ratios = " | ".join(
            f"{row['seconds'] / base[row['compiled']]:.3f}" if row["compiled"] in base else "" for base in (limit, lora)
        )
        adapter = "| | |" if row["adapter"] is None else "| {:.1f} | {:.2f} | {:.1e} |".format(*row["adapter"])
        lines.append(
            f"| {row['method']} | {form} | {1000 * row['seconds']:.1f} | {ratios} | {row['tokens_s']:,.0f} | {peak} "
            f"| {row['trained']:,} | {row['setup']:.2f} {adapter}"
        )
    return "\n".join(lines)


def chart(rows: list[dict], path: Path) -> None:
    """Bars of step time, and of peak memory where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [("step, ms", lambda row: 1000 * row["seconds"])]
    if rows[0]["peak"] is not None:
        panels.append(("peak memory, GiB", lambda row: row["peak"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 0.4 * len(rows) + 1.2), layout="constrained")
    names = [f"{row['method']}{', compiled' if row['compiled'] else ''}" for row in rows]
    colors = ["#1f5fc8" if "FuRA" in name else "#b8b8b8" for name in names]
    for axis, (title, value) in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        axis.bar_label(axis.barh(names, [value(row) for row in rows], color=colors), fmt="%.1f", padding=2, fontsize=8)
        axis.set(title=title)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="llama-4" if torch.cuda.is_available() else "small")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all without Q and other blocks; with pictures three"
    )
    parser.add_argument("--forms", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budget", type=float, default=1.0, help="the compiler's activation_memory_budget")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: as the size has it")
    parser.add_argument("--profile", action="store_true", help="print the time by kernel of 3 more steps")
    parser.add_argument("--output", type=Path, help="folder for method-SIZE.md and .png")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32
    compiler.activation_memory_budget = args.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, form = SIZES[args.size], ""
    if args.methods is None:
        usual = [method for method in METHODS if not method.startswith(("Q", "FuRA,"))]
        args.methods = PICTURE_METHODS if size.picture else usual
    if args.checkpointing not in (None, size.checkpointing):
        size.checkpointing = args.checkpointing
        form = " --checkpointing" if args.checkpointing else " --no-checkpointing"
    rows = []
    for compiled in args.forms:
        for method in args.methods:
            try:
                rows.append(measure(method, size, device, dtype, compiled == "compiled", args.steps, args.profile))
            except torch.OutOfMemoryError:
                print(f"{method}, {compiled}: out of memory", flush=True)
                continue
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = (
        f"# {args.size}: {size.layers} layers of {size.hidden}, {size.batch} x {size.tokens} tokens, {dtype}"
        f"{f', a picture of {size.picture} pixels each' if size.picture else ''}"
        f"{', checkpointed' if size.checkpointing else ''}\n\n"
        f"{time.strftime('%Y-%m-%d')}, {hardware}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"median of {args.steps} steps after 3; activation budget of the compiler {args.budget}.\n"
        f"`python benchmarks/method.py --size {args.size} --methods "
        f"{' '.join(repr(m) if ' ' in m else m for m in args.methods)} --forms {' '.join(args.forms)} "
        f"--budget {args.budget}{form}`\n\n"
    )
    print("\n" + head + table(rows))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = f"method-{args.size}" + form.replace(" --", "-")
        name += f"-budget-{args.budget:g}" if args.budget != 1 else ""
        chart(rows, args.output / f"{name}.png")
        (args.output / f"{name}.md").write_text(head + table(rows) + f"\n\n![bars]({name}.png)\n")


if __name__ == "__main__":
    main()
