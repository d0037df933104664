"""Whether a server answers as the model does here, and if not, where the difference begins.

    transformers serve models/mine
    python benchmarks/served.py models/mine http://localhost:8000 [--model NAME] [--questions 20]

Scenes of several shapes, each asked about greedily, here (float32 on a CPU, else in the GPU's dtype) and there. The
lengths of the prompts are compared first: where they differ, the server's chat template or its beginning of a text is
another, and answers cannot be equal. Where they are equal and answers are not, pixels or the dtype differ. Exit status
1 if a length differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys

from PIL import Image

from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.evaluation.generation import Answerer, Question, messages_of
from fura_vlm.evaluation.served import ServedAnswerer, ServedSource
from fura_vlm.evaluation.source import find_model
from fura_vlm.remote.server import Server, message

ASKED = "What is in this picture?"
ARGUMENTS = {"max_new_tokens": 24, "do_sample": False, "until": []}


def scenes(number: int) -> list[Image.Image]:
    """Some as they are, some wide, some tall, some large."""
    made = [draw(make_scene(11, "eval", each, with_sign=True)) for each in range(number)]
    factors = itertools.cycle([(1, 1), (2, 1), (1, 3), (5, 5)])
    return [each.resize((w * each.width, h * each.height)) for each, (w, h) in zip(made, factors, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("server")
    parser.add_argument("--model", help="by default the folder's name as it was given")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--server_key")
    options = parser.parse_args()

    name, server = options.model or options.folder, Server(options.server, options.server_key)
    model, family, dtype = find_model(options.folder).place()
    shown = scenes(options.questions)
    here = [len(family.inputs(messages_of(family, ASKED, 1), [picture])["input_ids"][0]) for picture in shown]
    there = [server.wait(server.prompt_length(name, message("user", ASKED, [picture]))) for picture in shown]
    equal = sum(a == b for a, b in zip(here, there, strict=True))
    print(f"prompts of the same length: {equal} of {len(shown)} (the first is {here[0]} here and {there[0]} there)")

    questions = [Question(f"scene {n}", ASKED, lambda each=each: [each], ARGUMENTS) for n, each in enumerate(shown)]
    said: list[dict[int, str]] = [{}, {}]
    for batch in Answerer(model, family, dtype, 4).answers(questions):
        said[0] |= batch
    for batch in ServedAnswerer(ServedSource(server, name, sees=True), 4).answers(questions):
        said[1] |= batch
    same = sum(said[0][number] == said[1][number] for number in said[0])
    print(f"the same answers: {same} of {len(shown)}")
    for number in sorted(said[0]):
        if said[0][number] != said[1][number]:
            print(f"  scene {number}, {shown[number].size}")
            print(f"    here   {said[0][number]!r}\n    there  {said[1][number]!r}")
    sys.exit(equal < len(shown))


if __name__ == "__main__":
    main()
