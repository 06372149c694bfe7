"""One PPO step on given rollouts, without a run folder: the recipe's own loop, for tests and
benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ovr_fast.config import Config
from ovr_fast.evaluation.heldout import NoHeldOut
from ovr_fast.learner.learner import Learner
from ovr_fast.observe.clock import Clock
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.ppo import ppo
from ovr_fast.records import RolloutBatch
from ovr_fast.rollout.fleet import NoServers
from ovr_fast.rollout.sources import Scoring
from ovr_fast.run.resume import State
from ovr_fast.run.run import Line, Run, Step


class BareRun(Run):
    """A run of one step that keeps its row in memory and writes nothing."""

    def __init__(self, config: Config, models: Models, number: int) -> None:
        self.config, self.mesh, self.folder = config, models.mesh, Path()
        self.clock = Clock()
        self.number, self.row = number, dict[str, float]()

    def begin_or_resume(self, recipe_stage: str, state: State) -> None:
        """Go on as after the steps before this one."""
        self.recipe_stage, self.steps_done, self.last_step = (
            recipe_stage,
            self.number - 1,
            self.number,
        )

    def steps(self, last: int) -> Iterator[int]:
        """The one step."""
        yield self.number

    @contextmanager
    def step(self, number: int) -> Iterator[Step]:
        """Errors come out as they are."""
        yield Step(run=self, number=number)

    def record_rollouts(self, step: int, batch: RolloutBatch) -> None:
        """Nothing is written."""

    def record(
        self, recipe_stage: str, number: int, metrics: dict[str, float], line: Line | None
    ) -> None:
        """Keep the row."""
        self.row = metrics | self.clock.lap()

    def export_if_due(self, number: int, learner: Learner) -> None:
        """Never."""

    def save_is_due(self, number: int) -> bool:
        """Never."""
        return False

    def finish(self, learner: Learner) -> None:
        """Nothing is written."""


class GivenRollouts:
    """A rollout source of one batch."""

    def __init__(self, batch: RolloutBatch) -> None:
        self.batch = batch

    def last_step(self, planned: int) -> int:
        """The batch's step."""
        return self.batch.step

    def next(self, step: int, *, max_tokens: int, scoring: Scoring | None = None) -> RolloutBatch:
        """The batch."""
        return self.batch

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


def learn(models: Models, config: Config, batch: RolloutBatch) -> dict[str, float]:
    """Update critic and actor on a batch of rollouts. A collective.

    Args:
        models: to train.
        config: all settings.
        batch: rank 0's is assigned to replicas; its step decides the minibatches.

    Returns:
        the step's metrics, times among them.
    """
    run = BareRun(config, models, batch.step)
    ppo(run, models, GivenRollouts(batch), NoServers(), NoHeldOut())
    return run.row
