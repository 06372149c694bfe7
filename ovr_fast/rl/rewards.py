"""Verifiable rewards: each answer checked in a process that can be killed (``grading.checkers``),
or scored by functions of one's own (``rl.own_rewards``)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ovr_fast.config import RewardConfig
from ovr_fast.grading.boxes import last_boxed
from ovr_fast.grading.checkers import Checkers, RewardFunctionError, TooManyFailures
from ovr_fast.grading.exact import is_same
from ovr_fast.records import Response, Rollout
from ovr_fast.rl.own_rewards import OUTCOMES, OwnRewards

__all__ = ["OUTCOMES", "RewardFunctionError", "TooManyFailures", "Verifier"]

CHECKS = {"math_verify": "ovr_fast.grading.verdict:math_verify"}
"""What each ``reward.method`` calls in a process of its own; "exact" needs none."""


class Verifier:
    """A pool of checkers. They start at once, so that their imports are over when rewards are due.

    Args:
        config: method, deadline, memory and number of workers.
        check: ``module:function`` or ``file.py:function`` in place of the method's; tests plant a
            hang or a crash here.
    """

    def __init__(self, config: RewardConfig, *, check: str | None = None) -> None:
        self.config, self._own, self._checkers = config, None, None
        if config.function or config.parts:
            self._own = OwnRewards(config)
            self._checkers = self._own.checkers
        elif name := check or CHECKS.get(config.method):
            self._checkers = Checkers(
                [name], count=config.workers, timeout_s=config.timeout_s,
                memory_gib=config.memory_gib,
            )  # fmt: skip

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
            elif self._checkers is not None:
                waiting.append(index)
        rows = []
        for index in waiting:
            (said, gold), question = pairs[index], questions[index] if questions else ""
            rows.append({"said": said, "gold": gold, "question": question})
        answers = self._checkers.ask_all(rows) if rows and self._checkers else []
        for index, answer in zip(waiting, answers, strict=True):
            outcomes[index] = "crash" if isinstance(answer, dict) else answer
        return outcomes

    def reward(
        self,
        responses: list[Response],
        answers: list[str],
        questions: list[str] | None = None,
        names: list[tuple[str, str]] | None = None,
        columns: list[dict[str, Any]] | None = None,
    ) -> list[Rollout]:
        """The responses with reward and outcome: 1 for a finished, correct response, else 0; or
        what functions of one's own give them.

        Args:
            responses: of one step.
            answers: the data set's answer to each.
            questions: the text of each one's prompt.
            names: id and data source of each one's prompt.
            columns: further columns of each one's row (``DataSource.columns``).

        Raises:
            TooManyFailures: over ``reward.max_failure_share`` of the checks failed.
        """
        if self._own is not None:
            rollouts = self._own.reward(responses, answers, questions, names, columns)
            self._check_failures([rollout.outcome for rollout in rollouts])
            return rollouts
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
            way_out = "start a new run with reward.method=exact"
            if self._own is not None:
                way_out = f"mend {', '.join(self._own.checkers.checks)}"
            raise TooManyFailures(
                f"{failures} of {len(outcomes)} answer checks failed ({counts['timeout']} "
                f"timeouts, {counts['crash']} crashes), over reward.max_failure_share="
                f"{self.config.max_failure_share}; raise reward.timeout_s, or {way_out}"
            )

    def close(self) -> None:
        """End the processes."""
        if self._checkers is not None:
            self._checkers.close()
