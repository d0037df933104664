"""What a run of training by reward writes for people: the curve of the reward, a table, sample answers."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from rich.console import Console

from fura_vlm.files import whole_file, write_text
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.tables import Table, show
from fura_vlm.training.methods import method_of
from fura_vlm.training.report import read_metrics
from fura_vlm.training.run_folder import FINISHED

SHARE = 0.1  # of the steps, at the beginning and at the end, that are compared
LONGEST = 1500  # letters of a sample answer

ROWS = {
    "reward": ("reward", 3, 1),
    "groups whose answers all had the same reward, %": ("frac_reward_zero_std", 1, 100),
    "answers in which nothing could be read, %": ("unread", 1, 100),
    "answers that were cut off, %": ("completions/clipped_ratio", 1, 100),
    "tokens of an answer": ("completions/mean_length", 0, 1),
    "entropy of a token": ("entropy", 3, 1),
}
"""What the table says: the metric, the digits after the point, and what it is multiplied by."""


def write_report(config: GrpoConfig, run: Path, said: str, console: Console) -> None:
    """Curve, report and closing words.

    Args:
        said: what was said of a reward that was the same for all answers, or "".
    """
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "reward" in row]
    plot_reward(rows, run / "reward.png")
    table = begin_and_end(rows)
    answers = config.prompts_per_step * config.num_generations
    unread = round(answers * sum(row["unread"] for row in rows) / len(rows) * config.max_steps)
    total = answers * config.max_steps
    counted = f"Of {total:,} answers {unread:,} had nothing in them that could be compared; they have reward 0."
    lines = [f"# {run.name}", "", "![reward](reward.png)", "", table.markdown(), "", counted, ""]
    lines += [said, ""] if said else []
    lines += _samples(read_metrics(run / "solutions.jsonl"))
    write_text(run / FINISHED, "\n".join(lines))
    show([table, counted])
    full = method_of(config).adapter is None
    console.print(f"{'model  ' if full else 'adapter'}      {run / ('model' if full else 'adapter')}")
    console.print(f"reward curve {run / 'reward.png'}")
    console.print(f"report       {run / FINISHED}, with sample answers; all of them: {run / 'solutions.jsonl'}")
    console.print("What next:")
    program = os.path.relpath(Path(sys.executable).with_name("fura-vlm"))
    evaluates = ["bash", "scripts/eval.sh"] if Path("scripts/eval.sh").is_file() else [program, "eval"]
    suite = ["--suite", "math", "--data", "FOLDER"] if config.reward == "math" else []
    commands = [[*evaluates, run, *suite]]
    if not full:
        commands.append([program, "merge", run, run / "merged"])
    for command in commands:
        console.print("  " + shlex.join(map(str, command)), soft_wrap=True)


def begin_and_end(rows: list[dict]) -> Table:
    """The means of the first and of the last tenth of the logged steps."""
    some = max(1, round(SHARE * len(rows)))
    parts = rows[:some], rows[-some:]
    head = ["", *(f"steps {part[0]['step']} to {part[-1]['step']}" for part in parts)]
    table = []
    for name, (key, digits, factor) in ROWS.items():
        means = [factor * sum(row[key] for row in part) / len(part) for part in parts]
        table.append([name, *(f"{mean:.{digits}f}" for mean in means)])
    return Table(head, table)


def _samples(rows: list[dict]) -> list[str]:
    """A question of the first step and one of the last, each with its best and its worst answer."""
    lines = []
    for row in rows[:1] + rows[1:][-1:]:
        lines += [f"## Step {row['step']}", "", "Question:", "", *_quoted(row["question"]), ""]
        lines += [f"Expected: {row['expected']}", ""]
        ordered = sorted(row["answers"], key=lambda answer: -answer["reward"])
        for answer in ordered[:1] + ordered[1:][-1:]:
            lines += [f"Answer with reward {answer['reward']:g}:", "", *_quoted(answer["text"]), ""]
    return lines


def _quoted(text: str) -> list[str]:
    cut = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return ["```text", *cut.replace("```", "'''").splitlines(), "```"]


def plot_reward(rows: list[dict], path: Path) -> None:
    """The reward of each step and its running mean, and the length of the answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, rewards = [row["step"] for row in rows], [row["reward"] for row in rows]
    width = max(1, round(SHARE * len(rows)))
    means = [sum(rewards[max(0, n - width + 1) : n + 1]) / min(width, n + 1) for n in range(len(rewards))]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(steps, rewards, ".", color="#1f5fc8", alpha=0.35, label="a step")
    axis.plot(steps, means, color="#1f5fc8", linewidth=1.8, label=f"mean of the last {width}")
    axis.set(xlabel="step", ylabel="mean reward of the answers", title="Training by reward")
    axis.set_ylim(0, max([*rewards, 0.01]) * 1.1)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", frameon=False)
    length = axis.twinx()
    tokens = [row["completions/mean_length"] for row in rows]
    length.plot(steps, tokens, color="#f58214", linewidth=1, linestyle="--")
    length.set_ylabel("tokens of an answer", color="#f58214")
    length.set_ylim(bottom=0)
    with whole_file(path) as building:
        figure.savefig(building, dpi=120, format="png")
    plt.close(figure)
