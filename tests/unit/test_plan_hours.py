"""Hours before they are rented: the roofline by hand, the step that an H100 ran, the search."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovr_fast.plan.__main__ as command
from ovr_fast.config import Config, load_config
from ovr_fast.plan import rates as rates_module
from ovr_fast.plan.decode import CHUNK, Server, decode, draw_lengths
from ovr_fast.plan.hours import StepHours, Workload, run_hours, step_hours
from ovr_fast.plan.memory import memory_plan
from ovr_fast.plan.rates import NAMES, Rates, read_rates
from ovr_fast.plan.search import search
from ovr_fast.settings import ConfigError, to_toml
from ovr_fast.shape.folder import PUBLISHED
from ovr_fast.shape.model_shape import ModelShape, read_shape
from rehearsal import CASES, LAYERS, SHIPPED, SHORT
from support.toy_run import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def recipe() -> Config:
    return load_config(ROOT / "configs" / "ovr_7b_rl.toml", [])


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(PUBLISHED / "Qwen2.5-VL-7B-Instruct")


@pytest.fixture(scope="module")
def rates() -> Rates:
    return read_rates("H100")


def server(**more: float) -> Server:
    plain = dict(
        weight_bytes=100.0, bytes_a_token=1.0, capacity_tokens=1e9, flops_a_token=0.0,
        bytes_a_second=10.0, flops_a_second=1.0, latency_s=0.5,
    )  # fmt: skip
    return Server(**{**plain, **more})


def test_a_response_alone_reads_weights_and_itself() -> None:
    found = decode(server(), np.array([CHUNK]), prompt_tokens=20)
    assert found.seconds == pytest.approx(CHUNK * (0.5 + (100 + 20) / 10))
    assert (found.most_live, found.tail_seconds) == (1, 0.0)


def test_products_bind_where_many_are_live() -> None:
    found = decode(server(flops_a_token=40.0), np.full(8, CHUNK), prompt_tokens=1)
    assert found.seconds == pytest.approx(CHUNK * (0.5 + 8 * 40.0))


def test_what_does_not_fit_waits_and_the_longest_has_a_tail() -> None:
    lengths = np.full(40, 64)
    all_at_once = decode(server(), lengths, prompt_tokens=36)
    in_turns = decode(server(capacity_tokens=1000), lengths, prompt_tokens=36)
    assert all_at_once.most_live == 40
    assert in_turns.most_tokens <= 1000 + in_turns.most_live
    assert in_turns.most_live <= 1000 / 36
    assert in_turns.seconds > all_at_once.seconds
    tailed = decode(server(), np.append(lengths, 6400), prompt_tokens=36)
    assert tailed.tail_seconds > 0.9 * (6400 - 64) * 10.5
    # What the next responses would leave of it: all tokens at the rate of the first 64.
    assert tailed.full_seconds < 0.2 * tailed.seconds
    at_that_rate = all_at_once.seconds * (6400 + 40 * 64) / (41 * 64)
    assert tailed.full_seconds == pytest.approx(at_that_rate, rel=0.1)
    assert all_at_once.full_seconds == all_at_once.seconds


@pytest.mark.parametrize(("mean", "limit"), [(9500, 49_152), (9500, 24_576), (60, 96), (1, 96)])
def test_lengths_have_their_mean_after_the_cut(mean: int, limit: int) -> None:
    found = draw_lengths(4096, mean=mean, limit=limit, spread=0.8, seed=0)
    assert found.mean() == pytest.approx(mean, rel=0.02, abs=1)
    assert (found.min() >= 1, found.max() <= limit) == (True, True)


@pytest.mark.parametrize(
    ("name", "responses", "limit"),
    [
        ("1 rank, selective", 8, 15_360),
        ("1 rank, full", 8, 15_360),
        ("1 rank, full, offload model, 53k tokens", 2, 49_152),
    ],
)
def test_the_step_that_an_h100_ran(
    recipe: Config, shape: ModelShape, rates: Rates, name: str, responses: int, limit: int
) -> None:
    """Four 7B-wide layers at 16k and 53k tokens, by the shipped rates. It ran a pass for all
    values, as lambda under 1 needs it."""
    ran = json.loads((RESULTS / "h100_step.json").read_text())["layouts"][name]["steps"][-1]
    offload = "model" if "offload" in name else "none"
    config = replace(
        recipe,
        parallel=replace(recipe.parallel, world=1, tensor=1, pipeline=1, offload=offload),
        model=replace(recipe.model, recompute=name.split(", ")[1]),
        rl=replace(
            recipe.rl, prompts_per_step=responses // 2, samples_per_prompt=2, critic_steps=1,
            gae_lambda=0.99, max_prompt_tokens=1024, max_response_tokens=limit,
            context_tokens=(limit,), context_steps=(),
            max_tokens_per_microbatch=limit + 4096,
        ),
    )  # fmt: skip
    step = step_hours(
        config, replace(shape, layers=4), rates,
        Workload(prompt_tokens=1024, response_tokens=limit, spread=1e-6),
        train_gpus=1, rollout_gpus=1, limit=limit,
    )  # fmt: skip
    if offload == "none":  # else a phase's transfers are planned as one sum
        for phase in ("targets", "critic", "actor"):
            assert step.seconds[phase] == pytest.approx(ran[f"time/{phase}_s"], rel=0.10), phase
    planned = sum(step.seconds.get(key, 0) for key in ("targets", "critic", "actor", "offload"))
    seconds = sum(ran[f"time/{phase}_s"] for phase in ("targets", "critic", "actor"))
    assert planned == pytest.approx(seconds, rel=0.05)


def test_the_interval_holds_the_value(recipe: Config, shape: ModelShape, rates: Rates) -> None:
    def hours(end):
        return run_hours(recipe, shape, rates, Workload(), train_gpus=32, rollout_gpus=32, end=end)[
            0
        ]

    assert hours("fast") < hours("value") < hours("slow")


def test_contexts_are_the_schedules(recipe: Config, shape: ModelShape, rates: Rates) -> None:
    _, parts = run_hours(recipe, shape, rates, Workload(), train_gpus=32, rollout_gpus=32)
    assert [steps for steps, _ in parts] == [300, 400, 200]
    tails = [step.decoded.tail_seconds for _, step in parts]
    assert tails == sorted(tails)


def test_what_staleness_buys(recipe: Config, shape: ModelShape, rates: Rates) -> None:
    def step(staleness: int, **rollout: Any) -> StepHours:
        more = replace(recipe.rollout, max_staleness=staleness, **rollout)
        _, parts = run_hours(
            replace(recipe, rollout=more), shape, rates, Workload(), train_gpus=32, rollout_gpus=32
        )
        return parts[-1][1]

    strict, one = step(0), step(1)
    assert strict.step_s == strict.total_s
    assert one.step_s < 0.6 * strict.step_s
    assert one.step_s >= max(one.training_s, one.sampling_s, strict.decoded.seconds / 2)
    assert one.gpu_hours == one.gpus * one.step_s / 3600


def test_what_early_scores_and_shared_prompts_buy(
    recipe: Config, shape: ModelShape, rates: Rates
) -> None:
    def step(**rl: Any) -> StepHours:
        config = replace(recipe, rl=replace(recipe.rl, **rl))
        _, parts = run_hours(config, shape, rates, Workload(), train_gpus=32, rollout_gpus=32)
        return parts[-1][1]

    plain, early, shared = step(), step(score_while_sampling=True), step(share_prefixes=True)
    # All values are estimated then, those of the first critic minibatch too: 4/3 of the pass.
    assert early.seconds["targets"] == pytest.approx(plain.seconds["targets"] * 4 / 3)
    assert early.hidden_s == early.seconds["targets"]
    assert early.total_s == pytest.approx(plain.total_s - plain.seconds["targets"])
    assert (
        plain.hidden_s
        == step(score_while_sampling=True, gae_lambda=0.9).hidden_s - (early.seconds["targets"])
    )
    # 16 responses drawn into 4 minibatches: 3.96 of them have a prompt, 12 of 16 copies are spared.
    spared = 1 - 4 * (1 - 0.75**16) / 16
    work = sum(plain.tflop[phase] for phase in ("critic", "actor"))
    less = sum(shared.tflop[phase] for phase in ("critic", "actor"))
    share = spared * 1200 / (1200 + plain.tokens / 8192)
    assert 0 < 1 - less / work < share  # attention and the head are not spared
    assert shared.seconds["critic"] < plain.seconds["critic"]
    assert shared.seconds["decode"] == plain.seconds["decode"]


def test_the_search_finds_what_fits_and_beats_the_given(
    recipe: Config, shape: ModelShape, rates: Rates
) -> None:
    found = search(recipe, shape, rates, Workload(), 16)
    assert all(one.card_gib <= 0.97 * 79.6 for one in found)
    given = ["parallel.world=8", "parallel.tensor=4", "parallel.pipeline=2"]
    config = load_config(ROOT / "configs" / "ovr_7b_rl.toml", given)
    plain, _ = run_hours(config, shape, rates, Workload(), train_gpus=8, rollout_gpus=8)
    assert found[0].gpu_hours < plain
    assert all(one.train_gpus + one.rollout_gpus == 16 for one in found)
    again = load_config(ROOT / "configs" / "ovr_7b_rl.toml", found[0].words.split())
    hours, _ = run_hours(
        again, shape, rates, Workload(), train_gpus=found[0].train_gpus,
        rollout_gpus=found[0].rollout_gpus,
    )  # fmt: skip
    assert hours == pytest.approx(found[0].gpu_hours)


@pytest.mark.parametrize(
    ("name", "gpus", "more"),
    [("ovr_7b_rl", 8, ["parallel.world=4"]), ("ovr_3b_rl", 8, []), ("ovr_72b_rl", 128, [])],
)
def test_the_search_takes_any_file(rates: Rates, name: str, gpus: int, more: list[str]) -> None:
    config = load_config(ROOT / "configs" / f"{name}.toml", more)
    model = read_shape(PUBLISHED / config.model.path.split("/")[-1])
    found = search(config, model, rates, Workload(), gpus)
    layouts = {
        (one.config.parallel.world, one.config.parallel.tensor, one.config.parallel.pipeline)
        for one in found
    }
    if name == "ovr_72b_rl":
        assert (64, 8, 8) in layouts  # the file's own
    for one in found[:10]:
        servers, width = one.config.rollout.servers, one.config.rollout.tensor
        assert servers * width == one.rollout_gpus
        load_config(ROOT / "configs" / f"{name}.toml", [*more, *one.words.split()])


def test_more_tokens_than_the_limit_is_an_error(
    recipe: Config, shape: ModelShape, rates: Rates
) -> None:
    with pytest.raises(ConfigError, match="cut at 24,576; lower --response-tokens"):
        run_hours(
            recipe, shape, rates, Workload(response_tokens=30_000), train_gpus=32, rollout_gpus=32
        )
    with pytest.raises(ConfigError, match="cut at 24,576; lower --response-tokens"):
        search(recipe, shape, rates, Workload(response_tokens=30_000), 64)


def plan_now(name: str) -> float:
    """Of a layout of benchmarks/rehearsal.py."""
    file, words = SHIPPED[name] if name in SHIPPED else ("ovr_7b_rl", [*SHORT, *CASES[name]])
    config = load_config(ROOT / "configs" / f"{file}.toml", words)
    model = read_shape(PUBLISHED / config.model.path.split("/")[-1])
    if name in CASES:
        model = replace(model, layers=LAYERS)
    return memory_plan(config, model, config.parallel.world, recipe_stage="rl").total


def test_the_memory_plan_is_what_an_h100_gave() -> None:
    layouts = json.loads((RESULTS / "h100_step.json").read_text())["layouts"]
    found = json.loads((RESULTS / "rehearsal.json").read_text())
    for name, ran in layouts.items():
        if "rehearsed" in ran:
            assert plan_now(name) == pytest.approx(ran["allocated_gib"], rel=0.03)
            rehearsed = ran["rehearsed"]["allocated_gib"]
            assert rehearsed == pytest.approx(ran["allocated_gib"], rel=0.0005)
    assert set(found) == {*CASES, *SHIPPED}
    for name, row in found.items():
        assert not row["out_of_memory"]
        assert plan_now(name) == pytest.approx(row["allocated_gib"], rel=0.03), name
        fullest = max(row["resident"].values(), key=lambda classes: sum(classes.values()))
        for kind, size in fullest.items():  # what an update finds on the card, class by class
            assert row["plan"][kind] == pytest.approx(size, rel=0.01), (name, kind)


def test_rates_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rates of 'TPU'.*which has H100.*--rates FILE"):
        read_rates("TPU")
    path = tmp_path / "rates.toml"
    path.write_text(rates_module.SHIPPED.read_text().replace("value = 600.0", "value = 60.0"))
    with pytest.raises(ConfigError, match=r"H100.products_tflops must have 0 < low"):
        read_rates("H100", path)
    path.write_text("[H100.products_tflops]\nvalue = 1\n")
    with pytest.raises(ConfigError, match="must have value, low, high, source"):
        read_rates("H100", path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_rates("H100", tmp_path / "nowhere.toml")
    assert set(read_rates("H100").rates) == set(NAMES)


def test_the_command(
    recipe: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plan(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan", *words])
        monkeypatch.chdir(ROOT)
        command.main()
        return capsys.readouterr().out

    printed = plan("--config", "configs/ovr_7b_rl.toml", "--gpus", "64")
    assert "| critic |" in printed
    assert "assumed, not measured: decode_share" in printed
    with pytest.raises(SystemExit):
        plan("--config", "configs/ovr_7b_rl.toml", "--gpus", "32")
    assert "leaves none for vLLM" in capsys.readouterr().err
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(to_toml(recipe))
    row = {
        "stage": "rl", "rollout/length_tokens": 9500.0, "rollout/limit_tokens": 32_768.0,
        "time/generate_s": 2000.0, "time/targets_s": 100.0, "time/critic_s": 400.0,
        "time/actor_s": 400.0, "time/weight_sync_s": 5.0,
    }  # fmt: skip
    rows = [{**row, "step": step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    held = plan("--against", str(run), "--gpus", "64")
    assert "| critic | 400.00 |" in held
    assert "--scale-rollouts" in held
