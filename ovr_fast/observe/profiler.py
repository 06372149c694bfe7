"""``--profile FIRST:LAST``: a trace a rank of those steps, and their three longest phases."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch


class StepProfiler:
    """Traces some steps of a stage with torch's profiler.

    On a GPU the CUDA profiler runs over the same steps, so that ``nsys profile
    --capture-range=cudaProfilerApi`` records just them.

    Args:
        steps: first and last step to trace, counted from 1; None: none.
        folder: gets ``rank-NNNNN.json.gz``, for chrome://tracing or Perfetto.
        rank: this rank's number.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self.steps, self.folder, self.rank = steps, folder, rank
        self._profile: torch.profiler.profile | None = None
        self._phases: Counter[str] = Counter()

    @property
    def waiting(self) -> bool:
        """Whether steps were asked for and none has been traced."""
        return self.steps is not None

    def before(self, step: int) -> None:
        """Called when a step begins."""
        if self.steps is None or self._profile is not None or step < self.steps[0]:
            return
        if step > self.steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.profiler.start()
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()

    def after(self, step: int, times: dict[str, float], *, last: bool) -> str:
        """Called when a step ends; ``last`` if it is the stage's last.

        Args:
            times: seconds as ``time/PHASE_s``.

        Returns:
            what to print, after the last traced step; else nothing.
        """
        if self._profile is None or self.steps is None:
            return ""
        for name, seconds in times.items():
            if name.startswith("time/") and name != "time/step_s":
                self._phases[name[5:-2]] += seconds  # type: ignore[assignment]
        if step < self.steps[1] and not last:
            return ""
        self._profile.stop()
        if torch.cuda.is_available():
            torch.cuda.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.rank:05d}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile, self.steps = None, None
        total = sum(self._phases.values())
        longest = ", ".join(
            f"{name} {seconds:.2f} s ({seconds / total:.0%})"
            for name, seconds in self._phases.most_common(3)
        )
        return f"profile: {path} (one a rank); longest phases: {longest}"


def parse_steps(text: str) -> tuple[int, int]:
    """ "4:6" as (4, 6), both counted.

    Raises:
        ValueError: it is not of this form.
    """
    first, separator, last = text.partition(":")
    if not separator or not first.isdigit() or not last.isdigit() or int(first) < 1:
        raise ValueError(f"--profile {text}: not FIRST:LAST, such as 4:6")
    if int(last) < int(first):
        raise ValueError(f"--profile {text}: the last step is before the first")
    return int(first), int(last)
