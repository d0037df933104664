"""``generate`` with the loop of CUDA graphs, in Triton's interpreter, against ``generate`` as it is."""

import itertools
from pathlib import Path

import pytest
from family_models import BUILDERS

from fura_vlm.fura import kernels


@pytest.fixture(scope="module")
def reported(interpreted, tmp_path_factory):
    if kernels.triton is None:
        pytest.skip("this build of PyTorch comes without Triton")
    return interpreted(Path(__file__).with_name("loop_worker.py"), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("case", ["greedy", "fewer", "sampled"])
def test_every_family_writes_the_same(reported, name, case):
    row = reported[f"{name}, {case}"]
    assert row["same"] and not row["failed"] and row["graphs"]
    assert case == "fewer" or row["different"] > 1


def test_answers_that_end_at_different_places(reported):
    row = reported["ends"]
    assert row["same"] and len(row["lengths"]) > 2
    assert reported["ends again"]["same"] and not reported["ends again"]["failed"]


@pytest.mark.parametrize("name", ["fura", "lora"])
def test_what_is_trained_in_between_is_seen_and_the_graphs_stay(reported, name):
    for case in ("step 0", "step 1", "step 2", "trained"):
        assert reported[f"{name}, {case}"]["same"] and not reported[f"{name}, {case}"]["failed"], case
    answers = [reported[f"{name}, {case}"]["answers"] for case in ("step 0", "step 1", "step 2", "trained")]
    assert all(one != other for one, other in itertools.pairwise(answers))
    for case in ("step 1", "step 2", "trained"):
        assert reported[f"{name}, {case}, graphs"]["kept"], case


@pytest.mark.parametrize("name", ["fura", "lora"])
@pytest.mark.parametrize("case", ["base", "other", "moved"])
def test_graphs_of_another_adapter_or_of_other_memory_are_let_go(reported, name, case):
    row = reported[f"{name}, {case}"]
    assert row["same"] and not row["failed"]
    assert not reported[f"{name}, {case}, graphs"]["kept"]


def test_a_model_that_chooses_its_attention_itself_is_left_alone(reported):
    assert not reported["falcon"]["able"] and reported["falcon"]["attention"] == "sdpa"
