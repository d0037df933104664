"""FuRA as the paper writes it (arXiv 2605.22869): an explicit W = L S R in float64, by torch.linalg.svd."""

import torch
from torch import nn


class ExplicitFura(nn.Module):
    """``y = [U_1 ... U_N] diag(s) blockdiag(R_j) x + bias`` with trained ``R (N, r, b)`` and ``s (N, r)``.

    With ``side="output"`` the same of the transposed weight: blocks of rows, ``R`` the left singular vectors.
    """

    def __init__(self, weight, bias, num_blocks, side="input", train_s=True):
        super().__init__()
        self.side, self.bias = side, bias
        matrix = weight.double() if side == "input" else weight.double().T
        blocks = matrix.unflatten(1, (num_blocks, -1)).transpose(0, 1)  # (N, out, b)
        U, s, R = torch.linalg.svd(blocks, full_matrices=False)
        self.register_buffer("L", U)
        self.s = nn.Parameter(s.clone(), requires_grad=train_s)
        self.R = nn.Parameter(R.clone())
        self.s_start, self.R_start = s.clone(), R.clone()

    def weight(self):
        blocks = self.L @ (self.s.unsqueeze(-1) * self.R)  # (N, out, b)
        matrix = blocks.transpose(0, 1).flatten(1)
        return matrix if self.side == "input" else matrix.T

    def forward(self, x):
        y = x @ self.weight().T
        return y if self.bias is None else y + self.bias
