"""A loss straight from hidden states, its gradients made in the forward.

Where a row's gradient depends on its own log-prob and on numbers known beforehand, nothing has to
be computed again: three matrix products in all (6 N H V operations) where a recomputing backward
has four. For each chunk of rows: the product and its statistics, kept as scaled exponentials in the
operands' dtype; the loss of the rows; the exponentials into logit gradients, in place; the products
for hidden and weight. Rows whose coefficients are exactly 0 (clipped, or no advantage) are left out
of those two.

Saved for the backward: the hidden gradient [N, H] and, unless a buffer is given, the weight's
[V, H] (in fp32 where there are several chunks); the backward multiplies both by the upstream
gradient. Extra memory of a chunk of C rows: C V x 2 bytes, whatever N is. Log-probs are those of
fp32 logits and are the bits of ``linear_logprob``, so the ratio of a first on-policy step is
exactly 1. Without gradients to make it is one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels.head import (
    Coefficients,
    Head,
    OperandGradients,
    ScaledExponentials,
    logit_gradients,
    row_statistics,
    scaled,
)
from ovr_kernels.reference import LinearPolicyStatistics, RowValues


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLoss:
    """The loss of some rows and its gradients by their values."""

    loss: Tensor  # fp32
    by: Coefficients
    totals: Tensor  # [4] fp32, ``objective.TOTALS``


class RowLoss(Protocol):
    """A loss that is a sum over rows."""

    entropy: bool  # it, or its statistics, need entropies
    mean: bool  # it needs means
    prepare: bool  # it looks at all rows' values before the first gradient

    def all_rows(self, logprobs: Tensor) -> None:
        """With ``prepare``: the log-probs of all rows, [R] fp32."""

    def chunk(self, rows: slice, found: RowValues) -> ChunkLoss:
        """The loss of a chunk of rows."""


def loss_in_forward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    row_loss: RowLoss,
    *,
    weight_gradient: Tensor | None,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """The loss, fp32, differentiable in hidden, weight and bias; and its statistics, [R].

    Args:
        hidden: [R, H].
        head: weight, bias and options.
        targets: [R] int64; a negative one marks a row to ignore.
        row_loss: of the rows; an ignored one must count nothing in it.
        weight_gradient: [V, H] fp32 that the weight's gradient is added to, once the loss is made.
            The loss must then be differentiated with an upstream gradient of 1; the backward
            asserts it on the device.
    """
    box: list[LinearPolicyStatistics] = []
    operands = hidden, head.weight, head.bias
    with torch.autocast(hidden.device.type, enabled=False):
        needed = weight_gradient is not None or any(
            tensor is not None and tensor.requires_grad for tensor in operands
        )
        if torch.is_grad_enabled() and needed:
            loss = _LossInForward.apply(*operands, targets, row_loss, head, weight_gradient, box)
            return loss, box[0]
        with torch.no_grad():
            return _walk(hidden, head, targets, row_loss, None)


class _LossInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_loss, head, buffer, box):
        gradients = OperandGradients(
            hidden,
            head,
            wanted=tuple(ctx.needs_input_grad[:3]),
            buffer=buffer,
            whole=hidden.shape[0] <= head.options.chunk,
        )
        loss, statistics = _walk(hidden, head, targets, row_loss, gradients)
        gradients.finish()
        ctx.save_for_backward(
            gradients.hidden,
            None if buffer is not None else gradients.weight,
            gradients.bias,
            gradients.factors,
        )
        ctx.dtype, ctx.buffered = hidden.dtype, buffer is not None
        box.append(statistics)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, weight, bias, factors = ctx.saved_tensors
        if ctx.buffered:  # the buffer has its gradient already
            torch._assert_async(
                upstream == 1.0,
                "with weight_gradient a loss is differentiated as it is; put factors "
                "(1 / accumulation steps, a loss scale) into weights",
            )
        by_row = upstream if factors is None else upstream * factors
        found = (
            None if hidden is None else scaled(hidden, by_row, ctx.dtype),
            None if weight is None else scaled(weight, upstream, ctx.dtype),
            None if bias is None else scaled(bias, upstream, ctx.dtype),
        )
        return (*found, None, None, None, None, None)


def _walk(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    row_loss: RowLoss,
    gradients: OperandGradients | None,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """Chunk by chunk: values of the rows, their loss and, where asked for, the gradients."""
    rows, device, chunk = hidden.shape[0], hidden.device, head.options.chunk
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    entropies = torch.empty_like(logprobs) if row_loss.entropy else None
    loss = torch.zeros((), dtype=torch.float32, device=device)
    totals = torch.zeros(4, dtype=torch.float32, device=device)
    at_once = rows <= chunk
    known: list[RowValues] = []
    if row_loss.prepare and not at_once:
        for start in range(0, rows, chunk):
            at = slice(start, start + chunk)
            values, _ = _values(hidden, head, targets, row_loss, at, store=False)
            known.append(values)
        row_loss.all_rows(torch.cat([values.logprobs for values in known]))
    for number, start in enumerate(range(0, rows, chunk)):
        at = slice(start, start + chunk)
        exponentials = None
        if not known or gradients is not None:
            values, exponentials = _values(
                hidden, head, targets, row_loss, at, store=gradients is not None,
                known=known[number] if known else None,
            )  # fmt: skip
        else:
            values = known[number]
        if row_loss.prepare and at_once:
            row_loss.all_rows(values.logprobs)
        found = row_loss.chunk(at, values)
        if gradients is not None and exponentials is not None:
            kept = found.by.kept()
            of_rows, scale = found.by.scaled(hidden.dtype)
            if kept.numel():
                part = hidden[at]
                gradients.add(
                    logit_gradients(exponentials, values, head, targets[at], of_rows, kept=kept),
                    part if kept.numel() == part.shape[0] else part[kept],
                    kept + start,
                    scale,
                )
        del exponentials  # or two chunks of them exist in the next round
        logprobs[at] = values.logprobs
        if entropies is not None:
            entropies[at] = values.entropies
        totals += found.totals
        loss += found.loss
    return loss, LinearPolicyStatistics(logprobs=logprobs, entropies=entropies, totals=totals)


def _values(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    row_loss: RowLoss,
    at: slice,
    *,
    store: bool,
    known: RowValues | None = None,
) -> tuple[RowValues, ScaledExponentials | None]:
    return row_statistics(
        hidden[at], head, targets[at], entropy=row_loss.entropy, mean=row_loss.mean, store=store,
        known=known,
    )  # fmt: skip
