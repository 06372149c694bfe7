"""One answer checker: a process that outlives whatever it checks.

    python -m ovr_fast.grading.worker --check ovr_fast.grading.verdict:math_verify \\
        --timeout-s 5 --memory-gib 4

It imports what checks need, once, then forks a child that does them. A child that is late is killed
and the next one forked, which takes milliseconds and no import: n answers that hang cost n times
the deadline, whatever a library's import takes. Standard input and output are lines of JSON: in, a
check's arguments; out, its outcome. With ``--score`` in, ``{"check": number, "rows": [...]}``; out,
what that reward function gave for each (``Scorer``). The first line out is ``{"ready": kinds of the
functions}``, or ``{"error": why}``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ovr_fast.lifetime import end_with_parent

Check = Callable[..., Any]
ASYNC_GRACE_S = 5.0
"""Past the deadline of an async function's calls, which end by themselves."""


def find_check(name: str) -> Check:
    """The function that ``module:name`` or ``file.py:name`` says.

    Raises:
        ValueError: it says none; whatever the file raises when it is imported.
    """
    place, _, function = name.rpartition(":")
    if not place:
        raise ValueError(f"{name!r} is not file.py:name or package.module:name")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ValueError(f"{place} does not exist")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None, place
        assert spec.loader is not None, place
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # what dataclasses and pickles look for
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{place} has no function {function!r}")
    return found


class Scorer:
    """A reward function: what it gives for rows, each ``{"scores": {"reward": ..., NAME: ...}}``,
    ``{"error": why}`` or "timeout".

    "plain" takes response and answer, and by keyword those columns of a row that it names;
    "batch" takes responses and answers, and lists of columns; "async" is a plain one whose calls
    for several rows wait together.

    Raises:
        ValueError: it takes neither response nor answer.
    """

    def __init__(self, function: Check, timeout_s: float) -> None:
        self.function, self.timeout_s = function, timeout_s
        parameters = inspect.signature(function).parameters
        self.every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.names = set(parameters)
        batch = {"responses", "answers"} <= self.names
        if not batch and not self.every and not {"response", "answer"} <= self.names:
            raise ValueError(
                f"{function.__name__}({', '.join(parameters)}) must take response and answer"
            )
        waits = inspect.iscoroutinefunction(function)
        if batch and waits:
            raise ValueError(
                f"{function.__name__} is async and takes responses: take response and answer, its "
                "calls wait together anyway"
            )
        self.kind = "batch" if batch else "async" if waits else "plain"

    def __call__(self, rows: list[dict[str, Any]]) -> list[Any]:
        if self.kind == "batch":
            return self._batch(rows)
        if self.kind == "async":
            return asyncio.run(self._together(rows))
        return [_tried(self.function, **self._known(row)) for row in rows]

    def _known(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if self.every else {k: v for k, v in row.items() if k in self.names}

    def _batch(self, rows: list[dict[str, Any]]) -> list[Any]:
        columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
        columns["responses"], columns["answers"] = columns.pop("response"), columns.pop("answer")
        try:
            given = list(self.function(**self._known(columns)))
            if len(given) != len(rows):
                raise ValueError(f"it returned {len(given)} rewards for {len(rows)} responses")
        except Exception as error:
            return [{"error": _why(error)}] * len(rows)
        return [_tried(_itself, given=one) for one in given]

    async def _together(self, rows: list[dict[str, Any]]) -> list[Any]:
        async def one(row: dict[str, Any]) -> Any:
            try:
                async with asyncio.timeout(self.timeout_s):
                    given = await self.function(**self._known(row))
            except TimeoutError:
                return "timeout"
            except Exception as error:
                return {"error": _why(error)}
            return _tried(_itself, given=given)

        return list(await asyncio.gather(*(one(row) for row in rows)))


def _itself(given: Any) -> Any:
    return given


def _tried(call: Check, /, **arguments: Any) -> dict[str, Any]:
    try:
        return {"scores": numbers(call(**arguments))}
    except Exception as error:  # of the user's function
        return {"error": _why(error)}


def numbers(given: Any) -> dict[str, float]:
    """A function's result as ``{"reward": ..., NAME: ...}``.

    Raises:
        TypeError, ValueError: it is no number and no dict of numbers with a reward.
    """
    parts = given if isinstance(given, dict) else {"reward": given}
    if "reward" not in parts:
        raise TypeError(f"it returned a dict of {', '.join(map(str, parts))}, without reward")
    for name, value in parts.items():
        number = isinstance(value, bool | int | float) or hasattr(value, "__float__")
        if not number:
            raise TypeError(f"{name} is {value!r}, not a number")
        if not math.isfinite(float(value)):
            raise ValueError(f"{name} is {value!r}, not finite")
    return {str(name): float(value) for name, value in parts.items()}


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

    def ask(self, line: bytes, timeout_s: float) -> Any:
        """Answer to a check; after "timeout" and "crash" this child is gone."""
        try:
            _write(self._requests, line)
        except BrokenPipeError:
            return "crash"
        deadline, answer = time.monotonic() + timeout_s, b""
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                return "timeout"
            if not (part := os.read(self._answers, 65_536)):
                return "crash"
            answer += part
        return json.loads(answer)

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
        answer: Any
        try:
            found = check(**json.loads(line))
            answer = found if isinstance(found, list) else "correct" if found else "wrong"
        except Exception as error:  # a verifier raises many types; all mean "could not check"
            answer = {"error": _why(error)}
        _write(answers, json.dumps(answer).encode() + b"\n")


def _why(error: BaseException) -> str:
    """An exception and where it came from, in a line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"[:500]


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ovr_fast.grading.worker")
    parser.add_argument(
        "--check", required=True, action="append", help="module:function or file.py:function"
    )
    parser.add_argument("--score", action="store_true", help="it is a reward function")
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--memory-gib", type=float, required=True)
    arguments = parser.parse_args()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to answer
    output = os.dup(1)
    os.dup2(2, 1)  # what a check prints is no outcome
    scorers: list[Scorer] = []
    try:
        for name in arguments.check:
            check = find_check(name)
            if arguments.score:
                scorers.append(Scorer(check, arguments.timeout_s))
    except Exception as error:  # of the user's file
        why = f"{name}: {_why(error)}"
        _write(output, json.dumps({"error": why}).encode() + b"\n")
        return

    def score(check: int, rows: list[dict[str, Any]]) -> list[Any]:
        return scorers[check](rows)

    memory, kinds = int(arguments.memory_gib * 2**30), [scorer.kind for scorer in scorers]
    limit = arguments.timeout_s + (ASYNC_GRACE_S if "async" in kinds else 0.0)
    if arguments.score:
        check = score
    child = Child(check, memory)
    _write(output, json.dumps({"ready": kinds}).encode() + b"\n")
    for line in sys.stdin.buffer:
        outcome = child.ask(line, limit)
        if outcome in ("timeout", "crash"):
            child.end()
            child = Child(check, memory)
        _write(output, json.dumps(outcome).encode() + b"\n")
    child.end()


if __name__ == "__main__":
    main()
