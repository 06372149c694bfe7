"""The context curriculum: how long a response may be, growing during a run and across resumes."""

from __future__ import annotations

from dataclasses import dataclass, field

from ovr_fast.config import RLConfig


@dataclass(slots=True)
class ContextCurriculum:
    """Which of ``rl.context_tokens`` is the response limit now.

    OVR grows 24k, 32k, 48k: at steps 300 and 700 by its section 4.1, "when the mean length plateaus
    or declines" by its section 5.1. With ``rl.context_steps`` the steps decide; without, the limit
    grows when the mean length of the last ``rl.context_patience`` steps is not more than 1 % over
    that of as many steps before them.
    """

    settings: RLConfig
    stage: int = 0
    lengths: list[float] = field(default_factory=list)  # mean of each step since the stage began

    GROWTH = 0.01

    @property
    def limit(self) -> int:
        """Tokens at which a response is truncated."""
        limits = self.settings.context_tokens
        return limits[self.stage] if limits else self.settings.max_response_tokens

    def start(self, step: int) -> None:
        """Called before step ``step`` (0 is the first)."""
        begins = self.settings.context_steps
        self.stage = max(self.stage, sum(step >= begin for begin in begins))

    def observe(self, mean_length: float) -> None:
        """Called after a step, with the mean length of its responses, tokens."""
        rl = self.settings
        if not rl.context_tokens or rl.context_steps or self.stage + 1 == len(rl.context_tokens):
            return
        self.lengths.append(mean_length)
        window = rl.context_patience
        if len(self.lengths) < 2 * window:
            return
        before, now = self.lengths[-2 * window : -window], self.lengths[-window:]
        if sum(now) <= (1.0 + self.GROWTH) * sum(before):
            self.stage += 1
            self.lengths = []

    def state(self) -> dict:
        """What ``restore`` needs to go on from here."""
        return {"stage": self.stage, "lengths": list(self.lengths)}

    def restore(self, state: dict) -> None:
        """Go on from a saved position."""
        self.stage, self.lengths = state["stage"], list(state["lengths"])
