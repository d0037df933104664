"""FP8 in the backward pass: against an explicit product of quantised factors in float64, in whole models, and what
becomes of the weight's copy."""

import copy

import pytest
import torch
from fp8_reference import VALUES, by_rows, gradients, product, rounded
from fura_models import LLAMA, batch, perturb
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from fura_vlm.fura import FuraConfig, fp8, set_fp8_backward
from fura_vlm.fura.layer import FuraLinear

ROUNDING = 4e-3  # of bfloat16, in which the product is given
FP8 = 2e-2  # what the factors' rounding makes of a product is more than this


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def adapted(dim, out, side="input", dtype=torch.float32, **config):
    """An adapted Linear in training mode, its adapter away from zero."""
    torch.manual_seed(0)
    linear = nn.Linear(dim, out, dtype=dtype)
    config = FuraConfig(target_modules=["lin"], train_side=side, **config)
    model = perturb(get_peft_model(nn.ModuleDict({"lin": linear}), config)).train()
    return model, model.base_model.model["lin"]


def llama(dtype=torch.float32, side="input", **config):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(dtype)
    return perturb(get_peft_model(base, FuraConfig(target_modules="all-linear", train_side=side, **config))).train()


def trained(model):
    """The outputs for a batch, and the gradients by name."""
    ids = batch()
    model.zero_grad()
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    return found.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------- the numbers


def test_rows_are_rounded_to_the_nearest_value():
    torch.manual_seed(0)
    x = torch.randn(60, 200) * torch.logspace(-30, 30, 60)[:, None]
    x[:20] *= torch.logspace(0, -7, 200)  # down to where the format has no more values
    x[3], x[4, 1:] = 0, 0
    q, scale = fp8.quantised(x)
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and scale.shape == (60, 1)
    assert torch.equal(q.double(), rounded(x.double() / scale.double()))
    assert (q.double().abs().amax(1) == VALUES[-1]).sum() == 59 and not q[3].double().any()
    assert error(q.double() * scale.double(), by_rows(x)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_rounded_factors(dtype):
    torch.manual_seed(0)
    grad, weight = torch.randn(2, 7, 48).to(dtype), torch.randn(48, 32).to(dtype)
    found = fp8.product(grad, *fp8.quantised_weight(weight))
    expected = product(grad.flatten(0, 1), weight).view(2, 7, 32)
    assert found.dtype == dtype and error(found, expected) < ROUNDING
    assert error(found, grad.double() @ weight.double()) > FP8


def test_what_is_no_number_stays_none():
    """So that a gradient's norm says so, as ever."""
    grad = torch.randn(4, 32)
    grad[1, 5], grad[2, 7] = float("nan"), float("inf")
    found = fp8.product(grad, *fp8.quantised_weight(torch.randn(32, 16)))
    assert found[[0, 3]].isfinite().all() and not found[[1, 2]].isfinite().any()


def test_the_factors_lie_in_memory_as_gpus_want_them():
    """PyTorch checks that without a GPU, on tensors without memory."""
    with FakeTensorMode():
        weight = torch.empty(352, 128, dtype=torch.bfloat16, device="cuda")
        for grad in (torch.empty(3, 5, 352, device="cuda"), torch.empty(352, 5, device="cuda").T):
            found = fp8.product(grad.bfloat16(), *fp8.quantised_weight(weight))
            assert found.shape == (*grad.shape[:-1], 128) and found.dtype == torch.bfloat16 and found.is_cuda
        with pytest.raises(RuntimeError, match="col_major"):  # it does look
            q, scale = fp8.quantised(weight)
            torch._scaled_mm(q, q.T.contiguous(), scale, scale.T, out_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "amd", "sentence"),
    [((8, 9), False, None), ((9, 0), False, None), ((12, 0), False, None), ((8, 6), False, "Card has 8.6"),
     ((7, 5), False, "Card has 7.5"), ((9, 4), True, "Card is AMD's")],
)  # fmt: skip
def test_gpus_that_cannot(capability, amd, sentence):
    said = fp8.unfit("Card", capability, amd)
    assert said is None if sentence is None else said.endswith(sentence) and "8.9 or more" in said


@pytest.mark.skipif(not torch.cuda.is_available() or fp8.missing() is not None, reason="no GPU with FP8 here")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300, 8352])
def test_the_product_on_a_gpu(rows, compiled):
    torch.manual_seed(0)
    grad, weight = torch.randn(rows, 1536).bfloat16(), torch.randn(1536, 576).bfloat16() / 1536**0.5
    made = torch.compile(fp8.product, dynamic=True) if compiled else fp8.product
    found = made(grad.cuda(), *fp8.quantised_weight(weight.cuda())).cpu()
    assert error(found, product(grad, weight)) < FP8  # the sums have fewer bits than here


# --------------------------------------------------------------------------------------------------------- a layer


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layers_gradients_are_those_of_the_rounded_factors(dtype, side):
    model, layer = adapted(32, 48, side, dtype)
    x, grad = torch.randn(5, 9, 32).to(dtype), torch.randn(5, 9, 48).to(dtype)
    assert set_fp8_backward(model) == (1, 1)
    found = {}
    for form in ("exact", "fp8"):
        model.train(form == "fp8")  # copies are made here, and not before
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        found[form] = y.detach(), leaf.grad, layer.fura_dR["default"].grad, layer.fura_ds["default"].grad
    adapter = [layer.fura_dR["default"], layer.fura_ds["default"], layer.fura_V["default"], layer.fura_s0["default"]]
    expected = gradients(x.flatten(0, 1), grad.flatten(0, 1), layer.base_layer.weight, *adapter, side)
    assert torch.equal(found["exact"][0], found["fp8"][0])
    passes = [True, side == "input", side == "input"]  # whether the gradient of x, dR, ds goes through the weight
    rounding = ROUNDING if dtype == torch.float32 else 3 * ROUNDING
    for exact, ours, theirs, through in zip(found["exact"][1:], found["fp8"][1:], expected, passes, strict=True):
        assert error(ours.view_as(theirs), theirs) < rounding
        assert error(ours, exact) > FP8 if through else torch.equal(ours, exact)


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_under_autocast(target):
    """The base is in float32 or in bfloat16, products in bfloat16."""
    model, layer = adapted(32, 48, dtype=getattr(torch, target))
    x, found = torch.randn(9, 32), []
    for on in (False, True):
        set_fp8_backward(model, on)
        model.train()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaf)
        y.sum().backward()
        found.append((y.detach(), leaf.grad))
    (y, dx), (same, rounded_dx) = found
    assert torch.equal(y, same) and rounded_dx.dtype == torch.float32
    assert FP8 < error(rounded_dx, dx) < 0.1


def test_two_adapters_and_a_sample_of_each():
    """The forward is the same in all of the layer's forms, and so is what the base alone answers."""
    model, layer = adapted(32, 48)
    model.add_adapter("other", FuraConfig(target_modules=["lin"], train_side="output", init_weights=False))
    layer.set_adapter(["default", "other"])
    x, found = torch.randn(4, 32), []
    for on in (False, True):
        set_fp8_backward(model, on)
        model.train()
        with torch.no_grad():
            alone = layer(x)
        found.append([layer(x), layer(x, adapter_names=["default", "other", "__base__", "default"]), alone])
    assert layer._fp8_copy is not None
    for exact, ours in zip(*found, strict=True):
        assert torch.equal(exact, ours)


# --------------------------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("eager", torch.float32), ("eager", torch.bfloat16), ("checkpointed", torch.bfloat16),
     ("compiled", torch.float32), ("compiled and checkpointed", torch.bfloat16)],
)  # fmt: skip
def test_a_model_answers_the_same_and_learns_nearly_the_same(form, dtype):
    found = []
    for on in (False, True):
        torch._dynamo.reset()
        model = llama(dtype)
        assert set_fp8_backward(model, on) == (10 * on, 14)  # keys and values are 24 wide
        model.train()
        if "checkpointed" in form:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in model.base_model.model.model.layers:
            if "compiled" in form:
                layer.compile(dynamic=True)
        found.append(trained(model))
    (logits, exact), (same, ours) = found
    assert torch.equal(logits, same) and len(exact) == 28
    for name in exact:
        assert 1e-3 < error(ours[name], exact[name]) < 0.2, name


def test_only_what_goes_through_a_weight_is_rounded():
    """With adapters of the output side the last layer's gradients meet no weight; those before it do."""
    exact, ours = (trained(prepared(llama(side="output"), on))[1] for on in (False, True))
    last = [name for name in exact if ".layers.1.mlp.down_proj." in name]
    before = [name for name in exact if ".layers.0.mlp.down_proj." in name]
    assert len(last) == len(before) == 2
    assert all(torch.equal(ours[name], exact[name]) for name in last)
    assert all(error(ours[name], exact[name]) > 1e-3 for name in before)


def prepared(model, on):
    set_fp8_backward(model, on)
    return model.train()


# -------------------------------------------------------------------------------------------------------- the copies


def copies(model):
    return [layer._fp8_copy for layer in model.modules() if isinstance(layer, FuraLinear)]


def assert_right(layer):
    """The copy is of the weight that the layer has."""
    found, scale = layer._fp8_copy
    assert error(found.double() * scale.double(), by_rows(layer.base_layer.weight.detach().T)) < 1e-6


def test_copies_follow_their_weights():
    model, layer = adapted(32, 48)
    set_fp8_backward(model)
    assert copies(model) == [None] and layer.fp8_bytes == 32 * 48 + 4 * 32  # made by train, and not in this state
    model.eval()
    assert copies(model) == [None]
    model.train()
    assert_right(layer)
    assert sum(tensor.nbytes for tensor in layer._fp8_copy) == layer.fp8_bytes
    before = layer._fp8_copy[0].float()
    state = copy.deepcopy(model.state_dict())
    assert not any("fp8" in name or tensor.dtype == fp8.FORMAT for name, tensor in state.items())
    name = next(name for name in state if name.endswith("base_layer.weight"))
    state[name] = state[name].flip(0)
    model.load_state_dict(state)
    assert_right(layer)
    assert torch.equal(layer._fp8_copy[0].float(), before.flip(1))
    model.to(torch.bfloat16)
    assert layer._fp8_copy[0].dtype == fp8.FORMAT
    assert_right(layer)
    assert copies(model.double().train()) == [None]
    assert_right(prepared(model.float(), True).base_model.model["lin"])
    assert copies(model.to("meta")) == [None]
    set_fp8_backward(model, False)
    assert layer.fp8_bytes == 0


def test_a_merged_weight_is_not_copied():
    model, layer = adapted(32, 48)
    set_fp8_backward(model)
    layer.merge()
    model.train()
    assert copies(model) == [None]
    layer.unmerge()
    model.train()
    assert_right(layer)
    kept = layer._fp8_copy
    layer.merge()
    layer.unmerge()
    assert layer._fp8_copy is kept
    assert_right(layer)


def test_layers_that_stay_as_they_are():
    """Sides that are no multiples of 16, and whatever is no plain Linear."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"odd": nn.Linear(32, 40), "even": nn.Linear(32, 64)})
    model = get_peft_model(base, FuraConfig(target_modules=["odd", "even"], init_weights=False))
    assert set_fp8_backward(model) == (1, 2)
    model.train()
    odd, even = (model.base_model.model[name] for name in ("odd", "even"))
    assert odd._fp8_copy is None and odd.fp8_bytes == 0 and even._fp8_copy is not None
    x, plain = torch.randn(6, 32, requires_grad=True), copy.deepcopy(odd)
    (found,) = torch.autograd.grad(odd(x).sum(), x)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    assert torch.equal(found, expected)
