"""What a run writes for people: a table, a loss curve, bars, and sample answers as pictures."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from fura_vlm.evaluation.heldout import Answer, blind_guess, exact_match
from fura_vlm.families.base import Family, model_class
from fura_vlm.families.messages import Message, Text
from fura_vlm.files import whole_file, write_text
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import method_of
from fura_vlm.training.run_folder import FINISHED


def read_metrics(path: Path) -> list[dict]:
    """The rows of a ``metrics.jsonl``. A last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def score_table(before: dict[str, float], after: dict[str, float], blind: dict[str, float]) -> str:
    """A Markdown table of exact match in percent; the mean of the families is the last row."""
    lines = ["| family | blind guess | before | after | gain |", "|---|---:|---:|---:|---:|"]
    for family in after:
        b, a, g = (100 * scores[family] for scores in (before, after, blind))
        below = ", below the guess" if a < g else ""
        lines.append(f"| {family} | {g:.1f} | {b:.1f} | {a:.1f} | {a - b:+.1f}{below} |")
    return "\n".join(lines)


def below_the_guess(after: dict[str, float], blind: dict[str, float]) -> str:
    """A warning if the trained model answers worse than a blind guess; "" if it does not."""
    worse = [family for family in after if family != "mean" and after[family] < blind[family]]
    if not worse:
        return ""
    named = ", ".join(f"{kind} ({100 * after[kind]:.1f} %, the guess {100 * blind[kind]:.1f} %)" for kind in worse)
    return (
        "After training the answers are still worse than giving the most common answer to every question: "
        f"{named}. Likely causes: too few steps; a learning rate that is too low, or so high that the loss does not "
        "fall; answers that the model's tokenizer spells letter by letter (there is a warning before the training); or "
        "held-out questions asked in other words than those trained. Look at the loss curve and the sample answers"
    )


def write_report(
    config: TrainConfig, run: Path, before: list[Answer], after: list[Answer], time: str, console: Console
) -> None:
    """Pictures, the report and the closing words. ``time``: where it went."""
    rows = read_metrics(run / "metrics.jsonl")
    plot_curve(rows, run / "loss.png")
    lines = [f"# {run.name}", "", f"Time: {time}.", "", "![loss](loss.png)", ""]
    if after:
        scores = exact_match(before), exact_match(after), blind_guess(after)
        plot_scores(*scores, run / "scores.png")
        plot_samples(before, after, run / "samples.png")
        table = score_table(*scores)
        below = below_the_guess(scores[1], scores[2])
        lines += ["Held-out questions, exact match in percent:", "", table, "", *([below, ""] if below else [])]
        lines += ["![scores](scores.png)", ""]
        lines += ["![samples](samples.png)", ""]
        console.print(Markdown("Held-out questions, exact match in percent\n\n" + table))
        if below:
            console.print(below, style="yellow", soft_wrap=True)
    write_text(run / FINISHED, "\n".join(lines))
    full = method_of(config).adapter is None
    console.print(f"{'model  ' if full else 'adapter'}     {run / ('model' if full else 'adapter')}")
    console.print(f"loss curve  {run / 'loss.png'}")
    console.print(f"time        {time}", soft_wrap=True)
    if after:
        samples = run / "samples.png"
        console.print(f"report      {run / FINISHED}, with sample answers in {samples}", soft_wrap=True)
    console.print("What next:")
    image = next((answer.image for answer in after if answer.image), "IMAGE")
    program = os.path.relpath(Path(sys.executable).with_name("fura-vlm"))
    evaluates = ["bash", "scripts/eval.sh"] if Path("scripts/eval.sh").is_file() else [program, "eval"]  # a checkout
    commands = [[*evaluates, run], [program, "chat", image, "--model", run]]
    if not full:
        commands.append([program, "merge", run, run / "merged"])
    for command in commands:
        console.print("  " + shlex.join(map(str, command)), soft_wrap=True)


def adapter_card(config: TrainConfig, run: str, family: Family) -> str:
    """The README of the adapter of a run of this name, with the fields that model cards on the hub have."""
    name, base, model = config.method, config.model_name_or_path, model_class(family.config).__name__
    registers = "import fura_vlm  # registers FuRA with PEFT\n" if method_of(config).ours else ""
    if family.sees:
        pipeline, libraries, reads = "image-text-to-text", "Pillow, PEFT and transformers", "AutoProcessor"
        pillow = "from PIL import Image\n"
        asks = """turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=Image.open("PICTURE").convert("RGB"), text=prompt, return_tensors="pt")"""
    else:
        pipeline, libraries, reads, pillow = "text-generation", "PEFT and transformers", "AutoTokenizer", ""
        prompt = family.prompt([Message("user", (Text("What is this?"),))])
        special = family.adds_special_tokens([prompt])
        asks = f'inputs = processor({prompt!r}, add_special_tokens={special}, return_tensors="pt")'
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: {pipeline}
tags:
- {name}
---

# {run}

An adapter of {base}, trained with FuRA-VLM by the method {name}. With {libraries}:

```python
{registers}from peft import PeftModel
{pillow}from transformers import {model}, {reads}

base = {model}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "RUN/adapter").eval()
processor = {reads}.from_pretrained("RUN/processor")
{asks}
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""


def plot_curve(rows: list[dict], path: Path) -> None:
    """The loss and the learning rate over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logged = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in logged]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(steps, [row["loss"] for row in logged], color="#1f5fc8", linewidth=1.8)
    axis.set(xlabel="step", ylabel="loss on the answers' tokens", title="Training")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    rate.plot(steps, [row["learning_rate"] for row in logged], color="#f58214", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate", color="#f58214")
    rate.set_ylim(bottom=0)
    _save(figure, path)


def plot_scores(before: dict, after: dict, blind: dict, path: Path) -> None:
    """Bars by family: a blind guess, before, after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    series = (("blind guess", blind, "#b8b8b8"), ("before", before, "#f58214"), ("after", after, "#1f5fc8"))
    for shift, (name, scores, color) in enumerate(series):
        places = [n + (shift - 1) * 0.27 for n in range(len(after))]
        bars = axis.bar(places, [100 * scores[family] for family in after], 0.25, label=name, color=color)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(after)), list(after))
    axis.set(ylabel="exact match, %", ylim=(0, 108), title="Held-out questions")
    axis.legend(loc="upper right", ncols=3, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_samples(before: list[Answer], after: list[Answer], path: Path, number: int = 8) -> None:
    """Pictures with question, expected answer, and the answers before and after; families take turns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fura_vlm.data.images import load_image

    was = {answer.id: answer.predicted for answer in before}
    families = {}
    for answer in after:
        families.setdefault(answer.family, []).append(answer)
    turns = [answer for group in zip(*families.values(), strict=False) for answer in group if answer.image]
    shown = turns[:number]
    if not shown:
        return
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(3.2 * columns, 4.8 * rows),
        squeeze=False,
        height_ratios=[3, 2] * rows,  # a picture, and below it what was asked and said
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, answer in enumerate(shown):
        row, column = divmod(place, columns)
        axes[2 * row, column].imshow(load_image(answer.image))
        question = answer.question.replace("<image>", "").strip()
        for instruction in ("a single word or phrase.", "the option's letter from the given choices directly."):
            question = question.partition(f"\nAnswer the question using {instruction}")[0]
            question = question.partition(f"\nAnswer with {instruction}")[0]
        color = "#2c962c" if answer.correct else "#d62728"
        text = axes[2 * row + 1, column].text
        asked = "\n".join(_wrapped(line) for line in question.splitlines())
        text(0, 1, asked, va="top", fontsize=9, weight="bold")
        said = f"before: {textwrap.shorten(was.get(answer.id, ''), 60, placeholder=' …')}"
        replies = (_wrapped(said), _wrapped(f"after: {answer.predicted}"), _wrapped(f"expected: {answer.expected}"))
        text(0, 0.97 - 0.09 * (asked.count("\n") + 1), "\n".join(replies), va="top", fontsize=9, color=color)
    _save(figure, path)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 42)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    with whole_file(path) as building:
        figure.savefig(building, dpi=120, format="png")
    plt.close(figure)
