"""Policy losses and cross-entropy straight from hidden states (``in_forward``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_kernels import checks, reference
from ovr_kernels.head import Coefficients, Head
from ovr_kernels.in_forward import ChunkLoss, loss_in_forward
from ovr_kernels.linear_logprob import CHUNK, linear_rows
from ovr_kernels.objective import PolicyObjective
from ovr_kernels.policy_loss import policy_gradients, policy_loss
from ovr_kernels.reference import LinearPolicyStatistics, LogitOptions, RowValues


class _Policy:
    """``policy_loss`` as a sum over rows."""

    mean = prepare = False

    def __init__(self, objective: PolicyObjective, tokens: dict[str, Tensor], entropy: bool):
        self.objective, self.tokens, self.entropy = objective, tokens, entropy

    def all_rows(self, logprobs: Tensor) -> None:
        """Not asked for."""

    def chunk(self, rows: slice, found: RowValues) -> ChunkLoss:
        """See ``RowLoss``."""
        tokens: dict[str, Any] = dict.fromkeys(("old_logprobs", "rollout_logprobs", "ref_logprobs"))
        tokens |= {name: value[rows] for name, value in self.tokens.items()}
        loss, by_logprob, by_entropy, statistics = policy_gradients(
            found.logprobs, objective=self.objective, entropies=found.entropies, **tokens
        )
        return ChunkLoss(
            loss=loss,
            by=Coefficients(logprobs=by_logprob, entropies=by_entropy),
            totals=statistics.totals,
        )


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
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    return_entropy: bool = True,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """See ``reference.linear_policy_loss``.

    With ``weight_gradient`` the loss must be differentiated with an upstream gradient of 1 (the
    buffer was filled in the forward); the backward asserts it on the device. Under
    ``torch.compile`` it is ``policy_loss`` of ``linear_logprob``: a fourth product.
    """
    name = "linear_policy_loss"
    rows = checks.head_rows(
        name, hidden, weight, targets, bias, temperature=temperature, softcap=softcap,
        group=tp_group, check_targets=check_targets,
    )  # fmt: skip
    checks.check_buffer(name, weight_gradient, weight, hidden)
    tokens = checks.flat_tokens(
        name, targets, advantages=advantages, old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs,
    )  # fmt: skip
    tokens["weights"] = checks.row_weights(name, weights, targets, rows)
    options = LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk)
    entropy = return_entropy or objective.entropy_coef != 0
    if torch.compiler.is_compiling():
        checks.no_buffer(name, weight_gradient)
        found = linear_rows(
            rows.hidden, rows.weight, rows.bias, rows.targets, options, entropy=entropy
        )
        loss, sums = policy_loss(
            found.logprobs, tokens.pop("advantages"), objective,
            entropies=found.entropies if entropy else None, **tokens,
        )  # fmt: skip
        statistics = LinearPolicyStatistics(
            logprobs=found.logprobs.detach(),
            entropies=found.entropies.detach() if entropy else None,
            totals=sums.totals,
        )
    else:
        reference.check_policy_inputs(
            tokens["weights"], tokens["advantages"], objective, tokens["weights"],
            *(tokens.get(key) for key in ("old_logprobs", "rollout_logprobs", "ref_logprobs")),
        )  # fmt: skip
        loss, statistics = loss_in_forward(
            rows.hidden,
            Head(weight=rows.weight, bias=rows.bias, options=options),
            rows.targets,
            _Policy(objective, tokens, entropy),
            weight_gradient=weight_gradient,
        )
    return loss, statistics.shaped(targets.shape)


class _CrossEntropy:
    """``reference.row_losses``, weighed, as a sum over rows."""

    prepare = False

    def __init__(self, weights: Tensor, label_smoothing: float, z_loss: float, entropy: bool):
        self.weights, self.entropy = weights, entropy
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.mean = label_smoothing > 0

    def all_rows(self, logprobs: Tensor) -> None:
        """Not asked for."""

    def chunk(self, rows: slice, found: RowValues) -> ChunkLoss:
        """See ``RowLoss``."""
        weights, smooth, z_loss = self.weights[rows], self.label_smoothing, self.z_loss
        losses = reference.row_losses(found, smooth, z_loss)
        by_normalizer = None
        if smooth or z_loss:
            by_normalizer = weights * (smooth + 2.0 * z_loss * found.normalizers)
        by = Coefficients(
            logprobs=weights * (smooth - 1.0),
            normalizers=by_normalizer,
            means=weights * -smooth if smooth else None,
        )
        return ChunkLoss(
            loss=(losses * weights).where(weights != 0, 0.0).sum(),
            by=by,
            totals=reference.cross_entropy_totals(losses, weights),
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | float = 1.0,
    reduction: str = "sum",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """See ``reference.linear_cross_entropy``; as for ``linear_policy_loss``."""
    call = checks.cross_entropy_call(
        hidden, weight, targets, bias, weights=weights, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        temperature=temperature, softcap=softcap, group=tp_group,
        weight_gradient=weight_gradient, check_targets=check_targets,
    )  # fmt: skip
    checks.check_softcap(call.rows, softcap, label_smoothing, temperature)
    options = LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk)
    if reduction == "none" or torch.compiler.is_compiling():
        checks.no_buffer("linear_cross_entropy", weight_gradient)
        found = linear_rows(
            call.rows.hidden, call.rows.weight, call.rows.bias, call.rows.targets, options,
            entropy=return_entropy, mean=label_smoothing > 0,
        )  # fmt: skip
        return reference.cross_entropy_of(
            found, call.weights, targets.shape, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, return_entropy=return_entropy,
        )  # fmt: skip
    loss, statistics = loss_in_forward(
        call.rows.hidden,
        Head(weight=call.rows.weight, bias=call.rows.bias, options=options),
        call.rows.targets,
        _CrossEntropy(call.weights, label_smoothing, z_loss, return_entropy),
        weight_gradient=weight_gradient,
    )
    return loss, statistics.shaped(targets.shape)


class _Gspo:
    """``reference.gspo_loss`` as a sum over rows, once all log-probs are known."""

    mean = False
    prepare = True

    def __init__(
        self, targets: Tensor, cu_seqlens: Tensor, settings: dict[str, Any], entropy: bool
    ):
        self.targets, self.cu_seqlens, self.settings = targets, cu_seqlens, settings
        self.entropy = entropy

    def all_rows(self, logprobs: Tensor) -> None:
        """See ``RowLoss``."""
        self.loss, by_logprob = reference.gspo_gradients(
            logprobs, cu_seqlens_S1=self.cu_seqlens, **self.settings
        )
        self.by_logprob = by_logprob.where(self.targets >= 0, 0.0)

    def chunk(self, rows: slice, found: RowValues) -> ChunkLoss:
        """See ``RowLoss``; the whole loss is the first chunk's."""
        first = self.loss if rows.start == 0 else torch.zeros_like(self.loss)
        return ChunkLoss(
            loss=first,
            by=Coefficients(logprobs=self.by_logprob[rows]),
            totals=torch.zeros(4, dtype=torch.float32, device=first.device),
        )


def linear_gspo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int = CHUNK,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """See ``reference.linear_gspo_loss``."""
    name = "linear_gspo_loss"
    rows = checks.head_rows(
        name, hidden, weight, targets, bias, temperature=temperature, softcap=softcap,
        group=tp_group, check_targets=check_targets,
    )  # fmt: skip
    checks.check_buffer(name, weight_gradient, weight, hidden)
    options = LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk)
    settings = dict(
        advantages_S=advantages, old_logprobs=old_logprobs, clip_low=clip_low,
        clip_high=clip_high, weights=weights,
    )  # fmt: skip
    checks.check_gspo(
        rows.targets, advantages, cu_seqlens, old_logprobs, clip_low, clip_high, weights
    )
    loss, statistics = loss_in_forward(
        rows.hidden,
        Head(weight=rows.weight, bias=rows.bias, options=options),
        rows.targets,
        _Gspo(rows.targets, cu_seqlens, settings, return_entropy),
        weight_gradient=weight_gradient,
    )
    totals = reference.gspo_totals(
        loss.detach(), statistics.logprobs, cu_seqlens, old_logprobs, clip_low, clip_high
    )
    return loss, LinearPolicyStatistics(
        logprobs=statistics.logprobs, entropies=statistics.entropies, totals=totals
    )
