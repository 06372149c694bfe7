"""A pool of processes that check answers (``grading.worker``), each of which can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Any

from ovr_fast.errors import OVRFastError

START_S = 120.0
"""A worker's imports, on a busy machine."""
GRACE_S = 30.0
"""Past a check's deadline, when a worker itself is given up."""


class TooManyFailures(OVRFastError, RuntimeError):
    """Too many answer checks crashed or timed out to trust the rewards."""


class RewardFunctionError(OVRFastError, ValueError):
    """``reward.function`` names nothing that can be called, or a check cannot be imported."""


class Worker:
    """One checker process and the check it works on."""

    def __init__(self, words: List[str]) -> None:
        command = [sys.executable, "-m", "ovr_fast.grading.worker", *words]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self.stdout = self._process.stdin, self._process.stdout
        self.index = -1  # of the check, or -1
        self.ready = False
        self.deadline = time.monotonic() + START_S

    def ask(self, index: int, arguments: dict[str, Any], timeout_s: float) -> None:
        """Begin a check; raises BrokenPipeError where the process has died."""
        self.index, self.deadline = index, time.monotonic() + timeout_s + GRACE_S
        self._stdin.write(json.dumps(arguments).encode() + b"\n")
        self._stdin.flush()

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Checkers:
    """The pool. Its processes start at once, so that their imports are over when they are needed.

    Args:
        checks: ``module:function`` or ``file.py:function`` each.
        count: processes.
        timeout_s: of a check.
        memory_gib: of address space for one.
        score: the checks are reward functions.
        what: they are called in messages.
    """

    def __init__(
        self, checks: List[str], *, count: int, timeout_s: float, memory_gib: float,
        score: bool = False, what: str = "the answer check",
    ) -> None:  # fmt: skip
        self.checks, self.count, self.timeout_s, self.what = checks, count, timeout_s, what
        self.kinds: list[str] = []  # of reward functions, once a process is ready
        self._words = [
            *(word for check in checks for word in ("--check", check)),
            "--timeout-s", str(timeout_s), "--memory-gib", str(memory_gib),
            *(["--score"] if score else []),
        ]  # fmt: skip
        self._workers = self._started(count)

    def _started(self, count: int) -> list[Worker]:
        return [Worker(self._words) for _ in range(count)]

    def ask_all(self, rows: List[dict[str, Any]]) -> list[Any]:
        """What the checkers answer to each: "timeout" and "crash" where they cannot. Of no rows,
        wait for a checker to be ready.

        Raises:
            RewardFunctionError: the function cannot be found.
            TooManyFailures: checkers end as soon as they start.
        """
        answers: list[Any] = ["crash"] * len(rows)
        waiting = list(range(len(rows)))[::-1]
        failed_starts = 0
        if not self._workers:
            raise RuntimeError("the checkers are closed")
        with selectors.DefaultSelector() as selector, self._whole_workers():
            for worker in self._workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while (
                waiting
                or any(worker.index >= 0 for worker in self._workers)
                or not (rows or any(worker.ready for worker in self._workers))
            ):
                for worker in list(self._workers):
                    if worker.ready and worker.index < 0 and waiting:
                        index = waiting.pop()
                        try:
                            worker.ask(index, rows[index], self.timeout_s)
                        except BrokenPipeError:  # died idle: the check is not at fault
                            waiting.append(index)
                            worker.index = -1
                            failed_starts += 1
                            self._replace(worker, selector)
                for key, _ in selector.select(timeout=1.0):
                    worker = key.data
                    line = worker.stdout.readline()
                    if not line:
                        failed_starts += not worker.ready
                        self._replace(worker, selector)
                    elif worker.ready:
                        answers[worker.index], worker.index = json.loads(line), -1
                    elif "error" in (first := json.loads(line)):
                        raise RewardFunctionError(f"{self.what} {first['error']}")
                    else:
                        worker.ready, self.kinds = True, first["ready"]
                for worker in list(self._workers):
                    busy = worker.index >= 0 or not worker.ready
                    if busy and time.monotonic() > worker.deadline:
                        if worker.index >= 0:
                            answers[worker.index] = "timeout"
                        failed_starts += not worker.ready
                        self._replace(worker, selector)
                if failed_starts > 2 * self.count:
                    raise TooManyFailures(
                        f"answer checkers ({', '.join(self.checks)}) end as soon as they start, or "
                        "never do; what they said is above"
                    )
        return answers

    @contextlib.contextmanager
    def _whole_workers(self) -> Iterator[None]:
        """An interrupted call's workers go: their late answers would be the next one's."""
        try:
            yield
        except BaseException:
            count = len(self._workers)
            self.close()
            self._workers = self._started(count)
            raise

    def _replace(self, worker: Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(worker.stdout)
        worker.end()
        self._workers.remove(worker)
        (fresh,) = self._started(1)
        self._workers.append(fresh)
        selector.register(fresh.stdout, selectors.EVENT_READ, fresh)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()
        self._workers = []
