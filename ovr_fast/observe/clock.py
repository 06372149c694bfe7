"""Times the phases of a step; the names are the metric names, NVTX ranges and README words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ovr_fast.observe.ranges import named_range

PHASES = (
    "start", "generate", "reward", "rollout", "pack", "vision", "targets", "critic", "advantages",
    "actor", "update", "weight_sync", "evaluate", "record", "export", "save", "other",
)  # fmt: skip
"""Every phase there is, in the order in which a step has them. "start" is what came before a recipe
stage's first step (loading models, waiting for servers), "rollout" what neither generates nor
rewards, "update" the cold start's, "other" what no phase covers."""

TRAINING = ("pack", "vision", "targets", "critic", "advantages", "actor", "update")
"""Phases that MFU and FLOP/s are measured over."""

OUTSIDE = ("start", "evaluate", "export", "save")
"""Phases that are not part of what a step must do: tokens a second leave them out."""


class Clock:
    """Phase timers. ``with clock("critic"): ...``; every second is in exactly one phase of one lap.

    A phase inside another counts as its own and not as the other's.
    """

    def __init__(self) -> None:
        self._lap_began = self._moved = time.perf_counter()
        self._open = ["other"]
        self._phases: dict[str, float] = {}

    def _advance(self) -> None:
        """Give the time since the last change to the innermost open phase."""
        now, phase = time.perf_counter(), self._open[-1]
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._moved
        self._moved = now

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is not one of the phases {', '.join(PHASES)}")
        self._advance()
        self._open.append(phase)
        try:
            with named_range(phase):
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # else the work would be timed under a later phase
        finally:
            self._advance()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, and of all of them ("step"); begins a lap."""
        self._advance()
        total = self._moved - self._lap_began
        phases = {"other": 0.0, **self._phases, "step": total}
        self._lap_began, self._phases = self._moved, {}
        return {f"time/{name}_s": seconds for name, seconds in phases.items()}
