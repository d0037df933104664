"""The Triton kernels, run by Triton's interpreter, against formulas in float64; block matrices kept while answering."""

import copy
import heapq
from pathlib import Path

import pytest
import torch
from fura_models import perturb, tiny_llama
from peft import get_peft_model

from fura_vlm.fura import FuraConfig, kernels
from fura_vlm.fura.basis import effective_values
from fura_vlm.fura.layer import FuraLayer

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="this build of PyTorch comes without Triton")


@pytest.fixture(scope="module")
def reported(interpreted):
    return interpreted(Path(__file__).with_name("kernels_worker.py"))


def test_mixing_and_its_gradients(reported):
    cases = {name: row for name, row in reported.items() if name.startswith("mix")}
    assert len(cases) == 15
    for name, row in cases.items():
        # float16 results are rounded once, to 11 bits; sums are made in float32 in any case
        rounding = 5e-4 if row["half"] else 1e-6
        assert row["y"] < rounding and row["dx"] < rounding and row["dD"] < 1e-6, (name, row)
        assert row["same_at_zero"], name


def test_a_gate_and_its_gradients(reported):
    cases = {name: row for name, row in reported.items() if name.startswith("gated")}
    assert len(cases) == 7
    for name, row in cases.items():
        # float16: the factors, their product and what comes back through the weight are rounded, to 11 bits
        rounding = 2e-3 if row["half"] else 2e-6
        assert max(row[what] for what in ("y", "dgate", "dup", "dD")) < rounding, (name, row)


def test_adapters_of_one_input_and_their_gradients(reported):
    cases = {name: row for name, row in reported.items() if name.startswith("joint")}
    assert len(cases) == 10
    for name, row in cases.items():
        rounding = 5e-4 if row["half"] else 1e-6
        assert row["y"] < rounding and row["dx"] < rounding and row["dD"] < 1e-6, (name, row)


def test_linears_of_one_input_are_taken_together_where_nothing_stands_against_it(reported):
    """And give the same in any case."""
    cases = {name: row for name, row in reported.items() if name.startswith("same input")}
    assert len(cases) == 12
    for name, row in cases.items():
        assert row["joined"] == row["expected"] and row["exact_joined"] == 0, (name, row)
        assert row["error"] < 1e-5 and row["number"] > 6 and not row["left"], (name, row)


@pytest.mark.parametrize("case", ["40", "10", "40 hooked"])
def test_a_llamas_mlp_keeps_no_product_for_its_adapter(reported, case):
    row, hooked = reported[f"mlp {case}"], "hooked" in case
    assert row["y"] < 1e-6 and row["gradients"] < 1e-5 and row["number"] == 6, row
    assert row["product_kept"] == row["product_seen"] == hooked
    assert row["own"] and not row["left"]


def test_layers_are_the_explicit_factorisation(reported):
    cases = {name: row for name, row in reported.items() if name.startswith("layer")}
    assert {row["folded"] for row in cases.values()} == {True, False}
    for name, row in cases.items():
        for what in ("y", "answered", "dx", "dR", "ds"):
            assert row[what] < 2e-5, (name, what, row)


def test_the_block_matrices_are_those_of_block_delta(reported):
    """The kernels hold its formula, and its gradients, once more."""
    cases = {name: row for name, row in reported.items() if name.startswith("delta")}
    assert len(cases) == 6
    for name, row in cases.items():
        assert row["kernel"] and max(row[what] for what in ("D", "dR", "ds")) < 2e-6, (name, row)


@pytest.mark.parametrize("blocks", [1, 43, 56, 86, 112, 148, 216, 640])
@pytest.mark.parametrize("tile", [16, 64])
def test_rows_are_divided_so_that_all_programs_end_soon(blocks, tile):
    """Played through on 264 places, each of which takes up the next program when it is done with one: the division
    chosen ends at most 4 % later than the best of all, and later than an even division of all rows by what a program
    does besides its rows and 15 %."""

    def end(shares):
        tiles = -(-8192 // tile)
        each = -(-tiles // shares)
        places = [0] * 264
        for _ in range(blocks):
            for share in range(shares):
                rows = max(0, min(each, tiles - share * each)) * tile
                heapq.heapreplace(places, places[0] + rows + 160)
        return max(places)

    least = max(1, min(16, 264 // blocks))
    chosen = end(kernels._balanced(least, blocks, 264, tile))
    assert chosen <= 1.04 * min(end(shares) for shares in range(least, 17))
    if blocks >= 43:
        assert chosen <= 1.15 * (8192 * blocks / 264 + 320)


def test_switched_off_no_kernel_runs(reported):
    row = reported["switched off"]
    assert row["kernels"] == [] and row["nodes"] > 50
    assert row["changed"] > 1e-3


def test_large_blocks_are_left_to_plain_operations(reported):
    assert reported["large blocks"] == {"used": False}


# --------------------------------------------------------------------------------------- compiled, where there is a GPU


@pytest.mark.skipif(not kernels.SHARED_MEMORY, reason="there is no GPU that the kernels are built for")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("rows", [7, 300])
def test_built_for_the_gpu_they_are_the_plain_form(rows, dtype, rounding, compiled):
    """A Llama's MLP, every kernel in it, as Triton builds them and within `torch.compile`: outputs and gradients are
    those of the plain form in float64, of the same numbers."""
    torch.manual_seed(0)
    config = FuraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_weights=False)
    model = get_peft_model(tiny_llama(dtype), config)
    with torch.no_grad():  # a direction below the floor of the 16-bit dtypes
        for layer in layers(model):
            layer.fura_s0["default"][0, -1] = layer.fura_s0["default"][0, 0] * 5e-4
            layer.fura_ds["default"][0, -1] = 1e-3
    block = model.cuda().base_model.model.model.layers[0].mlp
    exact = copy.deepcopy(block).double()
    for layer in layers(exact):
        s0 = layer.fura_s0["default"].double()
        layer.fura_V["default"] = layer.fura_V["default"].double()
        layer.fura_s0["default"] = effective_values(s0, dtype)
    x = torch.randn(rows, block.hidden_size, device="cuda").to(dtype)
    grad = torch.randn(rows, block.hidden_size, device="cuda").to(dtype)
    leaf, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    assert kernels.usable(x, 8) and not kernels.usable(theirs, 8)
    if compiled:
        block.compile()
    y, z = block(leaf), exact(theirs)
    y.backward(grad)
    z.backward(grad.double())
    pairs = [(y, z), (leaf.grad, theirs.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(block.parameters(), exact.parameters(), strict=True) if p.requires_grad]
    assert len(pairs) == 8
    for found, expected in pairs:
        assert (found.double() - expected).norm() < rounding * expected.norm()


# --------------------------------------------------------------------------------- block matrices kept while answering


@pytest.fixture
def model():
    config = FuraConfig(target_modules=["q_proj", "down_proj"])
    return perturb(get_peft_model(tiny_llama(), config), scale=0.1).eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, FuraLayer)]


def answer(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def afresh(model):
    """The logits with gradients on, where nothing is kept."""
    return model(input_ids=torch.arange(8)[None]).logits.detach()


def check(model, before):
    after = answer(model)
    torch.testing.assert_close(after, afresh(model))
    assert (after - before).abs().max() > 1e-4


def test_kept_from_one_call_to_the_next(model):
    first = answer(model)
    kept = [layer._kept_blocks.copy() for layer in layers(model)]
    assert all(kept)
    assert torch.equal(answer(model), first)
    for layer, was in zip(layers(model), kept, strict=True):
        assert layer._kept_blocks == was and all(layer._kept_blocks[key] is was[key] for key in was)


def test_nothing_is_kept_where_gradients_are_needed(model):
    afresh(model)
    assert not any(layer._kept_blocks for layer in layers(model))
    answer(model)
    model.train()
    answer(model)
    assert not any(layer._kept_blocks for layer in layers(model))


def test_a_step_of_an_optimizer_is_seen(model):
    before = answer(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    check(model, before)


def test_an_adapter_loaded_over_it_is_seen(model, tmp_path):
    before = answer(model)
    perturb(model, seed=5, scale=0.1)
    model.save_pretrained(tmp_path)
    perturb(model, seed=0, scale=0.1)
    torch.testing.assert_close(answer(model), before)
    model.load_adapter(tmp_path, "default")
    model.eval()
    check(model, before)


def test_training_that_writes_behind_the_parameters_is_seen(model):
    """DeepSpeed's parameters are views of one flat tensor, which it writes to: their version stays as it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.data.flatten() for p in trained])
    start = 0
    for p in trained:
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    before = answer(model)
    model.train()
    flat.mul_(0.2)
    model.eval()
    check(model, before)


def test_another_adapter_of_the_same_name_is_seen(model):
    before = answer(model)
    model.add_adapter("other", FuraConfig(target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", FuraConfig(target_modules=["q_proj", "down_proj"]))
    model.set_adapter("default")
    check(model.eval(), before)
    torch.testing.assert_close(answer(model), answer(tiny_llama()))


def test_another_dtype_is_seen(model):
    before = answer(model)
    torch.testing.assert_close(answer(model.double()), before.double(), rtol=1e-4, atol=1e-4)
