"""``--profile FIRST:LAST``: a trace a rank of those steps, and their three longest phases.

Of every pass the first microbatches are traced (``ranges.MicrobatchGate``); under Nsight all are.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from ovr_fast.observe.ranges import MICROBATCHES
from ovr_fast.settings import ConfigError


class StepProfiler:
    """Traces some steps of the first stage that is run, with torch's profiler; or Nsight Systems
    does: ``nsys profile --capture-range=cudaProfilerApi`` records just them, and torch's profiler,
    which needs the same CUPTI, stays out.

    Args:
        steps: first and last step to trace, counted from 1; None: none.
        folder: gets ``rank-NNNNN.json.gz``, for chrome://tracing or Perfetto.
        rank: this rank's number.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self.steps, self.folder, self.rank = steps, folder, rank
        self._profile: torch.profiler.profile | None = None
        self._running = False
        self._under_nsys = torch.cuda.is_available() and any(
            name in os.environ for name in ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH")
        )
        self._phases: Counter[str] = Counter()
        self._collecting = False

    @property
    def waiting(self) -> bool:
        """Whether steps were asked for and none has been traced."""
        return self.steps is not None

    def close(self) -> None:
        """Let later passes alone, also where a traced step has failed."""
        MICROBATCHES.on_change = None

    def before(self, step: int) -> None:
        """Called when a step begins."""
        if self.steps is None or self._running or not self.steps[0] <= step <= self.steps[1]:
            return
        self._running = True
        if self._under_nsys:
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile = self._profile = torch.profiler.profile(activities=activities)
        profile.start()

        def collect(enable: bool) -> None:
            if enable != self._collecting:
                profile.toggle_collection_dynamic(enable, activities)
                self._collecting = enable

        self._collecting = True
        MICROBATCHES.on_change = collect

    def after(self, step: int, times: dict[str, float], *, last: bool) -> str:
        """Called when a step ends; ``last`` if it is the stage's last.

        Args:
            times: seconds as ``time/PHASE_s``.

        Returns:
            what to print, after the last traced step; else nothing.
        """
        if not self._running or self.steps is None:
            return ""
        for name, seconds in times.items():
            if name.startswith("time/") and name not in ("time/step_s", "time/hidden_s"):
                self._phases[name[5:-2]] += seconds  # type: ignore[assignment]
        if step < self.steps[1] and not last:
            return ""
        where = "in nsys's report"
        if self._profile is None:
            torch.cuda.profiler.stop()
        else:
            MICROBATCHES.on_change = None
            self._profile.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank-{self.rank:05d}.json.gz"
            self._profile.export_chrome_trace(str(path))
            where = f"{path} (one a rank)"
        self._profile, self.steps, self._running = None, None, False
        total = sum(self._phases.values())
        longest = ", ".join(
            f"{name} {seconds:.2f} s ({seconds / total:.0%})"
            for name, seconds in self._phases.most_common(3)
        )
        return f"profile: {where}; longest phases: {longest}"


def parse_steps(text: str) -> tuple[int, int]:
    """The first and last step of "4:6", both counted.

    Raises:
        ConfigError: it is not of this form.
    """
    first, separator, last = text.partition(":")
    if not separator or not first.isdigit() or not last.isdigit() or int(first) < 1:
        raise ConfigError(f"--profile {text}: not FIRST:LAST, such as 4:6")
    if int(last) < int(first):
        raise ConfigError(f"--profile {text}: the last step is before the first")
    return int(first), int(last)


def check_steps(text: str, planned: int) -> None:
    """Raises ConfigError if "4:6" is not of this form, or begins after the last of ``planned``
    steps."""
    first, _ = parse_steps(text)
    if first > planned:
        raise ConfigError(
            f"--profile {text}: the first recipe stage of this run has {planned} steps"
        )
