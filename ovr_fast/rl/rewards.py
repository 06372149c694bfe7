"""Verifiable rewards: each answer checked in a worker process that can be killed."""

from __future__ import annotations

import multiprocessing as mp
import re
import time
from collections import Counter
from multiprocessing.connection import Connection, wait

from ovr_fast.config import RewardConfig
from ovr_fast.errors import OVRFastError
from ovr_fast.records import Response, Rollout

OUTCOMES = ("correct", "wrong", "truncated", "no_answer", "timeout", "crash")

_SPACE = re.compile(r"\s+")
_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


class TooManyFailures(OVRFastError, RuntimeError):
    """Too many answer checks crashed or timed out to trust the rewards."""


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete ``\boxed{...}`` of a text; None if there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def normalize(answer: str) -> str:
    """An answer without the differences that do not matter: case, spaces, dollar signs, a full
    stop at the end, text wrappers, thousands separators, a leading plus, a decimal ``.0``."""
    answer = _WRAPPERS.sub(r"\1", answer.strip().strip("$"))
    answer = _SPACE.sub("", answer).rstrip(".").lower()
    answer = answer.replace("\\!", "").replace("\\,", "").replace("\\left", "")
    answer = answer.replace("\\right", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", answer):
        answer = answer.replace(",", "")
    if re.fullmatch(r"\+?-?\d+\.0*", answer):
        answer = answer.split(".")[0]
    return answer.removeprefix("+")


def is_correct(response_answer: str, answer: str, method: str) -> bool:
    """Whether an extracted answer matches the data set's, by "exact" or "math_verify"."""
    if normalize(response_answer) == normalize(answer):
        return True
    if method == "exact":
        return False
    from math_verify import parse, verify

    # Deadlines are the caller's: math-verify's own use signals, which only work in a main thread.
    gold = parse(f"${answer}$", parsing_timeout=None)
    said = parse(f"${response_answer}$", parsing_timeout=None)
    return bool(verify(gold, said, timeout_seconds=None))


def _serve(pipe: Connection, method: str) -> None:
    """A worker: answers (response, answer) pairs until the pipe closes."""
    while True:
        try:
            said, answer = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(is_correct(said, answer, method))
        except Exception:  # the verifier's parser raises many types; all mean "could not check"
            pipe.send(None)


class Verifier:
    """A pool of worker processes, each check under a deadline; a late worker is killed.

    Args:
        config: method, deadline and number of workers.
        serve: the worker's loop; tests plant a hang or a crash here.
    """

    def __init__(self, config: RewardConfig, *, serve=_serve) -> None:
        self.config = config
        self._serve = serve
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []

    def _start(self) -> tuple[mp.process.BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=self._serve, args=(theirs, self.config.method), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def check(self, pairs: list[tuple[str, str]]) -> list[str]:
        """Outcome of each (extracted answer, data set's answer): correct, wrong, timeout, crash."""
        outcomes = ["crash"] * len(pairs)
        # Equal strings need no process, and most checks of an exact run are of equal strings.
        waiting = []
        for index, (said, answer) in enumerate(pairs):
            if normalize(said) == normalize(answer):
                outcomes[index] = "correct"
            elif self.config.method == "exact":
                outcomes[index] = "wrong"
            else:
                waiting.append(index)
        while len(self._workers) < min(self.config.workers, len(waiting)):
            self._workers.append(self._start())
        busy: dict[Connection, tuple[int, float, mp.process.BaseProcess]] = {}
        idle = list(self._workers)
        waiting.reverse()
        while waiting or busy:
            while waiting and idle:
                process, pipe = idle.pop()
                index = waiting.pop()
                try:
                    pipe.send(pairs[index])
                except (BrokenPipeError, OSError):  # it died while idle; the check is not at fault
                    self._replace(process, idle)
                    waiting.append(index)
                    continue
                # A fresh worker imports its verifier first; that is not the answer's time.
                first = not getattr(process, "warm", False)
                limit = self.config.timeout_s + (60.0 if first else 0.0)
                busy[pipe] = (index, time.monotonic() + limit, process)
            soonest = min(deadline for _, deadline, _ in busy.values())
            ready = wait(list(busy), timeout=max(0.0, soonest - time.monotonic()))
            for ended in ready:
                assert isinstance(ended, Connection)
                index, _, process = busy.pop(ended)
                try:
                    verdict = ended.recv()
                except (EOFError, OSError):
                    self._replace(process, idle)
                    continue  # stays "crash"
                process.warm = True  # type: ignore[attr-defined]
                idle.append((process, ended))
                if verdict is not None:
                    outcomes[index] = "correct" if verdict else "wrong"
            now = time.monotonic()
            for pipe, (index, deadline, process) in list(busy.items()):
                if now >= deadline:
                    outcomes[index] = "timeout"
                    del busy[pipe]
                    self._replace(process, idle)
        return outcomes

    def _replace(self, process: mp.process.BaseProcess, idle: list) -> None:
        process.kill()
        process.join()
        self._workers = [pair for pair in self._workers if pair[0] is not process]
        fresh = self._start()
        self._workers.append(fresh)
        idle.append(fresh)

    def reward(self, responses: list[Response], answers: list[str]) -> list[Rollout]:
        """The responses with reward and outcome: 1 for a finished, correct response, else 0.

        Args:
            responses: of one step.
            answers: the data set's answer to each.

        Raises:
            TooManyFailures: over ``reward.max_failure_share`` of the checks failed.
        """
        outcomes = [""] * len(responses)
        indices, pairs = [], []
        for index, (response, answer) in enumerate(zip(responses, answers, strict=True)):
            said = last_boxed(response.text)
            if response.finish_reason != "stop":
                outcomes[index] = "truncated"
            elif said is None:
                outcomes[index] = "no_answer"
            else:
                indices.append(index)
                pairs.append((said, answer))
        for index, outcome in zip(indices, self.check(pairs), strict=True):
            outcomes[index] = outcome
        counts = Counter(outcomes)
        failures = counts["timeout"] + counts["crash"]
        if failures > self.config.max_failure_share * len(responses):
            raise TooManyFailures(
                f"{failures} of {len(responses)} answer checks failed ({counts['timeout']} "
                f"timeouts, {counts['crash']} crashes), over reward.max_failure_share="
                f"{self.config.max_failure_share}; raise reward.timeout_s, or start a new "
                "run with reward.method=exact"
            )
        return [
            Rollout.of(response, reward=float(outcome == "correct"), outcome=outcome)
            for response, outcome in zip(responses, outcomes, strict=True)
        ]

    def close(self) -> None:
        """End the workers."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
