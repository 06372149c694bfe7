"""What a step reports."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch.distributed as dist

from ovr_fast.recipe.build import Models
from ovr_fast.records import PackedShard, RolloutBatch, Targets
from ovr_fast.rl.losses import global_moments
from ovr_fast.rl.rewards import OUTCOMES

Update = dict[str, float]
"""What ``Learner.update`` returns."""


def rollout_metrics(batch: RolloutBatch, image_token_id: int) -> dict[str, float]:
    """Reward, lengths and outcome shares of a batch; nothing where it is empty."""
    rollouts = batch.rollouts
    if not rollouts:
        return {}
    lengths = np.array([len(rollout.response_tokens) for rollout in rollouts])
    outcomes = Counter(rollout.outcome for rollout in rollouts)
    by_prompt: dict[int, list[float]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_index, []).append(rollout.reward)
    means = np.array([np.mean(rewards) for rewards in by_prompt.values()])
    differ = np.array([min(rewards) != max(rewards) for rewards in by_prompt.values()])
    named: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.scores:
            named.setdefault(name, []).append(value)
    best = np.array([max(rewards) for rewards in by_prompt.values()])
    right = np.array([rollout.outcome == "correct" for rollout in rollouts])
    by_outcome = {
        f"rollout/length_{name}_tokens": float(lengths[which].mean())
        for name, which in (("correct", right), ("wrong", ~right))
        if which.any()
    }
    visual = sum(int((r.prompt_tokens == image_token_id).sum()) for r in rollouts)
    return {
        "rollout/reward": float(np.mean([rollout.reward for rollout in rollouts])),
        "rollout/length_tokens": float(lengths.mean()),
        "rollout/length_p50_tokens": float(np.percentile(lengths, 50)),
        "rollout/length_p90_tokens": float(np.percentile(lengths, 90)),
        "rollout/length_max_tokens": float(lengths.max()),
        **by_outcome,
        "rollout/repeat": float(np.mean([repeated(r.response_tokens) for r in rollouts])),
        "rollout/response_tokens": float(lengths.sum()),
        "rollout/visual_tokens": float(visual),
        "rollout/truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        # Prompts whose samples differ in reward: the others teach the actor little.
        "rollout/mixed_prompts": float(differ.mean()),
        "rollout/solved_prompts": float((best > 0).mean()),
        "rollout/all_right_prompts": float((means == 1).mean()),
        "rollout/policy_version": float(min(r.first_policy_version for r in rollouts)),
        **{f"reward/{name}": outcomes[name] / len(rollouts) for name in OUTCOMES},
        **{f"reward/{name}": float(np.mean(values)) for name, values in named.items()},
        **batch.counters,
    }


REPEATED_TOKENS = 16


def repeated(tokens: np.ndarray) -> float:
    """Share of a response's sequences of 16 tokens that stood in it before: 0 of a text without a
    loop, near 1 of one that goes round."""
    count = len(tokens) - REPEATED_TOKENS + 1
    if count < 2:
        return 0.0
    wide = np.asarray(tokens, dtype=np.uint64)
    keys = np.zeros(count, dtype=np.uint64)
    for place in range(REPEATED_TOKENS):  # modulo 2^64: two sequences with one key are unlikely
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + wide[place : place + count] + np.uint64(1)
    return 1.0 - len(np.unique(keys)) / count


def step_metrics(
    shard: PackedShard,
    targets: list[Targets],
    critic_updates: list[Update],
    actor_updates: list[Update],
    models: Models,
) -> dict[str, float]:
    """A PPO step's metrics, but for its times. A collective."""
    group = models.mesh.dp_group
    actor = {key: sum(update[key] for update in actor_updates) for key in actor_updates[0]}
    first = actor_updates[0]
    metrics = {
        **shard.summary,
        **models.vision.read_counters(),
        # Of the first update only: later ones compare a policy that has already moved.
        "rollout/logprob_gap": first["logprob_gap"] / first["tokens"],
        "rollout/kl": first["rollout_kl"] / first["tokens"],
        "actor/loss": actor["loss"] / actor["tokens"],
        "actor/entropy": actor["entropy"] / actor["tokens"],
        "actor/ratio": actor["ratio"] / actor["ratios"],
        "actor/clip_frac": actor["clipped"] / actor["ratios"],
        "actor/grad_norm": actor["grad_norm"] / len(actor_updates),
        "actor/lr": actor_updates[-1]["lr"],
    }
    if "kl" in actor:
        metrics["actor/kl"] = actor["kl"] / actor["tokens"]
    if estimated := [target.kl_R for target in targets if target.kl_R is not None]:
        metrics["actor/kl"] = global_moments(estimated, group)[1]
    return metrics | (critic_metrics(targets, critic_updates, group) if critic_updates else {})


def critic_metrics(
    targets: list[Targets], updates: list[Update], group: dist.ProcessGroup
) -> dict[str, float]:
    """How the critic learns, and how well it knew the returns before. A collective of ``group``."""
    values = [target.old_values_R for target in targets if target.old_values_R is not None]
    returns = [target.returns_R for target in targets if target.returns_R is not None]
    errors = [a - b for a, b in zip(returns, values, strict=True)]
    _, value_mean, _ = global_moments(values, group)
    _, return_mean, return_deviation = global_moments(returns, group)
    _, _, error_deviation = global_moments(errors, group)
    critic = {key: sum(update[key] for update in updates) for key in updates[0]}
    return {
        "critic/loss": critic["loss"] / critic["tokens"],
        "critic/grad_norm": critic["grad_norm"] / len(updates),
        "critic/lr": updates[-1]["lr"],
        "critic/value": value_mean,
        "critic/return": return_mean,
        # Share of the returns' variance that the old values explain; 0 where there is none.
        "critic/explained_variance": (
            1.0 - (error_deviation / return_deviation) ** 2 if return_deviation > 1e-6 else 0.0
        ),
    }
