"""Every operator beside its peers.

    pytest benchmarks --benchmark-only          times, by pytest-benchmark
    python benchmarks/report.py --json FILE     checks, times, memory and error in one table

On a GPU the shapes are Qwen2.5-VL-7B's; on a CPU the references run at small ones, and times mean
something as ratios within a run alone.
"""

from __future__ import annotations

import pytest
import torch

from peers import GPU, Case, Missing, all_cases


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.operator}: {case.peer}")
def test_speed(benchmark, case: Case) -> None:
    benchmark.group = case.operator
    try:
        work = case.build()
    except Missing as error:
        pytest.skip(f"missing: {error}")

    def once() -> None:
        work()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=20, warmup_rounds=2)
