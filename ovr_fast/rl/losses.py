"""What a step trains on, and the loss functions of the actor, the critic and the cold start.

Every loss is summed over this microbatch's response tokens and divided by the tokens of the
*global* minibatch, so the gradient is that of the global token mean whatever the number of
microbatches, ranks or the packing order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.batch import PackedBatch
from ovr_fast.config import RLConfig
from ovr_kernels import reference as kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """What the frozen passes and GAE say about this rank's responses, laid end to end."""

    old_values_R: Tensor  # fp32, reward units, from before the critic's first update
    advantages_R: Tensor  # fp32, normalised over the global batch if the settings say so
    returns_R: Tensor  # fp32, reward units
    rollout_logprobs_R: Tensor  # fp32 nats, as vLLM reported them
    old_logprobs_R: Tensor | None  # fp32 nats; None when strictly on-policy (the ratio is 1)
    ref_logprobs_R: Tensor | None  # fp32 nats; None when the KL term is off


def global_moments(values_R: Tensor, group: dist.ProcessGroup) -> tuple[float, float, float]:
    """Count, mean and standard deviation of ``values_R`` over all ranks of ``group``."""
    wide = values_R.double()
    sums = torch.stack([torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()])
    dist.all_reduce(sums, group=group)
    count, total, squares = sums.tolist()
    mean = total / count
    return count, mean, max(0.0, squares / count - mean**2) ** 0.5


def normalize_advantages(advantages_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Zero mean and unit deviation over all response tokens of the step, on all ranks."""
    _, mean, deviation = global_moments(advantages_R, group)
    return (advantages_R - mean) / (deviation + 1e-8)


def actor_loss(
    logprobs_R: Tensor,
    entropy_R: Tensor,
    batch: PackedBatch,
    targets: PolicyTargets,
    *,
    config: RLConfig,
    global_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss with optional KL term and entropy bonus, and the sums to report.

    Args:
        logprobs_R, entropy_R: [R] fp32 nats from the pass being trained.
        batch: says which responses of ``targets`` the rows are.
        targets: of this rank's responses.
        global_tokens: response tokens of the whole minibatch, on all ranks.
    """
    places = batch.response_index_R
    old_R = None if targets.old_logprobs_R is None else targets.old_logprobs_R[places]
    loss_R, ratio_R = kernels.policy_loss(
        logprobs_R, targets.advantages_R[places], old_logprobs_R=old_R, clip_eps=config.clip_eps
    )
    report = {}
    if config.kl_coef:
        assert targets.ref_logprobs_R is not None
        kl_R = kernels.kl_k3(logprobs_R, targets.ref_logprobs_R[places])
        loss_R = loss_R + config.kl_coef * kl_R
        report["kl"] = kl_R.detach().sum()
    if config.entropy_coef:
        loss_R = loss_R - config.entropy_coef * entropy_R
    with torch.no_grad():
        gap_R = logprobs_R - targets.rollout_logprobs_R[places]
        report |= {
            "loss": loss_R.sum(),
            "entropy": entropy_R.sum(),
            "clipped": ((ratio_R - 1.0).abs() > config.clip_eps).sum(),
            "ratio": ratio_R.sum(),
            "logprob_gap": gap_R.abs().sum(),
            "tokens": torch.tensor(float(loss_R.numel())),
        }
    return loss_R.sum() / global_tokens, report


def critic_loss(
    values_R: Tensor,
    batch: PackedBatch,
    targets: PolicyTargets,
    *,
    config: RLConfig,
    global_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error to the returns, and the sums to report. Arguments as for ``actor_loss``."""
    places = batch.response_index_R
    loss_R = kernels.value_loss(
        values_R,
        targets.returns_R[places],
        old_values_R=targets.old_values_R[places],
        clip_eps=config.value_clip_eps or None,
    )
    report = {"loss": loss_R.detach().sum(), "tokens": torch.tensor(float(loss_R.numel()))}
    return loss_R.sum() / global_tokens, report


def cold_start_loss(logprobs_R: Tensor, *, global_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the response tokens, and the sums to report."""
    loss = -logprobs_R.sum()
    report = {"loss": loss.detach(), "tokens": torch.tensor(float(logprobs_R.numel()))}
    return loss / global_tokens, report
