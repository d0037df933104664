"""What happens beside the training by reward: sample answers are kept, and a reward that says nothing is noticed."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from fura_vlm.reinforcement.rewards import Reward
from fura_vlm.training.callbacks import MetricsFile

PATIENCE = 5
"""Logged steps in a row without any difference of rewards, after which it is said."""


class SolutionsFile(MetricsFile):
    """Appends to ``solutions.jsonl`` the answers to one question of each step that is logged; a resumed run drops the
    rows after its checkpoint."""

    def __init__(self, path: Path, resume_from: str | None, reward: Reward):
        super().__init__(path, resume_from)
        self.reward = reward

    def on_log(self, args, state, control, logs=None, **kwargs):
        answers, self.reward.recent = self.reward.recent, []
        if state.is_world_process_zero and answers:
            first = [each for each in answers if each.question is answers[0].question]
            row = {"step": state.global_step, "question": first[0].question.messages[-1].text}
            row |= {"expected": first[0].question.answer}
            self.write(row | {"answers": [{"text": each.text, "reward": each.reward} for each in first]})


class ConstantReward(TrainerCallback):
    """Says when the answers to each question had one reward for some steps: there is nothing to learn from then.

    Attributes:
        said: what was said, or "".
    """

    def __init__(self, console):
        self.console, self.said, self._rows = console, "", []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "frac_reward_zero_std" not in (logs or {}):
            return
        self._rows.append(logs)
        if not self.said and len(self._rows) >= PATIENCE:
            self._look(self._rows[-PATIENCE:])

    def on_train_end(self, args, state, control, **kwargs):
        if not self.said and self._rows:  # a short run
            self._look(self._rows[-PATIENCE:])

    def _look(self, rows: list[dict]) -> None:
        self.said = nothing_to_learn(rows)
        if self.said:
            self.console.print(self.said, style="yellow", soft_wrap=True)


def nothing_to_learn(rows: list[dict]) -> str:
    """What to change if in none of some logged steps two answers to a question had different rewards, or ""."""
    if any(row["frac_reward_zero_std"] < 1 for row in rows):
        return ""

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    if mean("reward") > 0.5:
        cause = "take harder questions"
    else:
        ways = ["easier questions", "a base that answers some of them, after a short fine-tuning on answers"]
        if mean("completions/clipped_ratio") > 0.5:
            ways.append(
                f"longer answers with --max_completion_length ({100 * mean('completions/clipped_ratio'):.0f} % are "
                "cut off)"
            )
        if mean("unread") > 0.5:
            ways.append(
                f"an --instruction that asks for the form that is read ({100 * mean('unread'):.0f} % of the answers "
                "name nothing that could be compared)"
            )
        cause = "take " + ", or ".join(ways)
    return (
        f"In the last {len(rows)} logged steps the answers to each question all had the same reward "
        f"({mean('reward'):.2f} on average), so nothing is learned: {cause}, or more answers to each question "
        "with --num_generations"
    )
