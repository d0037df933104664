"""What a run leaves: the adapter or the model, the pretrained projector, pictures, the report, the closing words."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file, save_file

from fura_vlm.evaluation.heldout import blind_guess, exact_match
from fura_vlm.files import write_text
from fura_vlm.modelling.assemble import PROJECTOR_KEYS
from fura_vlm.training import report
from fura_vlm.training.callbacks import HeldOut
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import method_of
from fura_vlm.training.run_folder import FINISHED
from fura_vlm.training.trainer import FuraTrainer


def save(trainer: FuraTrainer, config: TrainConfig, run: Path) -> None:
    """The adapter as PEFT saves it or the whole model, gathered from all processes under ZeRO-3."""
    if method_of(config).adapter is None:
        _save(trainer, run / "model")
    else:
        _save(trainer, run / "adapter", report.adapter_card(config, run.name))
    if config.method == "projector" and PartialState().is_main_process:
        _write_projector(run)


def _save(trainer: FuraTrainer, folder: Path, card: str | None = None) -> None:
    """Written beside and renamed. PEFT's own card is a form that nobody has filled in."""
    building = folder.with_name(folder.name + ".tmp")
    trainer.save_model(str(building))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        if card is not None:
            write_text(building / "README.md", card)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)


def _write_projector(run: Path) -> None:
    """The pretrained projector out of its adapter, by the names of LLaVA-1.5's, for ``fura-vlm assemble``; that of
    another family has none, and is in the adapter."""
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    weights = {
        theirs: weight
        for theirs, ours in PROJECTOR_KEYS.items()
        for name, weight in trained.items()
        if name.endswith(f"multi_modal_projector.{ours}")
    }
    if weights.keys() != PROJECTOR_KEYS.keys():
        return
    building = run / "mm_projector.tmp"
    save_file(weights, building)
    os.replace(building, run / "mm_projector.safetensors")


def finish(config: TrainConfig, run: Path, held_out: HeldOut, console: Console) -> None:
    """Pictures, the report and the closing words."""
    rows = report.read_metrics(run / "metrics.jsonl")
    report.plot_curve(rows, run / "loss.png")
    lines = [f"# {run.name}", "", "![loss](loss.png)", ""]
    if held_out.questions:
        before, after = exact_match(held_out.before), exact_match(held_out.after)
        blind = blind_guess(held_out.after)
        report.plot_scores(before, after, blind, run / "scores.png")
        report.plot_samples(held_out.before, held_out.after, run / "samples.png")
        table = report.score_table(before, after, blind)
        lines += ["Held-out questions, exact match in percent:", "", table, "", "![scores](scores.png)", ""]
        lines += ["![samples](samples.png)", ""]
        console.print(Markdown("Held-out questions, exact match in percent\n\n" + table))
    write_text(run / FINISHED, "\n".join(lines))
    full = method_of(config).adapter is None
    console.print(f"{'model  ' if full else 'adapter'}     {run / ('model' if full else 'adapter')}")
    console.print(f"loss curve  {run / 'loss.png'}")
    if held_out.questions:
        samples = run / "samples.png"
        console.print(f"report      {run / FINISHED}, with sample answers in {samples}", soft_wrap=True)
    console.print("What next:")
    image = next((answer.image for answer in held_out.after if answer.image), "IMAGE")
    program = os.path.relpath(Path(sys.executable).with_name("fura-vlm"))
    commands = [["bash", "scripts/eval.sh", run], [program, "chat", image, "--model", run]]
    if not full:
        commands.append([program, "merge", run, run / "merged"])
    for command in commands:
        console.print("  " + shlex.join(map(str, command)), soft_wrap=True)
