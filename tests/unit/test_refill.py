"""``rl.refill``: a step of prompts whose responses differ in reward, however many are sampled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ovr_fast.observe.clock import Clock
from ovr_fast.records import Rollout, RolloutBatch
from ovr_fast.rollout.sources import NothingToLearn, VLLMRollouts
from ovr_fast.stopping import Stopped
from unit.test_ahead import SAMPLES, Stream, named, settings, sync
from unit.test_fleet import OneRank, fleet_of, start  # noqa: F401


def source_of(fleet, teaches) -> VLLMRollouts:
    """A source in which the first sample of a prompt alone is right, if the prompt ``teaches``;
    of every third other all are right."""

    def judge(responses, answers, questions, names, columns) -> list[Rollout]:
        rollouts = []
        for response, (name, _) in zip(responses, names, strict=True):
            number = int(name.removeprefix("p"))
            right = response.sample_index == 0 if teaches(number) else number % 3 == 0
            rollouts.append(
                Rollout.of(response, reward=float(right), outcome="correct" if right else "wrong")
            )
        return rollouts

    return VLLMRollouts(
        fleet.config, stream=Stream(), fleet=fleet, verifier=SimpleNamespace(reward=judge),
        mesh=OneRank(), clock=Clock(),
    )  # type: ignore[arg-type]  # fmt: skip


def add_up(batch: RolloutBatch) -> None:
    """Every sampled token is trained, kept or dropped."""
    names = ("sampled", "trained", "kept", "dropped_refill", "dropped_stop")
    sampled, *rest = (batch.counters[f"rollout/{name}_tokens"] for name in names)
    assert sampled == sum(rest)


def test_a_step_is_filled_with_prompts_that_teach(start, fleet_of) -> None:  # noqa: F811
    server = start()
    fleet = fleet_of([server], *settings(staleness=0), "rl.refill=true")
    source = source_of(fleet, lambda number: number % 4 == 1)
    batch = source.next(1, max_tokens=30)
    # p1; of p3 to p5 p5; then 6 (short 1 / share 1 of 3) cut to a step's 3, of which p9 is late
    assert named(batch) == [(f"p{i}", j) for i in (1, 5, 9) for j in range(SAMPLES)]
    assert [r.prompt_index for r in batch.rollouts] == [0, 0, 1, 1, 2, 2]
    asked = batch.counters["rollout/refill_prompts"]
    assert len(server.bodies) == asked * SAMPLES
    assert len({body["sampling_params"]["seed"] for body in server.bodies}) == len(server.bodies)
    assert batch.counters["rollout/refill_mixed"] == pytest.approx(3 / asked)
    rewards = [
        float(j == 0) if n % 4 == 1 else float(n % 3 == 0)
        for n in range(int(asked)) for j in range(SAMPLES)
    ]  # fmt: skip
    assert batch.counters["rollout/refill_reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert source.state()["asked"] == []
    assert source.state()["position"] == asked
    add_up(batch)
    assert batch.counters["rollout/dropped_refill_tokens"] > 0
    assert batch.counters["rollout/dropped_stop_tokens"] == 0
    sync(fleet, [server], 1)
    again = source.next(2, max_tokens=30)
    assert all(int(name.removeprefix("p")) >= asked for name, _ in named(again))


def test_a_step_that_was_being_filled_begins_anew(start, fleet_of) -> None:  # noqa: F811
    """Stopped in its second round, with a checkpoint."""
    server = start()
    fleet = fleet_of([server], *settings(staleness=0), "rl.refill=true")
    calm = source_of(fleet, lambda number: number % 4 == 1)
    wanted = [calm.next(step, max_tokens=30) for step in (1, 2)]
    stopped = source_of(fleet, lambda number: number % 4 == 1)
    stopped.next(1, max_tokens=30)
    judge, rounds = stopped.verifier.reward, []

    def until_the_second(*arguments) -> list[Rollout]:
        rounds.append(1)
        if len(rounds) == 2:
            raise Stopped("SIGTERM", together=True)
        return judge(*arguments)

    stopped.verifier.reward = until_the_second
    with pytest.raises(Stopped):
        stopped.next(2, max_tokens=30)
    state = stopped.state()
    assert state["asked"] == []
    resumed = source_of(fleet, lambda number: number % 4 == 1)
    resumed.restore(state)
    again = resumed.next(2, max_tokens=30)
    assert named(again) == named(wanted[1])
    add_up(again)
    left_out = "rollout/dropped_refill_tokens"
    assert again.counters[left_out] == wanted[1].counters[left_out] > 0
    assert again.counters["rollout/dropped_stop_tokens"] > 0
    pairs = zip(again.rollouts, wanted[1].rollouts, strict=True)
    assert all((a.response_tokens == b.response_tokens).all() for a, b in pairs)


def test_what_is_too_much_is_left_out(start, fleet_of) -> None:  # noqa: F811
    server = start()
    fleet = fleet_of([server], *settings(staleness=0), "rl.refill=true")
    batch = source_of(fleet, lambda number: number > 1).next(1, max_tokens=30)
    assert named(batch)[::SAMPLES] == [("p2", 0), ("p3", 0), ("p4", 0)]
    assert len(batch.prompts) == 3
    assert batch.counters["rollout/refill_prompts"] == 6


def test_where_nothing_teaches_the_run_says_so(start, fleet_of) -> None:  # noqa: F811
    server = start()
    words = [*settings(staleness=0), "rl.refill=true", "rl.refill_most=2"]
    source = source_of(fleet_of([server], *words), lambda number: number == 1)
    with pytest.raises(NothingToLearn, match="of 6 prompts 1 have responses that differ") as found:
        source.next(1, max_tokens=30)
    assert "\n" not in str(found.value)
    assert len(server.bodies) == 6 * SAMPLES
