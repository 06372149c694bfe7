"""The loss functions of the actor, the critic and the cold start.

A loss is called on each microbatch, on the last pipeline stage. It is summed over the microbatch's
response tokens, each weighed by the size of the *global* minibatch, so the gradient is that of the
global mean over tokens (verl's token-mean) or over responses, whatever the microbatches, ranks and
packing order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.config import RLConfig
from ovr_fast.records import Microbatch, Minibatch, Targets, to_device
from ovr_kernels.objective import TOTALS, PolicyObjective

Sums = dict[str, Tensor]
"""What a loss reports: sums over a microbatch's tokens, added up over microbatches and ranks."""


class OutputHead(Protocol):
    """What the losses need of a model's last stage (``Qwen25VLStage``): its head, by operator."""

    operators: Any

    def policy_loss(
        self, hidden_RH: Tensor, batch: Microbatch, objective: PolicyObjective, **tokens: Any
    ) -> tuple[Tensor, Any]: ...

    def gspo_loss(
        self, hidden_RH: Tensor, batch: Microbatch, **responses: Any
    ) -> tuple[Tensor, Any]: ...

    def cross_entropy(
        self, hidden_RH: Tensor, batch: Microbatch, *, weights: float
    ) -> tuple[Tensor, Any]: ...

    def values(self, hidden_RH: Tensor) -> Tensor: ...


class Loss(Protocol):
    """From the last stage's rows of a microbatch to its part of the loss of the ``whole``
    minibatch, and sums to report."""

    def __call__(
        self,
        model: OutputHead,
        hidden_RH: Tensor,
        batch: Microbatch,
        targets: Targets | None,
        whole: Minibatch,
    ) -> tuple[Tensor, Sums]: ...


def global_moments(parts: list[Tensor], group: dist.ProcessGroup) -> tuple[float, float, float]:
    """Count, mean and standard deviation over all ranks of ``group``. A collective of it.

    Args:
        parts: [R] fp32 each, one per microbatch.
    """
    wide = torch.cat(parts).double()
    sums = torch.stack([torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()])
    dist.all_reduce(sums, group=group)
    count, total, squares = sums.tolist()
    mean = total / count
    return count, mean, max(0.0, squares / count - mean**2) ** 0.5


def normalize_advantages(parts: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Advantages [R] of each microbatch with zero mean and unit standard deviation over all
    response tokens of the step, on all ranks of ``group``."""
    _, mean, deviation = global_moments(parts, group)
    return [(advantages_R - mean) / (deviation + 1e-8) for advantages_R in parts]


def loss_weights(batch: Microbatch, whole: Minibatch, rl: RLConfig) -> Tensor | float:
    """What each response token of a microbatch counts, [R] fp32 or one number for all, so that the
    sum over all microbatches is the loss: see ``RLConfig.normalization``."""
    if rl.normalization == "token_mean":
        return 1.0 / whole.global_tokens
    if rl.normalization == "constant_length":
        return 1.0 / (whole.global_responses * rl.max_response_tokens)
    lengths_S = torch.tensor(batch.responses.lengths)
    each_S = 1.0 / (whole.global_responses * lengths_S.float())
    return to_device(each_S.repeat_interleave(lengths_S), batch.labels_R.device)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Clipped policy loss with optional KL term and entropy bonus (OVR 3.2), or one of the others
    that ``RLConfig.objective`` names.

    Args:
        config: objective, clipping, normalisation and coefficients.
        temperature: logits are divided by it, as they were when sampling.
    """

    config: RLConfig
    temperature: float

    @property
    def clip_high(self) -> float:
        """Upper bound of a ratio, less 1."""
        return self.config.clip_eps_high or self.config.clip_eps

    @property
    def objective(self) -> PolicyObjective:
        """The loss per token that the settings ask for."""
        return PolicyObjective(
            kind=self.config.objective,
            clip_low=self.config.clip_eps,
            clip_high=self.clip_high,
            dual_clip=self.config.dual_clip,
            kl_coef=self.config.kl_coef if self.config.kl_in == "loss" else 0.0,
            kl_estimator=self.config.kl_estimator,
            entropy_coef=self.config.entropy_coef,
            importance_cap=self.config.importance_cap,
        )

    def __call__(
        self,
        model: OutputHead,
        hidden_RH: Tensor,
        batch: Microbatch,
        targets: Targets | None,
        whole: Minibatch,
    ) -> tuple[Tensor, Sums]:
        """See ``Loss``. Reports ``objective.TOTALS``, entropy, tokens, ratios (one a token; GSPO's
        one a response), and the trainer's log-probs against vLLM's: mean absolute gap and k3
        estimate of KL(vLLM || trainer) (Schulman 2020). They come out of the forward that is
        trained; no pass is made for them."""
        assert targets is not None
        assert targets.advantages_R is not None
        if self.config.objective == "gspo":
            loss, statistics = self._by_response(model, hidden_RH, batch, targets, whole)
        else:
            loss, statistics = self._by_token(model, hidden_RH, batch, targets, whole)
        sums = dict(zip(TOTALS, statistics.totals, strict=True))
        if self.config.normalization != "token_mean":  # over tokens again, as it is reported
            sums["loss"] = loss.detach() * whole.global_tokens
        if not self.config.kl_coef or self.config.kl_in == "reward":
            del sums["kl"]
        gap_R = statistics.logprobs - batch.rollout_logprobs_R
        sums["entropy"] = statistics.entropies.sum()
        sums["logprob_gap"] = gap_R.abs().sum()
        sums["rollout_kl"] = (gap_R.exp() - 1.0 - gap_R).sum()
        sums["tokens"] = torch.full_like(loss.detach(), gap_R.numel())
        ratios = len(batch.responses.lengths) if self.config.objective == "gspo" else gap_R.numel()
        sums["ratios"] = torch.full_like(loss.detach(), ratios)
        return loss, sums

    def _by_token(
        self, model: OutputHead, hidden_RH: Tensor, batch: Microbatch, targets: Targets,
        whole: Minibatch,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        return model.policy_loss(
            hidden_RH,
            batch,
            self.objective,
            advantages=targets.advantages_R,
            old_logprobs=targets.old_logprobs_R,
            ref_logprobs=targets.ref_logprobs_R,
            rollout_logprobs=batch.rollout_logprobs_R if self.config.importance_cap else None,
            weights=loss_weights(batch, whole, self.config),
            temperature=self.temperature,
        )

    def _by_response(
        self, model: OutputHead, hidden_RH: Tensor, batch: Microbatch, targets: Targets,
        whole: Minibatch,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """All tokens of a response have its advantage."""
        assert targets.advantages_R is not None
        firsts_S = to_device(batch.responses.cu_seqlens_S1[:-1].long(), hidden_RH.device)
        return model.gspo_loss(
            hidden_RH,
            batch,
            advantages=targets.advantages_R[firsts_S],
            old_logprobs=targets.old_logprobs_R,
            clip_low=self.config.clip_eps,
            clip_high=self.clip_high,
            weights=1.0 / whole.global_responses,
            temperature=self.temperature,
        )


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """Half the squared error of the critic's values, optionally clipped (OVR 3.2): where the
    targets hold no values of before, these are, and nothing is to clip.

    Args:
        config: clipping.
        seen: gets the values [R] fp32 of each microbatch, on the last pipeline stage.
    """

    config: RLConfig
    seen: list[Tensor] | None = None

    def __call__(
        self,
        model: OutputHead,
        hidden_RH: Tensor,
        batch: Microbatch,
        targets: Targets | None,
        whole: Minibatch,
    ) -> tuple[Tensor, Sums]:
        """See ``Loss``. Reports loss and tokens."""
        assert targets is not None
        assert targets.returns_R is not None
        values_R = model.values(hidden_RH)
        if self.seen is not None:
            self.seen.append(values_R.detach())
        clip_eps = self.config.value_clip_eps or None
        loss = model.operators.value_loss(
            values_R,
            targets.returns_R,
            old_values=targets.old_values_R,
            clip_eps=None if targets.old_values_R is None else clip_eps,
        )
        sums = {"loss": loss.detach(), "tokens": torch.full_like(loss.detach(), values_R.numel())}
        return loss / whole.global_tokens, sums


def cross_entropy_loss(
    model: OutputHead,
    hidden_RH: Tensor,
    batch: Microbatch,
    targets: Targets | None,
    whole: Minibatch,
) -> tuple[Tensor, Sums]:
    """Cross-entropy of the response tokens (OVR 3.1). See ``Loss``; reports loss and tokens."""
    loss, statistics = model.cross_entropy(hidden_RH, batch, weights=1.0 / whole.global_tokens)
    tokens = torch.full_like(loss.detach(), batch.labels_R.numel())
    return loss, {"loss": statistics.totals[0], "tokens": tokens}
