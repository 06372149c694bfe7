"""Runs of several ranks, as a user would start them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import psutil
import pytest

from support.toy_run import ROOT


def run_ranks(
    count: int, arguments: list[str], *, timeout_s: float = 300, check: bool = True
) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` on ``count`` ranks, all ended after ``timeout_s``: several under
    torchrun, one without it (whose own import of torch costs 3 s a start)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launcher if count > 1 else []), *arguments]
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
        kill_tree(process)
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"{arguments} did not end within {timeout_s} s:\n{output[-3000:]}")
    if check and process.returncode != 0:
        pytest.fail(f"{arguments} ended with {process.returncode}:\n{output[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a process and all of its descendants. torchrun's workers and their servers are in
    sessions of their own: its process group alone would leave them, with its output still open."""
    try:
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
