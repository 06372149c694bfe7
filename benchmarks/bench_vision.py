"""A PPO update about pictures: each encoded once, against each sample in each pass.

    pytest benchmarks/bench_vision.py --benchmark-only

Four prompts of 16 samples, three with a picture of 280 x 280 pixels (100 visual tokens) and short
responses, a random model on a CPU; ratios within a run alone mean something. On the recipe's shape
(responses of thousands of tokens) the tower's share, and so the gain, is smaller.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from naive_encoder import NaiveEncoder
from ovr_fast.model.encoder import PictureEncoder, deal
from picture_run import picture_ppo, picture_rollouts, realistic_costs
from random_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "wide", "wide")


@pytest.mark.parametrize("train_vision", ["frozen", "full"])
@pytest.mark.parametrize("encoder", [PictureEncoder, NaiveEncoder], ids=["ours", "naive"])
def test_update(benchmark, model: Path, encoder: type, train_vision: str) -> None:
    benchmark.group = f"PPO update, {train_vision} vision"
    ppo = picture_ppo(model, train_vision, encoder)
    prompts, rollouts = picture_rollouts(ppo, size=(280, 280))

    def update() -> None:
        ppo.actor.encoder.forget()
        metrics = ppo.learn(0, prompts, rollouts)
        benchmark.extra_info["tower passes"] = metrics["vision/tower_passes"]

    benchmark.pedantic(update, rounds=3, warmup_rounds=1)


def test_imbalance(benchmark) -> None:
    """Largest over mean predicted cost of 8 ranks, 512 pictures, in the record's extra_info."""
    costs = realistic_costs()
    shares = benchmark(deal, costs, 8)
    loads = [sum(costs[i] for i in share) for share in shares]
    benchmark.extra_info["imbalance"] = max(loads) / (sum(loads) / 8) - 1.0
    assert benchmark.extra_info["imbalance"] <= 0.05
