"""The attention of one token a row, run by Triton's interpreter, against its formula and transformers' own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fura_vlm.fura import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="this build of PyTorch comes without Triton")


@pytest.fixture(scope="module")
def reported():
    worker = Path(__file__).with_name("attention_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("case"): row for row in rows}


def test_each_row_sees_its_own_columns(reported):
    cases = {name: row for name, row in reported.items() if name.startswith("kernel")}
    assert len(cases) == 8
    for name, row in cases.items():
        assert row["error"] < (1e-3 if row["half"] else 2e-6), (name, row)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_are_those_of_transformers_attention(reported, name):
    row = reported[f"model {name}"]
    assert row["steps"] == 21 and row["error"] < 1e-5, row
