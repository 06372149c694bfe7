"""Ranks as processes, each with a pretended card."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODE = 8
"""GPUs of a machine, of a world whose ranks run alone."""


def card_environment(
    libraries: Path, *, cards: int, name: str, triton_cache: Path
) -> dict[str, str]:
    """The environment of a process on pretended cards.

    Args:
        libraries: see ``card_libraries``.
        cards: that the machine has.
        name: processes of one name share the cards.
        triton_cache: gets the kernels that are really launched, and no others.
    """
    runtime = str(libraries / "libpretended.so")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": runtime,
        "VLLM_NCCL_SO_PATH": runtime,  # vLLM opens both by name
        "VLLM_CUDART_SO_PATH": runtime,
        "PRETEND_GPUS": str(cards),
        "PRETEND_CARDS": name,
        "PYTHONFAULTHANDLER": "1",  # so that a collective that hangs says where
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(triton_cache),
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }


def run_world(ranks: int, arguments: list[str], environment: Mapping[str, str]) -> int:
    """All ranks of a world, under torchrun; its exit status."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), "-m", "ovr_fast.rehearse.rank", *arguments,
    ]  # fmt: skip
    return _run(command, environment)


def run_alone(rank: int, world: int, arguments: list[str], environment: Mapping[str, str]) -> int:
    """One rank of a world whose others are not there; its exit status."""
    command = [sys.executable, "-m", "ovr_fast.rehearse.rank", *arguments]
    about = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(min(world, NODE)),
        "PRETEND_ALONE": "1",
    }
    return _run(command, {**environment, **about})


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    try:
        return subprocess.run(command, env=dict(environment)).returncode
    finally:
        for left in Path("/dev/shm").glob(f"pretend-card-{environment['PRETEND_CARDS']}-*"):
            left.unlink(missing_ok=True)
