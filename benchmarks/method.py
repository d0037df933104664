"""Step time, memory and size of fine-tuning methods, side by side in one run.

    python benchmarks/method.py --size llama-4       4 layers of Llama-7B, 16 x 1024 tokens (one GPU)
    python benchmarks/method.py --size llama-7b      all 32 layers, 1 x 2048 tokens, with checkpointing (one GPU)
    python benchmarks/method.py --size small         4 layers of 512, float32 (a CPU)

A step is forward, backward and AdamW on random weights, random input states and a random gradient of the output: a
loss would take time and memory of its own, the same for every method. "frozen base" trains nothing and sends gradients
to the input only: no method over a frozen base can be faster. PEFT's LoRA keeps its matrices in float32 unless told
otherwise; it is measured so, as transformers' Trainer runs it (under autocast), and with all of it in bfloat16, as
DeepSpeed runs it. Products of float32 may use TF32, as in the recipe. The compiler of each decoder layer may compute
cheap operations again rather than keep their results (--budget below 1), for every method alike.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch._functorch import config as compiler
from transformers import LlamaConfig, LlamaModel

from fura_vlm.fura import FuraConfig


@dataclass
class Size:
    """A model and a batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int
    tokens: int
    checkpointing: bool = False


SIZES = {
    "small": Size(512, 1408, 4, 8, 4, 256),
    "llama-4": Size(4096, 11008, 4, 32, 16, 1024),
    "llama-7b": Size(4096, 11008, 32, 32, 1, 2048, checkpointing=True),
}
BFLOAT16 = ", bfloat16"
AUTOCAST = ", autocast"
METHODS = {
    "frozen base": None,
    "FuRA": FuraConfig(target_modules="all-linear"),
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


class Run:
    """One method on the device, ready to step."""

    def __init__(self, method: str, size: Size, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.method, self.size, self.device, self.dtype = method, size, device, dtype
        base = self._base(method.startswith("Q"))
        _wait(device)
        started = time.perf_counter()
        if method in ("frozen base", "full"):
            self.model = base.requires_grad_(method == "full")
        else:
            self.model = get_peft_model(
                base, copy.deepcopy(METHODS[method]), autocast_adapter_dtype=not method.endswith(BFLOAT16)
            )
        _wait(device)
        self.setup = time.perf_counter() - started
        self.model.train()
        if size.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            for layer in base.layers:
                layer.compile()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda") if trained else None
        torch.manual_seed(1)
        shape = (size.batch, size.tokens, size.hidden)
        self.inputs = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        self.gradient = torch.randn(shape, device=device, dtype=dtype) / self.inputs.numel()

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
        torch.manual_seed(0)
        with self.device:
            model = LlamaModel(config).to(self.dtype)
        if quantized:
            _quantize(model, self.dtype)
        return model.requires_grad_(False)

    def step(self) -> float:
        """One training step; returns its seconds."""
        _wait(self.device)
        started = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.method.endswith(AUTOCAST)):
            output = self.model(inputs_embeds=self.inputs).last_hidden_state
        output.backward(self.gradient.to(output.dtype))
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.inputs.grad = None
        _wait(self.device)
        return time.perf_counter() - started

    def adapter(self) -> tuple[float, float, float] | None:
        """Size of the saved adapter in MiB, seconds to load it, largest relative difference of outputs once merged."""
        if not isinstance(self.model, PeftModel):
            return None
        self.model.eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            self.model.save_pretrained(folder)
            mebibytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**20
            base = self._base(self.method.startswith("Q"))
            started = time.perf_counter()
            loaded = PeftModel.from_pretrained(base, folder).eval()
            _wait(self.device)
            seconds = time.perf_counter() - started
            few = self.inputs[:1, :64].detach()
            expected = loaded(inputs_embeds=few).last_hidden_state.float()
            merged = loaded.merge_and_unload()(inputs_embeds=few).last_hidden_state.float()
        return mebibytes, seconds, ((merged - expected).norm() / expected.norm()).item()


def _quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Puts 4-bit layers (NF4, double quantisation) in the place of the linear ones, as transformers does in loading."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        small = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        small.weight = weight.to(layer.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small)
    model.is_loaded_in_4bit = True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(method: str, size: Size, device: torch.device, dtype: torch.dtype, compiled: bool, steps: int) -> dict:
    """A row of the table for one method, alone on the device."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    run = Run(method, size, device, dtype, compiled)
    for _ in range(3):
        run.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(run.step() for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
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


def table(rows: list[dict]) -> str:
    """The rows as Markdown; ratios to the frozen base in the same form."""
    lines = [
        "| method | form | step, ms | of frozen base | tokens/s | peak, GiB | trained | set-up, s | adapter, MiB "
        "| load, s | merged, rel. diff. |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    limit = {row["compiled"]: row["seconds"] for row in rows if row["method"] == "frozen base"}
    for row in rows:
        form = "compiled" if row["compiled"] else "eager"
        peak = "" if row["peak"] is None else f"{row['peak']:.1f}"
        ratio = f"{row['seconds'] / limit[row['compiled']]:.3f}" if row["compiled"] in limit else ""
        adapter = "| | |" if row["adapter"] is None else "| {:.1f} | {:.2f} | {:.1e} |".format(*row["adapter"])
        lines.append(
            f"| {row['method']} | {form} | {1000 * row['seconds']:.1f} | {ratio} | {row['tokens_s']:,.0f} | {peak} "
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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if not m.startswith("Q")])
    parser.add_argument("--forms", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budget", type=float, default=1.0, help="the compiler's activation_memory_budget")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: as the size has it")
    parser.add_argument("--output", type=Path, help="folder for method-SIZE.md and .png")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32
    compiler.activation_memory_budget = args.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, form = SIZES[args.size], ""
    if args.checkpointing not in (None, size.checkpointing):
        size.checkpointing = args.checkpointing
        form = " --checkpointing" if args.checkpointing else " --no-checkpointing"
    rows = []
    for compiled in args.forms:
        for method in args.methods:
            try:
                rows.append(measure(method, size, device, dtype, compiled == "compiled", args.steps))
            except torch.OutOfMemoryError:
                print(f"{method}, {compiled}: out of memory", flush=True)
                continue
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = (
        f"# {args.size}: {size.layers} layers of {size.hidden}, {size.batch} x {size.tokens} tokens, {dtype}"
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
