"""The samples that were asked for and that no step has trained on, and which of them a step takes.

Rank 0's. A step takes its own samples; with ``rollout.partial`` those that are finished, whatever
step asked for them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ovr_fast.rollout.protocol import Sample


@dataclass(slots=True, kw_only=True)
class Asked:
    """The samples that one step has asked for, until all have been trained on."""

    step: int
    max_tokens: int  # responses are truncated here
    before: dict[str, Any]  # where the stream of prompts was before theirs
    all: list[Sample]
    waiting: list[Sample]  # those that no step has taken

    def saved(self, *, unfinished: bool) -> dict[str, Any]:
        """For a checkpoint: which samples wait, and what they have so far, if they are finished or
        ``unfinished`` too."""
        waiting = set(self.waiting)
        return {
            "step": self.step,
            "max_tokens": self.max_tokens,
            "waiting": [place for place, sample in enumerate(self.all) if sample in waiting],
            "pieces": [
                [piece.saved() for piece in sample.pieces]
                if sample in waiting and (sample.done or unfinished)
                else []
                for sample in self.all
            ],
        }


class Pool:
    """Samples by the step that asked for them, oldest first.

    Args:
        wanted: samples that a step trains on.
        max_staleness: ``rollout.max_staleness``.
        partial: ``rollout.partial``.
    """

    def __init__(self, *, wanted: int, max_staleness: int, partial: bool) -> None:
        self.wanted, self.max_staleness, self.partial = wanted, max_staleness, partial
        self.asked: deque[Asked] = deque()

    @property
    def waiting(self) -> list[Sample]:
        """All samples that no step has taken, in the order in which they were asked for."""
        return [sample for asked in self.asked for sample in asked.waiting]

    def choose(self, *, version: int) -> list[Sample]:
        """The finished samples that a step trains on: its own or, with ``partial``, those that
        would be too old first, then in the order in which they were asked for.

        Args:
            version: of the weights that the step trains.
        """
        if not self.partial:
            return [sample for sample in self.asked[0].waiting if sample.done]
        done = [sample for sample in self.waiting if sample.done]
        return sorted(done, key=lambda s: self._steps_left(s, version))[: self.wanted]

    def enough(self, *, version: int) -> bool:
        """Whether a step's samples are there, and leave no more than later steps can take before
        they are too old: of those with n steps left, n steps' worth."""
        chosen = self.choose(version=version)
        if len(chosen) < self.wanted:
            return False
        kept = {*self.waiting} - {*chosen}
        left = Counter(self._steps_left(sample, version) for sample in kept)
        waiting = accumulate(left[steps] for steps in range(self.max_staleness))
        return all(count <= steps * self.wanted for steps, count in enumerate(waiting))

    def _steps_left(self, sample: Sample, version: int) -> int:
        """After this step, those that may still train on a sample."""
        age = 0 if sample.begun is None else version - sample.begun
        return max(0, self.max_staleness - age)

    def take(self, samples: List[Sample]) -> None:
        """These are trained on now; until then a checkpoint has them."""
        taken = set(samples)
        for asked in self.asked:
            asked.waiting = [sample for sample in asked.waiting if sample not in taken]
        while self.asked and not self.asked[0].waiting:
            self.asked.popleft()
