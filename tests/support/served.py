"""A server of ``rollout.serve``, started and stopped as on a node of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ovr_fast.rollout.client import Address
from ovr_fast.rollout.server import free_port
from support.processes import HUNG_S, kill_tree
from support.toy_run import ROOT, arguments


def processes_logging_to(folder: Path) -> list[int]:
    """Ids of the processes whose output goes to a file in ``folder``: a run's servers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            output = os.readlink(process / "fd" / "1")
        except OSError:
            continue
        if output.startswith(f"{folder}/"):
            found.append(int(process.name))
    return found


class ServedNode:
    """One server, registered for a run.

    Args:
        workplace: the run's root; has the toy's data.
        run: the run's name.
    """

    def __init__(self, workplace: Path, run: str) -> None:
        port = free_port()
        self.address = Address(f"http://127.0.0.1:{port}")
        self.logs = workplace / run / "logs"
        self.registered = workplace / f"{run}.servers" / f"127.0.0.1-{port}"
        self.log = workplace / f"{run}.serve.log"
        options = arguments(workplace, run)[2:]
        command = ["-m", "ovr_fast.rollout.serve", "--port", str(port), "--register", *options]
        with open(self.log, "w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        """Until it is registered, which is when it answers."""
        deadline = time.monotonic() + HUNG_S
        while not self.registered.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def server_processes(self) -> list[int]:
        """Ids of all processes of the vLLM server."""
        return processes_logging_to(self.logs)

    def stop(self) -> None:
        """By SIGTERM: it says so, and leaves nothing."""
        try:
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(timeout=HUNG_S)
            said = self.log.read_text()
            assert code == 0, said
            assert said.endswith("serve: stopped by SIGTERM\n"), said
            assert "Traceback" not in said, said
            assert not self.registered.exists()
            assert not self.server_processes()
        finally:
            kill_tree(self.process)
