"""Rewards by functions of one's own: one, or several weighted parts, by data source."""

from __future__ import annotations

import re
from collections.abc import Sequence as List
from typing import Any

from ovr_fast.config import RewardConfig, RewardPart
from ovr_fast.grading.checkers import Checkers
from ovr_fast.records import Response, Rollout

OUTCOMES = ("correct", "wrong", "truncated", "no_answer", "scored", "timeout", "crash")
"""Of a response; "scored" is what a reward function has seen."""


class OwnRewards:
    """What ``reward.function`` or ``reward.parts`` give, in processes that can be killed.

    A plain function sees one response at a time; one that takes ``responses`` and ``answers``, or
    is async, sees ``reward.batch`` of them.

    Raises:
        RewardFunctionError: a function is not there, or takes neither response nor answer.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.parts: tuple[RewardPart, ...] = config.parts or (
            RewardPart(name="", function=config.function),
        )
        functions = list(dict.fromkeys(part.function for part in self.parts))
        self.checkers = Checkers(
            functions, count=config.workers, timeout_s=config.timeout_s,
            memory_gib=config.memory_gib, score=True, what="reward.function",
        )  # fmt: skip
        self._said: set[str] = set()  # kinds of errors
        try:
            self.checkers.ask_all([])  # one that is not there ends the run before it begins
        except BaseException:
            self.checkers.close()
            raise

    def reward(
        self,
        responses: List[Response],
        answers: List[str],
        questions: List[str] | None,
        names: List[tuple[str, str]] | None,
        columns: List[dict[str, Any]] | None,
    ) -> list[Rollout]:
        """Every response goes to its parts, truncated ones too: they see ``finish_reason``. Where
        one of them fails, the reward is 0 and the outcome says how."""
        rows = []
        for index, (response, answer) in enumerate(zip(responses, answers, strict=True)):
            name, source = names[index] if names else (str(index), "")
            rows.append({
                **(columns[index] if columns else {}),
                "response": response.text, "answer": answer,
                "question": questions[index] if questions else "", "id": name,
                "data_source": source, "finish_reason": response.finish_reason,
                "response_tokens": len(response.response_tokens),
            })  # fmt: skip
        given = self._ask(rows)
        return [
            self._rollout(response, row, answers)
            for response, row, answers in zip(responses, rows, given, strict=True)
        ]

    def _ask(self, rows: List[dict[str, Any]]) -> list[dict[RewardPart, Any]]:
        """What each part that is a row's own answers to it."""
        asks: list[dict[str, Any]] = []
        of: list[tuple[RewardPart, list[int]]] = []
        for part in self.parts:
            check = self.checkers.checks.index(part.function)
            size = 1 if self.checkers.kinds[check] == "plain" else self.config.batch
            own = [n for n, row in enumerate(rows) if is_of(part, row["data_source"])]
            for begin in range(0, len(own), size):
                places = own[begin : begin + size]
                of.append((part, places))
                asks.append({"check": check, "rows": [rows[place] for place in places]})
        found: list[dict[RewardPart, Any]] = [{} for _ in rows]
        for (part, places), answer in zip(of, self.checkers.ask_all(asks), strict=True):
            each = answer if isinstance(answer, list) else [answer] * len(places)
            for place, one in zip(places, each, strict=True):
                found[place][part] = one
        return found

    def _rollout(
        self, response: Response, row: dict[str, Any], given: dict[RewardPart, Any]
    ) -> Rollout:
        outcome = "scored" if response.finish_reason == "stop" else "truncated"
        reward, scores, failure = 0.0, dict[str, float](), ""
        if not given:
            given = {RewardPart(name="", function=""): {
                "error": f"no part of reward.parts is for the source {row['data_source']!r}"
            }}  # fmt: skip
        for part, one in given.items():
            parts = dict(one["scores"]) if isinstance(one, dict) and "scores" in one else {}
            if taken := sorted(set(OUTCOMES) & parts.keys()):
                parts, one = {}, {"error": f"it names {taken[0]}, which is an outcome's name"}
            if not parts:
                failure = one if isinstance(one, str) else "crash"
                self._say_once(part, one if isinstance(one, str) else one["error"], row)
                continue
            worth = parts.pop("reward")
            reward += part.weight * worth
            prefix = f"{part.name}/" if part.name else ""
            scores |= {f"{prefix}{name}": value for name, value in parts.items()}
            if part.name:
                scores[part.name] = worth
        if failure:
            return Rollout.of(response, reward=0.0, outcome=failure)
        return Rollout.of(
            response, reward=reward, outcome=outcome, scores=tuple(sorted(scores.items()))
        )

    def _say_once(self, part: RewardPart, why: str, row: dict[str, Any]) -> None:
        """A kind of failure, with the first row that had it."""
        kind = part.name + re.sub(r"\d+", "0", why)
        if kind not in self._said:
            self._said.add(kind)
            what = f"reward.parts {part.name}" if part.name else "reward.function"
            print(
                f"{what}: {why}; prompt {row['id']}, answer {row['answer'][:80]!r}, the "
                f"response ends with {row['response'][-120:]!r}; reward 0",
                flush=True,
            )


def is_of(part: RewardPart, source: str) -> bool:
    """Whether a part rewards responses to a source's prompts."""
    return not part.sources or source in part.sources
