"""The context curriculum: how long a response may be, growing during a run and across resumes."""

from __future__ import annotations

from dataclasses import dataclass, field

from ovr_fast.config import RLConfig

GROWTH = 0.01
"""Lengths that grow by less have stopped growing."""


@dataclass(slots=True)
class ContextCurriculum:
    """Which of ``rl.context_tokens`` is the response limit of a step.

    OVR grows 24k, 32k, 48k: at steps 300 and 700 by its section 4.1, "when the mean length plateaus
    or declines" by its section 5.1. With ``rl.context_steps`` the steps decide; without, the limit
    grows when the mean length of the last ``rl.context_patience`` steps is not more than 1 % over
    that of as many steps before them.
    """

    settings: RLConfig
    grown: int = 0  # times that the limit has grown so far
    lengths: list[float] = field(default_factory=list)  # mean of each step since it last grew

    def limit(self, step: int) -> int:
        """Tokens at which a response of ``step`` (1 is the first) is truncated."""
        limits = self.settings.context_tokens
        if not limits:
            return self.settings.max_response_tokens
        return limits[max(self.grown, sum(step > done for done in self.settings.context_steps))]

    def metrics(self, step: int) -> dict[str, float]:
        """The limit of ``step`` as a metric."""
        return {"rollout/limit_tokens": float(self.limit(step))}

    def observe(self, step: int, mean_length: float) -> None:
        """Called after a step, with the mean length of its responses, tokens."""
        rl = self.settings
        # Kept, so that a run that resumes with other context_steps does not fall back.
        self.grown = max(self.grown, sum(step > done for done in rl.context_steps))
        if not rl.context_tokens or rl.context_steps or self.grown + 1 == len(rl.context_tokens):
            return
        self.lengths.append(mean_length)
        window = rl.context_patience
        if len(self.lengths) < 2 * window:
            return
        before, now = self.lengths[-2 * window : -window], self.lengths[-window:]
        if sum(now) <= (1.0 + GROWTH) * sum(before):
            self.grown += 1
            self.lengths = []

    def state(self) -> dict:
        """What ``restore`` needs to go on from here."""
        return {"grown": self.grown, "lengths": list(self.lengths)}

    def restore(self, state: dict) -> None:
        """Go on from a saved position."""
        self.grown, self.lengths = state["grown"], list(state["lengths"])
