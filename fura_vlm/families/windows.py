"""Attention within pictures and windows in one call a layer, for towers that pack all patches into one sequence.

With PyTorch's attention transformers calls it once for each window: for eight pictures of 448 pixels Qwen2.5-VL's tower
makes 3,616 calls, while a GPU waits. FlashAttention takes all windows at once, and PyTorch has it built in as
``varlen_attn``, for GPUs and 16 bits. Elsewhere the windows are taken one by one, as transformers does it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # builds of PyTorch without it
    varlen_attn = None

NAME = "flash_within_windows"
"""transformers hands the windows over to what has "flash" in its name."""


def within_windows(
    module, query, key, value, attention_mask=None, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        query: (1, heads, patches, size of a head), like key and value.
        scaling: of the products, by default one over the square root of a head's size.
        cu_seq_lens_q: (windows + 1,) int32, where each window begins, and the end of the last.
        max_length_q: patches of the longest window.

    Returns: (1, patches, heads, size of a head), and None.
    """
    if _takes_all_at_once(query):
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        if scaling is not None and scaling != q.shape[-1] ** -0.5:
            q = q * (scaling * q.shape[-1] ** 0.5)
        where = cu_seq_lens_q.to(torch.int32)
        return varlen_attn(q, k, v, where, where, max_length_q, max_length_q)[None], None
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    windows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    out = [scaled_dot_product_attention(*window, scale=scaling) for window in windows]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _takes_all_at_once(query: torch.Tensor) -> bool:
    """Whether ``varlen_attn`` computes this: FlashAttention is for 16 bits, and for NVIDIA's GPUs from Ampere on."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype.itemsize == 2
        and not torch.version.hip
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def use_windows(tower: torch.nn.Module) -> None:
    """Has a tower use it in the place of PyTorch's attention; one that was set to something else is left alone."""
    if tower.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, within_windows)
        tower.config._attn_implementation = NAME
