"""Held-out accuracy, sampled as in training: one response a prompt at the training temperature."""

from __future__ import annotations

from ovr_fast.batch import Prompt
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.ppo import score_rollouts
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.engine import RolloutEngine

EVALUATION_STEP = -1
"""Stands for the step in the seed of a request: every evaluation draws the same numbers, so two
policies differ by their weights alone."""


def evaluate(
    engine: RolloutEngine,
    sets: dict[str, list[Prompt]],
    verifier: Verifier,
    mesh: Mesh,
    *,
    max_tokens: int,
) -> dict[str, float]:
    """Accuracy, mean length and share without an answer, for each set. A collective."""
    metrics: dict[str, float] = {}
    for name, prompts in sets.items():
        rollouts = engine.generate(
            prompts,
            step=EVALUATION_STEP,
            samples=1,
            max_tokens=max_tokens,
            describe=f"evaluate {name}",
        )
        rollouts = score_rollouts(rollouts, prompts, verifier, mesh)
        count = len(rollouts)
        metrics |= {
            f"eval/{name}/accuracy": sum(r.reward or 0.0 for r in rollouts) / count,
            f"eval/{name}/no_answer": sum(r.outcome == "no_answer" for r in rollouts) / count,
            f"eval/{name}/length_tokens": sum(len(r.response_tokens) for r in rollouts) / count,
        }
    return metrics
