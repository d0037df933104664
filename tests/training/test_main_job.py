"""The main job as it is, and then a talk with the model: what the project promises of both, with room for other seeds
and processors. The README's run is well above these floors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fura_vlm.embedded.conversations import KINDS
from fura_vlm.embedded.converse import converse, shares
from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded
from fura_vlm.modelling.load import load_any

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("main-job")
    write_embedded(EmbeddedConfig(output_dir=str(folder / "embedded")))
    settings = {"data_path": "train.json", "eval_data_path": "eval.json"}
    subprocess.run(
        [sys.executable, "-m", "fura_vlm.cli", "train", "--config", "tiny", "--output_dir", str(folder / "run")]
        + [part for key, name in settings.items() for part in (f"--{key}", str(folder / "embedded" / name))],
        cwd=ROOT,
        check=True,
        timeout=3000,
    )
    return folder / "run"


def test_held_out_questions(run):
    answers = [json.loads(line) for line in (run / "answers-after.jsonl").read_text().splitlines()]
    right: dict[str, list[bool]] = {}
    for row in answers:
        kinds = [row["family"]]
        if row["family"] == "gqa" and re.search(r"\b(where|left|right|above|below)\b", row["question"].lower()):
            kinds.append("place and relation")
        for kind in kinds:
            right.setdefault(kind, []).append(row["predicted"].strip() == row["expected"])
    share = {kind: sum(marks) / len(marks) for kind, marks in right.items()}
    families = ("gqa", "pope", "textvqa", "scienceqa")
    assert {len(right[family]) for family in families} == {100} and len(right["place and relation"]) > 40
    assert sum(share[family] for family in families) / 4 >= 0.8, share
    assert min(share.values()) >= 0.7, share


def test_conversations_in_phrasings_that_training_does_not_have(run):
    model, family = load_any(str(run))
    good = shares(converse(model.eval(), family, seed=0, number=40, progress=False))
    assert set(good) == {*KINDS, "all"}
    assert good["all"] >= 0.75, good
