"""What only the people who release a model know: its name, licence, base and data."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovr_fast.errors import OVRFastError

BASE_LICENCES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "other: Qwen Research License (no commercial use)",
    "Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-VL-32B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-VL-72B-Instruct": "other: Qwen License",
}
"""Of the published bases, by their model cards."""
REQUIRED = {"name": str, "base": str, "licence": str}
OPTIONAL = {
    "base_licence": str, "licence_file": str, "summary": str, "limits": str, "authors": list,
    "data": list, "evaluations": dict,
}  # fmt: skip


class ReleaseError(OVRFastError, ValueError):
    """A release cannot be made; says what is missing, or what may not leave the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Of ``release.toml``."""

    name: str
    base: str  # Hugging Face id, or a name
    licence: str  # SPDX id
    base_licence: str
    licence_file: str = ""  # of its text, where it is not Apache-2.0
    summary: str = ""
    limits: str = ""
    authors: list[str] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)  # name, licence, and what else is said
    evaluations: dict[str, dict[str, str]] = field(default_factory=dict)
    """By benchmark: the data set's id and the task's there, for ``.eval_results``."""


def read_about(path: Path) -> About:
    """``release.toml``.

    Raises:
        ReleaseError: a key is missing, unknown or of another type, a data set has no licence, or
            nobody says what licence the base has.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: {error}; it has name, base and licence at least") from error
    for key, value in table.items():
        kind = (REQUIRED | OPTIONAL).get(key)
        if kind is None:
            raise ReleaseError(f"{path}: unknown key {key}; there are {', '.join(REQUIRED)} and "
                               f"{', '.join(OPTIONAL)}")  # fmt: skip
        if not isinstance(value, kind):
            raise ReleaseError(f"{path}: {key} must be of the type {kind.__name__}")
    if missing := [key for key in REQUIRED if not table.get(key)]:
        raise ReleaseError(f"{path}: {', '.join(missing)} is missing")
    licence = table.get("base_licence") or BASE_LICENCES.get(table["base"])
    if licence is None:
        raise ReleaseError(
            f"{path}: the licence of {table['base']} is not known here; look it up and set "
            "base_licence"
        )
    for number, row in enumerate(table.get("data", []), 1):
        if not (isinstance(row, dict) and row.get("name") and row.get("licence")):
            raise ReleaseError(f"{path}: data set {number} needs a name and a licence")
    for name, row in table.get("evaluations", {}).items():
        if not (isinstance(row, dict) and row.get("dataset") and row.get("task")):
            raise ReleaseError(f"{path}: evaluations.{name} needs dataset and task")
    permissive = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0")
    if licence.lower() not in permissive and table["licence"].lower() in permissive:
        raise ReleaseError(
            f"{path}: {table['licence']} cannot be, since the base's licence is {licence}"
        )
    return About(**{**table, "base_licence": licence})
