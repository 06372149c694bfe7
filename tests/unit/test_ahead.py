"""Rollouts that are sampled ahead of training, and those that several steps share."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import overlap
from ovr_fast import stopping
from ovr_fast.config import load_config
from ovr_fast.observe.clock import Clock
from ovr_fast.records import Rollout
from ovr_fast.rollout.sources import VLLMRollouts
from ovr_fast.settings import ConfigError
from ovr_fast.stopping import Stopped
from support.toy_run import ROOT
from unit.test_fleet import OneRank, fleet_of, prompt, start  # noqa: F401

PROMPTS_A_STEP, SAMPLES = 3, 2
WANTED = PROMPTS_A_STEP * SAMPLES


class Stream:
    """Prompts p0, p1, ..."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, count: int) -> list:
        self.position += count
        return [prompt(f"p{i}") for i in range(self.position - count, self.position)]

    def state(self) -> dict:
        return {"position": self.position}

    def restore(self, state: dict) -> None:
        self.position = state["position"]


def source_of(fleet) -> VLLMRollouts:
    """A source whose verifier likes everything."""

    def like(responses, answers, questions, names, columns) -> list[Rollout]:
        return [Rollout.of(response, reward=1.0, outcome="correct") for response in responses]

    return VLLMRollouts(
        fleet.config, stream=Stream(), fleet=fleet, verifier=SimpleNamespace(reward=like),
        mesh=OneRank(), clock=Clock(),
    )  # type: ignore[arg-type]  # fmt: skip


def settings(*, staleness: int, partial: bool = False, steps: int = 4) -> list[str]:
    return [
        f"rollout.max_staleness={staleness}", f"rollout.partial={str(partial).lower()}",
        f"rl.steps={steps}", f"rl.prompts_per_step={PROMPTS_A_STEP}",
        f"rl.samples_per_prompt={SAMPLES}",
    ]  # fmt: skip


def sync(fleet, servers, version: int) -> None:
    """As ``Fleet.sync``, without weights."""
    with fleet.at_rest():
        fleet.delivery.version = fleet.sampler.version = version
        for server in servers:
            server.version = str(version)


def named(batch) -> list[tuple[str, int]]:
    return [(batch.prompt_of(r).id, r.sample_index) for r in batch.rollouts]


def test_strictly_on_policy_nothing_is_asked_ahead(start, fleet_of) -> None:  # noqa: F811
    server = start()
    fleet = fleet_of([server], *settings(staleness=0))
    source = source_of(fleet)
    for step in range(1, 4):
        batch = source.next(step, max_tokens=30)
        assert len(server.bodies) == WANTED * step
        assert named(batch) == [
            (f"p{i}", j) for i in range(PROMPTS_A_STEP * (step - 1), PROMPTS_A_STEP * step)
            for j in range(SAMPLES)
        ]  # fmt: skip
        assert batch.counters["rollout/staleness"] == 0.0
        assert source.state()["asked"] == []
        sync(fleet, [server], step)


def test_the_next_step_is_sampled_meanwhile(start, fleet_of) -> None:  # noqa: F811
    servers = [start(token_s=0.002), start(token_s=0.002)]
    fleet = fleet_of(servers, *settings(staleness=1))
    source = source_of(fleet)
    ages, seen = [], []
    for step in range(1, 5):
        batch = source.next(step, max_tokens=30)
        seen += named(batch)
        assert all(r.prompt_index < len(batch.prompts) for r in batch.rollouts)
        assert sum(len(s.bodies) for s in servers) >= WANTED * min(4, step)
        ages.append(batch.counters["rollout/staleness_max"])
        sync(fleet, servers, step)
    assert ages[0] == 0.0
    assert max(ages) == 1.0  # asked with the weights of the step before
    assert seen == [(f"p{i}", j) for i in range(4 * PROMPTS_A_STEP) for j in range(SAMPLES)]


LONGER = range(2, 5)
"""Steps whose responses do not end in the step before, which asks for them."""


def long_tail(body: dict) -> int | None:
    """Of each prompt of those steps the first sample stops at its first token, and goes on when it
    is asked for the rest."""
    step, _, sample, done, _ = (int(part) for part in body["request_id"].split("-"))
    return 1 if step in LONGER and sample == done == 0 else None


def run_partial(source, fleet, server, steps: range) -> tuple[list, list[dict]]:
    seen, counters = [], []
    for step in steps:
        batch = source.next(step, max_tokens=400)
        deadline = time.monotonic() + 60
        while step + 1 in LONGER and not server.held:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(batch.rollouts) == WANTED
        for rollout in batch.rollouts:
            assert step - 1 - rollout.first_policy_version <= fleet.config.rollout.max_staleness
            spans = rollout.versions
            assert list(spans) == sorted(spans, key=lambda span: span.start)
            assert len(rollout.response_tokens) == len(rollout.rollout_logprobs)
        seen += named(batch)
        counters.append(batch.counters)
        sync(fleet, [server], step)
    return seen, counters


def test_unfinished_responses_go_on_in_the_next_step(start, fleet_of) -> None:  # noqa: F811
    """A long tail: each sample is trained on once, no token is lost, none is too old."""
    server = start(token_s=0.002, mean=60)
    server.hold = long_tail
    fleet = fleet_of([server], *settings(staleness=2, partial=True, steps=6))
    source = source_of(fleet)
    seen, counters = run_partial(source, fleet, server, range(1, 7))
    assert Counter(seen) == Counter(
        (f"p{i}", j) for i in range(6 * PROMPTS_A_STEP) for j in range(SAMPLES)
    )
    assert seen != sorted(seen, key=lambda item: (int(item[0][1:]), item[1]))
    assert any(row["rollout/kept_tokens"] > 0 for row in counters)
    assert max(row["rollout/staleness_max"] for row in counters) in (1.0, 2.0)
    for row in counters:
        assert row["rollout/sampled_tokens"] == (
            row["rollout/trained_tokens"] + row["rollout/kept_tokens"]
        )
    assert counters[-1]["rollout/kept_tokens"] == 0.0


def test_a_checkpoint_keeps_what_is_unfinished(start, fleet_of) -> None:  # noqa: F811
    server = start(token_s=0.002, mean=60)
    server.hold = long_tail
    more = settings(staleness=2, partial=True, steps=6)
    fleet = fleet_of([server], *more)
    source = source_of(fleet)
    seen, _ = run_partial(source, fleet, server, range(1, 4))
    fleet.canary.usual[:] = [0.011, 0.012, 0.013]
    state = source.state()
    kept = {s.place: [p.tokens.tolist() for p in s.pieces] for s in source.pool.waiting}
    assert any(kept.values())
    fleet.close()
    del server.bodies[:]
    again = fleet_of([server], *more)
    sync(again, [server], 3)
    resumed = source_of(again)
    canary = again.canary
    canary.usual[:] = [0.02]  # of the sync at the start
    canary.restore(state["canary"] | {"engine": "another"})
    assert canary.usual == [0.02]
    resumed.restore(state)
    assert canary.usual == [0.011, 0.012, 0.013, 0.02], "what it has learned"
    assert {s.place: [p.tokens.tolist() for p in s.pieces] for s in resumed.pool.waiting} == kept
    rest, counters = run_partial(resumed, again, server, range(4, 7))
    assert Counter(seen + rest) == Counter(
        (f"p{i}", j) for i in range(6 * PROMPTS_A_STEP) for j in range(SAMPLES)
    )
    asked_again = 0
    for body in server.bodies:
        *place, done, _ = (int(part) for part in body["request_id"].split("-"))
        before = sum(kept.get(tuple(place), []), [])
        if before and done == len(before):  # from where it was
            assert body["token_ids"][-done:] == before
            asked_again += 1
        assert done or not before
    assert asked_again > 0
    last = counters[-1]
    assert last["rollout/sampled_tokens"] == last["rollout/trained_tokens"]


def test_a_stopped_on_policy_step_keeps_what_is_finished(start, fleet_of) -> None:  # noqa: F811
    """What is not begins anew with its seed: the tokens are those of a run that was not stopped."""
    server = start(token_s=0.001)
    more = settings(staleness=0)
    fleet = fleet_of([server], *more)
    calm = source_of(fleet).next(1, max_tokens=30)
    broken = source_of(fleet)
    broken._ask(1, 30)
    done = broken.pool.asked[0].all[:2]
    fleet.submit(done)
    fleet.wait(lambda: all(s.done for s in done), done, "x")
    state = broken.state()
    del server.bodies[:]
    resumed = source_of(fleet)
    resumed.restore(state)
    batch = resumed.next(1, max_tokens=30)
    assert len(server.bodies) == WANTED - 2
    for one, other in zip(calm.rollouts, batch.rollouts, strict=True):
        assert np.array_equal(one.response_tokens, other.response_tokens)
        assert one.text == other.text


@pytest.mark.parametrize("mode", overlap.MODES, ids=lambda mode: mode[0])
def test_the_readme_s_table_of_overlap_can_be_made(mode: tuple[str, list[str]]) -> None:
    """By ``benchmarks/overlap.py``, here without waiting for tokens."""
    row = overlap.run(mode[1], steps=3, update_s=0.0, token_s=0.0)
    assert row["tokens"] > 0
    assert row["rollout/trained_tokens"] > 0


def test_servers_sleep_before_the_checkpoint_of_a_stop(start, fleet_of) -> None:  # noqa: F811
    """A stop that comes while they are put to sleep, too: the trainer needs their memory."""
    source, tries = source_of(fleet_of([start()], *settings(staleness=0))), list[str]()

    def sleep() -> None:
        tries.append(stopping.asked_now())
        stopping.check(together=True)

    source.fleet = SimpleNamespace(ready=True, sleep=sleep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping._Request, "now", "SIGTERM")
        with pytest.raises(Stopped), source._asleep_after():
            pass
    assert tries == ["SIGTERM", "SIGTERM"]


def test_what_a_stop_breaks_off_is_counted(start, fleet_of) -> None:  # noqa: F811
    """Of a colocated step, whose servers sleep before the checkpoint."""
    server = start(token_s=0.005, mean=1000)
    fleet = fleet_of([server], *settings(staleness=0))
    broken = source_of(fleet)
    broken._ask(1, 30)
    fleet.submit(broken.pool.asked[0].all)
    time.sleep(0.06)
    fleet.client.run(fleet.sampler.suspend())
    state = broken.state()
    counts = state["tokens"]
    dropped = counts["dropped_stop"]
    assert counts["sampled"] == dropped > 0 == counts["trained"] == counts["dropped_refill"]
    server.token_s = 0.0
    resumed = source_of(fleet_of([server], *settings(staleness=0)))
    resumed.restore(state)
    row = resumed.next(1, max_tokens=30).counters
    assert row["rollout/dropped_stop_tokens"] == dropped
    assert row["rollout/sampled_tokens"] == row["rollout/trained_tokens"] + dropped


def test_a_stop_string_needs_whole_responses() -> None:
    more = ["rollout.max_staleness=1", 'rollout.stop=["END"]']
    with pytest.raises(ConfigError, match=r"rollout\.stop does not go with"):
        load_config(ROOT / "configs" / "tiny.toml", more)


def test_partial_needs_staleness() -> None:
    with pytest.raises(ConfigError, match=r"set rollout\.max_staleness to the steps"):
        load_config(ROOT / "configs" / "tiny.toml", ["rollout.partial=true"])
