"""Log-probs and entropies of targets straight from hidden states, differentiable.

Fused: matrix product, temperature, softmax statistics, choice of the target, entropy; logits live
in registers only. Saved for the backward: hidden, weight, targets and 12 bytes a row. The backward
makes a chunk's logits again (as scaled exponentials in the operands' dtype), turns them into logit
gradients in place and multiplies twice. Counted: 2 N H V operations forward, 6 N H V backward;
extra memory 16 bytes a row and split of the vocabulary, and [chunk, V] x 2 in the backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels import checks
from ovr_kernels.head import (
    RowStatistics,
    accumulate_gradients,
    fp16_scale,
    logit_gradients,
    row_statistics,
    shard_start,
)

CHUNK = 8192


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, group, entropy, chunk):
        statistics, _ = row_statistics(
            hidden,
            weight,
            targets,
            temperature=temperature,
            group=group,
            entropy=entropy,
            store=False,
        )
        ctx.save_for_backward(
            hidden, weight, targets, statistics.logprobs, statistics.entropies,
            statistics.normalizers,
        )  # fmt: skip
        ctx.options = temperature, group, entropy, chunk
        ctx.mark_non_differentiable(*([] if entropy else [statistics.entropies]))
        return statistics.logprobs, statistics.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob, by_entropy):
        hidden, weight, targets, logprobs, entropies, normalizers = ctx.saved_tensors
        temperature, group, entropy, chunk = ctx.options
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        counted = targets >= 0
        by_logprob = torch.where(counted, by_logprob, 0.0)
        moved = by_logprob != 0
        if entropy:
            by_entropy = torch.where(counted, by_entropy, 0.0)
            moved |= by_entropy != 0
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            kept = moved[rows].nonzero().squeeze(1)
            known = RowStatistics(
                logprobs=logprobs[rows], entropies=entropies[rows], normalizers=normalizers[rows]
            )
            _, exponentials = row_statistics(
                hidden[rows],
                weight,
                targets[rows],
                temperature=temperature,
                group=group,
                entropy=False,
                store=True,
                known=known,
            )
            assert exponentials is not None
            by_row = by_logprob[rows].contiguous()
            by_entropy_row = by_entropy[rows].contiguous() if entropy else None
            scale = fp16_scale(hidden.dtype, by_row, by_entropy_row)
            if scale is not None:
                by_row = by_row / scale
                by_entropy_row = None if by_entropy_row is None else by_entropy_row / scale
            gradients = logit_gradients(
                exponentials,
                known,
                targets[rows],
                by_row,
                by_entropy_row,
                kept=kept.int(),
                temperature=temperature,
                first_id=shard_start(weight, group),
            )
            if kept.numel():
                found = accumulate_gradients(
                    gradients,
                    hidden[rows][kept],
                    weight,
                    group=group,
                    weight_gradient=weight_gradient,
                    scale=scale,
                )
                if scale is not None:
                    found = (found.float() * scale).to(found.dtype)
                hidden_gradient[kept + start] = found
            del exponentials, gradients  # or two chunks of them exist in the next round
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``reference.linear_logprob``. A row's result depends on no other row, bit for bit."""
    checks.check_rows("linear_logprob", hidden, weight, targets, temperature=temperature)
    if check_targets:
        checks.check_targets("linear_logprob", targets, weight, tp_group)
    logprobs, entropies = _LinearLogprob.apply(
        hidden, weight, targets.long(), temperature, tp_group, return_entropy, chunk
    )
    return (logprobs, entropies) if return_entropy else logprobs
