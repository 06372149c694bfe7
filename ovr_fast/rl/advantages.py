"""What a response is credited with where no critic says: its reward against its group's."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np

EPSILON = 1e-6
"""Added to a group's standard deviation, reward units."""


def group_advantages(
    rewards: List[float], groups: List[int], *, baseline: str, scale: str
) -> list[float]:
    """Advantage of each response, reward units or standard deviations.

    * "mean", "deviation": ``(r - mean) / (std + 1e-6)``, std of the sample (n - 1): GRPO (Shao et
      al. 2024, 4.1.2), as verl and TRL compute it.
    * "mean", "none": ``r - mean``: Dr. GRPO (Liu et al. 2025, eq. 3).
    * "leave_one_out", "none": ``r - mean of the others``: RLOO (Ahmadian et al. 2024, eq. 8),
      which is Dr. GRPO's times n / (n - 1).

    Args:
        rewards: of each response.
        groups: the prompt's number of each.
        baseline: "mean" or "leave_one_out".
        scale: "deviation" or "none".

    Raises:
        ValueError: a group has one response, whose baseline would be itself; "group N".
    """
    found = np.zeros(len(rewards))
    wide, owner = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    for group in dict.fromkeys(groups):
        (places,) = np.nonzero(owner == group)
        own, count = wide[places], len(places)
        if count < 2:
            raise ValueError(f"group {group} has one response, and nothing to compare it with")
        away = own - own.mean()
        if baseline == "leave_one_out":
            away *= count / (count - 1)
        if scale == "deviation":
            away /= own.std(ddof=1) + EPSILON
        found[places] = away
    return [float(value) for value in found]
