"""Fast tests first: unit, then several processes, then servers and whole runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Here, before anything imports Triton, its kernels become the interpreter's, on CPU tensors. The
# variable goes again: processes that tests start compile as usual. OVR_KERNELS_GPU=1 leaves the
# kernels compiled, for tests/kernels/test_gpu.py.
if not os.environ.get("OVR_KERNELS_GPU"):
    os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: F401  (the interpreter loads it at its first launch)

import ovr_kernels.fused  # noqa: F401

os.environ.pop("TRITON_INTERPRET", None)

from ovr_fast.torchvision_ops import declare_if_broken

declare_if_broken()

from support import toy_run

ROOT = Path(__file__).parent.parent
BASE_MODEL = ROOT / "ovr_fast" / "toy" / "base_model"
ORDER = ("unit", "kernels", "distributed", "golden", "end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.parent.name))


def run_ranks(
    count: int, arguments: list[str], *, timeout_s: float = 300, check: bool = True
) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` on ``count`` ranks under torchrun, all ended after ``timeout_s``."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(count), *arguments,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep),
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{arguments} did not end within {timeout_s} s:\n{output[-3000:]}")
    if check and process.returncode != 0:
        pytest.fail(f"{arguments} ended with {process.returncode}:\n{output[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs, with the toy's data."""
    folder = tmp_path_factory.mktemp("runs")
    toy_run.write_data(folder / "toy_data")
    return folder


@pytest.fixture(scope="session")
def whole_run(workplace: Path) -> Path:
    """A short run of both stages with a real engine, which recorded its rollouts."""
    run_ranks(1, toy_run.both_stages(workplace), timeout_s=420)
    return workplace / "whole"
