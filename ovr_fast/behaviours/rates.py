"""Rates of behaviours and of their transfer, with intervals that hold where counts are small."""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np

DRAWS = 20_000
FEW = 10
"""Responses with the linguistic behaviour under which a transfer rate is not estimable."""
LEAST_POWER = 0.3
"""Sensitivity and specificity less 1, under which a share is not corrected."""
PRIOR = 0.5
"""Of each cell, Jeffreys'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share, or a ratio of two, with a 95 % interval."""

    value: float
    low: float
    high: float


def share(shown: int, of: int) -> Rate:
    """Share of responses, with Jeffreys' interval (Brown, Cai, DasGupta 2001, section 4)."""
    from scipy import stats

    if not of:
        return Rate(value=math.nan, low=math.nan, high=math.nan)
    posterior = stats.beta(shown + PRIOR, of - shown + PRIOR)
    low = 0.0 if shown == 0 else float(posterior.ppf(0.025))
    high = 1.0 if shown == of else float(posterior.ppf(0.975))
    return Rate(value=shown / of, low=low, high=high)


def transfer(visual: List[bool], linguistic: List[bool], *, seed: int = 0) -> Rate:
    """Behaviour transfer rate: the visual share over the linguistic one, on the same responses
    (OVR section 5.2), with the interval of a Dirichlet posterior over the four cells.

    A bootstrap of such a ratio holds the truth 59 % of the time where one response of 304 shows the
    visual behaviour; this one 94 %.
    """
    a, b = np.asarray(visual, dtype=bool), np.asarray(linguistic, dtype=bool)
    if not b.any():
        return Rate(value=math.nan, low=math.nan, high=math.nan)
    cells = np.array([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()])
    drawn = np.random.default_rng(seed).dirichlet(cells + PRIOR, DRAWS)
    ratios = (drawn[:, 0] + drawn[:, 1]) / (drawn[:, 0] + drawn[:, 2])
    low, high = np.percentile(ratios, [2.5, 97.5])
    low = low if a.any() else 0.0  # as of a share: the estimate is in its interval
    return Rate(value=float(a.sum() / b.sum()), low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Of a judge on labelled excerpts."""

    sensitivity: float  # share of positives it finds
    specificity: float  # share of others that it leaves alone
    positives: int
    negatives: int
    characters: float = 0.0  # of an excerpt, in the mean


def corrected(shown: int, of: int, judge: Accuracy, *, seed: int = 0) -> Rate | None:
    """The share that a judge with these errors would show as ``shown`` of ``of`` (Rogan and Gladen
    1978), within 0 and 1; None where the judge tells too little: the correction divides by that.

    The interval also holds what is not known of the errors: that of a few excerpts is wide. Drawn
    from Jeffreys' posteriors of share, sensitivity and specificity.
    """
    power = judge.sensitivity + judge.specificity - 1
    if power < LEAST_POWER or not of:
        return None
    drawn = np.random.default_rng(seed)

    def posterior(hits: float, count: int) -> np.ndarray:
        return drawn.beta(hits + PRIOR, count - hits + PRIOR, DRAWS)

    share_, sensitivity, specificity = (
        posterior(shown, of),
        posterior(judge.sensitivity * judge.positives, judge.positives),
        posterior(judge.specificity * judge.negatives, judge.negatives),
    )
    powers = np.maximum(sensitivity + specificity - 1, 1e-3)
    shares = np.clip((share_ + specificity - 1) / powers, 0.0, 1.0)
    low, high = np.percentile(shares, [2.5, 97.5])
    value = min(1.0, max(0.0, (shown / of + judge.specificity - 1) / power))
    return Rate(value=value, low=min(float(low), value), high=max(float(high), value))


def agreement(first: List[bool], second: List[bool]) -> tuple[float, float, float]:
    """Of two judges: share of equal verdicts, Cohen's kappa, Gwet's AC1. (Kappa collapses where
    nearly all responses show a behaviour; AC1 does not.)"""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not len(a):
        return math.nan, math.nan, math.nan
    same = float((a == b).mean())
    by_chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    prevalence = float((a.mean() + b.mean()) / 2)
    for_gwet = 2 * prevalence * (1 - prevalence)
    kappa = (same - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan
    return same, kappa, (same - for_gwet) / (1 - for_gwet)


def rank_correlation(first: List[int], second: List[int]) -> float:
    """Spearman's, of two judges' numbers of instances; NaN where one gives the same to all."""
    from scipy import stats

    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(stats.spearmanr(first, second).statistic)
