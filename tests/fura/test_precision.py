"""Adapters in 16 bits over weights of any spectrum: constructed ones, so that no machine's rounding decides."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fura_vlm.fura import FuraConfig, export_delta
from fura_vlm.fura.basis import block_delta, effective_values

OUT, SIZE = 48, 16

SPECTRA = {
    "well": torch.logspace(0, -1, SIZE),
    "one small": torch.cat([torch.linspace(1, 0.3, SIZE - 1), torch.tensor([1e-5])]),
    "falling": torch.logspace(0, -5, SIZE),
    "rank 5": torch.cat([torch.linspace(1, 0.5, 5), torch.zeros(SIZE - 5)]),
    "tiny": 1e-7 * torch.logspace(0, -1, SIZE),
    "tiny and falling": 1e-6 * torch.logspace(0, -5, SIZE),
    "zero": torch.zeros(SIZE),
    "large": 1e3 * torch.logspace(0, -5, SIZE),
}
POOR = ["one small", "falling", "rank 5", "tiny and falling", "large"]  # a small value beside a larger one


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def weight_of(name):
    """Two blocks of columns: one of the named spectrum, and a good one."""
    generator = torch.Generator().manual_seed(0)
    blocks = [
        orthonormal(OUT, SIZE, generator) * SPECTRA[kind].double() @ orthonormal(SIZE, SIZE, generator).T
        for kind in (name, "well")
    ]
    return torch.cat(blocks, dim=1)


def adapted(name, side="input", dtype=torch.float32, scale=0.02, **config):
    """One Linear with an adapter that has been trained: its FuraLinear, with the model around it."""
    weight = weight_of(name) if side == "input" else weight_of(name).T
    linear = nn.Linear(*weight.T.shape, bias=False, dtype=dtype)
    linear.weight.data.copy_(weight)
    config = FuraConfig(target_modules=["lin"], block_size=SIZE, train_side=side, **config)
    model = get_peft_model(nn.ModuleDict({"lin": linear}), config)
    layer = model.base_model.model["lin"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (layer.fura_dR["default"], layer.fura_ds["default"]):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, layer


def inputs(layer, dtype=torch.float32):
    return torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(2)).to(dtype)


def error(found, expected):
    assert torch.isfinite(found).all()
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_model_cast_after_its_adapter_was_made(name, dtype, side):
    """D is finite, and the answers are those of the adapter in float32, but for what the cast weight has lost: at most
    the change along the directions below its resolution, 0.02 of the largest singular value."""
    model, layer = adapted(name, side, scale=0.02 * min(1.0, max(SPECTRA[name].max().item(), 1e-3)))
    x = inputs(layer)
    with torch.no_grad():
        expected = layer(x)
        model.to(dtype)
        D = layer.delta("default")
        assert torch.isfinite(D).all() and torch.isfinite(D.to(dtype)).all()
        found = layer(x.to(dtype))
    assert error(found, expected) < 0.05
    merged = model.merge_and_unload(safe_merge=True)["lin"]
    assert error(merged(x.to(dtype)), expected) < 0.05
    assert error(merged(x.to(dtype)), found) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPECTRA)
def test_changes_far_larger_than_the_weight_stay_finite(name, dtype):
    model, layer = adapted(name, scale=30.0)
    model.to(dtype)
    assert torch.isfinite(torch.stack(layer._blocks(["default"], "input", dtype, dtype)).to(dtype)).all()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "rank 5"])  # which float32 does not resolve
def test_autocast_over_float32_is_rounding_away_from_float32(name, dtype, side):
    """Nothing is lost where the weight has everything: answers and gradients, and what is trained is what is merged."""
    model, layer = adapted(name, side)
    x = inputs(layer)

    def run(autocast):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = layer(x)
        y.float().square().mean().backward()
        return y.detach(), *(parameter.grad for parameter in (layer.fura_dR["default"], layer.fura_ds["default"]))

    for what, found, exact in zip(("y", "dR", "ds"), run(True), run(False), strict=True):
        assert error(found, exact) < 4 * torch.finfo(dtype).eps, what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_good_spectrum_is_left_alone(dtype):
    """Bit for bit, and every spectrum in float32 and float64."""

    def parts(layer):
        return [getattr(layer, f"fura_{part}")["default"] for part in ("dR", "ds", "V", "s0")]

    good = parts(adapted("well")[1])
    assert torch.equal(block_delta(*good, dtype), block_delta(*good))
    for name in SPECTRA:
        for wide in (torch.float32, torch.float64):
            poor = parts(adapted(name, dtype=wide)[1])
            assert torch.equal(block_delta(*poor, wide), block_delta(*poor))
    assert all(effective_values(parts(adapted(name)[1])[3], dtype)[0].min() > 0 for name in SPECTRA)


@pytest.mark.parametrize("name", POOR)
def test_an_adapter_made_in_16_bits_has_the_floor_already(name):
    """Over a bfloat16 weight nothing is raised any more: the numbers are those of a floor put in when it was made."""
    _, layer = adapted(name, dtype=torch.bfloat16)
    s0 = layer.fura_s0["default"]
    assert torch.equal(effective_values(s0, torch.bfloat16), s0)
    wide = adapted(name)[1].fura_s0["default"]
    torch.testing.assert_close(effective_values(wide, torch.bfloat16)[0], s0[0], rtol=0.05, atol=0)
    assert (wide[0] < 0.5 * s0[0]).any()


@pytest.mark.parametrize("name", POOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_used_in_16_bits_is_what_is_saved(name, dtype, tmp_path):
    """Loaded over the float32 base, the adapter is the same function as over the cast one; so is an export."""
    model, layer = adapted(name)
    wide = layer.delta("default").detach()
    model.to(dtype)
    used = layer.delta("default").detach()
    assert (wide - used).abs().max() > 0.1 * wide.abs().max()
    model.save_pretrained(tmp_path / "full")
    export_delta(model, tmp_path / "delta", dtype=torch.float32)
    for folder, kept in (("full", 1e-5), ("delta", 0)):
        base = adapted(name)[0].unload()
        again = PeftModel.from_pretrained(base, tmp_path / folder).base_model.model["lin"]
        assert again.base_layer.weight.dtype == torch.float32
        torch.testing.assert_close(again.delta("default"), used, rtol=kept, atol=kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_loaded_over_a_coarser_base(dtype, tmp_path):
    """As after a cast: what float32 resolves is no use where the weight does not."""
    model, layer = adapted("falling")
    expected = layer(inputs(layer)).detach()
    model.save_pretrained(tmp_path / "full")
    export_delta(model, tmp_path / "delta", dtype=dtype)
    for folder in ("full", "delta"):
        base = adapted("falling", dtype=dtype)[0].unload()
        again = PeftModel.from_pretrained(base, tmp_path / folder).base_model.model["lin"]
        with torch.no_grad():
            assert error(again(inputs(again, dtype)), expected) < 0.05


def test_another_spectrum_loaded_into_a_layer_is_seen():
    """An adapter over a good weight gets the basis of a poor one by load_state_dict, and autocast knows."""
    model, layer = adapted("well")
    adapter, narrow = layer.fura_adapters["default"], (torch.bfloat16, torch.float16)
    assert not any(adapter.is_too_coarse(dtype) for dtype in narrow)
    layer.load_state_dict(adapted("falling")[1].state_dict())
    assert all(adapter.is_too_coarse(dtype) for dtype in narrow)
    x = inputs(layer)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(layer(x), exact) < 0.03
