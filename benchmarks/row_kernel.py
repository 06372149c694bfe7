"""The baseline of the head: a large cuBLAS product, then one kernel over rows of bf16 logits.

About the best that can be had without a matrix product of one's own: the logits of a chunk are
written once in bf16, read by one program a row for statistics, and for training read again and
overwritten with their gradients. Its log-probs carry the rounding of bf16 logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovr_kernels.head import add_product


@triton.jit
def row_kernel(
    logits, targets, advantages, logprobs, columns, scale, TRAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: log-prob of its target, and with TRAIN the gradient of -advantage x log-prob."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * columns
    peak, total = -float("inf"), 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(line + column, mask=column < columns, other=-1e30).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(z - new_peak), 0)
        peak = new_peak
    target = tl.load(targets + row)
    normalizer = peak + tl.log(total)
    tl.store(logprobs + row, tl.load(line + target).to(tl.float32) - normalizer)
    if TRAIN:
        slope = tl.load(advantages + row) * scale
        tl.debug_barrier()
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            z = tl.load(line + column, mask=inside, other=-1e30).to(tl.float32)
            gradient = slope * (tl.exp(z - normalizer) - tl.where(column == target, 1.0, 0.0))
            tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=inside)


def chunked_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, advantages: Tensor | None, chunk: int
) -> tuple[Tensor, ...]:
    """Log-probs [N]; with advantages also the gradients of hidden and weight."""
    rows, columns = hidden.shape[0], weight.shape[0]
    logprobs = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden)
    weight_gradient = None
    if advantages is not None:
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = hidden[part] @ weight.t()
        row_kernel[(logits.shape[0],)](
            logits,
            targets[part],
            logprobs if advantages is None else advantages[part],
            logprobs[part],
            columns,
            1.0 / rows,
            TRAIN=advantages is not None,
            BLOCK=8192,
            num_warps=16,
        )
        if weight_gradient is not None:
            hidden_gradient[part] = logits @ weight
            add_product(weight_gradient, logits.t(), hidden[part])
    if weight_gradient is None:
        return (logprobs,)
    return logprobs, hidden_gradient, weight_gradient
