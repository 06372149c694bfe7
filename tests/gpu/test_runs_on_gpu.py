"""On a GPU: the trainer's own command there, beside the same run on this machine's CPU.

OVR_KERNELS_GPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from golden.golden import differences, kept, read_metrics
from ovr_fast.parallel.checkpoint import list_checkpoints
from support.processes import run_ranks
from support.toy_run import arguments

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and os.environ.get("OVR_KERNELS_GPU")),
    reason="needs a GPU and OVR_KERNELS_GPU=1",
)

STAGES = {
    "cold_start": ['run.stages=["cold_start"]', "evaluation.sources=[]"],
    "rl": ["--fake-rollouts", "30"],
}
"""What each stage's run is given beside the toy's settings; no server is needed."""
BFLOAT16 = 0.1
"""Relative tolerance of metrics: the toy's weights are rounded to 8 bits before the first step."""


def run(workplace: Path, name: str, *more: str) -> list[dict]:
    """Metrics of a run of a few steps."""
    done = run_ranks(1, arguments(workplace, name, *more), timeout_s=300)
    on_gpu = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    assert ("triton (sm_" in done.stdout) == on_gpu
    return read_metrics(workplace / name / "metrics.jsonl")


@pytest.fixture(scope="module", params=list(STAGES))
def stage(request: pytest.FixtureRequest) -> str:
    """Of the recipe."""
    return request.param


@pytest.fixture(scope="module")
def on_the_cpu(workplace: Path, stage: str) -> list[dict]:
    """What the stage measures without the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return run(workplace, f"cpu_{stage}", *STAGES[stage])


def test_a_gpu_trains_as_a_cpu_does(workplace: Path, stage: str, on_the_cpu: list[dict]) -> None:
    found = run(workplace, f"gpu_{stage}", *STAGES[stage])
    assert differences(found, on_the_cpu, exact=False) == []


def test_bfloat16_stays_near(workplace: Path, stage: str, on_the_cpu: list[dict]) -> None:
    rows = run(workplace, f"bf16_{stage}", "model.dtype=bfloat16", *STAGES[stage])
    compared = 0
    for found, wanted in zip(rows, on_the_cpu, strict=True):
        for key, value in kept(wanted).items():
            if key.endswith(("loss", "grad_norm")):
                assert found[key] == pytest.approx(value, rel=BFLOAT16, abs=1e-3), key
                compared += 1
    assert compared >= 2 * len(rows)


def test_a_resumed_run_goes_on(workplace: Path) -> None:
    run(workplace, "gpu_resumed", *STAGES["rl"])
    folder = workplace / "gpu_resumed"
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1])
    run_ranks(1, ["-m", "ovr_fast.train", "--resume", str(folder), *STAGES["rl"]], timeout_s=300)
    found = read_metrics(folder / "metrics.jsonl")
    assert differences(found, [json.loads(row) for row in rows], exact=False) == []
