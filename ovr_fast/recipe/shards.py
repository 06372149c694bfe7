"""From a rollout batch to packed shards: rank 0 assigns sequences, every replica
packs its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from ovr_fast.config import Config, RLConfig
from ovr_fast.data.balance import (
    load_imbalance,
    pipeline_order,
    pipeline_time,
    split_minibatches,
)
from ovr_fast.data.errors import DataError
from ovr_fast.data.packing import pack
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.plan.flops import packed_passes, ppo_passes, rollout_flops, spared_flops
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.metrics import rollout_metrics
from ovr_fast.records import Microbatch, Minibatch, PackedShard, RolloutBatch, Sequence, Shard
from ovr_fast.rl.advantages import group_advantages
from ovr_fast.shape.cost import Passes, prefix_flops


def pack_shard(rollouts: RolloutBatch, models: Models, config: Config) -> PackedShard:
    """This replica's share of a rollout batch, packed once for all passes. A collective.

    Args:
        rollouts: of the step; rank 0's are assigned.
        models: whose passes are balanced.
        config: minibatches, token cap and seed.

    Raises:
        TooFewRollouts: a replica would get no rollout of a minibatch.
        DataError: a rollout is over the token cap, a response holds an image placeholder, or
            placeholders and images disagree.
    """
    mesh, cap = models.mesh, config.rl.max_tokens_per_microbatch
    nothing: list[Shard] = []
    shards = mesh.on_first_rank(
        lambda: assign_to_replicas(rollouts, models, config), otherwise=nothing
    )
    shard: Shard = mesh.scatter_to_replicas(shards)
    positions = models.chat.mrope_cache()
    minibatches = []
    for sequences, costs in zip(shard.minibatches, shard.costs, strict=True):
        packed = pack(
            sequences,
            positions=positions,
            max_tokens=cap,
            multiple=mesh.tp,
            costs=costs,
            share_prefixes=config.rl.share_prefixes,
        )
        order = _order([microbatch.cost for microbatch in packed], mesh.pp)
        minibatches.append(tuple(packed[i] for i in order))
    return PackedShard(
        minibatches=tuple(minibatches),
        global_tokens=shard.global_tokens,
        global_responses=shard.global_responses,
        summary=shard.summary | packing_metrics(shard, minibatches, models, config),
    )


def packing_metrics(
    shard: Shard,
    minibatches: List[tuple[Microbatch, ...]],
    models: Models,
    config: Config,
) -> dict[str, float]:
    """What packing left empty, what shared prompts spared, and how long pipeline stages wait for
    each other, on all replicas. A collective."""
    microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch]
    early = all(microbatch.known_R for microbatch in microbatches)
    passes, shape = packed_passes(config.rl, early=early), models.actor.model.shape
    branches = [m.segments.branches for m in microbatches if m.segments.branches is not None]
    spared = [prefix for branch in branches for prefix in branch.shared]
    busy, waited = _pipeline_times(minibatches, config.rl, models.mesh.pp)
    sums = torch.tensor(
        [
            sum(len(sequence.tokens) for part in shard.minibatches for sequence in part),
            config.rl.max_tokens_per_microbatch * len(microbatches),
            sum(branch.shared_tokens for branch in branches),
            sum((count - 1) * prefix_flops(shape, tokens, passes) for tokens, count in spared),
            busy,
            waited,
        ],
        dtype=torch.float64,
        device=models.mesh.device,
    )
    dist.all_reduce(sums, group=models.mesh.dp_group)
    filled, room, shared, flops, busy, waited = sums.tolist()
    metrics = {"pack/empty_share": 1.0 - filled / room}
    if models.mesh.pp > 1:
        metrics["pack/bubble"] = 1.0 - busy / waited
    if config.rl.share_prefixes:
        metrics["pack/shared_tokens"] = shared
        metrics["pack/shared_share"] = shared / filled
    if flops:
        metrics["perf/train_tflop"] = shard.summary["perf/train_tflop"] - flops / 1e12
    return metrics


def _order(costs: list[float], stages: int) -> list[int]:
    """Of microbatches, for an update by so many pipeline stages."""
    return pipeline_order(costs, stages) if stages > 1 else list(range(len(costs)))


def in_pipeline_order(minibatch: Minibatch, mesh: Mesh) -> Minibatch:
    """The same microbatches, with their targets, in the order of which the pipeline is done first:
    ``pack_shard`` has ordered a critic's, the actor joins several of them."""
    order = _order([microbatch.cost for microbatch in minibatch.microbatches], mesh.pp)
    return replace(
        minibatch,
        microbatches=tuple(minibatch.microbatches[i] for i in order),
        targets=tuple(minibatch.targets[i] for i in order),
    )


def _pipeline_times(
    minibatches: List[tuple[Microbatch, ...]], rl: RLConfig, stages: int
) -> tuple[float, float]:
    """Of a step's updates, the critic's and the actor's: what a stage works, and how long it takes
    with what it waits."""
    work = [[microbatch.cost for microbatch in part] for part in minibatches]
    busy = 3.0 * sum(map(sum, work)) * (1 + rl.has_critic)
    if stages == 1:
        return busy, busy
    size = len(work) // rl.policy_steps
    joined = [sum(work[start : start + size], []) for start in range(0, len(work), size)]
    updates = [[costs[i] for i in _order(costs, stages)] for costs in joined]
    updates += work * rl.has_critic
    return busy, sum(pipeline_time(costs, stages) for costs in updates)


def assign_to_replicas(rollouts: RolloutBatch, models: Models, config: Config) -> list[Shard]:
    """The shard of each data-parallel replica, balanced by estimated FLOPs.

    Raises: see ``pack_shard``.
    """
    chat, replicas = models.chat, models.mesh.dp
    sequences = sequences_of(rollouts, chat.image_token_id, config.rl)
    cap = config.rl.max_tokens_per_microbatch
    for sequence in sequences:  # here, on rank 0, so that all ranks stop together
        if len(sequence.tokens) > cap:
            raise DataError(
                f"the rollout of {sequence.name} has {len(sequence.tokens)} tokens, over "
                f"rl.max_tokens_per_microbatch={cap}; raise it"
            )
    passes, shape = ppo_passes(config.rl), models.actor.model.shape
    trained = models.vision.trained

    def flops_of(made: Passes) -> list[float]:
        return rollout_flops(rollouts, shape, chat.image_processor, made, tower_trained=trained)

    packed = packed_passes(config.rl, early=all(r.known for r in rollouts.rollouts))
    flops, costs = flops_of(passes), flops_of(packed)
    if config.rl.share_prefixes:
        spared = spared_flops(rollouts, shape, packed, config.rl, tower_trained=trained)
        costs = [whole - part for whole, part in zip(costs, spared, strict=True)]
    prompts = [rollout.prompt_index for rollout in rollouts.rollouts]
    minibatches = split_minibatches(
        costs,
        # A trained tower encodes an image once a minibatch: its samples stay together.
        prompts if trained else list(range(len(sequences))),
        count=config.rl.minibatches,
        ranks=replicas,
        seed=(config.run.seed, rollouts.step - 1),
        affinity=prompts,
    )
    summary = rollout_metrics(rollouts, chat.image_token_id) | {
        "perf/train_tflop": sum(flops) / 1e12,
        "perf/forward_passes": float(passes.decoder),
        "pack/imbalance": max(load_imbalance(shares, costs) for shares in minibatches),
    }
    global_tokens = tuple(
        sum(sequences[i].response_length for share in shares for i in share)
        for shares in minibatches
    )
    return [
        Shard(
            minibatches=tuple(
                tuple(sequences[i] for i in shares[replica]) for shares in minibatches
            ),
            costs=tuple(tuple(costs[i] for i in shares[replica]) for shares in minibatches),
            global_tokens=global_tokens,
            global_responses=tuple(sum(map(len, shares)) for shares in minibatches),
            summary=summary,
        )
        for replica in range(replicas)
    ]


def sequences_of(rollouts: RolloutBatch, image_token_id: int, rl: RLConfig) -> list[Sequence]:
    """Prompt and response of each rollout as one row of tokens.

    Raises:
        DataError: a response holds an image placeholder, or is alone where a group is compared;
            names the prompt.
    """
    sequences = []
    advantages = _advantages(rollouts, rl)
    for rollout, advantage in zip(rollouts.rollouts, advantages, strict=True):
        prompt = rollouts.prompt_of(rollout)
        places = np.flatnonzero(rollout.response_tokens == image_token_id)
        if places.size:
            raise DataError(
                f"the response to {prompt.id} holds an image placeholder at token {places[0]}, "
                "which stands for no image; the servers must not sample it"
            )
        sequences.append(
            Sequence(
                tokens=np.concatenate([rollout.prompt_tokens, rollout.response_tokens]),
                response_start=len(rollout.prompt_tokens),
                images=prompt.images,
                rollout_logprobs=rollout.rollout_logprobs,
                reward=rollout.reward,
                name=prompt.id,
                advantage=advantage,
                known=rollout.known,
            )
        )
    return sequences


def _advantages(rollouts: RolloutBatch, rl: RLConfig) -> list[float]:
    """Of each rollout, against its prompt's others; NaN where a critic says."""
    if rl.has_critic:
        return [math.nan] * len(rollouts.rollouts)
    groups = [rollout.prompt_index for rollout in rollouts.rollouts]
    alone = [index for index, count in Counter(groups).items() if count < 2]
    if alone:
        raise DataError(
            f"{rollouts.prompts[alone[0]].id} has one response in step {rollouts.step}, and "
            "rl.advantage=group has nothing to compare it with; record more samples a prompt"
        )
    return group_advantages(
        [rollout.reward for rollout in rollouts.rollouts], groups, baseline=rl.group_baseline,
        scale=rl.group_scale,
    )  # fmt: skip
