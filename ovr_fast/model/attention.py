"""Attention over packed sequences: the one place that knows which kernel runs on which device."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as List
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ovr_fast.records import Branches, Segments

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
        return _branched(q_TND, k_TKD, v_TKD, segments.lengths, segments.branches)
    kernel = attention_kernel(q_TND.device.type, q_TND.dtype)
    if kernel == "sdpa by length":
        return _by_length(q_TND, k_TKD, v_TKD, segments.lengths, causal)
    if kernel == "cudnn" and causal and segments.max_seqlen >= LONG:
        return _long_alone(q_TND, k_TKD, v_TKD, segments)
    ends, longest = segments.cu_seqlens_S1, segments.max_seqlen
    return _in_one_call(q_TND, k_TKD, v_TKD, Ends(ends, ends, longest, longest), causal)


class Ends(NamedTuple):
    """Where sequences end among the queries and among the keys of one call."""

    queries_S1: Tensor  # int32, from 0
    keys_S1: Tensor
    most_queries: int  # of a sequence
    most_keys: int


def _in_one_call(q: Tensor, k: Tensor, v: Tensor, ends: Ends, causal: bool) -> Tensor:
    """All sequences in a call of a variable-length kernel. Causal is from the end: a sequence's
    last query sees all its keys, the one before it all but one."""
    if attention_kernel(q.device.type, q.dtype) == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *ends, causal=causal)
    return _together(q, k, v, ends, causal)


def _together(q: Tensor, k: Tensor, v: Tensor, ends: Ends, causal: bool) -> Tensor:
    """``_in_one_call`` by torch's variable-length kernel, which is FlashAttention 2."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, *ends, window_size=window)
    assert isinstance(out, Tensor)
    return out


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
            ends = Ends(bounds, bounds, max(lengths), max(lengths))
            outputs.append(_together(queries, keys, values, ends, causal=True))
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


class Pieces(NamedTuple):
    """Queries, keys and values, cut into segments."""

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    def of(self, segments: List[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Those of some segments, end to end."""
        q, k, v = (torch.cat([part[i] for i in segments]) for part in self)
        return q, k, v


def _branched(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], branches: Branches
) -> Tensor:
    """Causal: the roots by themselves, then the queries of each branch over the keys of its prefix
    and its own. Keys and values are written out once a branch (no more of them than without
    branches, which the cap counts): every kernel takes them so, and autograd sums their gradients
    in one order."""
    prefix_S = branches.prefix_S
    roots = [i for i, prefix in enumerate(prefix_S) if prefix < 0]
    others = [i for i, prefix in enumerate(prefix_S) if prefix >= 0]
    pieces = Pieces(*(x.split(lengths) for x in (q, k, v)))
    whole = packed_attention(*pieces.of(roots), branches.roots, causal=True)
    found = dict(zip(roots, whole.split(branches.roots.lengths), strict=True))
    kernel = attention_kernel(q.device.type, q.dtype)
    if kernel == "sdpa by length":
        # The prefix's queries go along: without them a call would need a mask of T x T, which a GPU
        # would keep in each layer, and of whose blocks a CPU skips none.
        pairs = [i for own in others for i in (prefix_S[own], own)]
        sizes = tuple(lengths[prefix_S[own]] + lengths[own] for own in others)
        outputs = _by_length(*pieces.of(pairs), sizes, causal=True).split(sizes)
        found |= {
            own: out[lengths[prefix_S[own]] :] for own, out in zip(others, outputs, strict=True)
        }
    else:
        outputs = _branches_on_gpu(pieces, others, branches, cudnn=kernel == "cudnn")
        found |= zip(others, outputs, strict=True)
    return torch.cat([found[i] for i in range(len(lengths))])


def _branches_on_gpu(
    pieces: Pieces, others: list[int], branches: Branches, *, cudnn: bool
) -> Iterator[Tensor]:
    """Of each branch in turn. A long one has a cuDNN call of its own, whose causality counts from
    the start: its prefix's queries go along and their results are dropped (2 % of the operations at
    1.5k of 10k tokens; the kernels that need none have half of cuDNN's speed)."""
    queries, keys = branches.queries, branches.keys
    first = 0
    for is_long, run in itertools.groupby(keys.lengths, lambda n: cudnn and n >= LONG):
        last = first + len(list(run))
        chosen = others[first:last]
        pairs = [(branches.prefix_S[i], i) for i in chosen]
        if is_long:
            for prefix, own in pairs:
                yield _alone(*pieces.of((prefix, own)))[len(pieces.q[prefix]) :]
        else:
            ends = Ends(
                queries.cu_seqlens_S1[first : last + 1] - sum(queries.lengths[:first]),
                keys.cu_seqlens_S1[first : last + 1] - sum(keys.lengths[:first]),
                max(queries.lengths[first:last]),
                max(keys.lengths[first:last]),
            )
            q = torch.cat([pieces.q[i] for i in chosen])
            _, k, v = pieces.of([i for pair in pairs for i in pair])
            yield from _in_one_call(q, k, v, ends, True).split(queries.lengths[first:last])
        first = last


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
