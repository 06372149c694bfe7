"""Scores, gradients, optimizer steps and weights: every layout against one process, and one
process against transformers. Float32 throughout; each tolerance is the project's promise."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ovr_fast.score
import step_ranks
from ovr_fast.config import RLConfig
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.observe.meanings import same_on_any_layout
from ovr_fast.parallel.checkpoint import CheckpointWriter, copied
from ovr_fast.recipe import ppo as recipe
from ovr_fast.recipe.alone import learn
from ovr_fast.recipe.build import Models
from ranks import LAYOUTS
from support.image_run import build, lone_mesh
from support.processes import run_ranks
from support.random_models import SHAPES, transformers_logprobs


def score(models: Path, name: str, out: Path, max_tokens: int = 8192) -> list[dict]:
    """What ``python -m ovr_fast.score`` writes, by one process."""
    options = {
        "model": models / name,
        "input": models / "conversations" / "conversations.jsonl",
        "output": out,
        "tp": 1,
        "pp": 1,
        "dtype": "float32",
        "max_tokens": max_tokens,
    }
    ovr_fast.score.score(argparse.Namespace(**options))
    return [json.loads(line) for line in out.read_text().splitlines()]


def largest_difference(a: list[dict], b: list[dict]) -> float:
    assert [row["token_ids"] for row in a] == [row["token_ids"] for row in b]
    assert all(row["logprobs"][0] is None for row in a + b)
    return max(
        abs(x - y)
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left["logprobs"][1:], right["logprobs"][1:], strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_score_agrees_with_transformers_and_packing_changes_nothing(
    name: str, models: Path, tmp_path: Path
) -> None:
    packed = score(models, name, tmp_path / "packed.jsonl")
    expected = transformers_logprobs(
        models / name, models / "conversations" / "conversations.jsonl"
    )
    rows = [{"token_ids": ids, "logprobs": [None, *values.tolist()]} for ids, values in expected]
    assert largest_difference(packed, rows) <= 1e-4
    alone = score(models, name, tmp_path / "alone.jsonl", max_tokens=1)
    assert largest_difference(packed, alone) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_score_agrees_between_layouts(layout: str, results: dict) -> None:
    one, many = (
        [json.loads(line) for line in results[name]["folder"].with_suffix(".jsonl").open()]
        for name in ("one", layout)
    )
    assert largest_difference(one, many) <= 1e-4


@pytest.mark.slow
def test_the_score_command(models: Path, tmp_path: Path) -> None:
    """Under torchrun, on two ranks, from the command line that the README has."""
    words = ["--model", str(models / "tied"), "--output", str(tmp_path / "out.jsonl"), "--tp", "2"]
    words += ["--input", str(models / "conversations" / "conversations.jsonl")]
    run_ranks(2, ["-m", "ovr_fast.score", *words])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert largest_difference(score(models, "tied", tmp_path / "one.jsonl"), found) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("model", ["tied", "wide"])
def test_weights_come_back_bit_for_bit(
    layout: str, model: str, results: dict, models: Path
) -> None:
    original = load_file(models / model / "model.safetensors")
    exported = results[layout][f"{model}/weights"]
    assert set(exported) == set(original)
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    # An engine on the last rank's own GPU would get the same.
    last = torch.load(results[layout]["folder"].with_suffix(f".{model}.last"), weights_only=True)
    assert all(torch.equal(last[name], tensor) for name, tensor in original.items())
    # What save_hf wrote after a step is what was streamed after it.
    saved = load_file(results[layout]["folder"].with_suffix(f".{model}.hf") / "model.safetensors")
    stepped = results[layout][f"{model}/actor/stepped"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in stepped.items())
    assert any(not torch.equal(saved[name], original[name]) for name in original)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / max(scale, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("kind", ["actor", "critic"])
@pytest.mark.parametrize("model", ["tied", "wide"])
def test_gradients_and_step_agree_with_one_process(
    layout: str, kind: str, model: str, results: dict
) -> None:
    one, many = results["one"], results[layout]
    key = f"{model}/{kind}"
    expected = one[f"{key}/gradients"]
    assert set(many[f"{key}/gradients"]) == set(expected)
    whole = torch.cat([tensor.flatten() for tensor in expected.values()])
    found = torch.cat([many[f"{key}/gradients"][name].flatten() for name in expected])
    assert relative_error(found, whole) <= 1e-4
    largest = whole.abs().max().item()
    for name, gradient in expected.items():
        if gradient.abs().max() < 1e-5 * largest:
            continue  # all rounding: a key bias shifts every score alike, so its gradient is zero
        assert relative_error(many[f"{key}/gradients"][name], gradient) <= 1e-4, name
    for name, value in one[f"{key}/report"].items():
        assert many[f"{key}/report"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    before = one[f"{model}/weights"]
    for name, weight in one[f"{key}/stepped"].items():
        if name not in before or expected[name].abs().max() < 1e-5 * largest:
            continue
        # Adam's first step is a sign: where a gradient is rounding alone it may flip, so the
        # weights are compared as a whole, and not in the entries below the rounding.
        sure = expected[name].abs() > 1e-5 * largest
        change = (many[f"{key}/stepped"][name] - weight)[sure]
        assert change.norm() <= 1e-4 * weight[sure].norm(), name


def compare_steps(found: dict, expected: dict, *, tolerance: float) -> None:
    """Metrics, and the gradients of every minibatch, each as a whole and by parameter."""
    for name, value in expected["metrics"].items():
        if same_on_any_layout(name):
            assert found["metrics"][name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    assert set(found["gradients"]) == set(expected["gradients"])
    turns: dict[str, list[str]] = {}
    for name in expected["gradients"]:
        turns.setdefault("/".join(name.split("/")[:2]), []).append(name)
    actors = [turn for turn in turns if turn.startswith("actor")]
    critics = [f"critic/{i}" for i in range(len(turns) - len(actors))]
    assert sorted(turns) == [*(f"actor/{i}" for i in range(len(actors))), *critics]
    for names in turns.values():
        whole = torch.cat([expected["gradients"][name].flatten() for name in names])
        other = torch.cat([found["gradients"][name].flatten() for name in names])
        assert relative_error(other, whole) <= tolerance
        largest = whole.abs().max().item()
        for name in names:
            gradient = expected["gradients"][name]
            if gradient.abs().max() >= 1e-5 * largest:  # else rounding alone
                assert relative_error(found["gradients"][name], gradient) <= tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_ppo_step_agrees_with_one_process(layout: str, results: dict) -> None:
    """Four critic minibatches and the actor's, with images; tensor layouts are sequence parallel,
    two of them recompute."""
    compare_steps(results[layout]["step"], results["one"]["step"], tolerance=1e-4)
    bubble = results[layout]["step"]["metrics"].get("pack/bubble", 0.0)
    assert (0 < bubble < 1) == (LAYOUTS[layout][1] > 1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", step_ranks.OBJECTIVES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_step_of_groups_agrees_with_one_process(
    layout: str, objective: str, results: dict
) -> None:
    """No critic; responses are weighed by the number of them on all replicas."""
    found, one = (results[name]["step"]["objectives"][objective] for name in (layout, "one"))
    assert sorted({name.split("/")[0] for name in one["gradients"]}) == ["actor"]
    compare_steps(found, one, tolerance=1e-4)


@pytest.fixture(scope="module")
def unshared(models: Path) -> dict:
    """What ``step_ranks.SHARED`` changes nothing of, by one process."""
    return one_process(models, *step_ranks.SHARED[1:])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_that_stand_once_have_the_gradients_of_those_that_do_not(
    layout: str, results: dict, unshared: dict
) -> None:
    found = results[layout]["step"]["shared"]
    assert found["metrics"]["pack/shared_share"] > 0.2
    less = found["metrics"].pop("perf/train_tflop")
    wanted = {k: v for k, v in unshared["metrics"].items() if k != "perf/train_tflop"}
    assert less < 0.9 * unshared["metrics"]["perf/train_tflop"]
    compare_steps(found, unshared | {"metrics": wanted}, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_finished_responses_are_those_of_the_pass(layout: str, results: dict) -> None:
    found, one = results[layout]["step"]["early"], results["one"]["step"]
    # The first critic minibatch's values are estimated with the others.
    assert [step["metrics"]["perf/forward_passes"] for step in (found, one)] == [7, 6.75]
    wanted = {k: v for k, v in one["metrics"].items() if not k.startswith("perf/")}
    compare_steps(found, one | {"metrics": wanted}, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_another_layout_goes_on_from_a_checkpoint(layout: str, results: dict) -> None:
    expected = results["one"]["step"]["next"]
    found = results[layout]["step"]["after_one"]
    for name, value in expected.items():
        if same_on_any_layout(name):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    # And the weights after that step, which need the moments too: by norm, and far under a step's
    # change, since Adam makes whole steps of gradients that are rounding.
    weights = results["one"]["step"]["weights_after_next"]
    for name, tensor in results[layout]["step"]["weights_after_next"].items():
        assert relative_error(tensor, weights[name]) <= 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2pp2", "pp2dp2"])
def test_one_process_goes_on_from_the_checkpoint_of_a_layout(
    layout: str, results: dict, models: Path
) -> None:
    mesh = lone_mesh()
    folder = results["one"]["folder"].parent / "checkpoints" / layout / "rl-000001"
    config = step_ranks.config_of(models / "wide", lr=1e-3)
    trained = build(models / "wide", config, mesh)
    step_ranks.restore(trained, folder, mesh)
    conversations = models / "conversations" / "conversations.jsonl"
    batch = step_ranks.rollouts_of(models / "wide", conversations)
    found = learn(trained, config, replace(batch, step=2))
    for name, value in results[layout]["step"]["next"].items():
        if same_on_any_layout(name):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def one_process(
    models: Path, *settings: str, slow: bool = False, shuffle: bool = False, seed: int = 0
) -> dict:
    """A step of one process; ``slow``: with the passes for old log-probs, and for the values of
    the first critic minibatch, that it does not need."""
    folder = models / "wide"
    conversations = models / "conversations" / "conversations.jsonl"
    batch = step_ranks.rollouts_of(folder, conversations, seed=seed)
    if shuffle:
        batch = step_ranks.permuted(batch)
    config = step_ranks.config_of(folder, *settings)
    trained = build(folder, config)
    with pytest.MonkeyPatch.context() as patch:
        if slow:
            fast = recipe.compute_targets

            def with_old_logprobs(shard, models, config):
                targets = fast(shard, models, config)
                temperature = config.rollout.temperature
                old = models.actor.logprobs(shard.microbatches, temperature=temperature)
                pairs = zip(targets, old, strict=True)
                return [replace(target, old_logprobs_R=logprobs) for target, logprobs in pairs]

            patch.setattr(recipe, "compute_targets", with_old_logprobs)
            patch.setattr(RLConfig, "values_of_first_update", False)
        metrics, gradients = step_ranks.gradients_of_a_step(trained, config, batch)
    return {"metrics": metrics, "gradients": gradients}


@pytest.mark.slow
@pytest.mark.parametrize(("critic_steps", "passes"), [(1, 6), (2, 6.5), (4, 6.75)])
@pytest.mark.parametrize("more", [[], ["rl.value_clip_eps=0.01"]])
def test_the_fast_path_has_the_gradients_of_the_slow_one(
    critic_steps: int, passes: float, more: list[str], models: Path
) -> None:
    """Without a pass for old log-probs, and without one for the values of the first critic
    minibatch: 6 to 6.75 units of forward work instead of 8, the same step."""
    words = [f"rl.critic_steps={critic_steps}", *more]
    fast, slow = one_process(models, *words), one_process(models, *words, slow=True)
    work = [
        (step["metrics"].pop("perf/forward_passes"), step["metrics"].pop("perf/train_tflop"))
        for step in (fast, slow)
    ]
    assert [units for units, _ in work] == [passes, 7]
    assert passes / 7 < work[0][1] / work[1][1] < 1  # the head's and the tower's work is the same
    compare_steps(fast, slow, tolerance=1e-5)
    assert fast["metrics"]["actor/ratio"] == slow["metrics"]["actor/ratio"] == 1.0
    assert fast["metrics"]["critic/explained_variance"] == pytest.approx(
        slow["metrics"]["critic/explained_variance"], abs=1e-6
    )


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), cap=st.integers(340, 4096))
def test_the_number_of_microbatches_changes_nothing(models: Path, seed: int, cap: int) -> None:
    """Random lengths under random caps against one sequence a microbatch: the loss, the gradients
    and the statistics are those of the global token mean."""
    alone = one_process(models, "rl.max_tokens_per_microbatch=340", seed=seed)
    other = one_process(models, f"rl.max_tokens_per_microbatch={cap}", seed=seed)
    compare_steps(other, alone, tolerance=1e-4)


@pytest.mark.slow
def test_the_order_of_rollouts_changes_nothing(models: Path) -> None:
    """With one critic minibatch, since the order of rollouts decides which of them form one."""
    plain = one_process(models, "rl.critic_steps=1")
    shuffled = one_process(models, "rl.critic_steps=1", shuffle=True)
    compare_steps(shuffled, plain, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["optimizer", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_waits_on_the_host_comes_back_bit_for_bit(what: str, dtype: str, models: Path) -> None:
    folder = models / "wide"
    conversations = models / "conversations" / "conversations.jsonl"
    batch = step_ranks.rollouts_of(folder, conversations)
    results = []
    for offload in ("none", what):
        more = f"parallel.offload={offload}", f"model.dtype={dtype}"
        config = step_ranks.config_of(folder, *more, lr=1e-3)
        trained = build(folder, config)
        metrics = [learn(trained, config, replace(batch, step=step)) for step in (1, 2)]
        buffers = trained.actor.optimizer.ddp.buffers
        away = [b.grad_data.untyped_storage().nbytes() == 0 for b in buffers]
        weights = [b.param_data.untyped_storage().nbytes() == 0 for b in buffers]
        assert all(away) == (offload != "none")
        assert all(weights) == (offload == "model")
        with trained.actor.on_device():
            results.append((metrics, {n: t.clone() for n, t in export_hf(trained.actor.model)}))
    (plain, expected), (offloaded, found) = results
    for a, b in zip(plain, offloaded, strict=True):
        assert {k: v for k, v in a.items() if same_on_any_layout(k)} == {
            k: v for k, v in b.items() if same_on_any_layout(k)
        }
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_bfloat16_model_goes_on_bit_for_bit(models: Path, tmp_path: Path) -> None:
    """The critic's float32 value head stands beside bfloat16 matrices in the optimizer."""
    mesh, folder = lone_mesh(), models / "wide"
    batch = step_ranks.rollouts_of(folder, models / "conversations" / "conversations.jsonl")

    config = step_ranks.config_of(folder, "model.dtype=bfloat16", lr=1e-3)

    def wired() -> Models:
        return build(folder, config, mesh)

    one = wired()
    learn(one, config, batch)
    pieces = [piece for learner in (one.actor, one.critic) for piece in learner.pieces()]
    for piece in pieces:  # fp32 masters of bfloat16 weights, and the fp32 head itself
        assert piece.tensor.dtype is torch.float32
    writer = CheckpointWriter(tmp_path, mesh, keep=1)
    steps = {learner.name: learner.steps_done for learner in (one.actor, one.critic)}
    writer.save("rl", 1, [copied(piece) for piece in pieces], {"learner_steps": steps})
    writer.wait()
    again = wired()
    step_ranks.restore(again, tmp_path / "rl-000001", mesh)
    second = replace(batch, step=2)
    first, same = (
        {k: v for k, v in learn(m, config, second).items() if same_on_any_layout(k)}
        for m in (one, again)
    )
    assert first == same
    for a, b in ((one.actor, again.actor), (one.critic, again.critic)):
        for (name, x), (_, y) in zip(export_hf(a.model), export_hf(b.model), strict=True):
            assert torch.equal(x, y), name
