"""Verifiable rewards: each answer checked in a process that can be killed (``grading.worker``)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Any

from ovr_fast.config import RewardConfig
from ovr_fast.errors import OVRFastError
from ovr_fast.grading.boxes import last_boxed
from ovr_fast.grading.exact import is_same
from ovr_fast.records import Response, Rollout

OUTCOMES = ("correct", "wrong", "truncated", "no_answer", "scored", "timeout", "crash")
"""Of a response; "scored" is what a reward function has seen."""
CHECKS = {"math_verify": "ovr_fast.grading.verdict:math_verify"}
"""What each ``reward.method`` calls in a process of its own; "exact" needs none."""
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

    def __init__(self, check: str, config: RewardConfig) -> None:
        command = [
            sys.executable, "-m", "ovr_fast.grading.worker", "--check", check,
            "--timeout-s", str(config.timeout_s), "--memory-gib", str(config.memory_gib),
            *(["--score"] if config.function else []),
        ]  # fmt: skip
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


class Verifier:
    """A pool of checkers. They start at once, so that their imports are over when rewards are due.

    Args:
        config: method, deadline, memory and number of workers.
        check: ``module:function`` or ``file.py:function`` in place of the method's; tests plant a
            hang or a crash here.
    """

    def __init__(self, config: RewardConfig, *, check: str | None = None) -> None:
        self.config = config
        self._check = check or config.function or CHECKS.get(config.method)
        self._workers = self._started(config.workers) if self._check else []
        self._said: set[str] = set()  # kinds of a function's errors
        if config.function:
            try:
                self._ask_all([])  # a function that is not there ends the run before it begins
            except BaseException:
                self.close()
                raise

    def _started(self, count: int) -> list[Worker]:
        assert self._check is not None
        return [Worker(self._check, self.config) for _ in range(count)]

    def check(self, pairs: list[tuple[str, str]], questions: list[str] | None = None) -> list[str]:
        """Outcome of each (extracted answer, data set's answer): correct, wrong, timeout, crash.

        Args:
            questions: the text of each one's prompt.
        """
        outcomes = ["wrong"] * len(pairs)
        waiting = []
        for index, (said, answer) in enumerate(pairs):
            # Equal answers need no process, and most checks of an exact run are of equal ones.
            if is_same(said, answer):
                outcomes[index] = "correct"
            elif self._check:
                waiting.append(index)
        rows = []
        for index in waiting:
            (said, gold), question = pairs[index], questions[index] if questions else ""
            rows.append({"said": said, "gold": gold, "question": question})
        answers = self._ask_all(rows) if rows else []
        for index, answer in zip(waiting, answers, strict=True):
            outcomes[index] = "crash" if isinstance(answer, dict) else answer
        return outcomes

    def _ask_all(self, rows: List[dict[str, Any]]) -> list[Any]:
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
            raise RuntimeError("the verifier is closed")
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
                            worker.ask(index, rows[index], self.config.timeout_s)
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
                    elif isinstance(first := json.loads(line), dict):
                        what = "reward.function" if self.config.function else "the answer check"
                        raise RewardFunctionError(f"{what} {self._check}: {first['error']}")
                    else:
                        worker.ready = True
                for worker in list(self._workers):
                    busy = worker.index >= 0 or not worker.ready
                    if busy and time.monotonic() > worker.deadline:
                        if worker.index >= 0:
                            answers[worker.index] = "timeout"
                        failed_starts += not worker.ready
                        self._replace(worker, selector)
                if failed_starts > 2 * self.config.workers:
                    raise TooManyFailures(
                        f"answer checkers ({self._check}) end as soon as they start, or never do; "
                        "what they said is above"
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

    def reward(
        self,
        responses: list[Response],
        answers: list[str],
        questions: list[str] | None = None,
        names: list[tuple[str, str]] | None = None,
    ) -> list[Rollout]:
        """The responses with reward and outcome: 1 for a finished, correct response, else 0; or
        what ``reward.function`` gives them.

        Args:
            responses: of one step.
            answers: the data set's answer to each.
            questions: the text of each one's prompt.
            names: id and data source of each one's prompt.

        Raises:
            TooManyFailures: over ``reward.max_failure_share`` of the checks failed.
        """
        if self.config.function:
            return self._by_function(responses, answers, questions, names)
        outcomes = [""] * len(responses)
        indices, pairs, asked = [], [], []
        for index, (response, answer) in enumerate(zip(responses, answers, strict=True)):
            if response.finish_reason != "stop":
                outcomes[index] = "truncated"
            elif said := last_boxed(response.text):
                indices.append(index)
                pairs.append((said, answer))
                asked.append(questions[index] if questions else "")
            else:  # no box, or an empty one
                outcomes[index] = "no_answer"
        for index, outcome in zip(indices, self.check(pairs, asked), strict=True):
            outcomes[index] = outcome
        self._check_failures(outcomes)
        return [
            Rollout.of(response, reward=float(outcome == "correct"), outcome=outcome)
            for response, outcome in zip(responses, outcomes, strict=True)
        ]

    def _check_failures(self, outcomes: list[str]) -> None:
        counts = Counter(outcomes)
        failures = counts["timeout"] + counts["crash"]
        if failures > self.config.max_failure_share * len(outcomes):
            way_out = (
                f"mend {self.config.function}" if self.config.function
                else "start a new run with reward.method=exact"
            )  # fmt: skip
            raise TooManyFailures(
                f"{failures} of {len(outcomes)} answer checks failed ({counts['timeout']} "
                f"timeouts, {counts['crash']} crashes), over reward.max_failure_share="
                f"{self.config.max_failure_share}; raise reward.timeout_s, or {way_out}"
            )

    def _by_function(
        self,
        responses: list[Response],
        answers: list[str],
        questions: list[str] | None,
        names: list[tuple[str, str]] | None,
    ) -> list[Rollout]:
        """Every response goes to the function, truncated ones too: it sees ``finish_reason``."""
        rows = []
        for index, (response, answer) in enumerate(zip(responses, answers, strict=True)):
            name, source = names[index] if names else (str(index), "")
            rows.append({
                "response": response.text, "answer": answer,
                "question": questions[index] if questions else "", "id": name,
                "data_source": source, "finish_reason": response.finish_reason,
                "response_tokens": len(response.response_tokens),
            })  # fmt: skip
        rollouts, outcomes = [], []
        for response, row, given in zip(responses, rows, self._ask_all(rows), strict=True):
            parts = dict(given["scores"]) if isinstance(given, dict) and "scores" in given else {}
            if taken := sorted(set(OUTCOMES) & parts.keys()):
                parts, given = {}, {"error": f"it names {taken[0]}, which is an outcome's name"}
            failed = not parts
            if failed:
                self._say_once(given if isinstance(given, str) else given["error"], row)
            stopped = response.finish_reason == "stop"
            outcome = "scored" if stopped else "truncated"
            if failed:
                outcome = given if isinstance(given, str) else "crash"
            reward = parts.pop("reward", 0.0)
            outcomes.append(outcome)
            rollouts.append(
                Rollout.of(
                    response, reward=reward, outcome=outcome, scores=tuple(sorted(parts.items()))
                )
            )
        self._check_failures(outcomes)
        return rollouts

    def _say_once(self, why: str, row: dict[str, Any]) -> None:
        """A kind of failure, with the first row that had it."""
        kind = re.sub(r"\d+", "0", why)
        if kind not in self._said:
            self._said.add(kind)
            print(
                f"reward.function: {why}; prompt {row['id']}, answer {row['answer'][:80]!r}, the "
                f"response ends with {row['response'][-120:]!r}; reward 0",
                flush=True,
            )

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()
        self._workers = []
