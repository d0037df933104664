"""The commands of ``fura-vlm`` and their settings. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import difflib
import re
from argparse import SUPPRESS

from jsonargparse import ActionConfigFile, ArgumentParser

from fura_vlm import __version__
from fura_vlm.chat.config import ChatConfig
from fura_vlm.data.config import DownloadConfig, VerifyConfig
from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded
from fura_vlm.evaluation.config import CompareConfig, EvalConfig
from fura_vlm.extras import require
from fura_vlm.modelling.config import AssembleConfig, InspectConfig, MergeConfig, SmolLM2Config
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.shipped import MODEL, copy_model, find, named
from fura_vlm.training.config import PlanConfig, TrainConfig


class Parser(ArgumentParser):
    """jsonargparse's parser; an unknown key is answered with the nearest one that exists, and never guessed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> None:
        known = _keys(self)
        for unknown in re.findall(r"(?:--|option ['\"])([\w.]+)", message):
            near = difflib.get_close_matches(unknown, known, n=1)
            if unknown not in known and near:
                message = f"there is no {unknown!r}. Did you mean {near[0]!r}?"
                break
        super().error(message, ex)


def build_parser() -> Parser:
    parser = Parser(prog="fura-vlm", description="Instruction-tune vision-language models with FuRA.")
    parser.add_argument("--version", action="version", version=f"fura-vlm {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)

    def command(
        group,
        name: str,
        config: type,
        positional: tuple[str, ...] = (),
        optional: dict[str, str] | None = None,
        flags: dict[str, str] | None = None,
    ) -> Parser:
        """Fields in ``optional`` are positional and may be left out; ``flags`` need no value. Both with their help."""
        optional, flags = optional or {}, flags or {}
        title = (config.__doc__ or "").split("\n")[0]
        words = " ".join([word.upper() for word in positional] + [f"[{word.upper()}]" for word in optional])
        usage = f"fura-vlm {name} {words}{' ' if words else ''}[--config FILE.yaml] [--KEY VALUE ...]"
        recipes = f", or the name of a recipe: {', '.join(named('recipe'))}" if name in ("train", "grpo") else ""
        sub = Parser(description=title, usage=usage)
        sub.add_argument(
            "--config", action=ActionConfigFile, help="a YAML file with any of the settings below" + recipes
        )
        sub.add_class_arguments(config, as_positional=True, skip={*optional, *flags})
        for key, text in optional.items():
            # Without SUPPRESS, one that is left out would override what --config says with None.
            sub.add_argument(key, nargs="?", type=str, default=SUPPRESS, help=text)
        for key, text in flags.items():
            sub.add_argument(f"--{key}", action="store_true", help=text)
        group.add_subcommand(name.split()[-1], sub, help=title)
        return sub

    command(commands, "train", TrainConfig)
    command(commands, "grpo", GrpoConfig)
    command(commands, "plan", PlanConfig, ("recipe",))
    command(commands, "eval", EvalConfig, ("model",))
    second = {"second": "another one, on the same benchmarks; without it base and tuned model of FIRST are compared"}
    command(commands, "compare", CompareConfig, ("first",), second)
    image = {"image": "the picture to talk about in the terminal"}
    web = {"web": "open the chat in the browser", "share": "with --web: make a public link through Gradio's servers"}
    command(commands, "chat", ChatConfig, optional=image, flags=web)
    command(commands, "merge", MergeConfig, ("model", "output_dir"))
    projector = {"mm_projector": "LLaVA's mm_projector.bin, or what stage 1 leaves; without one it is new and random"}
    command(commands, "assemble", AssembleConfig, ("output_dir",), optional=projector)
    command(commands, "inspect", InspectConfig, ("model",))
    data = Parser(description="Prepare data sets.", usage="fura-vlm data NAME ...")
    commands.add_subcommand("data", data, help="Prepare data sets.")
    names = data.add_subcommands(dest="name", required=True)
    command(names, "data embedded", EmbeddedConfig)
    for mixture in ("llava-665k", "llava-558k"):
        command(names, f"data {mixture}", DownloadConfig).set_defaults(recipe=mixture)
    command(names, "data smollm2", SmolLM2Config)
    command(names, "data verify", VerifyConfig, ("data_path",))
    return parser


def _keys(parser) -> set[str]:
    """The names of all settings of a parser and of the commands below it."""
    names = set()
    for action in parser._actions:
        below = getattr(action, "choices", None)
        if isinstance(below, dict):
            names.update(*(_keys(sub) for sub in below.values()))
        else:
            names.add(action.dest)
    return names


def run(command: str, options: dict) -> None:
    """Does what was asked for."""
    if command == "train":
        from fura_vlm.training.train import train

        train(TrainConfig(**options))
    elif command == "grpo":
        from fura_vlm.reinforcement.train import grpo

        grpo(GrpoConfig(**options))
    elif command == "plan":
        from fura_vlm.plan.page import plan

        plan(PlanConfig(**options))
    elif command == "eval":
        from fura_vlm.evaluation.suite import evaluate

        config = EvalConfig(**options)
        if config.server is not None:
            require("server")
        evaluate(config)
    elif command == "compare":
        from fura_vlm.evaluation.compare import compare

        compare(CompareConfig(**options))
    elif command == "chat":
        config = ChatConfig(**options)
        if config.server is not None:
            require("server")
        if config.web:
            from fura_vlm.chat.server import serve

            serve(config)
        else:
            from fura_vlm.chat.terminal import chat

            chat(config)
    elif command == "merge":
        from fura_vlm.modelling.merge import merge

        merge(MergeConfig(**options))
    elif command == "assemble":
        from fura_vlm.modelling.assemble import assemble

        assemble(AssembleConfig(**options))
    elif command == "inspect":
        from fura_vlm.modelling.inspect import inspect

        inspect(InspectConfig(**options))
    elif command == "data embedded":
        wrote, copied = write_embedded(EmbeddedConfig(**options)), copy_model()
        print(f"The embedded mixture is in {options['output_dir']}" + (" (made before)" if not wrote else ""))
        if copied:
            print(f"The embedded model is in {MODEL}")
    elif command == "data smollm2":
        require("smollm2")
        from fura_vlm.modelling.smollm2 import smollm2

        made = smollm2(SmolLM2Config(**options))
        print(f"SmolLM2-135M-Instruct is in {options['output_dir']}" + ("" if made else " (made before)"))
    elif command == "data verify":
        from fura_vlm.data.verify import verify

        verify(VerifyConfig(**options))
    elif command.startswith("data llava-"):
        from fura_vlm.data.download import download

        download(DownloadConfig(**options))


def parse(arguments: list[str]) -> tuple[str, dict]:
    """The command, of one word or two, and its settings. What is typed overrides ``--config``, wherever that stands.

    Raises:
        ShippedError: ``train --config`` or ``grpo --config`` names a recipe that is not there.
    """
    words, rest, files = arguments[:1], arguments[1:], []
    if words == ["data"]:
        words, rest = arguments[:2], arguments[2:]
    for at in reversed(range(len(rest))):
        if rest[at] == "--config" or rest[at].startswith("--config="):
            size = 2 if rest[at] == "--config" else 1
            given = rest[at : at + size]
            if words in (["train"], ["grpo"]) and given != ["--config"]:
                given = [f"--config={find('recipe', given[-1].removeprefix('--config='))}"]
            files = given + files
            del rest[at : at + size]
    options = build_parser().parse_args(words + files + rest).as_dict()
    command = options.pop("command")
    options = options[command]
    if "name" in options:
        name = options.pop("name")
        command, options = f"{command} {name}", options[name]
    options.pop("config")
    return command, options
