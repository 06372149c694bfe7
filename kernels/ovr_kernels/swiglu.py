"""SwiGLU on the packed output of one projection: ``silu(first half) * second half``.

Fused: both halves are read where they are, and the backward writes the gradient of the packed
tensor at once. Saved for the backward: the packed input. Counted, width I in bf16: 6 I bytes a row
forward, 10 I backward. Liger's kernel wants two contiguous tensors; on a packed projection that is
a copy of each half before, and a concatenation of their gradients after.
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
def swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=here, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=here, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide * tl.sigmoid(wide)).to(gate.dtype)  # rounded, as eager torch does
    tl.store(out + row * width + column, active * up, mask=here)


@triton.jit
def swiglu_backward_kernel(gate_up, upstream, gradient, width, BLOCK: tl.constexpr):
    """A block of one row, both halves."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=here, other=0.0).to(tl.float32)
    above = tl.load(upstream + row * width + column, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    kind = gradient.dtype.element_ty
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(gradient + at, (above * up * slope).to(kind), mask=here)
    tl.store(gradient + at + width, (above * gate * sigmoid).to(kind), mask=here)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        flat = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        rows, width = flat.shape[0], flat.shape[1] // 2
        out = torch.empty(rows, width, dtype=flat.dtype, device=flat.device)
        if rows:
            swiglu_kernel[(rows, triton.cdiv(width, 1024))](
                flat,
                out,
                width,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
        ctx.save_for_backward(flat)
        ctx.shape = gate_up.shape
        return out.view(*gate_up.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (flat,) = ctx.saved_tensors
        rows, width = flat.shape[0], flat.shape[1] // 2
        gradient = torch.empty_like(flat)
        if rows:
            swiglu_backward_kernel[(rows, triton.cdiv(width, 1024))](
                flat,
                upstream.reshape(-1, width).contiguous(),
                gradient,
                width,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return gradient.view(ctx.shape)


@plain_while_compiling(reference.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """See ``reference.swiglu``."""
    checks.check_gate_up(gate_up)
    return _SwiGLU.apply(gate_up)
