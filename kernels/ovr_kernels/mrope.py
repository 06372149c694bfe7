"""Rotary embedding from integer positions, in place: M-RoPE of the language model, and the two-axis
rotation of the vision tower.

Fused: angles, cosines and sines are made in registers from [axes, T] positions, so no table of
[T, D] exists; queries and keys turn where the projection left them. Saved for the backward: the
positions. The backward is the same kernel turning the other way, on a copy of the gradient.
Counted, forward: 2 x 2 bytes a rotated number and 8 bytes a token and axis.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels import checks, reference
from ovr_kernels.compiled import plain_while_compiling
from ovr_kernels.reference import RotaryTable


@triton.jit
def rotate_kernel(
    heads,  # [T, N, D] in and out; the first ``rotary_heads`` heads
    positions,  # [axes, T] int64
    inverse,  # [D / 2] fp32
    axes,  # [D / 2] int32
    tokens,
    rotary_heads,
    token_stride,
    head_stride,
    axis_stride,
    direction,  # 1 forward, -1 backward
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF rounded up to a power of two
    HEADS: tl.constexpr,  # heads of a step
):
    """All rotary heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, WIDTH)
    real = number < HALF
    axis = tl.load(axes + number, mask=real, other=0)
    place = tl.load(positions + axis * axis_stride + token, mask=real, other=0)
    angle = place.to(tl.float32) * tl.load(inverse + number, mask=real, other=0.0)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :] * direction
    for start in range(0, rotary_heads, HEADS):
        head = start + tl.arange(0, HEADS)
        at = heads + token * token_stride + head[:, None] * head_stride + number[None, :]
        here = (head < rotary_heads)[:, None] & real[None, :]
        first = tl.load(at, mask=here, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=here, other=0.0).to(tl.float32)
        kind = heads.dtype.element_ty
        tl.store(at, (first * cos - second * sin).to(kind), mask=here)
        tl.store(at + HALF, (second * cos + first * sin).to(kind), mask=here)


def _rotate(
    heads: Tensor, positions: Tensor, table: RotaryTable, rotary_heads: int, direction: float
) -> None:
    tokens, _, width = heads.shape
    if tokens == 0:
        return
    rotate_kernel[(tokens,)](
        heads,
        positions,
        table.inverse,
        table.axes,
        tokens,
        rotary_heads,
        heads.stride(0),
        heads.stride(1),
        positions.stride(0),
        direction,
        HALF=width // 2,
        WIDTH=triton.next_power_of_2(width // 2),
        HEADS=min(16, triton.next_power_of_2(rotary_heads)),
        num_warps=2,  # with 4, the angles' slow path spills on sm_90
        enable_fp_fusion=True,
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads, positions, table, rotary_heads):
        ctx.positions, ctx.table, ctx.rotary_heads = positions, table, rotary_heads
        _rotate(heads, positions, table, rotary_heads, 1.0)
        ctx.mark_dirty(heads)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradient = upstream.clone(memory_format=torch.contiguous_format)
        _rotate(gradient, ctx.positions, ctx.table, ctx.rotary_heads, -1.0)
        return gradient, None, None, None


@plain_while_compiling(reference.rotate)
def rotate(heads: Tensor, positions: Tensor, table: RotaryTable, *, rotary_heads: int) -> Tensor:
    """See ``reference.rotate``. Writes into ``heads`` and returns it.

    Raises:
        ValueError: ``heads`` has no unit stride, positions no unit stride along the tokens, shapes
            that do not fit, or more heads to rotate than there are.
    """
    checks.check_rotation(heads, positions, table.inverse, table.axes, rotary_heads)
    if not heads.numel() or rotary_heads == 0:
        return heads
    if heads.stride(2) != 1 or positions.stride(1) != 1:
        raise ValueError("the last axis of heads and of positions must be contiguous")
    return _Rotate.apply(heads, positions, table, rotary_heads)
