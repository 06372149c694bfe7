"""What a step trains on, and the loss functions of the actor, the critic and the cold start.

Every loss is summed over this microbatch's response tokens and divided by the tokens of the
*global* minibatch, so the gradient is that of the global token mean whatever the number of
microbatches, ranks or the packing order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.batch import PackedBatch
from ovr_fast.config import RLConfig
from ovr_kernels.objective import TOTALS, PolicyObjective


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


def policy_objective(config: RLConfig) -> PolicyObjective:
    """The settings' loss per token."""
    return PolicyObjective(
        clip_low=config.clip_eps,
        clip_high=config.clip_eps,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
    )


def actor_loss(
    head: Callable,
    batch: PackedBatch,
    targets: PolicyTargets,
    *,
    config: RLConfig,
    global_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss with optional KL term and entropy bonus, and the sums to report.

    Args:
        head: ``linear_policy_loss`` of this microbatch's rows, but for objective and tokens.
        batch: says which responses of ``targets`` the rows are.
        targets: of this rank's responses.
        global_tokens: response tokens of the whole minibatch, on all ranks.
    """
    places = batch.response_index_R

    def here(values_R: Tensor | None) -> Tensor | None:
        return None if values_R is None else values_R[places]

    loss, found = head(
        policy_objective(config),
        advantages=targets.advantages_R[places],
        old_logprobs=here(targets.old_logprobs_R),
        ref_logprobs=here(targets.ref_logprobs_R),
        weights=1.0 / global_tokens,
    )
    report = dict(zip(TOTALS, found.totals, strict=True))
    report["entropy"] = found.entropies.sum()
    # Trainer against engine. Both from this forward: no pass is made for them.
    apart = found.logprobs - targets.rollout_logprobs_R[places]
    report["logprob_gap"] = apart.abs().sum()
    report["rollout_kl"] = (apart.exp() - 1.0 - apart).sum()  # k3 of Schulman 2020, KL(engine, us)
    report["tokens"] = torch.tensor(float(places.numel()))
    if not config.kl_coef:
        del report["kl"]
    return loss, report


def critic_loss(
    values_R: Tensor,
    batch: PackedBatch,
    targets: PolicyTargets,
    *,
    config: RLConfig,
    global_tokens: int,
    operators: ModuleType,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error to the returns, and the sums to report. Arguments as for ``actor_loss``."""
    places = batch.response_index_R
    loss = operators.value_loss(
        values_R,
        targets.returns_R[places],
        old_values=targets.old_values_R[places],
        clip_eps=config.value_clip_eps or None,
    )
    report = {"loss": loss.detach(), "tokens": torch.tensor(float(places.numel()))}
    return loss / global_tokens, report


def cold_start_loss(
    head: Callable, batch: PackedBatch, *, global_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the response tokens, and the sums to report.

    Args:
        head: ``linear_cross_entropy`` of this microbatch's rows, but for the weights.
    """
    loss, found = head(weights=1.0 / global_tokens)
    report = {"loss": found.totals[0], "tokens": torch.tensor(float(batch.targets_R.numel()))}
    return loss, report
