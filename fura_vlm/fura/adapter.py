"""One FuRA adapter of one Linear: what it trains, the basis that is expressed in, and the update they make."""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from fura_vlm.fura.basis import (
    block_delta,
    columns_by_norm,
    decompose,
    effective_values,
    needs_floor,
    raise_to_floor,
    relative_floor,
    row_scales,
)
from fura_vlm.fura.config import FuraConfig

PARTS = ("dR", "ds", "V", "s0", "D")  # the names of an adapter's tensors


class FuraAdapter:
    """The block matrices of one adapter, with ``N`` blocks of size ``b`` and rank ``r``.

    Its tensors are registered in containers of the layer's, one for each part and each by the adapter's name, so that
    dR is ``"<layer>.fura_dR.<adapter>"`` among the model's. A module of its own, which would register them itself,
    would name them the other way round, and that is not what is loaded: PEFT, and transformers' ``load_adapter``, take
    a file's ``"<layer>.fura_dR"`` and put the adapter's name behind it.

    Attributes:
        dR: ``(N, r, b)``, trained: what has been added to the pretrained R (before it is scaled, where the
            configuration has a ``spectral_power``). None if exported for inference.
        ds: ``(N, r)``, trained: what has been added to the pretrained s. None if that is frozen, or exported.
        V: ``(N, b, r)``, and
        s0: ``(N, r)``: the frozen basis. They are buffers, not frozen parameters: DeepSpeed checkpoints of a PEFT model
            leave frozen parameters out, and dR is expressed in this very basis, so that resuming over one computed
            anew, on a machine that decides signs otherwise, would be wrong. Zeros until the basis is known.
        D: ``(N, b, b)``, a buffer in the place of all these in an adapter exported for inference, else None.
        side: ``"input"`` or ``"output"``, the axis of the weight that is cut.
        blocks: ``(N, b)``.
        guarded: how many singular values were raised to the floor when the basis was computed.
    """

    def __init__(
        self,
        name: str,
        containers: dict[str, nn.ParameterDict | BufferDict],
        config: FuraConfig,
        blocks: tuple[int, int],
        rank: int,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        """Makes its tensors.

        Args:
            name: the adapter's.
            containers: of the layer, one for each of PARTS.
            blocks: ``(N, b)``.
            rank: ``r``.
            dtype: of the base weight, as is the device.
        """
        (N, b), r = blocks, rank
        self._name, self._containers = name, containers
        self.side, self.blocks, self.guarded = config.train_side, blocks, 0
        self._floor, self._power = config.singular_floor, config.spectral_power
        self._decompose = decompose if config.basis == "singular" else columns_by_norm
        # the 16-bit dtypes too coarse for its singular values; None: its basis is not known, or not looked at
        self._narrow: set[torch.dtype] | None = None
        basis_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if config.basis_dtype is not None:
            basis_dtype = getattr(torch, config.basis_dtype)

        if config.delta_only:
            self._put("D", torch.zeros(N, b, b, dtype=dtype, device=device))
            return
        dR = torch.zeros(N, r, b, dtype=dtype, device=device)
        ds = torch.zeros(N, r, dtype=dtype, device=device)
        if not config.init_weights:
            nn.init.normal_(dR, std=0.02)
            nn.init.normal_(ds, std=0.02)
        self._put("dR", nn.Parameter(dR))
        if config.train_singular_values:
            self._put("ds", nn.Parameter(ds))
        # s0 = 0 is no basis: it marks one that is neither computed nor loaded
        self._put("V", torch.zeros(N, b, r, dtype=basis_dtype, device=device))
        self._put("s0", torch.zeros(N, r, dtype=basis_dtype, device=device))

    def get(self, part: str) -> torch.Tensor | None:
        """The tensor of this name, one of PARTS, or None."""
        container = self._containers[part]
        return container[self._name] if self._name in container else None

    def _put(self, part: str, tensor: torch.Tensor) -> None:
        self._containers[part][self._name] = tensor

    dR = property(lambda self: self.get("dR"))
    ds = property(lambda self: self.get("ds"))
    V = property(lambda self: self.get("V"))
    s0 = property(lambda self: self.get("s0"))
    D = property(lambda self: self.get("D"))

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [tensor for tensor in (self.get(part) for part in PARTS) if tensor is not None]

    @property
    def is_exported(self) -> bool:
        """Whether it is the block matrices alone, for inference."""
        return self.D is not None

    @property
    def is_ready(self) -> bool:
        """Whether its basis is known. Compiled code, which may not look at the basis, can ask this."""
        return self._narrow is not None or self.is_exported

    def is_too_coarse(self, dtype: torch.dtype) -> bool:
        """Whether a 16-bit dtype has no room for the smallest of its singular values."""
        return self._narrow is not None and dtype in self._narrow

    def forget_basis(self) -> None:
        """Look at the basis anew before the next use: another one may have been loaded."""
        self._narrow = None

    def look_at_basis(self) -> bool:
        """Take note of a basis that has been computed or loaded. Returns whether there is one."""
        if not self.is_exported and not self.s0.is_meta and self.s0.any():
            self._narrow = {d for d in (torch.bfloat16, torch.float16) if needs_floor(self.s0, d)}
        return self.is_ready

    def compute_basis(self, weight: torch.Tensor) -> None:
        """Decompose the base weight ``(out, in)`` into V and s0."""
        # the output side is the input side of the transposed weight
        V, s = self._decompose(weight if self.side == "input" else weight.T, self.blocks[0])
        s0, self.guarded = raise_to_floor(s, relative_floor(self._floor, weight.dtype))
        self._put("V", V.to(self.V.dtype))
        self._put("s0", s0.to(self.s0.dtype))
        self.look_at_basis()

    def keep_basis(self, V: torch.Tensor, s0: torch.Tensor) -> None:
        """Undo a cast of the basis, from what it was before; it stays on the device where it is now."""
        for part, before in (("V", V), ("s0", s0)):
            now = self.get(part)
            if now.dtype != before.dtype:
                self._put(part, before.to(now.device))

    def delta(self, dtype: torch.dtype | None, resolution: torch.dtype) -> torch.Tensor:
        """Its block matrices as they multiply a column from the left: ``(N, b, b)``; see `FuraLayer.delta`."""
        if self.is_exported:
            return self.D if dtype is None else self.D.to(dtype)
        parts = self.dR, self.ds, self.V, self.s0
        if dtype is not None:
            parts = [part if part is None else part.to(dtype) for part in parts]
        dR, ds, V, s0 = parts
        if self._power:
            dR = dR * row_scales(effective_values(s0, resolution), self._power).unsqueeze(-1)
        D = block_delta(dR, ds, V, s0, resolution)
        return D if self.side == "input" else D.mT

    def cast_trained(self, dtype: torch.dtype) -> None:
        """Cast what it trains (or D, if exported for inference); the basis keeps its dtype."""
        for tensor in (self.dR, self.ds, self.D):
            if tensor is not None:
                tensor.data = tensor.data.to(dtype)

    def move(self, device: torch.device) -> None:
        """Move its tensors, but for those on the meta device, which have no values yet."""
        for tensor in self.tensors():
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
