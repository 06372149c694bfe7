"""Scores, gradients, optimizer steps and weights: every layout against one process, and one
process against transformers. Float32 throughout; each tolerance is the project's promise."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ovr_fast.score
import ranks
from conftest import ROOT, run_ranks
from random_models import SHAPES, make_conversations, make_model, transformers_logprobs

LAYOUTS = {
    "one": (1, 1, 1),
    "tp2": (2, 1, 1),
    "pp2": (1, 2, 1),
    "tp2pp2": (2, 2, 1),
    "dp2": (1, 1, 2),
    "pp2dp2": (1, 2, 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in SHAPES:
        make_model(folder / name, name)
    make_conversations(folder / "conversations")
    return folder


def score(
    models: Path, name: str, out: Path, tp: int, pp: int, max_tokens: int = 8192
) -> list[dict]:
    """What ``python -m ovr_fast.score`` writes; one process runs inside the test's."""
    options = {
        "model": models / name,
        "input": models / "conversations" / "conversations.jsonl",
        "output": out,
        "tp": tp,
        "pp": pp,
        "dtype": "float32",
        "max_tokens": max_tokens,
    }
    if tp * pp == 1:
        ovr_fast.score.score(argparse.Namespace(**options))
    else:
        flags = [
            word
            for key, value in options.items()
            for word in (f"--{key.replace('_', '-')}", str(value))
        ]
        run_ranks(tp * pp, ["-m", "ovr_fast.score", *flags])
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
    packed = score(models, name, tmp_path / "packed.jsonl", 1, 1)
    expected = transformers_logprobs(
        models / name, models / "conversations" / "conversations.jsonl"
    )
    rows = [{"token_ids": ids, "logprobs": [None, *values.tolist()]} for ids, values in expected]
    assert largest_difference(packed, rows) <= 1e-4
    alone = score(models, name, tmp_path / "alone.jsonl", 1, 1, max_tokens=1)
    assert largest_difference(packed, alone) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2pp2"])
def test_score_agrees_between_layouts(layout: str, models: Path, tmp_path: Path) -> None:
    tp, pp, _ = LAYOUTS[layout]
    one = score(models, "wide", tmp_path / "one.jsonl", 1, 1)
    many = score(models, "wide", tmp_path / "many.jsonl", tp, pp)
    assert largest_difference(one, many) <= 1e-4


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What ``ranks.py`` found under every layout, and the folders it saved."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for name, (tp, pp, dp) in LAYOUTS.items():
        out = folder / f"{name}.pt"
        if name == "one":
            ranks.main(models, out, tp, pp)
        else:
            script = str(ROOT / "tests" / "distributed" / "ranks.py")
            run_ranks(tp * pp * dp, [script, str(models), str(out), str(tp), str(pp)])
        found[name] = torch.load(out, weights_only=True)
        found[name]["folder"] = out
    return found


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
