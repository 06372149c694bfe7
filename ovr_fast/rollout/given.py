"""Rollouts that no server samples: recorded ones, read again, and random ones to measure with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.prompts import Mixture
from ovr_fast.data.rollouts import list_recorded, read_rollouts, recorded_step, synthetic_rollouts
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Prompt, Rollout, RolloutBatch
from ovr_fast.rollout.sources import Scoring
from ovr_fast.shape.model_shape import ModelShape


class RecordedRollouts:
    """Read from one file, or from a folder's files in the order of their names, one a step.

    Args:
        path: file or folder.
        steps_done: of the run; files of earlier steps are passed over.
        replay: do every recorded step, also past ``rl.steps``.
        vocabulary: of the model; token ids are under it.
        mesh: this rank's position and groups; rank 0 reads.

    Raises:
        DataError: there is none left.
    """

    def __init__(
        self, path: Path, *, steps_done: int, replay: bool, vocabulary: int, mesh: Mesh
    ) -> None:
        self.path, self.steps_done, self.replay, self.mesh = path, steps_done, replay, mesh
        self.vocabulary = vocabulary
        self.file_step = steps_done  # of the last file that was read
        self._find()

    def _find(self) -> None:
        files = [(recorded_step(file), file) for file in list_recorded(self.path)]
        self.files = [(step, file) for step, file in files if step > self.file_step]
        if not self.files:
            raise DataError(f"{self.path} has no rollouts after step {self.file_step}")

    def last_step(self, planned: int) -> int:
        """See ``RolloutSource``; a replay's may be over ``planned``."""
        recorded = self.steps_done + len(self.files)
        return recorded if self.replay else min(planned, recorded)

    def next(self, step: int, *, max_tokens: int, scoring: Scoring | None = None) -> RolloutBatch:
        """See ``RolloutSource``. The batch has the step that it was recorded in.

        Raises:
            DataError: the file is not one of recorded rollouts.
        """
        file_step, file = self.files[step - self.steps_done - 1]
        nothing = RolloutBatch(step=file_step)
        found = self.mesh.on_first_rank(
            lambda: read_rollouts(file, vocabulary=self.vocabulary), otherwise=nothing
        )
        self.file_step = file_step  # one that cannot be read is read again, when it is mended
        return found

    def state(self) -> dict[str, Any]:
        """The last file's step, which need not be the run's."""
        return {"file_step": self.file_step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after that file. Another kind of source leaves nothing to go on from."""
        if "file_step" in state:
            self.file_step = state["file_step"]
            self._find()


class SyntheticRollouts:
    """Random responses to the run's prompts, to measure a step without servers: see
    ``synthetic_rollouts``.

    Args:
        config: all settings.
        stream: the prompts.
        shape: of the model.
        chat: the model's chat template.
        mean_tokens: of a response.
        mesh: this rank's position and groups; rank 0 draws.
    """

    def __init__(
        self,
        config: Config,
        *,
        stream: Mixture,
        shape: ModelShape,
        chat: ChatTemplate,
        mean_tokens: float,
        mesh: Mesh,
    ) -> None:
        self.config, self.stream, self.chat, self.mesh = config, stream, chat, mesh
        self.mean_tokens = mean_tokens
        self.vocabulary = min(shape.image_token_id, shape.video_token_id)

    def last_step(self, planned: int) -> int:
        """See ``RolloutSource``."""
        return planned

    def next(self, step: int, *, max_tokens: int, scoring: Scoring | None = None) -> RolloutBatch:
        """See ``RolloutSource``."""
        rl = self.config.rl
        prompts = tuple(self.stream.take(rl.prompts_per_step))

        def draw() -> list[Rollout]:
            return synthetic_rollouts(
                prompts,
                self.chat,
                samples=rl.samples_per_prompt,
                mean_tokens=self.mean_tokens,
                max_tokens=max_tokens,
                vocabulary=self.vocabulary,
                seed=(self.config.run.seed, step - 1),
            )

        nothing: list[Rollout] = []
        rollouts = self.mesh.on_first_rank(draw, otherwise=nothing)
        return first_rank_batch(step, prompts, rollouts, self.mesh)

    def state(self) -> dict[str, Any]:
        """See ``RolloutSource``."""
        return self.stream.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See ``RolloutSource``. Another kind of source leaves nothing to go on from."""
        if "position" in state:
            self.stream.restore(state)


def first_rank_batch(
    step: int, prompts: tuple[Prompt, ...], rollouts: list[Rollout], mesh: Mesh
) -> RolloutBatch:
    """The batch on rank 0; an empty one elsewhere."""
    if mesh.rank:
        return RolloutBatch(step=step)
    return RolloutBatch(step=step, prompts=prompts, rollouts=tuple(rollouts))
