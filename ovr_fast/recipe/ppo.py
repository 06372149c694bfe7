"""Stage 2, multimodal PPO (OVR 3.2): what a step does, phase by phase, and where each part lives.

rollout      vLLM samples, the verifier rewards (rank 0)         rollout.sources, rl.rewards
pack         sequences to replicas by FLOPs, to microbatches     recipe.shards, data.packing
vision       a frozen tower encodes images once, for all passes  model.vision_encoder
targets      values, GAE, old and reference log-probs            compute_targets, learner.passes
critic       critic_steps optimizer steps                        learner, rl.losses.ValueLoss
actor        policy_steps optimizer steps                        learner, rl.losses.PolicyLoss
weight_sync  the actor's weights to the servers                  rollout.fleet, .delivery
evaluate     held-out accuracy with those weights                evaluation.heldout
record       rollouts and a row of metrics                       recipe.metrics, run
save         a checkpoint, every so many steps                   run.resume, parallel.checkpoint
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovr_fast.config import Config
from ovr_fast.evaluation.heldout import Evaluation
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.metrics import step_metrics
from ovr_fast.recipe.shards import pack_shard
from ovr_fast.records import Microbatch, PackedShard, Targets, to_device
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
    rl, curriculum = config.rl, ContextCurriculum(config.rl)
    value_loss, policy_loss = ValueLoss(rl), PolicyLoss(rl, config.rollout.temperature)
    state: State = {"actor": actor, "critic": critic, "rollouts": source, "context": curriculum}
    with run.clock("start"):
        run.begin_or_resume("rl", state)
        servers.sync(actor, version=run.steps_done)
    for number in run.steps(source.last_step(rl.steps)):
        with run.step(number) as step:
            with step.phase("rollout"):
                step.rollouts = source.next(number, max_tokens=curriculum.limit(number))
            with step.phase("pack"):
                shard = pack_shard(step.rollouts, models, config)
            with step.phase("vision"):
                models.vision.encode(shard.microbatches)
            with step.phase("targets"):
                targets = compute_targets(shard, models, config)
            with step.phase("critic"), critic.on_device():
                minibatches = shard.split(targets, count=rl.critic_steps)
                critic_updates = [critic.update(m, value_loss) for m in minibatches]
            with step.phase("actor"), actor.on_device():
                minibatches = shard.split(targets, count=rl.policy_steps)
                actor_updates = [actor.update(m, policy_loss) for m in minibatches]
            with step.phase("weight_sync"):
                servers.sync(actor, version=number)
            with step.phase("evaluate"):
                accuracy = evaluation.measure_if_due(number, last=run.last_step)
            metrics = step_metrics(shard, targets, critic_updates, actor_updates, models)
            step.record(metrics | accuracy | curriculum.metrics(number), step_line)
        curriculum.observe(number, metrics["rollout/length_tokens"])
        run.export_if_due(number, actor)
        if run.save_is_due(number):
            models.vision.clear_cache()  # a resumed run has none, and must see the same bits
            run.save(number, state)
    run.finish(actor)


def compute_targets(shard: PackedShard, models: Models, config: Config) -> list[Targets]:
    """Values, advantages (GAE) and returns of each microbatch and, where needed, old and reference
    log-probs, all from the weights before the step's first update.

    Advantages are normalised over the global batch if the settings say so. Old log-probs are needed
    with several policy steps (with one the ratio is 1), reference log-probs with a KL term.
    """
    rl, temperature = config.rl, config.rollout.temperature
    microbatches = shard.microbatches
    values = models.critic.values(microbatches)
    estimates = [
        compute_gae(*pair, models, config) for pair in zip(microbatches, values, strict=True)
    ]
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


def compute_gae(
    batch: Microbatch, values_R: Tensor, models: Models, config: Config
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [R] fp32 of a microbatch; a response is rewarded at its last token."""
    rewards_R = torch.zeros(values_R.shape)
    rewards_R[batch.responses.cu_seqlens_S1[1:].long() - 1] = torch.tensor(batch.rewards_S)
    return models.operators.packed_gae(
        to_device(rewards_R, values_R.device),
        values_R,
        batch.responses.cu_seqlens_S1,
        gamma=config.rl.gamma,
        gae_lambda=config.rl.gae_lambda,
    )
