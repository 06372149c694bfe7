"""A policy loss straight from hidden states, its gradients made in the forward.

A token's gradient depends on its own log-prob and on numbers known beforehand, so nothing has to be
computed again: three matrix products in all (6 N H V operations) where a recomputing backward has
four. For each chunk of tokens: the product and its statistics, kept as scaled exponentials in the
operands' dtype; the objective; the exponentials into logit gradients, in place; the products for
hidden and weight. Rows whose coefficients are exactly 0 (clipped, or no advantage) are left out of
those two.

Saved for the backward: the hidden gradient [N, H] and, unless a buffer is given, the weight's in
fp32 [V, H]; the backward multiplies both by the upstream gradient. Extra memory of a chunk of C
tokens: C V x 2 bytes, whatever N is. Log-probs are those of fp32 logits and are the bits of
``linear_logprob``, so the ratio of a first on-policy step is exactly 1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels import checks
from ovr_kernels.head import (
    accumulate_gradients,
    fp16_scale,
    logit_gradients,
    row_statistics,
    shard_start,
)
from ovr_kernels.linear_logprob import linear_logprob
from ovr_kernels.objective import PolicyObjective
from ovr_kernels.policy_loss import policy_gradients, policy_loss
from ovr_kernels.reference import LinearPolicyStatistics

CHUNK = 8192


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, tokens, objective, options, box):
        temperature, group, weight_buffer, chunk = options
        rows = hidden.shape[0]
        device = hidden.device
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = weight_buffer
        if weight_buffer is None and ctx.needs_input_grad[1]:
            weight_gradient = torch.empty_like(weight, dtype=torch.float32)
        empty = weight_buffer is None  # nothing is in weight_gradient yet
        logprobs, entropies = torch.empty(2, rows, dtype=torch.float32, device=device).unbind(0)
        factors = torch.ones(rows, 1, device=device) if hidden.dtype is torch.float16 else None
        totals = torch.zeros(4, dtype=torch.float32, device=device)
        loss = torch.zeros((), dtype=torch.float32, device=device)
        for start in range(0, rows, chunk):
            at = slice(start, start + chunk)
            part = hidden[at]
            statistics, exponentials = row_statistics(
                part,
                weight,
                targets[at],
                temperature=temperature,
                group=group,
                entropy=True,
                store=True,
            )
            assert exponentials is not None
            inputs = {
                name: value[at] if isinstance(value, Tensor) else value
                for name, value in tokens.items()
            }
            part_loss, by_logprob, by_entropy, found = policy_gradients(
                statistics.logprobs, objective=objective, entropies=statistics.entropies, **inputs
            )
            moved = by_logprob != 0
            if by_entropy is not None:
                moved |= by_entropy != 0
            kept = moved.nonzero().squeeze(1)
            scale = fp16_scale(hidden.dtype, by_logprob, by_entropy)
            if scale is not None and factors is not None:
                by_logprob = by_logprob / scale
                by_entropy = None if by_entropy is None else by_entropy / scale
                factors[at] = scale
            gradients = logit_gradients(
                exponentials,
                statistics,
                targets[at],
                by_logprob,
                by_entropy,
                kept=kept.int(),
                temperature=temperature,
                first_id=shard_start(weight, group),
            )
            if kept.numel():
                hidden_gradient[kept + start] = accumulate_gradients(
                    gradients,
                    part if kept.numel() == part.shape[0] else part[kept],
                    weight,
                    group=group,
                    weight_gradient=weight_gradient,
                    empty=empty,
                    scale=scale,
                )
                empty = False
            del exponentials, gradients  # or two chunks of them exist in the next round
            logprobs[at], entropies[at] = statistics.logprobs, statistics.entropies
            totals += found.totals
            loss += part_loss
        if empty and weight_gradient is not None:
            weight_gradient.zero_()
        ctx.save_for_backward(
            hidden_gradient, None if weight_buffer is not None else weight_gradient, factors
        )
        ctx.weight_dtype, ctx.buffered = weight.dtype, weight_buffer is not None
        box.append(LinearPolicyStatistics(logprobs=logprobs, entropies=entropies, totals=totals))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient, factors = ctx.saved_tensors
        if ctx.buffered:  # the buffer has its gradient already
            torch._assert_async(
                upstream == 1.0,
                "linear_policy_loss: with weight_gradient the loss is differentiated as it is; "
                "put factors (1 / accumulation steps, a loss scale) into weights",
            )
        factor = upstream if factors is None else upstream * factors
        hidden_gradient = scaled(hidden_gradient, factor)
        if weight_gradient is not None:
            out = torch.empty_like(weight_gradient, dtype=ctx.weight_dtype)
            weight_gradient = torch.mul(weight_gradient, upstream, out=out)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: PolicyObjective,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | float = 1.0,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """See ``reference.linear_policy_loss``.

    With ``weight_gradient`` the loss must be differentiated with an upstream gradient of 1 (the
    buffer was filled in the forward); the backward asserts it on the device.
    """
    name = "linear_policy_loss"
    checks.check_rows(name, hidden, weight, targets, temperature=temperature)
    checks.check_buffer(name, weight_gradient, weight)
    if check_targets:
        checks.check_targets(name, targets, weight, tp_group)
    targets = targets.long()
    weights = _weights(checks.weights_of(name, weights, targets), targets)
    if not torch.is_grad_enabled():  # one product, no gradients, the buffer left alone
        logprobs, entropies = linear_logprob(
            hidden, weight, targets, temperature=temperature, tp_group=tp_group,
            return_entropy=True, chunk=chunk, check_targets=False,
        )  # fmt: skip
        loss, found = policy_loss(
            logprobs, advantages, objective, entropies=entropies, old_logprobs=old_logprobs,
            rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs, weights=weights,
        )  # fmt: skip
        return loss, LinearPolicyStatistics(
            logprobs=logprobs, entropies=entropies, totals=found.totals
        )
    checks.per_token(
        name, targets, advantages=advantages, old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs,
    )  # fmt: skip
    tokens = dict(
        advantages=advantages,
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
        weights=weights,
    )
    options = temperature, tp_group, weight_gradient, chunk
    box: list[LinearPolicyStatistics] = []
    loss = _LinearPolicyLoss.apply(hidden, weight, targets, tokens, objective, options, box)
    return loss, box[0]


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a factor of fp32 (one, or one a row), rounded once, a chunk of rows at a
    time: a factor that was rounded to bfloat16 first makes all of it up to 0.4 % wrong."""
    if gradient.dtype is torch.float32:
        return gradient * factor
    out = torch.empty_like(gradient)
    for start in range(0, gradient.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        out[rows] = gradient[rows].float() * (factor if factor.dim() == 0 else factor[rows])
    return out


def _weights(weights: Tensor | float, targets: Tensor) -> Tensor:
    """With ignored rows weighing nothing."""
    if not isinstance(weights, Tensor):
        weights = torch.full(targets.shape, weights, dtype=torch.float32, device=targets.device)
    return torch.where(targets >= 0, weights, 0.0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | float = 1.0,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """See ``reference.linear_cross_entropy``."""
    return linear_policy_loss(
        hidden,
        weight,
        targets,
        PolicyObjective(kind="reinforce"),
        advantages=torch.ones(targets.shape, device=targets.device),
        weights=weights,
        temperature=temperature,
        tp_group=tp_group,
        weight_gradient=weight_gradient,
        chunk=chunk,
        check_targets=check_targets,
    )
