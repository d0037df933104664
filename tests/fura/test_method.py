"""The implicit form against the paper's explicit factorisation, and what follows from it."""

import pytest
import torch
from fura_models import CASES, inputs_for
from fura_reference import ExplicitFura
from peft import get_peft_model
from torch import nn

from fura_vlm.fura import FuraConfig
from fura_vlm.fura.basis import block_shape, decompose, factor_pair, row_scales


def adapted_linear(out, dim, bias=True, dtype=torch.float64, seed=0, weight=None, **config):
    """A model of one Linear, and its FuraLinear."""
    torch.manual_seed(seed)
    linear = nn.Linear(dim, out, bias=bias, dtype=dtype)
    if weight is not None:
        linear.weight.data.copy_(weight)
    model = get_peft_model(nn.ModuleDict({"lin": linear}), FuraConfig(target_modules=["lin"], **config))
    return model, model.base_model.model["lin"]


@pytest.mark.parametrize(
    ("n", "pair"),
    [(1, (1, 1)), (2, (1, 2)), (36, (6, 6)), (4096, (64, 64)), (11008, (86, 128)), (1024, (32, 32)),
     (5120, (64, 80)), (14336, (112, 128)), (4099, (1, 4099))],
)  # fmt: skip
def test_factor_pair(n, pair):
    assert factor_pair(n) == pair


def test_factor_pair_is_the_closest_by_brute_force():
    for n in range(1, 300):
        pairs = [(a, n // a) for a in range(1, n + 1) if n % a == 0 and a <= n // a]
        assert factor_pair(n) == min(pairs, key=lambda pair: pair[1] - pair[0])


def test_awkward_dimensions_are_refused_by_name_with_a_way_out():
    for n in (4099, 2 * 5003):
        with pytest.raises(ValueError, match="layers.0.odd.*block_size_pattern.*exclude_modules"):
            block_shape(n, None, None, "layers.0.odd")
    assert block_shape(4099, 1, None, "m") == (1, 4099)
    assert block_shape(13, None, None, "m") == (1, 13)
    with pytest.raises(ValueError, match="^m: block_size=5 does not divide"):
        block_shape(12, None, 5, "m")


# wide, tall, square, thin (out < b), one block, blocks of one, awkward and small
SHAPES = [
    (96, 36, {}), (24, 64, {}), (36, 36, {}), (5, 64, {}), (40, 16, {"num_blocks": 1}), (16, 16,
    {"num_blocks": 1}), (16, 40, {"num_blocks": 1}), (12, 8, {"block_size": 1}), (20, 13, {}), (36, 24,
    {"block_size": 12}),
]  # fmt: skip


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("train_s", [True, False])
@pytest.mark.parametrize(("out", "dim", "blocks"), SHAPES)
def test_same_steps_as_the_explicit_factorisation(out, dim, blocks, side, train_s):
    """25 Adam steps from one basis: outputs and parameters agree to 1e-11 in float64."""
    model, layer = adapted_linear(out, dim, train_side=side, train_singular_values=train_s, **blocks)
    weight, bias = layer.base_layer.weight.data, layer.base_layer.bias.data
    N, b = layer.fura_adapters["default"].blocks
    reference = ExplicitFura(weight, bias, N, side, train_s)
    layer.fura_V["default"] = reference.R_start.mT.contiguous()
    layer.fura_s0["default"] = reference.s_start.clone()

    ours = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.Adam([p for p in reference.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    x, target = torch.randn(50, dim, dtype=torch.float64), torch.randn(50, out, dtype=torch.float64)
    before = layer(x).detach()
    for _ in range(25):
        y, z = layer(x), reference(x)
        torch.testing.assert_close(y, z, rtol=0, atol=1e-11)
        for optimizer, result in ((ours, y), (theirs, z)):
            optimizer.zero_grad()
            (result - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=1e-11)
    assert (layer(x) - before).abs().max() > 1e-2
    dR = layer.fura_dR["default"]
    # Adam divides by the root of a gradient that is all but zero
    torch.testing.assert_close(reference.R_start + dR, reference.R.data, rtol=0, atol=1e-11)
    if train_s:
        s = layer.fura_s0["default"] + layer.fura_ds["default"]
        torch.testing.assert_close(s, reference.s.data, rtol=0, atol=1e-11)
    else:
        assert "default" not in layer.fura_ds
    merged = weight + layer.get_delta_weight("default")
    torch.testing.assert_close(merged, reference.weight().data, rtol=0, atol=1e-11)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("power", [0.5, 1.0, -0.5])
@pytest.mark.parametrize(
    ("out", "dim", "blocks"), [(60, 36, {}), (24, 64, {"num_blocks": 4}), (24, 16, {"num_blocks": 1})]
)
def test_spectral_power_trains_as_its_formula(out, dim, blocks, power, side):
    """Ten Adam steps of ``W_j = U_j diag(s) (V_j^T + diag((m / s0) ** power) dR)``, written out, ``m`` the root mean
    square of a block's singular values; what is merged is that weight."""
    torch.manual_seed(0)
    uneven = torch.linspace(0.3, 3, out)[:, None] * torch.randn(out, dim) * torch.linspace(0.3, 3, dim)
    model, layer = adapted_linear(out, dim, weight=uneven, train_side=side, spectral_power=power, **blocks)
    weight, bias = layer.base_layer.weight.data, layer.base_layer.bias.data
    reference = ExplicitFura(weight, bias, layer.fura_adapters["default"].blocks[0], side)
    layer.fura_V["default"] = reference.R_start.mT.contiguous()
    layer.fura_s0["default"] = reference.s_start.clone()
    s0 = reference.s_start
    scale = ((s0**2).mean(1, keepdim=True).sqrt() / s0).pow(power)[..., None]
    assert scale.max() / scale.min() > 1.5
    dR = torch.zeros_like(reference.R_start, requires_grad=True)

    def explicit(x):
        blocks = reference.L @ (reference.s[..., None] * (reference.R_start + scale * dR))
        matrix = blocks.transpose(0, 1).flatten(1)
        return x @ (matrix if side == "output" else matrix.T) + bias, matrix if side == "input" else matrix.T

    ours = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.Adam([dR, reference.s], lr=1e-2)
    torch.manual_seed(1)
    x, target = torch.randn(50, dim, dtype=torch.float64), torch.randn(50, out, dtype=torch.float64)
    for _ in range(10):
        for optimizer, result in ((ours, layer(x)), (theirs, explicit(x)[0])):
            optimizer.zero_grad()
            (result - target).square().mean().backward()
            optimizer.step()
    assert (layer(x) - (x @ weight.T + bias)).abs().max() > 1e-2
    torch.testing.assert_close(layer(x), explicit(x)[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(weight + layer.get_delta_weight("default"), explicit(x)[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_basis_of_columns_trains_as_its_formula(side):
    """Ten Adam steps of ``W_j = C_j diag(n + dn) (P_j + dR)``, written out: ``C_j`` the block's columns of length one,
    ``n`` their norms in descending order, ``P_j`` the permutation that puts them back."""
    model, layer = adapted_linear(60, 36, train_side=side, basis="columns", bias=False)
    weight = layer.base_layer.weight.data
    matrix = weight if side == "input" else weight.T
    N, b = layer.fura_adapters["default"].blocks
    blocks = matrix.unflatten(1, (N, b)).transpose(0, 1)
    norms, order = blocks.norm(dim=1).sort(descending=True)
    P = torch.zeros(N, b, b, dtype=torch.float64)
    for block in range(N):
        for place in range(b):
            P[block, place, order[block, place]] = 1
    C = blocks @ P.mT / norms[:, None]
    torch.testing.assert_close(C * norms[:, None] @ P, blocks)
    dR, dn = torch.zeros_like(P, requires_grad=True), torch.zeros_like(norms, requires_grad=True)

    def explicit(x):
        made = ((C * (norms + dn)[:, None]) @ (P + dR)).transpose(0, 1).flatten(1)
        return x @ (made.T if side == "input" else made)

    ours = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.Adam([dR, dn], lr=1e-2)
    torch.manual_seed(1)
    x, target = torch.randn(50, 36, dtype=torch.float64), torch.randn(50, 60, dtype=torch.float64)
    before = layer(x).detach()
    torch.testing.assert_close(before, x @ weight.T, rtol=0, atol=0)
    for _ in range(10):
        for optimizer, result in ((ours, layer(x)), (theirs, explicit(x))):
            optimizer.zero_grad()
            (result - target).square().mean().backward()
            optimizer.step()
    assert (layer(x) - before).abs().max() > 1e-2
    torch.testing.assert_close(layer(x), explicit(x), rtol=0, atol=1e-9)


def test_a_step_has_the_same_size_for_the_powers_zero_and_one():
    """The first step of Adam moves every entry of dR by the learning rate: in the Frobenius norm the weight moves by
    the rate, times the root of the block size, times its own norm, and singular values frozen."""
    sizes = []
    for power in (0.0, 1.0):
        model, layer = adapted_linear(60, 36, spectral_power=power, train_singular_values=False, bias=False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=0)
        layer(torch.randn(50, 36, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        sizes.append(layer.get_delta_weight("default").norm().item())
    expected = 1e-3 * 6**0.5 * layer.base_layer.weight.norm().item()
    assert sizes == pytest.approx([expected, expected], rel=1e-6)


def test_directions_of_no_value_are_not_blown_up():
    """A weight of lower rank than its blocks: dR of the directions that are missing is scaled by 100 at most."""
    scales = row_scales(torch.tensor([[2.0, 1.0, 1e-7, 1e-9]]), 1.0)[0]
    mean = (5 / 4) ** 0.5
    torch.testing.assert_close(scales, torch.tensor([mean / 2, mean, 100.0, 100.0]))


@pytest.mark.parametrize("side", ["input", "output"])
def test_own_basis_trains_like_the_svd(side):
    """The Gram basis instead of the SVD's: signs differ, the trained function does not."""
    model, layer = adapted_linear(60, 36, train_side=side)
    N, _ = layer.fura_adapters["default"].blocks
    reference = ExplicitFura(layer.base_layer.weight.data, layer.base_layer.bias.data, N, side)
    torch.testing.assert_close(layer.fura_s0["default"], reference.s_start, rtol=1e-10, atol=0)
    overlap = (layer.fura_V["default"] * reference.R_start.mT).sum(1)
    torch.testing.assert_close(overlap.abs(), torch.ones_like(overlap), rtol=0, atol=1e-10)
    assert (overlap < 0).any()
    ours = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch.optim.Adam(reference.parameters(), lr=1e-2)
    x = torch.randn(50, 36, dtype=torch.float64)
    for _ in range(20):
        for module, optimizer in ((layer, ours), (reference, theirs)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=1e-9)


def test_signs_of_the_basis_change_nothing():
    """Training from a basis with other signs gives the same D, whoever decomposed."""
    deltas = []
    for flip in (False, True):
        model, layer = adapted_linear(30, 36)
        if flip:
            signs = torch.where(torch.rand(layer.fura_s0["default"].shape) < 0.5, -1.0, 1.0).double()
            assert (signs < 0).any()
            layer.fura_V["default"] = layer.fura_V["default"] * signs.unsqueeze(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        torch.manual_seed(2)
        x = torch.randn(40, 36, dtype=torch.float64)
        for _ in range(10):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        deltas.append(layer.delta("default").detach())
    assert deltas[0].abs().max() > 1e-2
    torch.testing.assert_close(deltas[0], deltas[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_untrained_is_the_base_bit_for_bit(case, dtype, autocast, side):
    build, targets = case
    model = build(dtype)
    inputs = inputs_for(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        config = FuraConfig(target_modules=targets, train_side=side)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        found = adapted(**inputs).logits
    assert found.dtype == expected.dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert trained == {torch.float32 if autocast else dtype}


def test_untrained_is_the_base_under_autocast_too(case):
    build, targets = case
    inputs = inputs_for(build())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = build()(**inputs).logits
        for side in ("input", "output"):
            adapted = get_peft_model(build(), FuraConfig(target_modules=targets, train_side=side))
            assert torch.equal(adapted(**inputs).logits, expected)


@pytest.mark.parametrize("side", ["input", "output"])
def test_compiles_to_one_graph(side):
    """No graph break in forward or backward, and the same numbers."""
    model, layer = adapted_linear(24, 36, dtype=torch.float32, train_side=side, init_weights=False)
    x = torch.randn(2, 5, 36)
    layer(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)
    compiled(x).square().mean().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(found) == 2
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_untrained_keeps_signed_zeros():
    _, layer = adapted_linear(12, 16, bias=False, dtype=torch.float32)
    x = torch.zeros(4, 16)
    x[1:] = -0.0
    x[2, :8] = 1.0
    expected = layer.base_layer(x)
    assert torch.equal(layer(x).view(torch.int32), expected.view(torch.int32))


def test_update_of_the_weight_has_full_rank():
    model, layer = adapted_linear(64, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, target = torch.randn(256, 64).double(), torch.randn(256, 64).double()
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    change = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(change, rtol=1e-6) == 64
    assert change.abs().max() > 1e-3


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("out", "dim", "blocks"), SHAPES)
def test_trainable_count_by_formula(out, dim, blocks):
    model, layer = adapted_linear(out, dim, **blocks)
    N, b = layer.fura_adapters["default"].blocks
    assert N * b == dim
    r = min(out, b)
    assert trainable(model) == N * b * r + N * r
    full, _ = adapted_linear(out, dim, num_blocks=1)
    if out >= dim:
        assert trainable(full) == dim * dim + dim


def test_trainable_count_of_a_7b_on_the_meta_device():
    """The published count, 96,559,104, without allocating a 7B."""
    attention = {name: (4096, 4096) for name in ("q", "k", "v", "o")}
    shapes = {**attention, "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    with torch.device("meta"):
        layers = [nn.ModuleDict({k: nn.Linear(i, o) for k, (i, o) in shapes.items()}) for _ in range(32)]
        model = get_peft_model(nn.ModuleList(layers), FuraConfig(target_modules=list(shapes)))
    assert trainable(model) == 96_559_104
    assert all(p.is_meta for p in model.parameters())


def test_basis_is_an_orthonormal_eigenbasis_in_any_chunking(monkeypatch):
    from fura_vlm.fura import basis

    torch.manual_seed(0)
    weight = torch.randn(50, 48)
    whole_V, whole_s = decompose(weight, 6)
    monkeypatch.setattr(basis, "CHUNK_BYTES", 1)
    torch.testing.assert_close(decompose(weight, 6)[0], whole_V, rtol=0, atol=1e-12)
    for j, block in enumerate(weight.double().split(8, dim=1)):
        V, s = whole_V[j], whole_s[j]
        torch.testing.assert_close(V.T @ V, torch.eye(8).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close((block @ V).norm(dim=0), s, rtol=1e-10, atol=0)
        torch.testing.assert_close(s, torch.linalg.svdvals(block), rtol=1e-10, atol=0)
        assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()  # the convention for signs


def test_deficient_blocks_are_guarded(caplog):
    """A rank-deficient, a zero and a badly conditioned block: finite, exact at the start, counted."""
    torch.manual_seed(0)
    weight = torch.randn(32, 16).double()
    weight[:, 4:8] = torch.outer(weight[:, 4], torch.randn(4).double())  # rank 1: three directions are zero
    weight[:, 8:12] = 0.0
    weight[:, 12] *= 1e-9
    with caplog.at_level("WARNING", logger="fura_vlm"):
        model, layer = adapted_linear(32, 16, weight=weight)
    assert [r.message for r in caplog.records if "singular values" in r.message] == [
        "FuRA: 8 of 16 singular values lie below the floor of their block and are raised to it."
    ]
    assert (layer.fura_s0["default"] > 0).all()
    assert layer.fura_s0["default"][2].tolist() == [1.0] * 4
    x = torch.randn(20, 16).double()
    assert torch.equal(layer(x), layer.base_layer(x))
    with torch.no_grad():
        layer.fura_ds["default"].fill_(0.01)
    change = layer.get_delta_weight("default")
    assert torch.isfinite(layer(x)).all() and torch.isfinite(change).all()
    assert change[:, 8:12].abs().max() == 0
    # along the floored directions the update is at most what the floor allows
    assert change.abs().max() < 0.1


def test_case_models_have_what_they_stand_for():
    llama, llava, neox, gpt2 = (build() for build, _ in CASES.values())
    assert any("vision_tower" in n and n.endswith("q_proj") for n, _ in llava.named_modules())
    assert neox.gpt_neox.layers[0].attention.query_key_value.bias.abs().max() > 0
    assert llama.model.layers[0].self_attn.k_proj.weight.shape == (24, 48)
    assert gpt2.transformer.h[0].attn.c_attn.weight.shape == (32, 96)


def test_decomposition_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    weight = torch.randn(50, 40 * 24)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(decompose(weight, 40))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
