"""The context curriculum, recorded and synthetic rollouts, the cost function, the step profiler."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ovr_fast.config import RLConfig
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.rollouts import (
    LENGTH_SIGMA,
    list_recorded,
    read_rollouts,
    recorded_step,
    synthetic_rollouts,
    write_rollouts,
)
from ovr_fast.observe import ranges
from ovr_fast.observe.clock import Clock
from ovr_fast.observe.profiler import StepProfiler, check_steps, parse_steps
from ovr_fast.plan.flops import ppo_passes
from ovr_fast.records import ImageFile, Prompt, Rollout, RolloutBatch, VersionSpan
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.shape.cost import layer_flops, sequence_flops, split_layers
from ovr_fast.shape.folder import PUBLISHED
from ovr_fast.shape.model_shape import read_shape
from support.toy_run import BASE_MODEL

OVR = dict(context_tokens=(24576, 32768, 49152), max_response_tokens=49152)


def test_the_context_grows_at_the_paper_s_steps() -> None:
    curriculum = ContextCurriculum(RLConfig(**OVR, context_steps=(300, 700)))
    limits = {step: curriculum.limit(step) for step in (1, 300, 301, 700, 701, 900)}
    assert limits == {
        1: 24576, 300: 24576, 301: 32768, 700: 32768, 701: 49152, 900: 49152,
    }  # fmt: skip


def test_the_context_grows_when_lengths_stop_growing() -> None:
    settings = RLConfig(**OVR, context_patience=3)
    curriculum = ContextCurriculum(settings)
    for length in (100, 110, 120, 130, 140, 150):  # growing
        curriculum.observe(1, length)
    assert curriculum.limit(7) == 24576
    for length in (140, 140):
        curriculum.observe(1, length)
    resumed = ContextCurriculum(settings)
    resumed.restore(json.loads(json.dumps(curriculum.state())))
    for each in (curriculum, resumed):
        each.observe(1, 130)  # 410 in three steps after 420
        assert each.limit(9) == 32768
        assert each.lengths == []
        for _ in range(20):
            each.observe(1, 100)
        assert each.limit(9) == 49152  # and stays


def test_without_a_curriculum_the_limit_is_the_setting() -> None:
    curriculum = ContextCurriculum(RLConfig(max_response_tokens=77))
    curriculum.observe(1, 5.0)
    assert curriculum.limit(1) == 77
    assert curriculum.state() == {"grown": 0, "lengths": []}


def a_batch(step: int) -> RolloutBatch:
    image = ImageFile(digest="d", stored=b"bytes", origin="a.png")
    prompts = [
        Prompt(
            id=f"p{index}", data_source="s", messages=({"role": "user", "content": "Hi"},),
            images=(image,) if index else (), answer="4", response=None,
        )
        for index in range(2)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(
            prompt_index=index // 2, sample_index=index % 2,
            prompt_tokens=rng.integers(0, 9, 4), response_tokens=rng.integers(0, 150_000, 7),
            rollout_logprobs=rng.normal(size=7).astype(np.float32), text="t",
            finish_reason="stop", versions=(VersionSpan(3, 0), VersionSpan(4, 1)),
            reward=float(index % 2), outcome="correct",
        )
        for index in range(4)
    ]  # fmt: skip
    return RolloutBatch(step=step, prompts=tuple(prompts), rollouts=tuple(rollouts))


def test_recorded_rollouts_come_back_whole(tmp_path: Path) -> None:
    for step in (7, 12):
        write_rollouts(tmp_path / f"{step:06d}.parquet", a_batch(step))
    files = list_recorded(tmp_path)
    assert [recorded_step(file) for file in files] == [7, 12]
    batch, found = a_batch(7), read_rollouts(files[0])
    assert (found.step, found.prompts) == (7, batch.prompts)
    assert found.prompts[1].images[0].data == b"bytes"
    for a, b in zip(batch.rollouts, found.rollouts, strict=True):
        for name in (field.name for field in fields(Rollout)):
            x, y = getattr(a, name), getattr(b, name)
            assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, name
            assert not isinstance(x, np.ndarray) or x.dtype == y.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_tokens": np.zeros(0, np.int64)}, "row 2: an empty response"),
        ({"prompt_tokens": np.zeros(0, np.int64)}, "row 2: an empty prompt"),
        ({"rollout_logprobs": np.zeros(1, np.float32)}, "row 2: 1 log-probs for 2 response tokens"),
        ({"rollout_logprobs": np.full(2, np.nan, np.float32)}, "row 2: a log-prob is not a number"),
        ({"reward": math.nan}, "row 2: its reward is nan"),
        ({"reward": None}, "row 2: its reward is None"),
        ({"response_tokens": np.array([1, 99])}, "row 2: token id 99 of the response"),
        ({"response_tokens": np.array([1, -1])}, "row 2: token id -1 of the response"),
        ({"prompt_tokens": np.array([99])}, "row 2: token id 99 of the prompt"),
    ],
)
def test_recorded_rollouts_that_cannot_be_trained_on_are_named(
    tmp_path: Path, change: dict, message: str
) -> None:
    batch = a_batch(1)
    tokens = {"response_tokens": np.array([1, 2]), "rollout_logprobs": np.zeros(2, np.float32)}
    good = [replace(rollout, **tokens) for rollout in batch.rollouts]
    write_rollouts(tmp_path / "good.parquet", replace(batch, rollouts=tuple(good)))
    read_rollouts(tmp_path / "good.parquet", vocabulary=99)
    good[1] = replace(good[1], **change)
    write_rollouts(tmp_path / "bad.parquet", replace(batch, rollouts=tuple(good)))
    with pytest.raises(DataError, match=f"bad.parquet:{message}"):
        read_rollouts(tmp_path / "bad.parquet", vocabulary=99)


def test_other_files_are_not_rollouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recorded rollouts"):
        list_recorded(tmp_path)
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match=r"x\.parquet: not a file of recorded rollouts"):
        read_rollouts(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="not a file of recorded rollouts"):
        recorded_step(tmp_path / "x.parquet")


def test_synthetic_rollouts_have_the_lengths_that_were_asked_for() -> None:
    chat = ChatTemplate(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)
    messages = ({"role": "user", "content": "Hi"},)
    prompt = Prompt(id="p", data_source="s", messages=messages, images=(), answer="", response=None)

    def lengths(mean: float, longest: int) -> np.ndarray:
        rollouts = synthetic_rollouts(
            (prompt,) * 8, chat, samples=500, mean_tokens=mean, max_tokens=longest,
            vocabulary=300, seed=(0, 1),
        )  # fmt: skip
        assert all((r.response_tokens != chat.image_token_id).all() for r in rollouts)
        cut = [len(r.response_tokens) for r in rollouts if r.finish_reason == "length"]
        assert all(length == longest for length in cut)
        return np.array([len(r.response_tokens) for r in rollouts])

    free = lengths(200.0, 10**6)
    assert free.mean() == pytest.approx(200.0, rel=0.05)
    assert np.log(free).std() == pytest.approx(LENGTH_SIGMA, rel=0.05)
    assert lengths(200.0, 250).max() == 250


def test_costs_are_those_of_the_recipe() -> None:
    """The arithmetic of the published 7B: attention is 12 % of a forward at 10 thousand tokens, a
    step of 8,192 rollouts of 10 thousand 8.5e18 operations in 6.75 units and 1.12e19 in 8.75."""
    shape = read_shape(PUBLISHED / "Qwen2.5-VL-7B-Instruct")
    fast = ppo_passes(RLConfig())
    slow = ppo_passes(RLConfig(policy_steps=2, kl_coef=0.1))
    assert (fast.decoder, slow.decoder) == (6.75, 8.75)
    whole = sequence_flops(shape, 10_000, 10_000, fast)
    attention = fast.decoder * shape.layers * 2.0 * 10_000**2 * shape.hidden
    assert attention / whole == pytest.approx(0.12, abs=0.02)
    assert 8192 * whole == pytest.approx(8.5e18, rel=0.02)  # the critic has no output head
    slow_whole = sequence_flops(shape, 10_000, 10_000, slow)
    assert slow_whole / whole == pytest.approx(8.75 / 6.75, rel=0.03)
    assert 8192 * slow_whole == pytest.approx(1.12e19, rel=0.01)
    assert layer_flops(shape, 20_000) > 2 * layer_flops(shape, 10_000)


@pytest.mark.parametrize(
    ("stages", "head", "sizes"),
    [(1, True, [28]), (2, True, [15, 13]), (4, True, [7, 8, 8, 5]), (4, False, [7, 7, 7, 7]),
     (8, True, [3, 4, 4, 4, 4, 4, 4, 1]), (28, True, [1] * 28)],
)  # fmt: skip
def test_the_last_stage_has_fewer_layers_for_its_head(
    stages: int, head: bool, sizes: list[int]
) -> None:
    shape = read_shape(PUBLISHED / "Qwen2.5-VL-7B-Instruct")
    ranges = split_layers(shape, stages, head=head)
    assert [len(stage) for stage in ranges] == sizes
    assert [layer for stage in ranges for layer in stage] == list(range(28))
    with pytest.raises(ValueError, match="parallel.pipeline=29 is more than the 28 layers"):
        split_layers(shape, 29, head=head)


def test_a_range_is_nsight_s_and_where_it_runs_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def annotate(name: str) -> AbstractContextManager:
        names.append(name)
        return nullcontext()

    monkeypatch.setattr(ranges.nvtx, "annotate", annotate)
    with ranges.named_range("critic"):
        pass
    assert names == ["critic"]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, ranges.named_range("actor"):
        pass
    assert names == ["critic", "actor"]
    assert [e.name for e in profile.events() if e.name in names] == ["actor"]


def test_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    profiler, clock, said = StepProfiler((2, 3), tmp_path / "trace", 0), Clock(), []
    for step in range(1, 5):
        profiler.before(step)
        with clock("actor"):
            sum(range(1000))
        said.append(profiler.after(step, clock.lap(), last=step == 4))
    assert [bool(text) for text in said] == [False, False, True, False]
    assert "longest phases: actor" in said[2] or "longest phases: other" in said[2]
    assert (tmp_path / "trace" / "rank-00000.json.gz").stat().st_size > 0


@pytest.mark.parametrize("text", ["4", "6:4", "0:2", "a:b", ":"])
def test_steps_to_trace_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="--profile"):
        parse_steps(text)


def test_steps_to_trace_are_among_those_that_are_run() -> None:
    check_steps("4:6", 4)
    with pytest.raises(ValueError, match="--profile 5:6: the first recipe stage .* has 4 steps"):
        check_steps("5:6", 4)


def test_every_second_of_a_lap_is_in_one_phase() -> None:
    clock = Clock()
    with clock("rollout"):
        time.sleep(0.02)
        with clock("generate"):
            time.sleep(0.04)
    time.sleep(0.01)
    lap = clock.lap()
    phases = {k: v for k, v in lap.items() if k != "time/step_s"}
    assert sum(phases.values()) == pytest.approx(lap["time/step_s"])
    assert lap["time/generate_s"] >= 0.04 > lap["time/rollout_s"] >= 0.02
    assert lap["time/other_s"] >= 0.01
    with clock("save"):
        time.sleep(0.01)
    assert clock.lap()["time/save_s"] >= 0.01  # what comes after a row belongs to the next
    with pytest.raises(ValueError, match="'nap' is not one of the phases"), clock("nap"):
        pass
