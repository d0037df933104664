"""Whole steps as a graph has them, in Triton's interpreter, against the model's own; and what tells a wrong one from a
rounded one."""

import re
from pathlib import Path

import pytest
import torch

from fura_vlm.decoding.graphs import check
from fura_vlm.fura import kernels


@pytest.fixture(scope="module")
def reported(interpreted):
    if kernels.triton is None:
        pytest.skip("this build of PyTorch comes without Triton")
    return interpreted(Path(__file__).with_name("graphs_worker.py"))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_that_come_and_go_are_those_of_the_model(reported, name):
    row = reported[f"changing {name}"]
    assert not row["failed"] and row["sizes"] == [1, 2, 4, 8]
    assert row["error"] < 1e-5, row


@pytest.mark.parametrize("model", ["float32", "float32, attention that hardly tells keys apart", "float16", "deep"])
def test_a_wrong_step_is_not_taken_for_rounding(reported, model):
    cases = {name.split(": ")[1]: row for name, row in reported.items() if name.startswith(f"fault {model}: ")}
    assert len(cases) == 6 and not cases.pop("none")["failed"]
    for fault, row in cases.items():
        assert row["failed"], fault
        (said,) = row["said"]
        differs, explained = (float(share) for share in re.findall(r"([\d.e+-]+) %", said))
        assert differs > explained, said


def test_the_chat_writes_what_generate_does(reported):
    for turn in ("first", "second"):
        row = reported[f"engine, {turn}"]
        assert all(row["same"]) and row["different"] == len(row["same"]) == 5
    assert row["recorded"] >= 3  # with each adapter, and without


def outputs(*shares):
    """Of two rows: what attention returned in two layers, and the logits; each moved by its share at random."""
    torch.manual_seed(0)
    states = [torch.randn(2, 1, 4, 64), torch.randn(2, 1, 4, 64), torch.randn(2, 512)]
    made = []
    for seed, share in enumerate(shares):
        torch.manual_seed(seed + 1)
        made.append([(s * (1 + by * torch.randn(s.shape))).bfloat16() for s, by in zip(states, share, strict=True)])
    return made


def test_differences_of_the_logits_are_measured_by_those_of_rounding():
    own, near, found = outputs((0, 0, 0), (0.002, 0.01, 0.04), (0.003, 0.02, 0.08))
    assert 0.4 < check(found, own, near) < 0.6


@pytest.mark.parametrize(
    "layer, words",
    [
        (0, "layer 1 of 2 differs by 5 % in row 1 of 2, where rounding explains 1.6 %"),
        (1, "layer 2 of 2"),
        (2, "its logits differ"),
    ],
)
def test_a_difference_beyond_that_is_named_with_its_size(layer, words):
    shares = [0.003, 0.02, 0.08]
    shares[layer] = (0.05, 0.1, 0.4)[layer]
    own, near, found = outputs((0, 0, 0), (0.002, 0.01, 0.04), shares)
    with pytest.raises(RuntimeError, match=words):
        check(found, own, near)


def test_one_wrong_row_of_many_is_seen_and_rows_beyond_are_not_looked_at():
    own, near, found = outputs((0, 0, 0), (0.002, 0.01, 0.04), (0.003, 0.02, 0.08))
    found = [torch.cat([states, torch.full_like(states, float("nan"))]) for states in found]
    check(found, own, near)
    found[1][1, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"layer 2 of 2 .* in row 2 of 2"):
        check(found, own, near)
