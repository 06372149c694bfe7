"""Responses worth reading, of those that a run keeps in readable form."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovr_fast.report.runs import Run

WORDS = 16
"""Of a sequence that counts as repeated."""
REPEATED = 0.2
"""Share of repeated sequences from which a response is shown for it."""
LONG = 700
"""Characters from which a response is folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response with its question."""

    why: str  # it is shown
    run: str
    step: int
    question: str
    pictures: list[str]  # data URLs
    origins: list[str]  # where pictures came from that nobody kept
    response: str
    answer: str
    outcome: str
    reward: float
    tokens: int

    @property
    def folded(self) -> bool:
        """It takes more than a few lines."""
        return len(self.response) > LONG


def choose(run: Run, *, each: int = 2) -> list[Sample]:
    """Right and wrong ones of the last steps, the longest, the one that repeats itself most, and a
    question at an early and at a late step."""
    rows = [row for row in run.rollouts if row.get("stage", "rl") == run.sampling]
    if not rows:
        return []
    late = sorted(rows, key=lambda row: row["step"])[-max(16, len(rows) // 4) :]
    picked: list[tuple[str, dict[str, Any]]] = []

    def pick(why: str, found: List[dict[str, Any]]) -> None:
        picked.extend((why, row) for row in found if all(row is not other for _, other in picked))

    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        if row.get("id") is not None:
            by_id.setdefault(str(row["id"]), []).append(row)
    again = [found for found in by_id.values() if found[-1]["step"] > found[0]["step"]]
    if again:
        widest = max(again, key=lambda found: found[-1]["step"] - found[0]["step"])
        pick("one question, early", widest[:1])
        pick("the same question, late", widest[-1:])
    for outcome in ("correct", "wrong"):
        own = [row for row in reversed(late) if row.get("outcome") == outcome]
        pick(f"{outcome}, late", own[:each])
    pick("the longest of the last steps", [max(late, key=_tokens)])
    most = max(late, key=lambda row: repeated(str(row["response"] or "")))
    if repeated(str(most["response"] or "")) >= REPEATED:
        pick("repeats itself most", [most])
    return [_sample(run, why, row) for why, row in picked]


def repeated(text: str) -> float:
    """Share of a text's sequences of 16 words that stood in it before."""
    words = text.split()
    found = Counter(tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
    total = sum(found.values())
    return 1 - len(found) / total if total else 0.0


def _tokens(row: dict[str, Any]) -> int:
    return int(row.get("length_tokens") or 0)


def _sample(run: Run, why: str, row: dict[str, Any]) -> Sample:
    pictures = [url for name in row.get("pictures", []) if (url := _data_url(run.folder, name))]
    return Sample(
        why=why, run=run.name, step=row["step"], question=_question(row.get("prompt", "")),
        pictures=pictures, origins=[] if pictures else list(row.get("images", [])),
        response=str(row["response"] or ""), answer=str(row.get("answer", "")),
        outcome=str(row.get("outcome", "")).replace("_", " "),
        reward=float(row.get("reward") or 0.0), tokens=_tokens(row),
    )  # fmt: skip


def _data_url(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file():
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def _question(prompt: Any) -> str:
    """The words of a conversation."""
    if isinstance(prompt, str):
        return prompt
    turns = []
    for turn in prompt:
        content = turn.get("content", "")
        if not isinstance(content, str):
            content = " ".join(part.get("text", "[image]") for part in content)
        turns.append(content if turn.get("role") == "user" else f"({turn.get('role')}) {content}")
    return "\n".join(turns)
