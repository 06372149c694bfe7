"""Log-probs and entropies of targets straight from hidden states, differentiable.

Fused: matrix product, temperature, softmax statistics, choice of the target, entropy; logits live
in registers only. Saved for the backward: hidden, weight, targets and 12 bytes a row. The backward
makes a chunk's logits again (as scaled exponentials in the operands' dtype), turns them into logit
gradients in place and multiplies twice; rows without a gradient are left out of all three products.
Counted: 2 N H V operations forward, 6 K H V backward of the K rows that have one; extra memory
16 bytes a row and split of the vocabulary, and [chunk, V] x 2 in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels import checks, compiled
from ovr_kernels.head import (
    Coefficients,
    Head,
    OperandGradients,
    logit_gradients,
    row_statistics,
)
from ovr_kernels.reference import LogitOptions, RowValues

CHUNK = 8192


def rows_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    known: List[Tensor],
    by: List[Tensor | None],
    options: LogitOptions,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that are ``wanted``.

    Args:
        known: log-probs, entropies and normalizers of the forward.
        by: the loss's gradients by ``RowValues``, in their order; None: it has none.
    """
    head = Head(weight=weight, bias=bias, options=options)
    counted = [None if each is None else each.where(targets >= 0, 0.0) for each in by]
    first = torch.zeros_like(known[0]) if counted[0] is None else counted[0]
    coefficients = Coefficients(
        logprobs=first, entropies=counted[1], normalizers=counted[2], means=counted[3]
    )
    kept, chunk = coefficients.kept(), options.chunk
    gradients = OperandGradients(hidden, head, wanted=wanted, whole=kept.numel() <= chunk)
    for start in range(0, kept.numel(), chunk):
        places = kept[start : start + chunk]
        part, ids = hidden[places], targets[places]
        logprobs, entropies, normalizers = (value[places] for value in known)
        found = RowValues(
            logprobs=logprobs, entropies=entropies, normalizers=normalizers, means=logprobs
        )
        _, exponentials = row_statistics(part, head, ids, entropy=False, store=True, known=found)
        assert exponentials is not None
        of_rows, scale = coefficients.at(places).scaled(hidden.dtype)
        every = torch.arange(places.numel(), device=places.device)
        logits = logit_gradients(exponentials, found, head, ids, of_rows, kept=every)
        gradients.add(logits, part, places, scale)
        del exponentials, logits  # or two chunks of them exist in the next round
    gradients.finish()
    return gradients.of_operands()


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options, entropy, mean):
        head = Head(weight=weight, bias=bias, options=options)
        found, _ = row_statistics(hidden, head, targets, entropy=entropy, mean=mean, store=False)
        ctx.save_for_backward(
            hidden, weight, bias, targets, found.logprobs, found.entropies, found.normalizers
        )
        ctx.options = options
        ctx.set_materialize_grads(False)
        unasked = [*([] if entropy else [found.entropies]), *([] if mean else [found.means])]
        ctx.mark_non_differentiable(*unasked)
        return found.logprobs, found.entropies, found.normalizers, found.means

    @staticmethod
    @once_differentiable
    def backward(ctx, *by):
        hidden, weight, bias, targets, *known = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = rows_backward(
                hidden, weight, bias, targets, known, by, ctx.options,
                wanted=tuple(ctx.needs_input_grad[:3]),
            )  # fmt: skip
        return *gradients, None, None, None, None


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LogitOptions,
    *,
    entropy: bool = True,
    mean: bool = False,
) -> RowValues:
    """See ``reference.linear_rows``."""
    if torch.compiler.is_compiling():
        return compiled.linear_rows(
            hidden, weight, bias, targets, options, entropy=entropy, mean=mean, fused=True
        )
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropies, normalizers, means = _LinearRows.apply(
            hidden, weight, bias, targets, options, entropy, mean
        )
    return RowValues(logprobs=logprobs, entropies=entropies, normalizers=normalizers, means=means)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``reference.linear_logprob``. A row's result depends on no other row, bit for bit."""
    rows = checks.head_rows(
        "linear_logprob", hidden, weight, targets, bias, temperature=temperature,
        softcap=softcap, group=tp_group, check_targets=check_targets,
    )  # fmt: skip
    options = LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk)
    found = linear_rows(
        rows.hidden, rows.weight, rows.bias, rows.targets, options, entropy=return_entropy
    )
    logprobs = found.logprobs.view(targets.shape)
    return (logprobs, found.entropies.view(targets.shape)) if return_entropy else logprobs
