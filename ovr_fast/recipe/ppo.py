"""Stage 2, multimodal PPO (OVR 3.2): what a step does, phase by phase, and where each part lives.
With ``rl.advantage=group`` there is no critic, and no value.

rollout      vLLM samples, the verifier rewards (rank 0); with   rollout.sources, rl.rewards,
             score_while_sampling targets begin                  recipe.early
pack         sequences to replicas by FLOPs, to microbatches     recipe.shards, data.packing
vision       a frozen tower encodes images once, for all passes  model.vision_encoder
targets      values, returns, old and reference log-probs        compute_targets, learner.passes
critic       critic_steps optimizer steps                        update_critic, learner,
                                                                 rl.losses.ValueLoss
advantages   of a critic's values by GAE, or of a response's     compute_advantages, rl.advantages
             group
actor        policy_steps optimizer steps                        learner, rl.losses.PolicyLoss
weight_sync  the actor's weights to the servers                  rollout.fleet, .delivery
evaluate     held-out accuracy with those weights                evaluation.heldout
record       rollouts and a row of metrics                       recipe.metrics, run
save         a checkpoint, every so many steps                   run.resume, parallel.checkpoint
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ovr_fast.config import Config
from ovr_fast.evaluation.heldout import Evaluation
from ovr_fast.learner.learner import Learner
from ovr_fast.parallel.schedule import on_every_stage
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.early import EarlyScores, score
from ovr_fast.recipe.metrics import Update, step_metrics
from ovr_fast.recipe.shards import in_pipeline_order, pack_shard
from ovr_fast.records import Microbatch, PackedShard, Targets, to_device
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.rl.losses import PolicyLoss, ValueLoss, normalize_advantages
from ovr_fast.rollout.fleet import Servers
from ovr_fast.rollout.sources import RolloutSource
from ovr_fast.run.lines import step_line
from ovr_fast.run.resume import State
from ovr_fast.run.run import Run
from ovr_kernels.reference import kl_estimate


def ppo(
    run: Run, models: Models, source: RolloutSource, servers: Servers, evaluation: Evaluation
) -> None:
    """Each step: one batch of rollouts, ``critic_steps`` updates of the critic on it, if there is
    one, then ``policy_steps`` of the actor, whose weights the next step samples with."""
    config, actor, critic = run.config, models.actor, models.critic
    rl, curriculum = config.rl, ContextCurriculum(config.rl)
    policy_loss = PolicyLoss(rl, config.rollout.temperature)
    scoring = EarlyScores.of(models, config)
    state: State = {"actor": actor, "rollouts": source, "context": curriculum}
    if critic is not None:
        state["critic"] = critic
    with run.clock("start"):
        run.begin_or_resume("rl", state)
        servers.sync(actor, version=run.steps_done)
    for number in run.steps(source.last_step(rl.steps)):
        with run.step(number) as step:
            with step.phase("rollout"):
                limit = curriculum.limit(number)
                step.rollouts = source.next(number, max_tokens=limit, scoring=scoring)
            with step.phase("pack"):
                shard = pack_shard(step.rollouts, models, config)
            with step.phase("vision"):
                models.vision.encode(shard.microbatches)
            with step.phase("targets"):
                targets = compute_targets(shard, models, config)
            critic_updates: list[Update] = []
            if critic is not None:
                with step.phase("critic"), critic.on_device():
                    critic_updates, targets = update_critic(critic, shard, targets, config)
            with step.phase("advantages"):
                targets = compute_advantages(shard, targets, models, config)
            with step.phase("actor"), actor.on_device():
                minibatches = shard.split(targets, count=rl.policy_steps)
                minibatches = [in_pipeline_order(m, models.mesh) for m in minibatches]
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
    """What the weights before the first update of the step say of each microbatch: with a critic
    its values and returns, and old and reference log-probs where they are needed.

    At gamma = lambda = 1 a return is the reward to go, and no value is in it. So the first critic
    minibatch needs no pass for its values: they come out of the forward that trains on them, whose
    weights are the same (``update_critic``). Old log-probs are needed with several policy steps
    (with one the ratio is 1) and by a KL term in the reward.
    """
    rl, microbatches = config.rl, shard.microbatches
    none: list[Tensor | None] = [None] * len(microbatches)

    def found(name: str, first: int = 0) -> list[Tensor | None]:
        """Of the microbatches from ``first`` on, if the step has that pass; None for the others."""
        rest = microbatches[first:]
        if name not in rl.passes or not rest:
            return none
        if all(name in batch.known_R for batch in rest):
            return none[:first] + [to_device(b.known_R[name], models.mesh.device) for b in rest]
        temperature = config.rollout.temperature
        return none[:first] + [*score(name, rest, models, temperature=temperature)]

    values = found("values", len(shard.minibatches[0]) if rl.values_of_first_update else 0)
    old, ref, kl = found("old log-probs"), found("reference log-probs"), none
    if rl.kl_coef and rl.kl_in == "reward":
        kl = [
            kl_estimate(old_R, ref_R, rl.kl_estimator)
            for old_R, ref_R in zip(old, ref, strict=True)
            if old_R is not None and ref_R is not None
        ]
    targets = [
        Targets(
            old_values_R=values[i],
            old_logprobs_R=old[i] if rl.policy_steps > 1 else None,
            ref_logprobs_R=ref[i] if rl.kl_in == "loss" else None,
            kl_R=kl[i],
        )
        for i in range(len(microbatches))
    ]
    if models.critic is None:
        return targets
    return [
        replace(target, returns_R=compute_gae(batch, target, models, config)[1])
        for batch, target in zip(microbatches, targets, strict=True)
    ]


def update_critic(
    critic: Learner, shard: PackedShard, targets: list[Targets], config: Config
) -> tuple[list[Update], list[Targets]]:
    """``critic_steps`` optimizer steps, and the targets with all values from before them."""
    first, *others = shard.split(targets, count=config.rl.critic_steps)
    seen: list[Tensor] = []
    updates = [critic.update(first, ValueLoss(config.rl, seen))]
    updates += [critic.update(minibatch, ValueLoss(config.rl)) for minibatch in others]
    if not config.rl.values_of_first_update:
        return updates, targets
    values = on_every_stage(seen, first.microbatches, critic.mesh)
    known = [replace(t, old_values_R=v) for t, v in zip(first.targets, values, strict=True) if t]
    return updates, known + targets[len(known) :]


def compute_advantages(
    shard: PackedShard, targets: list[Targets], models: Models, config: Config
) -> list[Targets]:
    """The targets with advantages, normalised over the global batch if the settings say so."""
    pairs = list(zip(shard.microbatches, targets, strict=True))
    if models.critic is None:
        advantages = [group_advantages_R(batch, models) for batch, _ in pairs]
    else:
        advantages = [compute_gae(batch, target, models, config)[0] for batch, target in pairs]
    if config.rl.normalize_advantages:
        advantages = normalize_advantages(advantages, models.mesh.dp_group)
    return [
        replace(target, advantages_R=advantages_R)
        for target, advantages_R in zip(targets, advantages, strict=True)
    ]


def group_advantages_R(batch: Microbatch, models: Models) -> Tensor:
    """[R] fp32: all tokens of a response have its advantage (``rl.advantages``)."""
    each_S = torch.tensor(batch.advantages_S)
    lengths_S = torch.tensor(batch.responses.lengths)
    return to_device(each_S.repeat_interleave(lengths_S), models.mesh.device)


def compute_gae(
    batch: Microbatch, target: Targets, models: Models, config: Config
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [R] fp32 of a microbatch; a response is rewarded at its last token,
    and, with a KL term in the reward, pays ``kl_coef`` times it at each. Without values yet only
    the returns mean something: at gamma = lambda = 1 they are the rewards to go."""
    rewards_R = torch.zeros(batch.labels_R.shape)
    rewards_R[batch.responses.cu_seqlens_S1[1:].long() - 1] = torch.tensor(batch.rewards_S)
    rewards_R = to_device(rewards_R, models.mesh.device)
    if target.kl_R is not None:
        rewards_R = rewards_R - config.rl.kl_coef * target.kl_R
    values_R = target.old_values_R
    return models.operators.packed_gae(
        rewards_R,
        torch.zeros_like(rewards_R) if values_R is None else values_R,
        batch.responses.cu_seqlens_S1,
        gamma=config.rl.gamma,
        gae_lambda=config.rl.gae_lambda,
    )
