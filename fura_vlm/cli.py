"""The command line, ``fura-vlm``. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import difflib
import re
import sys

from jsonargparse import ActionConfigFile, ArgumentParser

from fura_vlm import __version__
from fura_vlm.training.config import TrainConfig


class Parser(ArgumentParser):
    """jsonargparse's parser; an unknown key is answered with the nearest one that exists."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        known = [name.rpartition(".")[2] for name in vars(self.get_defaults(skip_validation=True)) if name != "config"]
        for unknown in re.findall(r"--([\w.]+)|[Kk]ey ['\"]([\w.]+)['\"]", message):
            word = next(filter(None, unknown)).rpartition(".")[2]
            near = difflib.get_close_matches(word, known, n=1)
            if word not in known and near:
                message += f"\nDid you mean {near[0]!r}?"
                break
        super().error(message, ex)


def build_parser() -> Parser:
    parser = Parser(prog="fura-vlm", description="Instruction-tune vision-language models with FuRA.")
    parser.add_argument("--version", action="version", version=f"fura-vlm {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)

    train = Parser(description="Fine-tune a LLaVA on a visual instruction mixture (start it with scripts/finetune_fura.sh).")
    train.add_argument("--config", action=ActionConfigFile, help="a recipe, such as scripts/configs/tiny.yaml")
    train.add_class_arguments(TrainConfig)
    train.add_argument("--local_rank", type=int, default=-1, help="set by the DeepSpeed launcher")
    commands.add_subcommand("train", train)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    print(options)


if __name__ == "__main__":
    main()
