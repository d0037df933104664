"""e4m3 by its definition (arXiv 2209.05433, table 1), and FuRA's backward pass with it, explicitly and in float64."""

import torch

# Bias 7; the largest code is NaN and there is no infinity. In the order of the codes: even places are even codes.
VALUES = torch.tensor(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)],
    dtype=torch.float64,
)


def rounded(x):
    """To the nearest value, ties to even; float64, none beyond the largest value."""
    sizes = x.abs().clamp(max=VALUES[-1])
    above = torch.searchsorted(VALUES, sizes.contiguous()).clamp(min=1)
    low, high = VALUES[above - 1], VALUES[above]
    up = (high - sizes < sizes - low) | ((high - sizes == sizes - low) & (above % 2 == 0))
    return torch.where(up, high, low).copysign(x)


def by_rows(x):
    """``x (m, n)`` after each row was scaled so that its largest number is the format's, rounded, and scaled back."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / VALUES[-1]
    return rounded(x / torch.where(scale > 0, scale, 1.0)) * scale


def product(grad, weight):
    """``grad (rows, out)`` times ``weight (out, in)``: rows of the one and columns of the other are scaled."""
    return by_rows(grad) @ by_rows(weight.T).T


def gradients(x, grad, weight, dR, ds, V, s0, side):
    """Those of x, dR and ds of a layer, where ``grad W`` is in FP8 and all else exact."""
    x, dR, ds = (each.detach().double().requires_grad_() for each in (x, dR, ds))
    weight, grad = weight.double(), grad.double()
    D = torch.block_diag(*(V.double() @ ((ds / s0.double()).unsqueeze(-1) * (V.double().mT + dR) + dR)))
    if side == "input":  # y = W (x + D x): what comes back through W meets x + D x
        (product(grad, weight) * (x + x @ D.T)).sum().backward()
        return x.grad, dR.grad, ds.grad
    z = (x.detach() @ weight.T).requires_grad_()  # y = z + D^T z, as D is of the transposed weight
    (grad * (z + z @ D)).sum().backward()
    return product(z.grad, weight), dR.grad, ds.grad
