"""The attention of one token a row, run by Triton's interpreter, against its formula and transformers' own."""

from pathlib import Path

import pytest

from fura_vlm.fura import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="this build of PyTorch comes without Triton")


@pytest.fixture(scope="module")
def reported(interpreted):
    return interpreted(Path(__file__).with_name("attention_worker.py"))


def test_each_row_sees_its_own_columns(reported):
    cases = {name: row for name, row in reported.items() if name.startswith("kernel")}
    assert len(cases) == 8
    for name, row in cases.items():
        assert row["error"] < (1e-3 if row["half"] else 2e-6), (name, row)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_are_those_of_transformers_attention(reported, name):
    row = reported[f"model {name}"]
    assert row["steps"] == 21 and row["error"] < 1e-5, row
