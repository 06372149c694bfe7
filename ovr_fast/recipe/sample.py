"""Stage 2's first half alone: sample and reward with the weights of ``model.path``, and record."""

from __future__ import annotations

from ovr_fast.data.chat import ChatTemplate
from ovr_fast.recipe.metrics import rollout_metrics
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.rollout.sources import RolloutSource
from ovr_fast.run.lines import rollout_line
from ovr_fast.run.run import Run


def sample(run: Run, source: RolloutSource, chat: ChatTemplate) -> None:
    """Each step: one batch of rollouts, in rollouts/STEP.parquet of the run's folder."""
    context = ContextCurriculum(run.config.rl)
    run.begin_or_resume("rollout", {})
    for number in run.steps(source.last_step(run.config.rl.steps)):
        with run.step(number) as step:
            with step.phase("rollout"):
                step.rollouts = source.next(number, max_tokens=context.limit(number))
            metrics = rollout_metrics(step.rollouts, chat.image_token_id)
            step.record(metrics | context.metrics(number), rollout_line)
    run.say(f"done: rollouts in {run.folder / 'rollouts'}")
