"""One answer checker: a process that outlives whatever it checks.

    python -m ovr_fast.grading.worker --check ovr_fast.grading.verdict:math_verify \\
        --timeout-s 5 --memory-gib 4

It imports what checks need, once, then forks a child that does them. A child that is late is killed
and the next one forked, which takes milliseconds and no import: n answers that hang cost n times
the deadline, whatever a library's import takes. Standard input and output are lines of JSON: in, a
check's arguments; out, its outcome. The first line out is ``"ready"``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ovr_fast.lifetime import end_with_parent

Check = Callable[..., bool]
OUTCOMES = {b"1": "correct", b"0": "wrong", b"!": "crash"}


def find_check(name: str) -> Check:
    """The function that ``module:name`` or ``file.py:name`` says."""
    place, _, function = name.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None, place
        assert spec.loader is not None, place
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, function)


class Child:
    """A fork of this process that checks, until it is late."""

    def __init__(self, check: Check, memory_bytes: int) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._answers)
            os.setsid()  # what a check starts ends with it
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            end_with_parent()
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
            _serve(check, os.fdopen(requests, "rb"), answers)
            os._exit(0)
        os.close(requests)
        os.close(answers)

    def ask(self, line: bytes, timeout_s: float) -> str:
        """Outcome of a check; after "timeout" and "crash" this child is gone."""
        try:
            _write(self._requests, line)
        except BrokenPipeError:
            return "crash"
        ready, _, _ = select.select([self._answers], [], [], timeout_s)
        if not ready:
            return "timeout"
        return OUTCOMES.get(os.read(self._answers, 1), "crash")

    def end(self) -> None:
        """Kill it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # before it has a group of its own
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._requests)
        os.close(self._answers)


def _serve(check: Check, requests: BinaryIO, answers: int) -> None:
    for line in requests:
        try:
            os.write(answers, b"1" if check(**json.loads(line)) else b"0")
        except Exception:  # a verifier raises many types; all mean "could not check"
            os.write(answers, b"!")


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ovr_fast.grading.worker")
    parser.add_argument("--check", required=True, help="module:function or file.py:function")
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--memory-gib", type=float, required=True)
    arguments = parser.parse_args()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to answer
    output = os.dup(1)
    os.dup2(2, 1)  # what a check prints is no outcome
    check = find_check(arguments.check)
    memory = int(arguments.memory_gib * 2**30)
    child = Child(check, memory)
    _write(output, b'"ready"\n')
    for line in sys.stdin.buffer:
        outcome = child.ask(line, arguments.timeout_s)
        if outcome in ("timeout", "crash"):
            child.end()
            child = Child(check, memory)
        _write(output, json.dumps(outcome).encode() + b"\n")
    child.end()


if __name__ == "__main__":
    main()
