"""Attention over packed sequences: the one place that knows which kernel runs on which device."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ovr_fast.records import Branches, Rows, Segments

LONG = 2048
"""Tokens from which a causal sequence has a cuDNN call of its own; shorter ones share a call."""

LONG_KERNEL = SDPBackend.CUDNN_ATTENTION
"""660 TFLOP/s forward on an H100 at 16k tokens, FlashAttention 2 has 336; 470 and 310 backward."""

PARITY = 8e-3
"""bfloat16's rounding of queries, keys, probabilities and results: 2e-3 to 3e-3 on an H100."""


@cache
def attention_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Name of the kernel that ``packed_attention`` uses, for the start-up log. The kernels of a GPU
    have no float32; cuDNN's are ahead of the others from sm_90 on (benchmarks/report.py)."""
    if device_type == "cpu" or dtype is torch.float32:
        return "sdpa by length"
    if torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash-attn" if importlib.util.find_spec("flash_attn") else "torch varlen"


def packed_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments: Segments, *, causal: bool
) -> Tensor:
    """Softmax attention inside each packed sequence, scaled by ``1 / sqrt(D)``.

    Args:
        q_TND: [T, N, D] queries.
        k_TKD, v_TKD: [T, K, D] keys and values; K divides N (grouped queries).
        segments: of the T tokens, boundaries on their device; a token attends inside its own, and
            a branch's to its prefix as well.
        causal: a token sees itself and what is before it; branches are causal.

    Returns:
        [T, N, D].
    """
    if segments.branches is not None:
        assert causal
        return _branched(q_TND, k_TKD, v_TKD, segments.branches)
    kernel = attention_kernel(q_TND.device.type, q_TND.dtype)
    if kernel == "sdpa by length":
        return _by_length(q_TND, k_TKD, v_TKD, segments.lengths, causal)
    if kernel == "cudnn" and causal and segments.max_seqlen >= LONG:
        return _long_alone(q_TND, k_TKD, v_TKD, segments)
    ends, longest = segments.cu_seqlens_S1, segments.max_seqlen
    if kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_TND, k_TKD, v_TKD, ends, ends, longest, longest, causal=causal
        )
    return _together(q_TND, k_TKD, v_TKD, ends, longest, causal)


def _together(
    q: Tensor, k: Tensor, v: Tensor, ends_S1: Tensor, longest: int, causal: bool
) -> Tensor:
    """All sequences in a call of torch's variable-length kernel, which is FlashAttention 2."""
    from torch.nn.attention.varlen import varlen_attn

    groups, options = q.shape[1] // k.shape[1], dict[str, Any]()
    if groups > 1 and _takes_groups():
        options = dict(enable_gqa=True)
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, ends_S1, ends_S1, longest, longest, window_size=window, **options)
    assert isinstance(out, Tensor)
    return out


@cache
def _takes_groups() -> bool:
    """Whether torch's variable-length kernel takes grouped queries: 2.11's does not say so."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _long_alone(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal: each long sequence in a cuDNN call, each run of shorter ones between them in one."""
    outputs: list[Tensor] = []
    first = start = 0
    for is_long, run in itertools.groupby(segments.lengths, lambda length: length >= LONG):
        lengths = list(run)
        last, end = first + len(lengths), start + sum(lengths)
        queries, keys, values = q[start:end], k[start:end], v[start:end]
        if is_long:
            parts = (x.split(lengths) for x in (queries, keys, values))
            outputs += map(_alone, *parts)
        elif end > start:
            bounds = segments.cu_seqlens_S1[first : last + 1] - start
            outputs.append(_together(queries, keys, values, bounds, max(lengths), causal=True))
        first, start = last, end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One causal sequence by cuDNN. It builds a plan for every length it meets, in 150 ms forward
    and backward, so lengths are rounded up, by 3 % at most, to one of 160 between 2k and 64k: with
    rows at the end, where no real row looks."""
    length = q.shape[0]
    unit = 1 << max(6, (length - 1).bit_length() - 6)

    def padded(x: Tensor) -> Tensor:
        """[1, heads, length rounded up, D]."""
        more = -length % unit
        return (F.pad(x, (0, 0, 0, 0, 0, more)) if more else x).transpose(0, 1)[None]

    with sdpa_kernel(LONG_KERNEL):
        out = F.scaled_dot_product_attention(
            padded(q), padded(k), padded(v), is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out[0].transpose(0, 1)[:length]


class _Take(torch.autograd.Function):
    """Rows of a tensor; an old row's gradient is the sum over its new ones, in their order."""

    @staticmethod
    def forward(ctx: Any, old: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return old.index_select(0, rows.index_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (new,) = gradients
        rows: Rows = ctx.rows
        flat = new.flatten(1)
        # One kernel, which sums in float32; index_add's sums come in any order.
        old = F.embedding_bag(
            rows.places_N, flat, rows.starts_M1, mode="sum", include_last_offset=True
        )
        return old.view(-1, *new.shape[1:]), None


def _branched(q: Tensor, k: Tensor, v: Tensor, branches: Branches) -> Tensor:
    """Causal. Attention alone is made for whole sequences, each branch behind a copy of its prefix,
    and costs what it costs without branches; of the prefix's results the first copy's are kept.
    (Calls of fewer queries than keys would spare the others, but not every kernel has them, and
    with a call for each kind of segment a step took half as many launches again.)"""
    heads = [x.shape[1] for x in (q, k, v)]
    q, k, v = _Take.apply(torch.cat([q, k, v], 1), branches.expand).split(heads, 1)
    out = packed_attention(q, k, v, branches.whole, causal=True)
    taken: Tensor = _Take.apply(out, branches.collapse)
    return taken


def check_attention(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    share_prefixes: bool = False,
) -> None:
    """Compare what ``packed_attention`` runs for these heads with float32, forward and backward, on
    one long sequence and two short ones.

    Args:
        share_prefixes: on a prompt of 100 tokens that stands once as well, before a long response
            and two short ones, with float32 where it stands three times.

    Raises:
        ParityError: a result differs by more than a dtype's rounding.
    """
    plain = Segments.of([LONG + 100, 130, 1]).to(device)
    cases = [("report", plain, plain, torch.arange(plain.total))]
    if share_prefixes:
        prompt, responses = 100, [LONG, 130, 1]
        shared = Segments.of([prompt, *responses], [-1, 0, 0, 0]).to(device)
        own = torch.arange(prompt, shared.total).split(responses)
        places = torch.cat([torch.cat([torch.arange(prompt), part]) for part in own])
        apart = Segments.of([prompt + length for length in responses]).to(device)
        cases.append(("run with rl.share_prefixes=false, and report", shared, apart, places))
    for way_out, segments, apart, places in cases:
        _compare(heads, kv_heads, head_dim, dtype, segments, apart, places.to(device), way_out)


def _compare(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    segments: Segments,
    apart: Segments,
    places: Tensor,
    way_out: str,
) -> None:
    """Raises ParityError: attention over ``segments`` is not float32's over ``apart``, whose tokens
    are those at ``places``."""
    from ovr_kernels.parity import ParityError, relative_error  # which needs Triton

    device = places.device
    generator = torch.Generator().manual_seed(0)
    shape = (segments.total, heads + 2 * kv_heads, head_dim)
    drawn = torch.randn(shape, generator=generator).to(device, dtype)
    upstream = torch.randn(shape[0], heads, head_dim, generator=generator).to(device)
    first = {token: place for place, token in reversed([*enumerate(places.tolist())])}
    firsts = torch.tensor([first[token] for token in range(segments.total)], device=device)
    results = []
    for kind, tested in ((dtype, True), (torch.float32, False)):
        packed = drawn.detach().to(kind).requires_grad_()
        if tested:
            q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
            out = packed_attention(q, k, v, segments, causal=True)
        else:
            q, k, v = packed[places].split([heads, kv_heads, kv_heads], 1)
            out = packed_attention(q, k, v, apart, causal=True)[firsts]
        (gradient,) = torch.autograd.grad((out.float() * upstream).sum(), packed)
        results.append((out.detach().float(), gradient.float()))
    for what, found, wanted in zip(("output", "gradient"), *results, strict=True):
        error = relative_error(found, wanted)
        if not error <= PARITY:
            raise ParityError(
                f"attention by {attention_kernel(device.type, dtype)}: its {what} differs from "
                f"float32 by {error:.1e} (relative norm, allowed {PARITY:.0e}) on {device}; "
                f"{way_out} the GPU and the versions of torch and cuDNN"
            )


def _by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> Tensor:
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
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        groups = 1
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
