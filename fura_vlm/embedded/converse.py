"""Talks with a model about held-out scenes in plain words and counts the good answers: ``bash scripts/converse.sh``.

Each conversation has six questions, one of each kind, in phrasings that training does not have; the model's own answers
stay in the conversation. :mod:`fura_vlm.embedded.judge` says which answers are good.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from fura_vlm.data.images import load_image
from fura_vlm.embedded.conversations import KINDS, Asked, held_out_conversations
from fura_vlm.embedded.judge import is_good
from fura_vlm.embedded.scenes import Scene, draw
from fura_vlm.evaluation.generation import written
from fura_vlm.families.base import Family
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.modelling.load import load_any


@dataclass(frozen=True)
class Said:
    """One question of a conversation with the model's answer, and whether it is a good one."""

    scene: Scene
    asked: Asked
    answer: str
    good: bool


@torch.no_grad()
def converse(
    model, family: Family, seed: int = 0, number: int = 50, max_new_tokens: int = 96, progress: bool = True
) -> list[list[Said]]:
    """``number`` conversations, answered greedily, all of them side by side.

    Args:
        model: as it is or within a PEFT model, where it is to run.
        family: that of the model.
        seed: gives other scenes and phrasings.
    """
    conversations = list(held_out_conversations(seed, number))
    said: list[list[Said]] = [[] for _ in conversations]
    with tempfile.TemporaryDirectory() as folder:
        histories = []
        for place, (scene, _) in enumerate(conversations):
            path = Path(folder) / f"{place}.png"
            draw(scene).save(path)
            histories.append((Picture(str(path)),))
        messages: list[list[Message]] = [[] for _ in conversations]
        for turn in tqdm(range(len(KINDS)), desc="conversations", disable=not progress, leave=False):
            inputs = []
            for place, (_, asked) in enumerate(conversations):
                picture = (*histories[place], Text("\n")) if turn == 0 else ()
                messages[place].append(Message("user", (*picture, Text(asked[turn].question))))
                inputs.append(family.inputs(tuple(messages[place]), [load_image(histories[place][0].source)]))
            texts = written(model, family, inputs, do_sample=False, max_new_tokens=max_new_tokens)
            for place, ((scene, asked), text) in enumerate(zip(conversations, texts, strict=True)):
                text = text.strip()
                messages[place].append(Message("assistant", (Text(text or " "),)))
                said[place].append(Said(scene, asked[turn], text, is_good(scene, asked[turn], text)))
    return said


def shares(said: list[list[Said]]) -> dict[str, float]:
    """The share of good answers by kind, and ``"all"``."""
    answers = [one for conversation in said for one in conversation]
    table = {kind: sum(one.good for one in answers if one.asked.kind == kind) / len(said) for kind in KINDS}
    return table | {"all": sum(one.good for one in answers) / len(answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a run's folder, an adapter or a model, e.g. runs/tiny-fura")
    parser.add_argument("--number", type=int, default=50, help="conversations (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="conversations to print (default 3)")
    args = parser.parse_args()
    model, family = load_any(args.model)
    if torch.cuda.is_available():
        model = model.cuda()
    said = converse(model.eval(), family, args.seed, args.number)
    for conversation in said[: args.show]:
        for one in conversation:
            print(f"{'' if one.good else 'X '}> {one.asked.question}\n  {one.answer}")
        print()
    print("| kind | good answers |\n|---|---:|")
    for kind, share in shares(said).items():
        print(f"| {kind.replace('_', ' ')} | {100 * share:.1f} |")


if __name__ == "__main__":
    main()
