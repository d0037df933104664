"""Configuration of FuRA: full-rank adaptation with a spectral basis (arXiv 2605.22869)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

from fura_vlm.fura.errors import FuraError

BASIS_DTYPES = ("float32", "float64", "bfloat16")
MAX_POWER = 2  # beyond, the rows of dR would differ in scale by more than float32 trains well


class FuraType(str, Enum):
    """The method's type as PEFT and transformers expect it: equal to, and hashed like, ``"FURA"``."""

    FURA = "FURA"


@dataclass
class FuraConfig(PeftConfig):
    """Configuration of a FuRA adapter.

    A Linear weight ``W (out, in)`` is cut along one axis into ``N`` blocks of size ``b``; each block's
    pretrained singular vectors and values on that axis are trained (the paper's ``R`` and ``S``), the rest of
    it is frozen (the paper's ``L``). Trainable parameters per Linear: ``N * b * r + N * r``, where ``r`` is
    the smaller of ``b`` and the size of the other axis.

    Args:
        target_modules: module names (suffixes), a regular expression over the full name, or ``"all-linear"``.
            None means ``"all-linear"``. In a vision-language model the vision tower is adapted only if an
            entry names it.
        exclude_modules: module names (suffixes) or a regular expression, not to be adapted.
        layers_to_transform: indices of the layers to adapt; with a list of target_modules only.
        layers_pattern: name of the module list that layers_to_transform indexes, such as ``"layers"``.
        modules_to_save: modules trained and saved in full beside the adapter.
        bias: ``"none"``, ``"all"`` or ``"fura_only"``: which biases are trained.
        init_weights: True starts at the base model exactly. False draws small random values, for tests.
        train_side: ``"input"`` cuts the input axis and trains ``R`` (the paper's default); ``"output"`` is
            the mirrored form, which cuts the output axis and trains the left singular vectors.
        num_blocks: ``N``. None takes the factor pair of the axis closest to a square, ``N <= b``. 1 is the
            paper's full SVD reparameterisation, with as many trainable parameters as a square weight has.
        block_size: ``b``, instead of num_blocks.
        block_size_pattern: block sizes per module, in the manner of PEFT's rank_pattern: a module name or
            regular expression to ``b``.
        train_singular_values: False freezes ``S`` (the paper's ablation).
        singular_floor: singular values below this fraction of their block's largest are treated as if they
            were that large where the method divides by them. None takes the resolution (eps) of the base
            weight's dtype: below it, a direction is rounding error of the stored weight. Where a 16-bit dtype is
            computed in, its resolution is the floor if that is higher.
        spectral_power: ``p`` in ``R = V^T + diag((m / s0) ** p) dR``, where ``m`` is the root mean square of a block's
            singular values. 0 is the paper's form: a step in dR moves the weight along a direction in proportion to its
            singular value. 1 moves it equally along all of them. A step has the same size in the Frobenius norm for
            both. Not from the paper; docs/evidence.md says why one may want it, and what was measured.
        basis: ``"singular"`` is the paper's form, ``V`` the singular vectors. ``"columns"`` is a control without them:
            ``V`` orders a block's own columns by their norms, which take the place of the singular values. The weights
            that can be reached are the same; other parameters lead there. Not from the paper (docs/evidence.md).
        basis_dtype: dtype in which the frozen basis is kept, also when the model is cast: ``"float32"``,
            ``"float64"`` or ``"bfloat16"``. None takes float64 over a float64 base and float32 otherwise.
        delta_only: the adapter holds the finished block matrices ``D`` alone, for inference. Set by
            [`export_delta`], not by hand.
        base_fingerprint: what the adapter was made for, module name to fingerprint. Filled in when the
            adapter is made, in the model's copy of the configuration; when the adapter is loaded, the base
            model is checked against it.

    Raises:
        FuraError: a field has a value outside the above, or two fields exclude each other.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bias: str = field(default="none")
    init_weights: bool = field(default=True)
    train_side: str = field(default="input")
    num_blocks: int | None = field(default=None)
    block_size: int | None = field(default=None)
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    train_singular_values: bool = field(default=True)
    singular_floor: float | None = field(default=None)
    spectral_power: float = field(default=0.0)
    basis: str = field(default="singular")
    basis_dtype: str | None = field(default=None)
    delta_only: bool = field(default=False)
    base_fingerprint: dict[str, str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = FuraType.FURA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.block_size_pattern = self.block_size_pattern or {}

        by_layer = self.layers_to_transform is not None or self.layers_pattern
        if isinstance(self.target_modules, str) and by_layer:
            raise FuraError(
                "FuraConfig: `layers_to_transform` and `layers_pattern` need `target_modules` to be a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise FuraError("FuraConfig: `layers_pattern` needs `layers_to_transform`.")
        if self.num_blocks is not None and self.block_size is not None:
            raise FuraError("FuraConfig: give `num_blocks` or `block_size`, not both.")
        if not isinstance(self.block_size_pattern, dict):
            raise FuraError("FuraConfig: `block_size_pattern` must map module names to block sizes.")
        sizes = {f"block_size_pattern[{key!r}]": value for key, value in self.block_size_pattern.items()}
        for name, value in {"num_blocks": self.num_blocks, "block_size": self.block_size, **sizes}.items():
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise FuraError(f"FuraConfig: `{name}` must be a whole number of at least 1, not {value!r}.")
        for pattern in self.block_size_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise FuraError(
                    f"FuraConfig: {pattern!r} in `block_size_pattern` is not a regular expression ({error})."
                ) from error
        floor = self.singular_floor
        if floor is not None and not (isinstance(floor, float) and 0 < floor < 1):
            raise FuraError(f"FuraConfig: `singular_floor` must be a number between 0 and 1, not {floor!r}.")
        power = self.spectral_power
        if isinstance(power, bool) or not isinstance(power, (int, float)) or not -MAX_POWER <= power <= MAX_POWER:
            raise FuraError(
                f"FuraConfig: `spectral_power` must be a number from -{MAX_POWER} to {MAX_POWER}, not {power!r}."
            )
        for name, allowed in (
            ("bias", ("none", "all", "fura_only")),
            ("train_side", ("input", "output")),
            ("basis", ("singular", "columns")),
            ("basis_dtype", (None, *BASIS_DTYPES)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise FuraError(f"FuraConfig: `{name}` must be one of {allowed}, not {value!r}.")
