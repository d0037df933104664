"""What the tests evaluate, and on what."""

from pathlib import Path

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import LlavaForConditionalGeneration

from fura_vlm import FuraConfig

BASE = "data/tiny-llava"
ROOT = Path(__file__).parents[2]


def make_adapter(folder: Path, seed: int = 0) -> Path:
    """An adapter that changes the answers: its trained parameters are drawn at random."""
    base = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(base, FuraConfig(target_modules=r".*language_model\..*\.(q_proj|v_proj|down_proj)"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def copy_of(benchmarks: Path, folder: Path, name: str, change) -> Path:
    """One of the benchmarks with its main file changed; the others as they are."""
    folder.mkdir()
    for other in benchmarks.iterdir():
        if other.name != name:
            (folder / other.name).symlink_to(other)
    (folder / name).mkdir()
    for source in (benchmarks / name).rglob("*"):
        target = folder / name / source.relative_to(benchmarks / name)
        if source.is_dir():
            target.mkdir()
        elif source.suffix == ".parquet":
            change(load_dataset("parquet", data_files=str(source), split="train")).to_parquet(target)
        else:
            target.write_bytes(source.read_bytes())
    return folder
