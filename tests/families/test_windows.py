"""Attention within windows: the tower's features and gradients as with transformers' own call for each window."""

import copy

import pytest
import torch
from family_talk import PICTURES
from transformers import AutoModelForImageTextToText

from fura_vlm.families.windows import NAME, use_windows


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def name(request) -> str:
    return request.param


def features(tower, inputs) -> torch.Tensor:
    found = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return found.last_hidden_state


@pytest.fixture
def towers(folder, family):
    """The tower as transformers makes it, one that uses windows, and two pictures of different sizes."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = family.parts(model).tower
    ours = copy.deepcopy(theirs)
    ours.config = copy.deepcopy(theirs.config)
    for module in ours.modules():
        if getattr(module, "config", None) is not None:
            module.config = ours.config
    use_windows(ours)
    assert theirs.config._attn_implementation == "sdpa" and ours.config._attn_implementation == NAME
    return theirs, ours, family.join([family.pixels([picture]) for picture in (PICTURES[1], PICTURES[3])])


def test_features_and_gradients_are_transformers_own(towers):
    theirs, ours, inputs = towers
    expected, found = features(theirs, inputs), features(ours, inputs)
    assert torch.equal(found, expected) and found.abs().max() > 0
    for result in (expected, found):
        result.square().sum().backward()
    for (parameter, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), parameter
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=parameter)


def test_another_implementation_is_left_alone(towers):
    theirs, _, _ = towers
    theirs.config._attn_implementation = "eager"
    use_windows(theirs)
    assert theirs.config._attn_implementation == "eager"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_one_call_on_a_gpu(towers):
    """In bfloat16 both round; the one call may be no further from float32 than the many."""
    theirs, ours, inputs = towers
    exact = features(theirs, inputs)
    inputs = {key: value.cuda() for key, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    errors = [
        (features(tower.cuda().bfloat16(), inputs).float().cpu() - exact).abs().max().item() for tower in (theirs, ours)
    ]
    assert errors[1] < 2 * errors[0]
