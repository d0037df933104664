"""Runs the Triton kernels in Triton's interpreter, which must be chosen before Triton is imported; prints relative
errors against float64 as JSON, one object a line. The interpreter has no bfloat16 products; float16 stands in."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from fura_reference import ExplicitFura
from peft import get_peft_model
from torch import nn

from fura_vlm.fura import FuraConfig, kernels
from fura_vlm.fura.basis import fold_pays

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
    out = kernels.Mix.apply(leaf_x, leaf_D.mT if transposed else leaf_D)
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
        folded=fold_pays(x, linear.weight, fura.delta("default")),
        y=error(y, z),
        answered=error(answered, z),
        dx=error(leaf.grad, theirs.grad),
        dR=error(dR.grad, reference.R.grad),
        ds=error(ds.grad, reference.s.grad) if train_s else 0.0,
    )


for dtype in (torch.float32, torch.float16):
    for rows, N, b in ((1, 2, 16), (5, 3, 4), (150, 2, 43), (300, 1, 128), (2100, 1, 16)):
        mixing(rows, N, b, dtype)
mixing(150, 2, 20, torch.float32, transposed=True)
for rows, out in ((100, 48), (20, 48), (20, 5)):  # more rows than outputs, fewer, and a rank below the block's size
    for side in ("input", "output") if out > 16 else ("input",):
        layer(rows, out, 32, side, True)
layer(100, 48, 32, "input", False)
report("large blocks", used=kernels.usable(torch.zeros(1, 256), 256))
