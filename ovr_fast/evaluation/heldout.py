"""Held-out accuracy, sampled as in training: one response a prompt at the training temperature."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np

from ovr_fast.evaluation.in_training import AskedBenchmark
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Prompt, Response, Rollout
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.rewarded import reward

EVALUATION_STEP = 0
"""Stands for the step in the seed of a request: every evaluation draws the same numbers, so two
policies differ by their weights alone."""


class Evaluation(Protocol):
    """What a recipe measures its weights with. Every method is a collective of all ranks."""

    def measure(self) -> dict[str, float]:
        """``eval/...`` metrics of the weights that the servers have."""

    def measure_if_due(self, step: int, *, last: int) -> dict[str, float]:
        """``measure`` every so many steps and after the last; else nothing."""


class NoHeldOut:
    """For a run that evaluates nothing."""

    def measure(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def measure_if_due(self, step: int, *, last: int) -> dict[str, float]:
        """Nothing."""
        return {}


class HeldOut:
    """Held-out sets, measured by the servers with the weights they have.

    Args:
        sets: prompts by the name of their set.
        benchmarks: by their names; their answers are extracted and scored as ``ovr_fast.evaluate``
            does.
        fleet: vLLM servers.
        verifier: of the answers.
        mesh: this rank's position and groups.
        max_tokens: a response is truncated here.
        every: RL steps between evaluations; 0: only the last.
    """

    def __init__(
        self,
        sets: dict[str, tuple[Prompt, ...]],
        *,
        fleet: Fleet,
        verifier: Verifier,
        mesh: Mesh,
        max_tokens: int,
        every: int,
        benchmarks: dict[str, AskedBenchmark] | None = None,
    ) -> None:
        self.benchmarks = benchmarks or {}
        self.sets, self.fleet, self.verifier, self.mesh = sets, fleet, verifier, mesh
        self.max_tokens, self.every = max_tokens, every

    def measure_if_due(self, step: int, *, last: int) -> dict[str, float]:
        """``measure`` every so many steps and after the last; else nothing. A collective."""
        due = step == last or (self.every and step % self.every == 0)
        return self.measure() if due else {}

    def measure(self) -> dict[str, float]:
        """Accuracy, mean length and share without an answer of each set, on every rank. Servers on
        the trainer's own GPUs then sleep. A collective.

        Raises:
            ServerFailed: a server stopped, refused a request, or did not answer in time.
        """
        metrics: dict[str, float] = {}
        for name, prompts in self.sets.items():
            responses = self._responses(name, prompts)
            rollouts = reward(responses, prompts, self.verifier, self.mesh)
            found = summarize(rollouts) if rollouts else {}
            shared = self.mesh.broadcast_object(found)
            metrics |= {f"eval/{name}/{key}": value for key, value in shared.items()}
        for name, asked in self.benchmarks.items():
            responses = self._responses(name, asked.prompts)
            score = partial(asked.metrics, responses, workers=self.verifier.config.workers)
            shared = self.mesh.from_first_rank(score)
            metrics |= {f"eval/{name}/{key}": value for key, value in shared.items()}
        self.fleet.sleep()
        return metrics

    def _responses(self, name: str, prompts: tuple[Prompt, ...]) -> list[Response]:
        return self.fleet.generate(
            prompts,
            step=EVALUATION_STEP,
            samples=1,
            max_tokens=self.max_tokens,
            describe=f"evaluate {name}",
        )


def summarize(rollouts: list[Rollout]) -> dict[str, float]:
    """Accuracy with its standard error, share without an answer, and mean length of one set's
    rollouts."""
    count = len(rollouts)
    rewards = np.array([rollout.reward for rollout in rollouts])
    return {
        "accuracy": float(rewards.mean()),
        **({"error": float(rewards.std(ddof=1) / count**0.5)} if count > 1 else {}),
        "no_answer": sum(rollout.outcome == "no_answer" for rollout in rollouts) / count,
        "length_tokens": sum(len(rollout.response_tokens) for rollout in rollouts) / count,
    }
