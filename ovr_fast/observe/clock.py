"""Times the phases of a step; the names are the metric names, NVTX ranges and README words."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ovr_fast.observe.ranges import named_range


class Clock:
    """Phase timers of one step. ``with clock("generate"): ...``"""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._began = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        with named_range(phase):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the work would be timed under a later phase
        self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - began

    def times(self) -> dict[str, float]:
        """Seconds of each phase, of the whole step, and of what no phase covers ("other")."""
        total = time.perf_counter() - self._began
        other = total - sum(self._phases.values())
        timed = {**self._phases, "other": other, "step": total}
        return {f"time/{name}_s": seconds for name, seconds in timed.items()}


def release_memory() -> None:
    """Give memory that nothing uses back to the GPU, for another process or a larger tensor."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident, GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
