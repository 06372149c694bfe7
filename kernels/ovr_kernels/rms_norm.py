"""Root-mean-square normalisation, alone or after a residual addition.

Fused: the addition, the mean square, the scaling; the normalised number is rounded to the input's
dtype before the scale, as Qwen2 does. Saved for the backward: the input (the sum, where there is
one) and one fp32 number a row. Counted, bf16 rows of width H: 4 H bytes alone, 8 H with the
addition; backward 6 H (8 H). Liger's kernel has the same numerics; this package depends on torch
and triton alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels import checks, reference
from ovr_kernels.compiled import plain_while_compiling


@triton.jit
def norm_kernel(
    hidden,  # [T, H]
    residual,  # [T, H], only with ADD
    weight,  # [H]
    out,  # [T, H]
    total,  # [T, H] hidden + residual, only with ADD
    scales,  # [T] fp32
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < width
    kind = hidden.dtype.element_ty
    value = tl.load(hidden + row * width + column, mask=here, other=0.0)
    if ADD:
        value += tl.load(residual + row * width + column, mask=here, other=0.0)
        tl.store(total + row * width + column, value, mask=here)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / width + eps)
    tl.store(scales + row, scale)
    normal = (wide * scale).to(kind)
    factor = tl.load(weight + column, mask=here, other=0.0)
    tl.store(out + row * width + column, (normal * factor).to(kind), mask=here)


@triton.jit
def norm_backward_kernel(
    upstream,  # [T, H] of the output
    total_upstream,  # [T, H] of the sum, only with ADD
    hidden,  # [T, H] what was normalised
    weight,
    scales,
    gradient,  # [T, H] out
    weight_partial,  # [programs, H] fp32 out, only with SCALE
    rows,
    width,
    rows_a_program,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,  # the weight has a gradient
    BLOCK: tl.constexpr,
):
    """A run of rows; their share of the weight's gradient is added up in registers."""
    column = tl.arange(0, BLOCK)
    here = column < width
    kind = hidden.dtype.element_ty
    factor = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    by_weight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_a_program
    for row in range(first, tl.minimum(first + rows_a_program, rows)):
        at = row * width + column
        above = tl.load(upstream + at, mask=here, other=0.0).to(tl.float32)
        wide = tl.load(hidden + at, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        if ADD:  # here, or the sum over the row is waited for first, and then memory again
            beside = tl.load(total_upstream + at, mask=here, other=0.0).to(tl.float32)
        normal = wide * scale
        if SCALE:
            by_weight += above * normal.to(kind).to(tl.float32)
        above *= factor
        slope = scale * (above - normal * (tl.sum(above * normal) / width))
        if ADD:
            slope += beside
        tl.store(gradient + at, slope.to(kind), mask=here)
    if SCALE:
        tl.store(weight_partial + tl.program_id(0) * width + column, by_weight, mask=here)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, residual, weight, eps):
        shape = hidden.shape
        hidden = hidden.reshape(-1, shape[-1]).contiguous()
        rows, width = hidden.shape
        add = residual is not None
        out = torch.empty_like(hidden)
        total = torch.empty_like(hidden) if add else hidden
        scales = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        if rows:
            norm_kernel[(rows,)](
                hidden,
                residual.reshape(-1, width).contiguous() if add else hidden,
                weight.contiguous(),
                out,
                total,
                scales,
                width,
                eps,
                ADD=add,
                BLOCK=triton.next_power_of_2(width),
                num_warps=8,
                enable_fp_fusion=True,
            )
        ctx.save_for_backward(total, weight.contiguous(), scales)
        ctx.set_materialize_grads(False)
        return (out.view(shape), total.view(shape)) if add else out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, total_upstream=None):
        total, weight, scales = ctx.saved_tensors
        rows, width = total.shape
        needs_hidden, needs_residual, needs_weight, _ = ctx.needs_input_grad
        if upstream is None:  # of the sum alone
            sums = [total_upstream if need else None for need in (needs_hidden, needs_residual)]
            return *sums, None, None
        add = total_upstream is not None
        programs = max(1, min(rows, 2 * _multiprocessors(total.device)))
        gradient = torch.empty_like(total)
        made = torch.empty if rows else torch.zeros  # every program writes its own
        shares = programs if needs_weight else 1
        partial = made(shares, width, dtype=torch.float32, device=total.device)
        if rows:
            norm_backward_kernel[(programs,)](
                upstream.reshape(-1, width).contiguous(),
                total_upstream.reshape(-1, width).contiguous() if add else total,
                total,
                weight,
                scales,
                gradient,
                partial,
                rows,
                width,
                triton.cdiv(rows, programs),
                ADD=add,
                SCALE=needs_weight,
                BLOCK=triton.next_power_of_2(width),
                num_warps=8,
                enable_fp_fusion=True,
            )
        gradient = gradient.view(upstream.shape)
        return (
            gradient if needs_hidden else None,
            gradient if needs_residual else None,
            partial.sum(0).to(weight.dtype) if needs_weight else None,
            None,
        )


@plain_while_compiling(reference.rms_norm)
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    checks.check_norm("rms_norm", hidden, weight, eps)
    return _RMSNorm.apply(hidden, None, weight, eps)


@plain_while_compiling(reference.add_rms_norm)
def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See ``reference.add_rms_norm``."""
    checks.check_norm("add_rms_norm", hidden, weight, eps, residual)
    return _RMSNorm.apply(hidden, residual, weight, eps)


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; an interpreted kernel runs few programs."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
