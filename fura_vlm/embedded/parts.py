"""Parts of a LLaVA with a language model of its own, for ``scripts/build_smol_llava.sh``: the embedded world's vision
tower, and captions to pretrain a projector on.

    python -m fura_vlm.embedded.parts tower FOLDER
    python -m fura_vlm.embedded.parts captions FOLDER --number 20000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from fura_vlm.embedded.captions import caption
from fura_vlm.embedded.embedded import EmbeddedError, is_made
from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.errors import FuraVLMError
from fura_vlm.files import whole_folder
from fura_vlm.modelling.load import load_base
from fura_vlm.shipped import MODEL, SHARE

VERSION = 1  # raised when the same settings give other captions
FIRST_SCENE = 1_000_000  # the embedded mixture has those below
SENTENCES = 3


def write_tower(folder: str | Path) -> None:
    """Writes the vision tower of the embedded model, a CLIP of five layers that was pretrained with it on captions of
    scenes, in float32.

    Raises:
        EmbeddedError: the folder exists.
    """
    if Path(folder).exists():
        raise EmbeddedError(f"{folder} exists: remove it, or name another folder")
    load_base(str(SHARE / MODEL), torch.float32).model.vision_tower.save_pretrained(folder)


def write_captions(folder: str | Path, number: int = 20_000, seed: int = 0) -> bool:
    """Writes ``captions.json``, LLaVA's records of a picture and a few true sentences each, and ``images/``; returns
    whether it did. They are there already if they were made with the same settings.

    Raises:
        EmbeddedError: the number is below 1, or the folder holds something else.
    """
    if number < 1:
        raise EmbeddedError("number must be at least 1")
    recipe = json.dumps({"version": VERSION, "captions": number, "seed": seed}, indent=1)
    if is_made(Path(folder), recipe, "captions"):
        return False
    with whole_folder(Path(folder)) as building:
        (building / "images").mkdir()
        records = []
        for index in tqdm(range(number), desc="captions", mininterval=1):
            scene = make_scene(seed, "train", FIRST_SCENE + index)
            said = caption(scene, random.Random(f"{seed}/caption/{index}"), SENTENCES)
            name = f"images/{index}.png"
            draw(scene).save(building / name)
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": said}]
            records.append({"id": f"caption-{index}", "image": name, "conversations": turns})
        (building / "captions.json").write_text(json.dumps(records))
        (building / "recipe.json").write_text(recipe)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tower", "captions"])
    parser.add_argument("folder")
    parser.add_argument("--number", type=int, default=20_000, help="of captions")
    arguments = parser.parse_args()
    try:
        if arguments.part == "tower":
            write_tower(arguments.folder)
        else:
            write_captions(arguments.folder, arguments.number)
    except FuraVLMError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
