"""Errors of scores and of their differences (Miller, "Adding Error Bars to Evals", 2024,
arXiv 2411.00640), and intervals for what is no mean.

Two errors stand beside each score: over samples, with these questions, and over questions, as if
others of the kind had been asked; those of a cluster move together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
FEW = 30
"""Clusters under which a normal quantile is too narrow."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its standard error over questions and a 95 % interval."""

    value: float
    error: float
    low: float
    high: float
    clusters: int


def quantile(clusters: int) -> float:
    """Of the 95 % interval: Student's with few clusters."""
    from scipy import stats

    if clusters < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, clusters - 1) if clusters < FEW else stats.norm.ppf(0.975))


def mean(values: List[float], clusters: List[Hashable], *, shares: bool = True) -> Estimate:
    """Mean of question scores (or, without ``shares``, of their differences), its error clustered:
    the sum of squared cluster sums of deviations, over n squared, times C / (C - 1) for C clusters.
    """
    array = np.asarray(values, dtype=float)
    center = float(array.mean())
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(places))
    np.add.at(sums, [places[name] for name in clusters], array - center)
    count = len(places)
    if count < 2:
        return Estimate(center, float("nan"), float("nan"), float("nan"), count)
    error = float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(array))
    if shares and error == 0 and center in (0.0, 1.0):
        return Estimate(center, error, *_of_all_alike(center, count), count)
    width = quantile(count) * error
    return Estimate(center, error, center - width, center + width, count)


def _of_all_alike(value: float, clusters: int) -> tuple[float, float]:
    """Jeffreys' interval where all clusters are wrong, or all right: the others' has no width."""
    from scipy import stats

    far = float(stats.beta.ppf(0.975, 0.5, clusters + 0.5))
    return (0.0, far) if value == 0 else (1.0 - far, 1.0)


def sampling_error(samples: List[List[float]]) -> float:
    """Standard error of the mean over samples with the questions fixed; NaN where a question has
    one sample: nothing says how far another would be."""
    if any(len(each) < 2 for each in samples):
        return float("nan")
    variances = [np.var(each, ddof=1) / len(each) for each in samples]
    return float(np.sqrt(np.sum(variances)) / len(samples))


def bootstrap(
    statistic: Callable[[np.ndarray], float], clusters: int, *, seed: int = 0
) -> Estimate:
    """A statistic of clusters, its error and percentile interval over redrawn ones.

    Args:
        statistic: of an array of cluster numbers, one of which may stand there several times.
        clusters: how many there are.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(clusters))
    if clusters < 2:
        return Estimate(value, float("nan"), float("nan"), float("nan"), clusters)
    drawn = [statistic(rng.integers(clusters, size=clusters)) for _ in range(DRAWS)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    if low == high and value in (0.0, 1.0):
        low, high = _of_all_alike(value, clusters)
    return Estimate(value, float(np.nanstd(drawn)), float(low), float(high), clusters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two models on the same questions."""

    value: float  # the second's score less the first's
    error: float
    low: float
    high: float
    p: float  # two-sided, of no difference; exact (McNemar) where each question has one sample
    wins: int  # questions on which the second is better
    losses: int
    smallest: float  # difference that this set shows with 80 % power


def paired(first: List[float], second: List[float], clusters: List[Hashable]) -> Difference:
    """Compare question scores of two models, question by question."""
    from scipy import stats

    differences = [b - a for a, b in zip(first, second, strict=True)]
    found = mean(differences, clusters, shares=False)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    single = all(value in (0.0, 1.0) for value in [*first, *second])
    alone = len(set(clusters)) == len(clusters)
    if single and alone:
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    elif found.error > 0:
        score = abs(found.value) / found.error
        few = found.clusters < FEW
        p = float(2 * (stats.t.sf(score, found.clusters - 1) if few else stats.norm.sf(score)))
    elif math.isnan(found.error):
        p = math.nan
    else:
        p = 1.0 if found.value == 0 else 0.0
    power = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    return Difference(
        value=found.value, error=found.error, low=found.low, high=found.high, p=p, wins=wins,
        losses=losses, smallest=power * found.error,
    )  # fmt: skip


def holm(p_values: List[float]) -> list[float]:
    """Holm's correction for several comparisons, in their order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected
