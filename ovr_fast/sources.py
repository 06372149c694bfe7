"""Where a step's rollouts come from: the engine, files of recorded ones, or thin air to measure.

A source is called with a step (0 is the first) and a response limit, and gives the step that the
rollouts are of, the prompts, and the scored rollouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ovr_fast.batch import Prompt, Rollout
from ovr_fast.config import Config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.prompts import DataError, Mixture
from ovr_fast.data.rollouts import fake_rollouts, list_recorded, read_rollouts, recorded_step
from ovr_fast.model.shape import ModelShape
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.ppo import collect
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.engine import RolloutEngine

RolloutSource = Callable[[int, int], tuple[int, list[Prompt], list[Rollout]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which half of RL to run, if not both."""

    only: str | None = None  # "rollout" or "train"
    recorded: Path | None = None  # rollouts to train on
    fake_tokens: float = 0.0  # mean length of made-up responses to train on

    @property
    def needs_engine(self) -> bool:
        return self.only != "train"

    @property
    def source(self) -> str:
        """Where rollouts come from, as checkpoints remember it."""
        if self.recorded is not None:
            return "recorded"
        return "made-up" if self.fake_tokens else "engine"


class Sampled:
    """The engine's, scored by the verifier; an engine on the trainer's own GPUs then sleeps."""

    def __init__(
        self,
        config: Config,
        *,
        stream: Mixture,
        engine: RolloutEngine,
        verifier: Verifier,
        mesh: Mesh,
        clock: Clock,
    ) -> None:
        self.config, self.stream, self.engine = config, stream, engine
        self.verifier, self.mesh, self.clock = verifier, mesh, clock

    def __call__(self, step: int, limit: int) -> tuple[int, list[Prompt], list[Rollout]]:
        prompts = self.stream.take(self.config.rl.prompts_per_step)
        rollouts = collect(
            prompts,
            step=step,
            config=self.config,
            engine=self.engine,
            verifier=self.verifier,
            mesh=self.mesh,
            clock=self.clock,
            max_tokens=limit,
        )
        self.engine.sleep()
        return step, prompts, rollouts


class Recorded:
    """Those of a file, or of a folder's files in turn.

    Args:
        path: file or folder.
        start: steps done; files of earlier ones are passed over.

    Raises:
        DataError: there is none left.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.start = start
        self.files = [file for file in list_recorded(path) if recorded_step(file) > start]
        if not self.files:
            raise DataError(f"{path} has no rollouts after step {start}")

    def __call__(self, step: int, limit: int) -> tuple[int, list[Prompt], list[Rollout]]:
        file = self.files[step - self.start]
        return recorded_step(file) - 1, *read_rollouts(file)


class MadeUp:
    """Random responses to the run's prompts, see ``fake_rollouts``."""

    def __init__(
        self,
        config: Config,
        *,
        stream: Mixture,
        shape: ModelShape,
        encoder: ChatEncoder,
        mean_tokens: float,
    ) -> None:
        self.config, self.stream, self.encoder = config, stream, encoder
        self.mean_tokens = mean_tokens
        self.vocabulary = min(shape.image_token_id, shape.video_token_id)

    def __call__(self, step: int, limit: int) -> tuple[int, list[Prompt], list[Rollout]]:
        rl = self.config.rl
        prompts = self.stream.take(rl.prompts_per_step)
        rollouts = fake_rollouts(
            prompts,
            self.encoder,
            samples=rl.samples_per_prompt,
            mean_tokens=self.mean_tokens,
            max_tokens=limit,
            vocabulary=self.vocabulary,
            seed=(self.config.run.seed, step),
        )
        return step, prompts, rollouts
