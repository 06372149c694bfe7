"""One definition for every number of a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.golden import FOLDER, read_metrics
from ovr_fast.observe.clock import PHASES
from ovr_fast.observe.meanings import METRICS, meaning_of, same_on_any_layout, table
from ovr_fast.rl.rewards import OUTCOMES
from support.toy_run import ROOT


def test_every_key_of_a_run_is_defined() -> None:
    for name in ("toy", "two_ranks"):
        for row in read_metrics(FOLDER / f"{name}.jsonl"):
            for key in row:
                assert meaning_of(key).text, key
    assert meaning_of(f"time/{PHASES[0]}_s").depends == "machine"
    assert {f"reward/{outcome}" for outcome in OUTCOMES} <= set(METRICS)
    for key in ("perf/train_tflop", "perf/forward_passes", "perf/tokens_per_second",
                "perf/tflops_per_rank", "perf/mfu", "memory/peak_gib"):  # fmt: skip
        assert meaning_of(key).text  # what golden files leave out
    with pytest.raises(KeyError):
        meaning_of("rollout/mood")


def test_two_ranks_say_what_one_says() -> None:
    """The golden RL steps on the same rollouts; a later step has the rounding of those before."""
    alone = {row["step"]: row for row in read_metrics(FOLDER / "toy.jsonl") if row["stage"] == "rl"}
    compared = 0
    for row in read_metrics(FOLDER / "two_ranks.jsonl"):
        for key, value in row.items():
            if key in ("stage", "step") or not same_on_any_layout(key):
                continue
            if key in alone[row["step"]]:
                wanted = alone[row["step"]][key]
                assert value == pytest.approx(wanted, rel=1e-3, abs=1e-6), (row["step"], key)
                compared += 1
    assert compared > 100


def test_the_page_is_current() -> None:
    page: Path = ROOT / "configs" / "METRICS.md"
    assert page.read_text() == table(), "python -m ovr_fast.observe.meanings > configs/METRICS.md"
