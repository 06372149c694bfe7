"""Attention over packed sequences: the one place that knows which kernel runs on which device."""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ovr_fast.records import Segments


@cache
def attention_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Name of the kernel that ``packed_attention`` uses, for the start-up log. The variable-length
    kernels of a GPU have no float32."""
    if device_type == "cpu" or dtype is torch.float32:
        return "sdpa by length"
    return "flash-attn" if importlib.util.find_spec("flash_attn") else "torch varlen"


def packed_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments: Segments, *, causal: bool
) -> Tensor:
    """Softmax attention inside each packed sequence, scaled by ``1 / sqrt(D)``.

    Args:
        q_TND: [T, N, D] queries.
        k_TKD, v_TKD: [T, K, D] keys and values; K divides N (grouped queries).
        segments: of the T tokens, boundaries on their device; a token attends inside its own.
        causal: a token sees itself and what is before it.

    Returns:
        [T, N, D].
    """
    kernel = attention_kernel(q_TND.device.type, q_TND.dtype)
    if kernel == "sdpa by length":
        return _by_length(q_TND, k_TKD, v_TKD, segments.lengths, causal)
    ends, longest = segments.cu_seqlens_S1, segments.max_seqlen
    if kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_TND, k_TKD, v_TKD, ends, ends, longest, longest, causal=causal
        )
    from torch.nn.attention.varlen import varlen_attn

    groups = q_TND.shape[1] // k_TKD.shape[1]
    if groups > 1:
        k_TKD = k_TKD.repeat_interleave(groups, dim=1)
        v_TKD = v_TKD.repeat_interleave(groups, dim=1)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q_TND, k_TKD, v_TKD, ends, ends, longest, longest, window_size=window)
    assert isinstance(out, Tensor)
    return out


def _by_length(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
    """One scaled-dot-product call for each group of sequences of similar length.

    Causal sequences share a call when their lengths round up to the same power of two: padding
    stands at the end, where a causal row never looks, so it needs no mask. Without causality only
    equal lengths share a call, and nothing is padded (the windows of an image are mostly equal).
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            key = 1 << (length - 1).bit_length() if causal else length
            buckets.setdefault(key, []).append(index)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cuda":
        # float32: of the kernels that take grouped heads only the one that holds T x T scores is
        # left, 120 GB at 32k tokens and 28 heads; memory-efficient attention takes equal heads.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    slots, outputs = [], []
    for members in buckets.values():
        longest = max(lengths[i] for i in members)
        steps = torch.arange(longest)
        start = torch.tensor([starts[i] for i in members])[:, None]
        size = torch.tensor([lengths[i] for i in members])[:, None]
        # Padding repeats the last token of its sequence; its output row is dropped below.
        gather = start + torch.minimum(steps[None], size - 1)
        real = steps[None] < size
        out = F.scaled_dot_product_attention(
            q[gather].transpose(1, 2),
            k[gather].transpose(1, 2),
            v[gather].transpose(1, 2),
            is_causal=causal,
            enable_gqa=groups > 1,
        ).transpose(1, 2)
        slots.append(gather[real])
        outputs.append(out[real])
    order = torch.argsort(torch.cat(slots))
    return torch.cat(outputs)[order]
