"""Stage 2, multimodal PPO (OVR 3.2). ``ppo`` is the recipe: what a step does, phase by phase."""

from __future__ import annotations

import torch
from torch import Tensor

from ovr_fast.config import Config
from ovr_fast.evaluation.heldout import Evaluation
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.metrics import step_metrics
from ovr_fast.recipe.shards import pack_shard
from ovr_fast.records import Microbatch, PackedShard, Targets
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.rl.losses import PolicyLoss, ValueLoss, normalize_advantages
from ovr_fast.rollout.fleet import Servers
from ovr_fast.rollout.sources import RolloutSource
from ovr_fast.run.lines import step_line
from ovr_fast.run.resume import State
from ovr_fast.run.run import Run


def ppo(
    run: Run, models: Models, source: RolloutSource, servers: Servers, evaluation: Evaluation
) -> None:
    """Each step: one batch of rollouts, ``critic_steps`` updates of the critic on it, then
    ``policy_steps`` of the actor, whose weights the next step samples with."""
    config, actor, critic = run.config, models.actor, models.critic
    rl, context = config.rl, ContextCurriculum(config.rl)
    value_loss, policy_loss = ValueLoss(rl), PolicyLoss(rl, config.rollout.temperature)
    state: State = {"actor": actor, "critic": critic, "prompts": source, "context": context}
    with run.clock("start"):
        run.enter("rl", state)
        servers.sync(actor, version=run.steps_done)
    for number in run.steps(source.last_step(rl.steps)):
        with run.step(number) as step:
            with step.phase("rollout"):
                step.rollouts = source.next(number, max_tokens=context.limit(number))
            with step.phase("pack"):  # rank 0 deals; each replica packs its shard
                shard = pack_shard(step.rollouts, models, config)
            with step.phase("vision"):  # a frozen tower encodes each image once, for all passes
                models.vision.encode(shard.microbatches)
            with step.phase("targets"):
                targets = estimate(shard, models, config)
            with step.phase("critic"), critic.on_device():
                minibatches = shard.split(targets, count=rl.critic_steps)
                critic_updates = [critic.update(m, value_loss) for m in minibatches]
            with step.phase("actor"), actor.on_device():
                minibatches = shard.split(targets, count=rl.policy_steps)
                actor_updates = [actor.update(m, policy_loss) for m in minibatches]
            with step.phase("weight_sync"):
                servers.sync(actor, version=number)
            with step.phase("evaluate"):
                scores = evaluation.measure_if_due(number, last=run.last_step)
            metrics = step_metrics(shard, targets, critic_updates, actor_updates, models) | scores
            step.record(metrics | context.metrics(number), step_line)
        context.observe(metrics["rollout/length_tokens"])
        run.export_if_due(number, actor)
        if run.save_is_due(number):
            models.vision.clear_cache()  # a resumed run has none, and must see the same bits
            run.save(number, state)
    run.finish(actor)


def estimate(shard: PackedShard, models: Models, config: Config) -> list[Targets]:
    """What the step's updates aim at, from the models as they are before the first of them.

    Returns:
        values, advantages (GAE, normalised over the global batch if the settings say so) and
        returns of each microbatch; old log-probs only where there are several policy steps, since
        with one the ratio of the policy to itself is 1; reference log-probs only with a KL term.
    """
    rl, temperature = config.rl, config.rollout.temperature
    microbatches = shard.microbatches
    values = models.critic.values(microbatches)
    estimates = [gae(*pair, models, config) for pair in zip(microbatches, values, strict=True)]
    advantages = [advantages_R for advantages_R, _ in estimates]
    if rl.normalize_advantages:
        advantages = normalize_advantages(advantages, models.mesh.dp_group)
    none: list[Tensor | None] = [None] * len(microbatches)
    old, ref = none, none
    if rl.policy_steps > 1:
        old = [*models.actor.logprobs(microbatches, temperature=temperature)]
    if models.reference is not None:
        ref = [*models.reference.logprobs(microbatches, temperature=temperature)]
    return [
        Targets(
            old_values_R=values[i],
            advantages_R=advantages[i],
            returns_R=estimates[i][1],
            old_logprobs_R=old[i],
            ref_logprobs_R=ref[i],
        )
        for i in range(len(microbatches))
    ]


def gae(
    batch: Microbatch, values_R: Tensor, models: Models, config: Config
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [R] fp32 of a microbatch; a response is rewarded at its last token."""
    rewards_R = torch.zeros_like(values_R)
    ends_S = batch.responses.cu_seqlens_S1[1:].long() - 1
    rewards_R[ends_S.to(values_R.device)] = torch.tensor(batch.rewards_S, device=values_R.device)
    return models.actor.model.operators.packed_gae(
        rewards_R,
        values_R,
        batch.responses.cu_seqlens_S1,
        gamma=config.rl.gamma,
        gae_lambda=config.rl.gae_lambda,
    )
