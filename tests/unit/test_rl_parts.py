"""The context curriculum, recorded and made-up rollouts, the cost function, the step profiler."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import BASE_MODEL
from ovr_fast.batch import Picture, Prompt, Rollout
from ovr_fast.config import RLConfig
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.prompts import DataError
from ovr_fast.data.rollouts import (
    FAKE_SIGMA,
    fake_rollouts,
    list_recorded,
    read_rollouts,
    recorded_step,
    write_rollouts,
)
from ovr_fast.model.cost import layer_flops, passes_of, sequence_flops, split_layers
from ovr_fast.model.shape import PUBLISHED, read_shape
from ovr_fast.observe.clock import Clock
from ovr_fast.observe.profiler import StepProfiler, parse_steps
from ovr_fast.rl.curriculum import ContextCurriculum

OVR = dict(context_tokens=(24576, 32768, 49152), max_response_tokens=49152)


def test_the_context_grows_at_the_paper_s_steps() -> None:
    curriculum = ContextCurriculum(RLConfig(**OVR, context_steps=(300, 700)))
    limits = {}
    for step in (0, 299, 300, 699, 700, 899):
        curriculum.start(step)
        limits[step] = curriculum.limit
    assert limits == {
        0: 24576, 299: 24576, 300: 32768, 699: 32768, 700: 49152, 899: 49152,
    }  # fmt: skip
    late = ContextCurriculum(curriculum.settings)
    late.start(700)  # a run that resumes there
    assert late.limit == 49152


def test_the_context_grows_when_lengths_stop_growing() -> None:
    settings = RLConfig(**OVR, context_patience=3)
    curriculum = ContextCurriculum(settings)
    for length in (100, 110, 120, 130, 140, 150):  # growing
        curriculum.observe(length)
    assert curriculum.limit == 24576
    for length in (140, 140):
        curriculum.observe(length)
    resumed = ContextCurriculum(settings)
    resumed.restore(json.loads(json.dumps(curriculum.state())))
    for each in (curriculum, resumed):
        each.observe(130)  # 410 in three steps after 420
        assert each.limit == 32768
        assert each.lengths == []
        for _ in range(20):
            each.observe(100)
        assert each.limit == 49152  # and stays


def test_without_a_curriculum_the_limit_is_the_setting() -> None:
    curriculum = ContextCurriculum(RLConfig(max_response_tokens=77))
    curriculum.observe(5.0)
    assert curriculum.limit == 77
    assert curriculum.state() == {"stage": 0, "lengths": []}


def prompts_and_rollouts() -> tuple[list[Prompt], list[Rollout]]:
    picture = Picture(digest="d", stored=b"bytes", origin="a.png")
    prompts = [
        Prompt(
            id=f"p{index}", source="s", messages=({"role": "user", "content": "Hi"},),
            pictures=(picture,) if index else (), answer="4", response=None,
        )
        for index in range(2)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(
            prompt_index=index // 2, sample_index=index % 2,
            prompt_tokens=rng.integers(0, 9, 4), response_tokens=rng.integers(0, 150_000, 7),
            rollout_logprobs=rng.normal(size=7).astype(np.float32), text="t",
            finish_reason="stop", policy_version=3, reward=float(index % 2), outcome="correct",
        )
        for index in range(4)
    ]  # fmt: skip
    return prompts, rollouts


def test_recorded_rollouts_come_back_whole(tmp_path: Path) -> None:
    prompts, rollouts = prompts_and_rollouts()
    for step in (7, 12):
        write_rollouts(tmp_path / f"{step:06d}.parquet", step, prompts, rollouts)
    files = list_recorded(tmp_path)
    assert [recorded_step(file) for file in files] == [7, 12]
    again, found = read_rollouts(files[0])
    assert again == prompts
    assert again[1].pictures[0].data == b"bytes"
    for a, b in zip(rollouts, found, strict=True):
        for name in Rollout.__slots__:
            x, y = getattr(a, name), getattr(b, name)
            assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, name
            assert not isinstance(x, np.ndarray) or x.dtype == y.dtype


def test_other_files_are_not_rollouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recorded rollouts"):
        list_recorded(tmp_path)
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match=r"x\.parquet: not a file of recorded rollouts"):
        read_rollouts(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="not a file of recorded rollouts"):
        recorded_step(tmp_path / "x.parquet")


def test_made_up_rollouts_have_the_lengths_that_were_asked_for() -> None:
    encoder = ChatEncoder(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)
    messages = ({"role": "user", "content": "Hi"},)
    prompt = Prompt(id="p", source="s", messages=messages, pictures=(), answer="", response=None)

    def lengths(mean: float, longest: int) -> np.ndarray:
        rollouts = fake_rollouts(
            [prompt] * 8, encoder, samples=500, mean_tokens=mean, max_tokens=longest,
            vocabulary=300, seed=(0, 1),
        )  # fmt: skip
        assert all((r.response_tokens != encoder.image_token_id).all() for r in rollouts)
        cut = [len(r.response_tokens) for r in rollouts if r.finish_reason == "length"]
        assert all(length == longest for length in cut)
        return np.array([len(r.response_tokens) for r in rollouts])

    free = lengths(200.0, 10**6)
    assert free.mean() == pytest.approx(200.0, rel=0.05)
    assert np.log(free).std() == pytest.approx(FAKE_SIGMA, rel=0.05)
    assert lengths(200.0, 250).max() == 250


def test_costs_are_those_of_the_recipe() -> None:
    """The arithmetic of the published 7B: attention is 12 % of a forward at 10 thousand tokens, a
    step of 8,192 rollouts of 10 thousand 9.3e18 operations in 7 units and 1.2e19 in 9."""
    shape = read_shape(PUBLISHED / "Qwen2.5-VL-7B-Instruct")
    fast = passes_of(old_logprobs=False, ref_logprobs=False)
    slow = passes_of(old_logprobs=True, ref_logprobs=True)
    assert (fast.trunk, slow.trunk) == (7, 9)
    whole = sequence_flops(shape, 10_000, 10_000, passes_of(old_logprobs=False, ref_logprobs=False))
    attention = fast.trunk * shape.layers * 2.0 * 10_000**2 * shape.hidden
    assert attention / whole == pytest.approx(0.12, abs=0.02)
    assert 8192 * whole == pytest.approx(8.8e18, rel=0.05)  # the critic has no output head
    assert sequence_flops(shape, 10_000, 10_000, slow) / whole == pytest.approx(9 / 7, rel=0.03)
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


def test_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    profiler, clock, said = StepProfiler((2, 3), tmp_path / "trace", 0), Clock(), []
    for step in range(1, 5):
        clock.restart()
        profiler.before(step)
        with clock("actor"):
            sum(range(1000))
        said.append(profiler.after(step, clock.times(), last=step == 4))
    assert [bool(text) for text in said] == [False, False, True, False]
    assert "longest phases: actor" in said[2] or "longest phases: other" in said[2]
    assert (tmp_path / "trace" / "rank-00000.json.gz").stat().st_size > 0


@pytest.mark.parametrize("text", ["4", "6:4", "0:2", "a:b", ":"])
def test_steps_to_trace_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="--profile"):
        parse_steps(text)
