"""An image costs what one image costs, and nothing else changes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from naive_encoder import NaiveEncoder
from ovr_fast.config import load_config
from ovr_fast.data.balance import greedy_partition
from ovr_fast.data.errors import DataError
from ovr_fast.data.images import ImageProcessor, load_image
from ovr_fast.learner.passes import build_model
from ovr_fast.recipe.alone import learn
from ovr_fast.shape.cost import tower_flops
from ovr_fast.shape.model_shape import read_shape
from ranks import LAYOUTS
from support.image_run import (
    an_image,
    build,
    image_rollouts,
    image_settings,
    lone_mesh,
)
from support.random_models import make_model
from support.toy_run import ROOT
from workload import realistic_costs


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_gradients_equal_the_naive_way(layout: str, results: dict) -> None:
    """Frozen, merger and full, several images and one alone, encoded once a pass."""
    assert results[layout]["vision"] == []


_TOWERS: dict[str, tuple] = {}


def towers() -> tuple:
    """transformers' random tower, and ours with its weights."""
    if not _TOWERS:
        import tempfile

        from transformers import Qwen2_5_VLForConditionalGeneration

        folder = make_model(Path(tempfile.mkdtemp()) / "wide", "wide")
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        mesh, shape = lone_mesh(), read_shape(folder)
        config = load_config(ROOT / "configs" / "tiny.toml")
        model = build_model(shape, mesh, config.model, weights=folder)
        _TOWERS["wide"] = theirs.model.visual, model.visual
    return _TOWERS["wide"]


@settings(max_examples=200, deadline=None)
@given(
    grids=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 9), st.integers(1, 9)),
            st.tuples(st.integers(1, 2), st.integers(10, 20)),  # up to 20:1
            st.tuples(st.integers(10, 20), st.integers(1, 2)),
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 1000),
)
def test_the_tower_agrees_with_transformers(grids, seed) -> None:
    theirs, ours = towers()
    grid = torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
    patches = torch.randn(
        int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        expected = theirs(patches, grid_thw=grid)
        found = ours(patches, grid)
    expected = getattr(expected, "pooler_output", expected)
    assert float((found - expected).abs().max()) <= 1e-5 * (1 + float(expected.abs().max()))


@settings(max_examples=100, deadline=None)
@given(height=st.integers(3, 700), width=st.integers(3, 700))
def test_a_header_says_how_many_patches_an_image_has(height: int, width: int) -> None:
    if max(height, width) > 150 * min(height, width):
        return
    processor = ImageProcessor(ROOT / "ovr_fast" / "toy" / "base_model")
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format="PNG")
    image = load_image(buffer.getvalue(), origin="test")
    patches, grid = processor(image)
    assert processor.grid(image) == grid
    assert len(patches) == np.prod(grid)


@pytest.mark.parametrize(("train_vision", "passes"), [("frozen", 1), ("merger", 3), ("full", 3)])
def test_passes_of_the_recipes_shape(train_vision: str, passes: int, models: Path) -> None:
    """16 samples a prompt; values (all, as with lambda under 1), four critic minibatches, actor:
    48 uses of each image."""
    config = image_settings(models / "wide", train_vision)
    config = replace(config, rl=replace(config.rl, gae_lambda=0.99))
    trained = build(models / "wide", config)
    batch = image_rollouts(trained.chat)
    metrics = learn(trained, config, batch)
    assert metrics["vision/tower_passes"] == 3 * passes
    assert metrics["vision/cache_hits"] == 0
    again = learn(trained, config, replace(batch, step=2))
    assert again["vision/tower_passes"] == (0 if train_vision == "frozen" else 9)
    naive = build(models / "wide", config, make_encoder=NaiveEncoder)
    expected = learn(naive, config, batch)
    assert expected["vision/tower_passes"] == 3 * 48
    for name in ("actor/grad_norm", "critic/grad_norm", "actor/entropy", "critic/value"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


def test_the_cache_is_bounded_and_can_be_emptied(models: Path) -> None:
    encoder = build(models / "wide", image_settings(models / "wide", "frozen")).actor.vision
    images = [an_image(i) for i in range(6)]

    def encode(start: int, end: int) -> None:
        encoder.encode_step([SimpleNamespace(images=images[start:end])])  # type: ignore[list-item]

    encode(0, 1)
    (one,) = encoder._held.values()
    encoder.cache_limit = 2 * one.numel() * one.element_size()
    for start in range(5):
        encode(start, start + 1)
    assert len(encoder._cache) <= 2
    encoder.read_counters()
    encode(3, 5)
    assert encoder.read_counters()["vision/cache_hits"] == 2
    encoder.clear_cache()
    encode(3, 5)
    assert encoder.read_counters()["vision/tower_passes"] == 2


def test_media_tokens_that_do_not_fit_are_refused(models: Path) -> None:
    config = image_settings(models / "wide", "frozen")
    trained = build(models / "wide", config)
    batch = image_rollouts(trained.chat)
    first, *others = batch.rollouts
    image = trained.chat.image_token_id
    bad = replace(first, response_tokens=np.array([7, image, 8]))
    with pytest.raises(DataError, match="prompt 0 holds an image placeholder at token 1"):
        learn(trained, config, replace(batch, rollouts=(bad, *others)))
    cut = replace(first, prompt_tokens=first.prompt_tokens[:-8])
    if (cut.prompt_tokens == image).sum() == (first.prompt_tokens == image).sum():
        keep = np.flatnonzero(first.prompt_tokens == image)[-1]
        cut = replace(first, prompt_tokens=first.prompt_tokens[:keep])
    with pytest.raises(DataError, match=r"prompt 0 \(image 0\): \d+ image placeholders"):
        learn(trained, config, replace(batch, rollouts=(cut, *others)))


def test_dealing_is_even_and_leaves_nothing_out() -> None:
    assert greedy_partition([5.0], 4) == [[0], [], [], []]
    shares = greedy_partition([1.0, 9.0, 3.0, 5.0, 4.0], 2)
    assert sorted(i for share in shares for i in share) == [0, 1, 2, 3, 4]
    shape = read_shape(ROOT / "ovr_fast" / "shape" / "published" / "Qwen2.5-VL-7B-Instruct").vision
    small, large = tower_flops((1, 32, 32), shape), tower_flops((1, 64, 64), shape)
    assert 4 < large / small < 8  # between linear and quadratic in the patches


def test_the_towers_counted_operations_are_its_matrix_products() -> None:
    """As torch counts a forward pass, which leaves attention out on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    _, ours = towers()
    grid = torch.tensor([[1, 12, 12]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(torch.randn(144, 1176), grid)
    keys = 2 * 144 + 36  # two layers see the whole image, one a window of 6 x 6
    attention = 4 * 144 * 64 * keys
    assert tower_flops((1, 12, 12), ours.shape) == counter.get_total_flops() + attention


def test_a_realistic_mix_is_dealt_within_five_per_cent() -> None:
    costs = realistic_costs()
    loads = [sum(costs[i] for i in share) for share in greedy_partition(costs, 8)]
    assert max(loads) / (sum(loads) / 8) <= 1.05
