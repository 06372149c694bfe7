"""What a run folder, an evaluation and an analysis of behaviours hold, as the report needs it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ovr_fast.errors import OVRFastError
from ovr_fast.observe.clock import PHASES

STAGES = {"base": "base", "cold_start": "cold start", "rl": "RL", "rollout": "sampling"}
"""Of the recipe, in their order."""


class ReportError(OVRFastError, ValueError):
    """A folder holds no run, no evaluation, or rows that nothing of this project wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder."""

    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    rollouts: list[dict[str, Any]] = field(repr=False)  # of rollouts.jsonl

    def series(self, stage: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a stage's rows that have the metric."""
        return [
            (row["step"], row[metric])
            for row in self.rows
            if row["stage"] == stage and _number(row.get(metric))
        ]

    def tokens(self, stage: str) -> dict[int, float]:
        """Response tokens of a stage up to and with each of its steps."""
        found, total = {}, 0.0
        name = f"{'cold_start' if stage == 'cold_start' else 'rollout'}/response_tokens"
        for row in self.rows:
            if row["stage"] == stage:
                total += row[name] if _number(row.get(name)) else 0.0
                found[row["step"]] = total
        return found

    @property
    def sampling(self) -> str:
        """The stage with rollouts: RL, or sampling alone."""
        return "rl" if any(row["stage"] == "rl" for row in self.rows) else "rollout"

    def accuracies(self) -> dict[str, list[tuple[str, int, float, float | None]]]:
        """Per held-out set and benchmark measured in training: (stage, step, accuracy, standard
        error where it was measured)."""
        found: dict[str, list[tuple[str, int, float, float | None]]] = {}
        for row in self.rows:
            for key, value in row.items():
                if key.startswith("eval/") and key.endswith("/accuracy") and _number(value):
                    name = key.removeprefix("eval/").removesuffix("/accuracy")
                    error = row.get(f"eval/{name}/error")
                    found.setdefault(name, []).append(
                        (row["stage"], row["step"], value, error if _number(error) else None)
                    )
        return found

    def hours(self) -> dict[str, float]:
        """By phase, over the whole run; "step" is all of it."""
        sums = dict.fromkeys((*PHASES, "step"), 0.0)
        for row in self.rows:
            for phase in sums:
                seconds = row.get(f"time/{phase}_s")
                sums[phase] += seconds / 3600 if _number(seconds) else 0.0
        return {phase: hours for phase, hours in sums.items() if hours > 0}


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> Run:
    """A run folder; a last line of its files that was not finished is left out.

    Raises:
        ReportError: it is none, or another line is not a row.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ReportError(
            f"{folder} holds no metrics.jsonl; name a run's folder, such as runs/tiny"
        )
    rows = list(_lines(metrics, ("stage", "step")))
    if not rows:
        raise ReportError(f"{metrics} holds no step yet")
    if unknown := {str(row["stage"]) for row in rows} - set(STAGES):
        raise ReportError(f"{metrics} has stages that no run has: {', '.join(sorted(unknown))}")
    environment = folder / "env.json"
    try:
        config = tomllib.loads((folder / "config.toml").read_text())
        about = json.loads(environment.read_text()) if environment.is_file() else {}
    except (OSError, ValueError) as error:
        raise ReportError(f"{folder}: its config.toml or env.json cannot be read ({error})") from (
            error
        )
    rollouts = folder / "rollouts.jsonl"
    kept = list(_lines(rollouts, ("step", "response"))) if rollouts.is_file() else []
    return Run(
        name=folder.resolve().name, folder=folder, config=config, environment=about, rows=rows,
        rollouts=kept,
    )  # fmt: skip


def _lines(path: Path, needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            for name in needed:
                row[name]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                return
            raise ReportError(f"{path}:{number} is not a row that a run wrote ({error!r})") from (
                error
            )
        yield row


def read_json(path: Path, name: str, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """``name`` in a folder: a list of results that have these keys.

    Raises:
        ReportError: it is not there, or no such list.
    """
    file = path / name
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, list) or not all(
        isinstance(row, dict) and all(key in row for key in needed) for row in found
    ):
        raise ReportError(f"{file} is not a list of results with {', '.join(needed)}")
    return found


def differing(runs: List[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: (section.key, value by run)."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    return [
        (key, [str(each.get(key, "")) for each in flat])
        for key in keys
        if len({str(each.get(key)) for each in flat}) > 1
    ]


def _flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
