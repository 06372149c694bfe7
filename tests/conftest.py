"""Fast tests first: unit, then several processes, then servers and whole runs (with ``-n 2``, these
beside the others)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Here, before anything imports Triton, its kernels become the interpreter's, on CPU tensors. The
# variable goes again: processes that tests start compile as usual. OVR_KERNELS_GPU=1 leaves the
# kernels compiled, for tests/gpu.
if not os.environ.get("OVR_KERNELS_GPU"):
    os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: F401  (the interpreter loads it at its first launch)

import ovr_kernels.fused  # noqa: F401

os.environ.pop("TRITON_INTERPRET", None)

from ovr_fast.torchvision_ops import declare_if_broken

declare_if_broken()

from support import toy_run
from support.processes import run_ranks
from support.served import ServedNode

ORDER = ("unit", "kernels", "gpu", "distributed", "rehearsal", "golden", "end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.parent.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two halves: what shares the servers and the run of both stages, and all else. (The marks of
    xdist's own groups do not reach it beside pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "runs" if nodeid.startswith(("tests/golden", "tests/end_to_end")) else "others"

    return ByFixtures(config, log)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs, with the toy's data."""
    folder = tmp_path_factory.mktemp("runs")
    toy_run.write_data(folder / "toy_data")
    return folder


@pytest.fixture(scope="session")
def running_server(workplace: Path) -> Iterator[ServedNode]:
    """A vLLM server that outlives its trainers, as on other nodes; the run called ``sampled`` finds
    it without an address."""
    node = ServedNode(workplace, "sampled")
    yield node
    node.stop()


@pytest.fixture(scope="session")
def whole_run(workplace: Path, running_server: ServedNode) -> Path:
    """A short run of both stages with a server of its own, which recorded its rollouts. (The
    other server starts meanwhile.)"""
    run_ranks(1, toy_run.both_stages(workplace))
    return workplace / "whole"
