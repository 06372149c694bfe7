"""A PPO update about images: each encoded once, against each sample in each pass.

    pytest benchmarks/bench_vision.py --benchmark-only

Four prompts of 16 samples, each with an image of 280 x 280 pixels (100 visual tokens) and short
responses, a random model on a CPU; ratios within a run alone mean something. On the recipe's shape
(responses of thousands of tokens) the tower's share, and so the gain, is smaller.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from naive_encoder import NaiveEncoder
from ovr_fast.data.balance import greedy_partition
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.recipe.alone import learn
from workload import make_batch, make_model, make_models, make_prompts, realistic_costs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", vocab=640)


@pytest.mark.parametrize("train_vision", ["frozen", "full"])
@pytest.mark.parametrize("encoder", [VisionEncoder, NaiveEncoder], ids=["ours", "naive"])
def test_update(benchmark, model: Path, encoder: type, train_vision: str) -> None:
    benchmark.group = f"PPO update, {train_vision} vision"
    more = f"model.train_vision={train_vision}", "rl.max_prompt_tokens=150"
    models, config = make_models(model, *more, lr=1e-4, make_encoder=encoder)
    batch = make_batch(model, make_prompts(4, 280), samples=16, mean_tokens=6.0, max_tokens=12)

    def update() -> None:
        models.vision.clear_cache()
        metrics = learn(models, config, batch)
        benchmark.extra_info["tower passes"] = metrics["vision/tower_passes"]

    benchmark.pedantic(update, rounds=3, warmup_rounds=1)


def test_imbalance(benchmark) -> None:
    """Largest over mean predicted cost of 8 ranks, 512 images, in the record's extra_info."""
    costs = realistic_costs()
    shares = benchmark(greedy_partition, costs, 8)
    loads = [sum(costs[i] for i in share) for share in shares]
    benchmark.extra_info["imbalance"] = max(loads) / (sum(loads) / 8) - 1.0
    assert benchmark.extra_info["imbalance"] <= 0.05
