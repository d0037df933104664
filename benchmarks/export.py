"""Memory and time of assembling and of merging a LLaVA of the 7B's widths, on the CPU.

    python benchmarks/export.py [--layers 32] [--shard 5GB] [--folder FOLDER] [--output FILE.md]

Parts with the published files and names (Vicuna in two pickled shards, CLIP, mm_projector.bin), random and with all
decoder layers alike, are assembled; then a FuRA adapter of every Linear is merged: from files (`fura-vlm merge`), and
by PEFT over the whole model in memory, for comparison. Each runs in a process of its own. Memory is what belongs to no
file, sampled every 5 ms, above what the process had before. Needs about 4 times the model's size on the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11_008, 32_000


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def make_parts(folder: Path, layers: int) -> None:
    """Folders ``vicuna`` and ``clip``, and ``mm_projector.bin``."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}
    drawn: dict[str, torch.Tensor] = {}  # once for all layers
    weights = {}
    for name, shape in shapes.items():
        kind = name.split(".", 3)[-1] if ".layers." in name else name
        if kind not in drawn:
            drawn[kind] = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
            drawn[kind] = drawn[kind].to(torch.float16)
        weights[name] = drawn[kind]
    vicuna = folder / "vicuna"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(vicuna)
    names = list(weights)
    index = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: weights[name].clone() for name in part}, vicuna / file)
        index |= dict.fromkeys(part, file)
    (vicuna / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"\u2581w{number}" for number in range(VOCABULARY - len(tokens))]
    LlamaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(vicuna)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    CLIPVisionModel(vision).to(torch.float16).save_pretrained(folder / "clip")
    projector = {"0": (HIDDEN, 1024), "2": (HIDDEN, HIDDEN)}
    torch.save(
        {f"model.mm_projector.{n}.weight": 0.02 * torch.randn(shape) for n, shape in projector.items()}
        | {f"model.mm_projector.{n}.bias": torch.zeros(HIDDEN) for n in projector},
        folder / "mm_projector.bin",
    )


def make_adapter(folder: Path, layers: int) -> None:
    """A FuRA adapter that does something: made over one layer and given to all of them."""
    from peft import get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from fura_vlm.modelling.load import load_family
    from fura_vlm.training.config import TrainConfig
    from fura_vlm.training.methods import adapter_config

    config = LlavaConfig.from_pretrained(folder / "llava")
    config.text_config.num_hidden_layers = 1
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", config=config, dtype=torch.bfloat16)
    recipe = TrainConfig(model_name_or_path=str(folder / "llava"), mm_projector="frozen")
    model = get_peft_model(
        model.requires_grad_(False), adapter_config(recipe, load_family(str(folder / "llava")), model)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    one = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = {
        name.replace(".layers.0.", f".layers.{n}."): weight.clone()
        for n in range(layers)
        for name, weight in one.items()
    }
    save_file(names, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    file = folder / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    prints = settings["base_fingerprint"]
    settings["base_fingerprint"] = {
        name.replace(".layers.0.", f".layers.{n}."): value for n in range(layers) for name, value in prints.items()
    }
    settings["base_model_name_or_path"] = str(folder / "llava")
    file.write_text(json.dumps(settings))


def assemble_it(folder: Path, shard: str) -> None:
    from fura_vlm.modelling.assemble import assemble
    from fura_vlm.modelling.config import AssembleConfig

    parts = {
        "mm_projector": folder / "mm_projector.bin",
        "language_model": folder / "vicuna",
        "vision_tower": folder / "clip",
    }
    given = {name: str(path) for name, path in parts.items()}
    assemble(AssembleConfig(output_dir=str(folder / "llava"), max_shard_size=shard, **given))


def merge_files(folder: Path, shard: str) -> None:
    from fura_vlm.modelling.config import MergeConfig
    from fura_vlm.modelling.merge import merge

    merge(MergeConfig(model=str(folder / "adapter"), output_dir=str(folder / "merged"), max_shard_size=shard))


def merge_whole(folder: Path, shard: str) -> None:
    from peft import PeftModel

    import fura_vlm  # noqa: F401
    from fura_vlm.modelling.load import load_base, load_family

    model = PeftModel.from_pretrained(load_base(str(folder / "llava"), torch.bfloat16), str(folder / "adapter"))
    model.merge_and_unload(safe_merge=True).save_pretrained(folder / "whole", max_shard_size=shard)
    load_family(str(folder / "llava")).processor.save_pretrained(folder / "whole")


TASKS = {"assemble": assemble_it, "merge from files": merge_files, "merge in memory (PEFT)": merge_whole}


def measured(task: str, folder: Path, shard: str) -> None:
    """Prints peak bytes and seconds of a task; its libraries are imported before."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import fura_vlm.modelling.assemble
    import fura_vlm.modelling.merge  # noqa: F401

    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    before, started = anonymous(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    TASKS[task](folder, shard)
    done.set()
    watcher.join()
    print("MEASURED", peak - before, time.perf_counter() - started)


def largest_difference(one: Path, other: Path) -> float:
    """Of two models' weights, relative to the largest of each weight."""
    from fura_vlm.modelling.shards import WeightFiles

    files = WeightFiles(str(one), "LLaVA"), WeightFiles(str(other), "LLaVA")
    largest = 0.0
    for name in files[0].tensors:
        a, b = (file.read(name).float() for file in files)
        largest = max(largest, ((a - b).abs().max() / a.abs().max()).item())
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard", default="5GB", help="size of the files that are written")
    parser.add_argument("--folder", type=Path, help="where to make the models; a temporary one by default")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return measured(args.task, args.folder, args.shard)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_parts(folder, args.layers)
        rows = []
        for task in args.tasks:
            if task != "assemble" and not (folder / "adapter").exists():
                make_adapter(folder, args.layers)
            command = [sys.executable, __file__, "--task", task, "--folder", str(folder), "--shard", args.shard]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                rows.append(f"| {task} | failed | | |")
                continue
            peak, seconds = map(float, done.stdout.partition("MEASURED ")[2].split())
            if task == "assemble":
                size = sum(file.stat().st_size for file in (folder / "llava").glob("*.safetensors"))
            rows.append(f"| {task} | {peak / 2**30:.2f} | {peak / size:.3f} | {seconds:.1f} |")
        lines = [
            f"# Assembling and merging a LLaVA of the 7B's widths, {args.layers} layers",
            "",
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}, {size / 2**30:.2f} GiB of weights in bfloat16.",
            f"`python benchmarks/export.py --layers {args.layers} --shard {args.shard}`",
            "",
            "| | memory, GiB | of the model | seconds |",
            "|---|---:|---:|---:|",
            *rows,
        ]
        if (folder / "merged").exists() and (folder / "whole").exists():
            difference = largest_difference(folder / "merged", folder / "whole")
            lines += ["", f"The two merged models differ by at most {difference:.1e} of a weight's largest entry."]
        print("\n".join(lines))
        if args.output:
            args.output.write_text("\n".join(lines) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
