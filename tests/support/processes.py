"""Runs of several ranks, as a user would start them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.toy_run import ROOT

HUNG_S = 900.0
"""Ends what hangs, and times nothing: two servers, the cold start and two PPO steps take 150 s of
two idle cores, and have taken over 300 beside another worker."""


def run_ranks(
    count: int,
    arguments: list[str],
    *,
    timeout_s: float = HUNG_S,
    check: bool = True,
    temporary: Path | None = None,
) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` on ``count`` ranks, all ended after ``timeout_s``: several under
    torchrun, one without it (whose own import of torch costs 3 s a start); with ``temporary`` as
    their folder for temporary files."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launcher if count > 1 else []), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"TMPDIR": str(temporary)} if temporary else {}),
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep),
    }
    done = run_command(command, environment=environment, timeout_s=timeout_s)
    if check and done.returncode != 0:
        pytest.fail(f"{arguments} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done


def run_command(
    command: list[str], *, environment: dict[str, str], timeout_s: float, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run a command, its output and errors as one text; after ``timeout_s`` its whole tree ends."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
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
        pytest.fail(f"{command} did not end within {timeout_s} s:\n{output[-3000:]}")
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
