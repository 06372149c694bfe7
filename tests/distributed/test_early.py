"""Responses that are scored while others are being sampled: in any order of arrival the same bits,
and those of the pass that waits for all."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import step_ranks
from ovr_fast import stopping
from ovr_fast.config import Config
from ovr_fast.evaluation.heldout import NoHeldOut
from ovr_fast.recipe.alone import BareRun
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.early import EarlyScores, _tokens
from ovr_fast.recipe.ppo import compute_targets, ppo
from ovr_fast.recipe.shards import pack_shard
from ovr_fast.records import RolloutBatch
from ovr_fast.rollout.fleet import NoServers
from ovr_fast.settings import ConfigError
from support.image_run import build, settings
from support.toy_run import BASE_MODEL
from test_layouts import compare_steps
from unit.test_ahead import source_of
from unit.test_fleet import fleet_of, start  # noqa: F401

EVERY_PASS = ("rl.policy_steps=2", "rl.kl_coef=0.1")
CASES = {
    "values": (),
    "every pass": EVERY_PASS,
    "a trained tower": ("model.train_vision=full",),
    "general lambda": ("rl.gae_lambda=0.9",),
    "shared prompts": ("rl.share_prefixes=true",),
    "no critic": ("rl.advantage=group", *EVERY_PASS),
}


def a_batch(models: Path) -> RolloutBatch:
    return step_ranks.rollouts_of(models / "wide", models / "conversations" / "conversations.jsonl")


def scored(models: Path, *words: str, orders: int = 1) -> list[RolloutBatch]:
    """The batch, scored in so many orders of arrival by one critic."""
    batch = a_batch(models)
    config = step_ranks.config_of(models / "wide", *step_ranks.EARLY, *words)
    wired, found = build(models / "wide", config), []
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(len(batch.rollouts)).tolist()
        result, turns = step_ranks.scored_early(wired, config, batch, order=order)
        assert turns > 2
        found.append(result)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["every pass", "a trained tower", "shared prompts"])
def test_the_order_of_arrival_changes_no_bit(case: str, models: Path) -> None:
    one, other = scored(models, *CASES[case], orders=2)
    for a, b in zip(one.rollouts, other.rollouts, strict=True):
        assert a.known.keys() == b.known.keys() != set()
        assert all(np.array_equal(a.known[name], b.known[name]) for name in a.known)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_gradients_of_one_that_waits(case: str, models: Path) -> None:
    batch, words = a_batch(models), CASES[case]
    steps = []
    for early in (True, False):
        asked = step_ranks.EARLY[1:] if not early else step_ranks.EARLY
        config = step_ranks.config_of(models / "wide", *asked, *words)
        given = scored(models, *words)[0] if early else batch
        metrics, gradients = step_ranks.gradients_of_a_step(
            build(models / "wide", config), config, given
        )
        kept = {k: v for k, v in metrics.items() if not k.startswith("perf/")}
        steps.append({"metrics": kept, "gradients": gradients})
    compare_steps(*steps, tolerance=1e-5)


@pytest.mark.slow
def test_what_is_known_is_not_computed_again(models: Path) -> None:
    """The targets of a step are what the responses came with."""
    (batch,) = scored(models, *EVERY_PASS)
    config = step_ranks.config_of(models / "wide", *step_ranks.EARLY, *EVERY_PASS)
    wired = build(models / "wide", config)
    shard = pack_shard(batch, wired, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ovr_fast.recipe.ppo.score", lambda *_, **__: pytest.fail("a pass"))
        targets = compute_targets(shard, wired, config)
    for microbatch, target in zip(shard.microbatches, targets, strict=True):
        torch.testing.assert_close(target.old_values_R, microbatch.known_R["values"])
        torch.testing.assert_close(target.old_logprobs_R, microbatch.known_R["old log-probs"])
        torch.testing.assert_close(target.ref_logprobs_R, microbatch.known_R["reference log-probs"])


STEP = (
    "rl.prompts_per_step=6", "rl.samples_per_prompt=4", "rl.critic_steps=2",
    "rl.score_while_sampling=true", "rl.max_tokens_per_microbatch=512", "rl.max_prompt_tokens=200",
    "rl.max_response_tokens=100",
)  # fmt: skip


class Recorded(BareRun):
    """Two steps, whose rows are kept."""

    def steps(self, last: int):
        self.rows = []
        yield from (1, 2)

    def record(self, recipe_stage, number, metrics, line) -> None:
        self.rows.append(metrics | self.clock.lap())


@pytest.mark.slow
def test_a_run_is_the_same_bit_for_bit_however_its_servers_hurry(start, fleet_of) -> None:  # noqa: F811
    """The whole loop beside a stub whose answers come in another order each time."""
    rows = []
    for seed in range(2):
        server = start()
        delays = np.random.default_rng(seed)

        async def wait(body: dict, delays=delays) -> None:
            await asyncio.sleep(float(delays.uniform(0.0, 1.5)))

        server.wait = wait
        fleet = fleet_of([server], *STEP, f"model.path={BASE_MODEL}")
        config: Config = replace(fleet.config, rl=settings(BASE_MODEL, *STEP, lr=1e-3).rl)
        wired: Models = build(BASE_MODEL, config)
        run, source = Recorded(config, wired, 1), source_of(fleet)
        source.clock = run.clock
        ppo(run, wired, source, NoServers(), NoHeldOut())
        rows.append(run.rows)
    for row in (row for run in rows for row in run):
        assert 0 < row["time/hidden_s"] <= row["time/generate_s"]
        assert row["perf/forward_passes"] == 7
    timed = ("time/", "perf/", "memory/", "servers/")
    kept = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in run] for run in rows
    ]
    assert kept[0] == kept[1]
    assert kept[0][0]["critic/value"] != kept[0][1]["critic/value"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.placement=colocated"], "takes the trainer's GPUs while servers sample"),
        (["rollout.max_staleness=1"], "sampled ahead, most responses are there"),
        (
            [
                "rl.advantage=group",
                "rl.objective=gspo",
                "rl.normalization=sequence_mean",
                "rl.policy_steps=2",
            ],
            "bounds are narrower",
        ),
        (["rl.critic_steps=1"], "nothing to do: the passes of a step are critic, actor"),
        (["rl.advantage=group"], "nothing to do: the passes of a step are actor"),
    ],
)
def test_settings_that_do_not_go_with_it(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(BASE_MODEL, "rl.score_while_sampling=true", *words, lr=0.0)


@pytest.mark.slow
def test_a_signal_waits_for_the_end_of_a_turn(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all ranks stop at one place, and there is a checkpoint; nor does a turn take all."""
    batch = a_batch(models)
    config = step_ranks.config_of(models / "wide", *step_ranks.EARLY)
    wired = build(models / "wide", config)
    scoring, samples = EarlyScores(wired, config), step_ranks.samples_of(batch)
    for sample, rollout in zip(samples, batch.rollouts, strict=True):
        step_ranks.finish(sample, rollout)
    monkeypatch.setattr(stopping._Request, "now", "SIGTERM")
    assert scoring.wants(samples)
    scoring.turn(samples)
    taken = sum(_tokens(s) for s in samples if s.place in scoring._known)
    longest = max(map(_tokens, samples))
    assert 0 < taken <= 2 * scoring.cap + step_ranks.SAMPLES * longest
    assert scoring.wants(samples)
    with pytest.raises(stopping.Stopped):
        stopping.check(together=True)


@pytest.mark.slow
def test_an_update_inside_puts_its_state_away_again(models: Path) -> None:
    """A checkpoint that is written while responses are scored brings each model's in turn."""
    config = step_ranks.config_of(models / "wide", "parallel.offload=model", lr=1e-3)
    critic = build(models / "wide", config).critic

    def here(name: str) -> bool:
        buffers = critic.optimizer.ddp.buffers
        return all(getattr(b, name).untyped_storage().nbytes() for b in buffers)

    with critic.on_device(weights_only=True):
        with critic.on_device():
            assert here("param_data")
            assert here("grad_data")
        assert here("param_data")
        assert not here("grad_data")
    assert not here("param_data")


@pytest.mark.slow
def test_what_is_held_of_early_images(models: Path) -> None:
    """A frozen tower keeps those of the step alone, each as it was; a trained one none, nor does
    the reference beside it."""
    for train_vision in ("frozen", "full"):
        words = (*step_ranks.EARLY, *EVERY_PASS, f"model.train_vision={train_vision}")
        config = step_ranks.config_of(models / "wide", *words)
        wired, batch = build(models / "wide", config), a_batch(models)
        step_ranks.scored_early(wired, config, batch, order=range(len(batch.rollouts)))
        encoders = {id(m.vision): m.vision for m in (wired.actor, wired.critic, wired.reference)}
        if train_vision == "full":
            assert len(encoders) == 3
            assert not any(encoder._held for encoder in encoders.values())
            continue
        ((_, encoder),) = encoders.items()
        early = dict(encoder._held)
        shard = pack_shard(batch, wired, config)
        some = shard.microbatches[:2]
        wanted = {image.digest for microbatch in some for image in microbatch.images}
        assert wanted < early.keys()
        encoder.encode_step(some)
        assert encoder._cache.keys() == encoder._held.keys() == wanted
        assert all(encoder._held[digest] is early[digest] for digest in wanted)
        assert encoder.read_counters()["vision/cache_hits"] == 0


def test_what_waits_for_whom(models: Path) -> None:
    """A long response goes at once, by itself; the short ones of a prompt when all are there."""
    config = step_ranks.config_of(models / "wide", *step_ranks.EARLY)
    batch = a_batch(models)
    samples = step_ranks.samples_of(batch)
    scoring = EarlyScores(build(models / "wide", config), config)
    scoring.cap = 8 * (len(batch.rollouts[0].prompt_tokens) + 20)
    group = [s for s in samples if s.asked.index == 0]
    for sample, length in zip(group, (30, 5, 6, 7), strict=True):
        given = replace(
            batch.rollouts[0],
            response_tokens=np.arange(length),
            rollout_logprobs=np.zeros(length, dtype=np.float32),
        )
        step_ranks.finish(sample, given)
        ready = [[s.number for s in unit] for unit in scoring._ready(samples)]
        assert ready == [[0]] + [[1, 2, 3]] * (sample.number == 3)
