"""What a trace of a step holds."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

import step_ranks
from ovr_fast.observe.profiler import StepProfiler
from ovr_fast.observe.ranges import EVERY_LAYER, MICROBATCHES
from ovr_fast.parallel.schedule import TRACED
from ovr_fast.recipe.alone import learn
from support.image_run import build


@pytest.mark.slow
def test_the_first_microbatches_of_every_pass(models: Path, tmp_path: Path) -> None:
    folder = models / "wide"
    conversations = models / "conversations" / "conversations.jsonl"
    batch = step_ranks.rollouts_of(folder, conversations)
    words = ("rl.max_tokens_per_microbatch=340", "rl.critic_steps=2")
    config = step_ranks.config_of(folder, *words)
    trained = build(folder, config)
    profiler = StepProfiler((1, 1), tmp_path / "trace", 0)
    profiler.before(1)
    metrics = learn(trained, config, batch)
    assert "longest phases" in profiler.after(1, metrics, last=True)
    assert MICROBATCHES.on_change is None
    with gzip.open(tmp_path / "trace" / "rank-00000.json.gz") as file:
        events = json.load(file)["traceEvents"]
    counted = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    passes = 1 + 2 + 1  # values, critic, actor
    kept = TRACED
    assert {name for name in counted if name.startswith("microbatch")} == {
        f"microbatch {number}" for number in range(kept)
    }
    assert all(counted[f"microbatch {number}"] == passes for number in range(kept))
    layers = [name for name in counted if name.startswith("layer ")]
    assert "layer 0" in layers
    assert all(int(name.split()[1]) % EVERY_LAYER == 0 for name in layers)
    assert counted["critic"] == counted["actor"] == 1
    MICROBATCHES.on_change = lambda collect: None
    profiler.close()  # as a run whose traced step has failed
    assert MICROBATCHES.on_change is None
    backward = [e for e in events if "Backward" in e["name"]]
    assert backward, "the microbatches' backward passes are in it too"
