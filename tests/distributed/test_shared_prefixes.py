"""Prompts that stand once in a microbatch: the gradients of a whole PPO step, in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import step_ranks
from ovr_fast.recipe.shards import pack_shard
from ovr_fast.records import RolloutBatch
from support.image_run import build
from test_layouts import compare_steps

TEXT_ONLY = "the prompts without images"


def a_step(folder: Path, batch: RolloutBatch, *words: str) -> dict:
    config = step_ranks.config_of(folder, *words)
    metrics, gradients = step_ranks.gradients_of_a_step(build(folder, config), config, batch)
    return {"metrics": metrics, "gradients": gradients}


def rollouts(models: Path, *, samples: int | None = None, images: bool = True) -> RolloutBatch:
    batch = step_ranks.rollouts_of(
        models / "wide", models / "conversations" / "conversations.jsonl"
    )
    kept = [
        rollout
        for rollout in batch.rollouts
        if (samples is None or rollout.sample_index < samples)
        and (images or not batch.prompt_of(rollout).images)
    ]
    return replace(batch, rollouts=tuple(kept))


CASES = {
    "frozen": [],
    "merger": ["model.train_vision=merger"],
    "whole tower": ["model.train_vision=full"],
    "recomputed": ["model.recompute=full"],
    "recomputed in part": ["model.recompute=selective"],
    "groups over several microbatches": ["rl.max_tokens_per_microbatch=340"],
    "one minibatch": ["rl.critic_steps=1"],
    "with a pass for all values": ["rl.gae_lambda=0.95"],
    "old and reference log-probs": ["rl.policy_steps=2", "rl.kl_coef=0.1"],
    "a group's baseline": ["rl.advantage=group"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_of_prompts_that_stand_with_each(case: str, models: Path) -> None:
    batch = rollouts(models)
    words = CASES[case]
    shared = a_step(models / "wide", batch, "rl.share_prefixes=true", *words)
    apart = a_step(models / "wide", batch, *words)
    less, whole = (step["metrics"].pop("perf/train_tflop") for step in (shared, apart))
    assert less < whole
    assert shared["metrics"]["pack/shared_tokens"] > 0
    compare_steps(shared, apart, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one sample", TEXT_ONLY])
def test_groups_at_their_edges(case: str, models: Path) -> None:
    batch = rollouts(models, samples=1 if case == "one sample" else None, images=case != TEXT_ONLY)
    shared = a_step(models / "wide", batch, "rl.share_prefixes=true", "rl.critic_steps=1")
    apart = a_step(models / "wide", batch, "rl.critic_steps=1")
    assert (shared["metrics"]["pack/shared_tokens"] > 0) == (case == TEXT_ONLY)
    for step in (shared, apart):
        step["metrics"].pop("perf/train_tflop")
    compare_steps(shared, apart, tolerance=1e-5)


@pytest.mark.slow
def test_the_count_of_what_was_spared(models: Path) -> None:
    """By hand, over the microbatches of one minibatch."""
    batch = rollouts(models)
    config = step_ranks.config_of(
        models / "wide", "rl.share_prefixes=true", "rl.critic_steps=1",
        "rl.max_tokens_per_microbatch=700",
    )  # fmt: skip
    wired = build(models / "wide", config)
    shard = pack_shard(batch, wired, config)
    whole = sum(len(r.prompt_tokens) + len(r.response_tokens) for r in batch.rollouts)
    packed = sum(m.tokens_T.numel() for m in shard.microbatches)
    assert shard.summary["pack/shared_tokens"] == whole - packed
    assert shard.summary["pack/shared_share"] == pytest.approx(1 - packed / whole)
    plain = pack_shard(batch, wired, step_ranks.config_of(models / "wide", "rl.critic_steps=1"))
    values = torch.cat([m.labels_R for m in shard.microbatches]).sort().values
    assert torch.equal(values, torch.cat([m.labels_R for m in plain.microbatches]).sort().values)
