"""Files of an evaluation: a line a response, a line a score, and what they were made with.

``responses/NAME.jsonl`` is appended to while responses come in, and sorted when the last one is
there, so that a run that was killed and goes on ends with the same bytes. ``responses/NAME.json``
beside it says with which protocol, model and files; another one is never mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ovr_fast.evaluation.adapter import EvaluationError


class ResponseRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One response."""

    question: str
    sample: int
    seed: int
    prompt_sha256: str
    order: tuple[int, ...]  # of the options, as they were shown
    response: str
    finish_reason: str
    prompt_tokens: int
    response_tokens: int

    @property
    def key(self) -> tuple[str, int]:
        """Which response it is."""
        return self.question, self.sample


class ScoreRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one response is worth."""

    question: str
    sample: int
    outcome: str  # correct, wrong, graded, truncated, no_answer, undecided, missing
    extracted: str
    extracted_by: str  # box, phrase, last line, or none
    rule: str  # the kind of the question, or "judge"
    judge: str = ""  # what the judge answered
    credit: float | None = None  # of what is graded: part of a point

    @property
    def key(self) -> tuple[str, int]:
        """Which response it is of."""
        return self.question, self.sample

    @property
    def worth(self) -> float:
        """From 0 to 1; what is not decided is worth nothing."""
        return float(self.outcome == "correct") if self.credit is None else self.credit


Record = TypeVar("Record", ResponseRecord, ScoreRecord)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Every whole line of a file; a last line that was not finished is left out.

    Raises:
        EvaluationError: another line is not a record, or two are of one response; names it.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    found: dict[tuple[str, int], Record] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = msgspec.json.decode(line, type=kind)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                break
            raise EvaluationError(
                f"{path}:{number}: not a record ({error}); remove the line, and what it held is "
                "made again"
            ) from error
        if record.key in found:
            raise EvaluationError(f"{path}:{number}: a second record of {record.key}")
        found[record.key] = record
    return list(found.values())


def write_records(path: Path, records: Iterable[Record]) -> None:
    """All records of a file, in the order of questions and samples; whole or not at all."""
    write_whole(path, b"".join(msgspec.json.encode(record) + b"\n" for record in records))


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there with all its bytes, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Appender:
    """Appends records, each flushed; a torn last line of an earlier run is cut off."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  (closed by close)
        self._file.seek(0)
        whole = self._file.read()
        self._file.truncate(whole.rfind(b"\n") + 1)

    def add(self, record: ResponseRecord | ScoreRecord) -> None:
        """One more line."""
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def check_manifest(path: Path, wanted: dict[str, Any]) -> None:
    """Write what a file's records are made with, or compare it with what was written.

    Raises:
        EvaluationError: the folder holds records of another protocol, model or files.
    """
    if not path.is_file():
        write_whole(path, json.dumps(wanted, indent=1, sort_keys=True).encode())
        return
    there = read_manifest(path)
    wanted = json.loads(json.dumps(wanted))  # tuples as lists, as they are read
    for key in sorted(wanted.keys() | there.keys()):
        old, new = there.get(key), wanted.get(key)
        if old != new:
            both = "" if isinstance(new, dict) else f" ({old!r}, now {new!r})"
            raise EvaluationError(
                f"{path}: its responses were made with another {key}{both}; give this evaluation "
                "a folder of its own"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """What ``check_manifest`` wrote.

    Raises:
        EvaluationError: it is not there, or not whole.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is missing: generate writes it") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path}: not an object")
    return found
