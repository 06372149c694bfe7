"""What a policy is trained for: the settings of a loss per token, and how tokens are weighed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("ppo", "cispo", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3")
NORMALIZATIONS = ("token_mean", "sequence_mean", "constant_length")
TOTALS = ("loss", "ratio", "clipped", "kl")
"""Sums in ``PolicyStatistics.totals``. "clipped" counts tokens whose ratio is outside its bounds,
also where the clip does not bind (verl's pg_clipfrac counts only where it does)."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are limited to this size: exp overflows at 88, and such a token is off any scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """A policy loss per token. r is the ratio of new to old probability, A the advantage.

    * "ppo": ``-min(r A, clip(r) A)`` (Schulman et al. 2017, eq. 7), clip to [1 - low, 1 + high];
      different bounds are DAPO's clip-higher (Yu et al. 2025, eq. 10).
    * "cispo": ``-clip(r) A log p``, the clipped ratio a constant (MiniMax-M1, 2025, eq. 4): every
      token keeps a gradient.
    * "reinforce": ``-A log p``; with A = 1 the cross-entropy.

    Raises:
        ValueError: a setting out of range; names it.
    """

    kind: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    """For A < 0 the ppo loss is at most ``-dual_clip A`` (Ye et al. 2020, eq. 5); 0 is off."""
    importance_cap: float = 0.0
    """The loss is weighed by ``min(old / rollout probability, cap)``, a constant: truncated
    importance sampling against the sampler's own log-probs (Yao et al. 2025); 0 is off."""
    kl_coef: float = 0.0
    """Weight of an estimate of KL(policy || reference); 0 is off."""
    kl_estimator: str = "k3"
    """Schulman (2020), with d = log reference - log policy: "k1" -d, "k2" d^2 / 2, "k3"
    exp(d) - d - 1. In expectation over the policy's own samples the gradient of k2 is that of
    KL(policy || reference), of k3 that of KL(reference || policy), of k1 nothing."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 is off."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"objective {self.kind!r} is not one of {', '.join(KINDS)}")
        for name in ("clip_low", "clip_high", "dual_clip", "importance_cap", "kl_coef",
                     "entropy_coef"):  # fmt: skip
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"{name}={value} is not finite")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"kl_estimator {self.kl_estimator!r} is not one of {', '.join(KL_ESTIMATORS)}"
            )
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef={self.kl_coef} must not be negative")
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low={self.clip_low} must be in 0..1 and clip_high={self.clip_high} not "
                "negative"
            )
        if self.dual_clip and (self.dual_clip <= 1 or self.kind != "ppo"):
            raise ValueError(f"dual_clip={self.dual_clip} must be over 1, and is ppo's alone")
        if self.importance_cap < 0:
            raise ValueError(f"importance_cap={self.importance_cap} must not be negative")


def token_weights(cu_seqlens: Tensor, normalization: str, *, length: int = 0) -> Tensor:
    """What each token counts, so that the weighted sum is the loss of a batch of responses.

    Args:
        cu_seqlens: [S + 1] integers, boundaries of the responses.
        normalization: "token_mean" (PPO, DAPO): 1 / R; "sequence_mean" (GRPO): 1 / (S length of
            the response); "constant_length" (Dr. GRPO, Liu et al. 2025): 1 / (S ``length``).
        length: the constant of "constant_length", tokens.

    Returns:
        [R] fp32.

    Raises:
        ValueError: an unknown normalization, or no length where one is needed.
    """
    lengths = torch.diff(cu_seqlens)
    sequences, tokens = lengths.numel(), int(lengths.sum())
    if normalization == "token_mean":
        each = torch.full_like(lengths, 1.0 / max(tokens, 1), dtype=torch.float32)
    elif normalization == "sequence_mean":
        each = 1.0 / (sequences * lengths.float())
    elif normalization == "constant_length" and length > 0:
        each = torch.full_like(lengths, 1.0 / (sequences * length), dtype=torch.float32)
    else:
        raise ValueError(
            f"normalization={normalization!r} with length={length} is not one of "
            f"{', '.join(NORMALIZATIONS)} (the last with its length)"
        )
    return each.repeat_interleave(lengths)
