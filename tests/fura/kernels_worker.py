"""Runs the Triton kernels in Triton's interpreter, which must be chosen before Triton is imported; prints relative
errors against float64 as JSON, one object a line. The interpreter has no bfloat16 products; float16 stands in."""

import copy
import importlib
import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from fura_models import LLAMA, tiny_llama
from fura_reference import ExplicitFura
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fura_vlm.fura import FuraConfig, basis, kernels
from fura_vlm.fura import adapter as adapter_module
from fura_vlm.fura.basis import block_delta, fold_pays
from fura_vlm.fura.layer import FuraLayer

torch.set_num_threads(1)


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def report(case, **values):
    print(json.dumps({"case": case, **values}), flush=True)


def mixing(rows, N, b, dtype, transposed=False):
    """``x + D x`` and its gradients by their formula, one block after the other."""
    torch.manual_seed(0)
    x, grad, D = torch.randn(rows, N * b).to(dtype), torch.randn(rows, N * b).to(dtype), torch.randn(N, b, b) * 0.1
    leaf_x, leaf_D = x.clone().requires_grad_(), D.clone().requires_grad_()
    out = kernels.Mix.apply(leaf_x, None, leaf_D.mT if transposed else leaf_D)
    out.backward(grad)
    X, G, E = x.double(), grad.double(), D.double()
    y, dx, dD = X.clone(), G.clone(), torch.zeros_like(E)
    for n in range(N):
        part = slice(n * b, (n + 1) * b)
        block = E[n].T if transposed else E[n]
        y[:, part] += X[:, part] @ block.T
        dx[:, part] += G[:, part] @ block
        dD[n] = X[:, part].T @ G[:, part] if transposed else G[:, part].T @ X[:, part]
    same = torch.equal(kernels.mix(x, torch.zeros_like(D)), x)
    name = f"mix {rows} x {N} x {b} {dtype}{' transposed' if transposed else ''}"
    report(name, half=dtype == torch.float16, y=error(out, y), dx=error(leaf_x.grad, dx), dD=error(leaf_D.grad, dD),
           same_at_zero=same)  # fmt: skip


def layer(rows, out, dim, side, train_s):
    """A layer in float32, kernels and all, against the explicit factorisation in float64, with gradients of R and s."""
    torch.manual_seed(1)
    linear = nn.Linear(dim, out)
    reference = ExplicitFura(linear.weight.data, linear.bias.data.double(), dim // 16 if side == "input" else out // 16,
                             side, train_s)  # fmt: skip
    config = FuraConfig(target_modules=["lin"], block_size=16, train_side=side, train_singular_values=train_s)
    fura = get_peft_model(nn.ModuleDict({"lin": linear}), config).base_model.model["lin"]
    dR, ds = fura.fura_dR["default"], fura.fura_ds["default"] if train_s else None
    # the decomposition's signs are its own: bring the reference into the same basis
    V = fura.fura_V["default"].double()
    sign = torch.sign((reference.R.data * V.mT).sum(-1, keepdim=True))
    reference.R.data.mul_(sign)
    reference.L.mul_(sign.mT)
    with torch.no_grad():
        dR.normal_(std=0.05)
        reference.R.add_(dR)
        if train_s:
            ds.normal_(std=0.05)
            reference.s.add_(ds)
    x, grad = torch.randn(rows, dim), torch.randn(rows, out)
    leaf, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, z = fura(leaf), reference(theirs)
    y.backward(grad)
    z.backward(grad.double())
    fura.eval()
    with torch.no_grad():
        answered = fura(x)
    report(
        f"layer {rows} x {dim} -> {out} {side} {'s' if train_s else 'no s'}",
        folded=fold_pays(x, [linear.weight], fura.delta("default")),
        y=error(y, z),
        answered=error(answered, z),
        dx=error(leaf.grad, theirs.grad),
        dR=error(dR.grad, reference.R.grad),
        ds=error(ds.grad, reference.s.grad) if train_s else 0.0,
    )


def delta(N, b, r, resolution, train_s=True):
    """D and its gradients against `block_delta` itself in float64, which takes no kernels, and autograd of it."""
    torch.manual_seed(4)
    parts = [torch.randn(N, r, b) * 0.05, torch.randn(N, r) * 0.05, torch.linalg.qr(torch.randn(N, b, r)).Q]
    s0 = torch.logspace(0, -4, r).expand(N, r).contiguous()  # some below the floor of each 16-bit dtype
    grad = torch.randn(N, b, b)
    found, exact = [
        [part.detach().to(dtype).requires_grad_(i < 2) for i, part in enumerate(parts)]
        for dtype in (torch.float32, torch.float64)
    ]
    ds, theirs = (found[1], exact[1]) if train_s else (None, None)
    D = block_delta(found[0], ds, found[2], s0, resolution)
    E = block_delta(exact[0], theirs, exact[2], s0.double(), resolution)
    D.backward(grad)
    E.backward(grad.double())
    report(
        f"delta {N} x {b} x {r} {resolution} {'s' if train_s else 'no s'}",
        kernel=type(D.grad_fn).__name__ == "DeltaBackward" and type(E.grad_fn).__name__ != "DeltaBackward",
        D=error(D, E),
        dR=error(found[0].grad, exact[0].grad),
        ds=error(ds.grad, theirs.grad) if train_s else 0.0,
    )


def switched_off():
    """`FURA_KERNELS=0` takes the plain form everywhere, gate and all: a change of `block_delta` is seen."""
    os.environ["FURA_KERNELS"] = "0"
    importlib.reload(kernels)
    torch.manual_seed(5)
    model = get_peft_model(
        tiny_llama(), FuraConfig(target_modules=["q_proj", "down_proj"], block_size=8, init_weights=False)
    )
    ids = torch.arange(60).view(2, 30)
    before, nodes = model(ids).logits, set()
    open_nodes = [before.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            open_nodes += [parent for parent, _ in node.next_functions]
    formula = basis.block_delta
    adapter_module.block_delta = lambda *args: 2 * formula(*args)
    after = model(ids).logits
    adapter_module.block_delta = formula
    own = {cls.__name__ + "Backward" for cls in (kernels.Delta, kernels.Mix, kernels.FoldedLinear)}
    report(
        "switched off",
        kernels=sorted({type(node).__name__ for node in nodes} & own),
        nodes=len(nodes),
        changed=error(after, before),
    )


def gated(rows, N, b, out, dtype):
    """``(W + W D) (silu(gate) * up)`` and its gradients by their formulas, in float64."""
    torch.manual_seed(2)
    gate, up = torch.randn(rows, N * b).to(dtype).requires_grad_(), torch.randn(rows, N * b).to(dtype).requires_grad_()
    weight, bias, grad = (
        torch.randn(out, N * b).to(dtype) / b,
        torch.randn(out).to(dtype),
        torch.randn(rows, out).to(dtype),
    )
    D = (torch.randn(N, b, b) * 0.1).requires_grad_()
    y = kernels.FoldedLinear.apply(gate, up, weight, bias, D)
    y.backward(grad)
    a, u, E = gate.detach().double(), up.detach().double(), torch.block_diag(*D.detach().double())
    sigmoid = 1 / (1 + torch.exp(-a))
    taken, back = a * sigmoid * u, grad.double() @ weight.double()
    dE = back.T @ taken
    back = back + back @ E
    report(
        f"gated {rows} x {N} x {b} -> {out} {dtype}",
        half=dtype == torch.float16,
        y=error(y, (taken + taken @ E.T) @ weight.double().T + bias.double()),
        dgate=error(gate.grad, back * u * (sigmoid + a * sigmoid * (1 - sigmoid))),
        dup=error(up.grad, back * a * sigmoid),
        dD=error(D.grad, torch.stack([dE[n * b : (n + 1) * b, n * b : (n + 1) * b] for n in range(N)])),
    )


def mlp(rows, hooked):
    """A Llama's MLP in float32 against the same in float64, where there are no kernels, before and after unloading."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"hidden_size": 16, "intermediate_size": 32}))
    config = FuraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], block_size=8, init_weights=False)
    model = get_peft_model(model, config)
    block = model.base_model.model.model.layers[0].mlp
    exact = copy.deepcopy(block).double()
    assert exact.forward.__self__ is exact
    seen = []
    if hooked:
        block.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(rows, block.hidden_size)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = block(x)
    z = exact(x.double())
    y.sum().backward()
    z.sum().backward()
    trained = [(p.grad, q.grad) for p, q in zip(block.parameters(), exact.parameters(), strict=True) if p.requires_grad]
    product = nn.functional.silu(block.gate_proj(x)) * block.up_proj(x)
    report(
        f"mlp {rows}{' hooked' if hooked else ''}",
        y=error(y, z),
        gradients=max(error(p, q) for p, q in trained),
        number=len(trained),
        product_kept=any(t.shape == product.shape and torch.allclose(t, product) for t in kept),
        product_seen=len(seen) == 1 and torch.allclose(seen[0], product),
        own="forward" in block.__dict__,
        left="forward" in model.unload().model.layers[0].mlp.__dict__,
    )


def joint(rows, N, b, number, dtype):
    """Adapters of the same x against the plain form in float64, and autograd of it."""
    torch.manual_seed(6)
    x, grads = torch.randn(rows, N * b).to(dtype), torch.randn(number, rows, N * b).to(dtype)
    Ds = torch.randn(number, N, b, b) * 0.1
    found = kernels.joint_mix(x, list(Ds))
    dx, dDs = kernels.joint_mix_backward(x, list(Ds), list(grads))
    X, Es = x.double().requires_grad_(), Ds.double().requires_grad_()
    exact = torch.stack([X + basis.apply_blocks(X, E) for E in Es])
    exact.backward(grads.double())
    report(
        f"joint {number} of {rows} x {N} x {b} {dtype}",
        half=dtype == torch.float16,
        y=error(torch.stack(found), exact.detach()),
        dx=error(dx, X.grad),
        dD=error(torch.stack(dDs), Es.grad),
    )


def joined(tensors):
    """How many times Linears of the same x were called together in making these."""
    open_nodes, nodes = [tensor.grad_fn for tensor in tensors], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            open_nodes += [parent for parent, _ in node.next_functions]
    return sum(type(node).__name__ == "JointLinearBackward" for node in nodes)


def same_input(what, expected, rows=40, change=lambda model, layer: None, **options):
    """A Llama's layer against a copy in float64, which takes `block_delta` and autograd of it and no kernel."""
    torch.manual_seed(7)
    kinds = options.pop("target_modules", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=kinds, init_weights=False, **options)).train()
    inner = model.base_model.model.model
    change(model, inner.layers[0])
    x = torch.randn(1, rows, inner.config.hidden_size)
    grad = torch.randn_like(x)
    results = []
    for dtype in (torch.float32, torch.float64):
        inner.to(dtype)
        layer = inner.layers[0]
        for each in layer.modules():
            if isinstance(each, FuraLayer):
                for name in each.fura_V:
                    each.fura_V[name], each.fura_s0[name] = each.fura_V[name].to(dtype), each.fura_s0[name].to(dtype)
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        positions = inner.rotary_emb(leaf, torch.arange(rows)[None])
        y = layer(leaf, position_embeddings=positions)
        number = joined([y])
        y.backward(grad.to(dtype))
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        layer.zero_grad()
        if dtype == torch.float32:
            report_joined = number
    report(
        f"same input {what}",
        joined=report_joined,
        expected=expected,
        exact_joined=number,
        error=max(error(f, e) for f, e in zip(*results, strict=True)),
        number=len(results[0]),
        left=any("forward" in vars(part) for part in model.unload().modules()),
    )


def hooked(model, layer):
    layer.self_attn.k_proj.register_forward_hook(lambda *_: None)


def second(sizes):
    def add(model, layer):
        model.add_adapter("second", FuraConfig(target_modules=["q_proj"], init_weights=False, block_size=sizes))
        model.base_model.set_adapter(["default", "second"])

    return add


def off(model, layer):
    layer.self_attn.v_proj.enable_adapters(False)


def merged(model, layer):
    layer.self_attn.v_proj.merge()


for dtype in (torch.float32, torch.float16):
    for rows, N, b, number in ((100, 3, 16, 3), (70, 2, 20, 2), (2100, 1, 16, 3), (130, 1, 64, 2), (5, 2, 16, 3)):
        joint(rows, N, b, number, dtype)
# q, k, v: 96 outputs, folded from 48 rows; gate, up: 192 outputs, folded from 128
same_input("mixed", 2)
same_input("folded and mixed", 2, rows=60)
same_input("folded", 2, rows=140)
same_input("hooked", 1, change=hooked)
same_input("one off", 1, change=off)
same_input("one merged", 1, change=merged)
same_input("two adapters", 2, change=second(8))
same_input("two adapters with other blocks", 1, change=second(16))
same_input("other blocks of one", 1, block_size_pattern={"k_proj": 16})
same_input("output side", 0, train_side="output")
same_input("not all", 0, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
same_input("frozen singular values", 2, train_singular_values=False)
for dtype in (torch.float32, torch.float16):
    gated(100, 2, 16, 40, dtype)
    gated(70, 3, 20, 10, dtype)
    gated(70, 2, 148, 10, dtype)
gated(2100, 1, 16, 10, torch.float32)
for rows in (40, 10):  # more than the weight's and fewer
    mlp(rows, False)
mlp(40, True)
for dtype in (torch.float32, torch.float16):
    for rows, N, b in ((1, 2, 16), (5, 3, 4), (150, 2, 43), (300, 1, 128), (2100, 1, 16), (90, 2, 148), (20, 1, 256)):
        mixing(rows, N, b, dtype)
mixing(150, 2, 20, torch.float32, transposed=True)
for rows, out in ((100, 48), (20, 48), (20, 5)):  # more rows than outputs, fewer, and a rank below the block's size
    for side in ("input", "output") if out > 16 else ("input",):
        layer(rows, out, 32, side, True)
layer(100, 48, 32, "input", False)
for resolution in (torch.float32, torch.bfloat16, torch.float16):
    delta(2, 16, 16, resolution)
delta(3, 20, 12, torch.bfloat16)
delta(3, 43, 43, torch.float32, train_s=False)
delta(1, 148, 140, torch.float32)
report("large blocks", used=kernels.usable(torch.zeros(1, 257), 257))
switched_off()  # the last: kernels stay off
