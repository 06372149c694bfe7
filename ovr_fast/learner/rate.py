"""The learning-rate schedule."""

from __future__ import annotations

import math

from ovr_fast.config import OptimizerConfig


def learning_rate(update: int, settings: OptimizerConfig, *, decay: str, total: int) -> float:
    """Rate of optimizer step ``update`` (1 is the first): linear warm-up, then constant or cosine.

    Args:
        update: number of the optimizer step.
        settings: peak, warm-up and minimum.
        decay: "constant" or "cosine".
        total: optimizer steps in all; the cosine ends there.
    """
    before = update - 1
    if before < settings.warmup_steps:
        return settings.lr * update / settings.warmup_steps
    if decay == "constant":
        return settings.lr
    done = (before - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    half = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return settings.min_lr + (settings.lr - settings.min_lr) * half
