"""Responses in the files of other harnesses, whose scorers then judge the very same texts.

* ``lm-eval`` 0.4: ``samples_TASK_TIME.jsonl``, as ``--log_samples`` writes it; a task's
  ``process_results(doc, resps)`` scores a line.
* ``lmms-eval`` 0.7: a log that ``--model from_log`` answers from in place of a model.
* ``vlmevalkit`` (ms-vlmeval 0.0.20): its own TSV of the task with a column "prediction", which
  ``vlmutil eval`` scores. A TSV, because a cell of its default, XLSX, ends at 32,767 characters.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ovr_fast.data.files import read_rows
from ovr_fast.evaluation.adapter import EvaluationError
from ovr_fast.evaluation.protocol import prompt_text
from ovr_fast.evaluation.question import Benchmark, Question
from ovr_fast.evaluation.records import ResponseRecord, write_whole
from ovr_fast.evaluation.results import OPEN
from ovr_fast.evaluation.scoring import score_responses

HARNESSES = ("lm-eval", "lmms-eval", "vlmevalkit")
_TIME = "1970-01-01T00-00-00.000000"
"""In a file's name: the same responses make the same file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """A benchmark's, with what they were made with."""

    benchmark: Benchmark
    manifest: dict[str, Any]
    records: List[ResponseRecord]

    def texts(self) -> dict[str, list[str]]:
        """Of each question, its samples in their order."""
        found: dict[str, list[str]] = {}
        for record in sorted(self.records, key=lambda each: each.key):
            found.setdefault(record.question, []).append(record.response)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file, and how the harness scores it."""

    path: Path
    says: str


def write(
    responses: Responses, *, to: str, task: str, model: str, folder: Path, sample: int = 0,
    rows: Path | None = None, on: str = "", whole_split: bool = False,
) -> Written:  # fmt: skip
    """Write the responses of a benchmark for another harness.

    Args:
        to: one of ``HARNESSES``.
        task: the benchmark's name there.
        model: as the files name it.
        folder: for the files.
        sample: which of a question's, for a harness that knows one.
        rows: VLMEvalKit's own file of the task.
        on: its column with our questions' names; "": "index", or else the questions' texts.
        whole_split: the task's split at lmms-eval has all rows of the files, also those that the
            benchmark leaves out; they get an empty answer.

    Raises:
        EvaluationError: the harness cannot score these responses; says why.
    """
    adapter = responses.benchmark.adapter
    if adapter.shuffled:
        raise EvaluationError(
            f"{adapter.name}: its options stand in an order of ours, whose letters mean others in "
            f"{to}; use an adapter without shuffled"
        )
    if unsafe := [name for name in (task, model) if not name or "/" in name or "\\" in name]:
        raise EvaluationError(f"{unsafe[0]!r} cannot be a part of a file's name")
    samples = responses.manifest["settings"]["samples"]
    if not 0 <= sample < samples:
        raise EvaluationError(f"{adapter.name}: there is no sample {sample} of {samples}")
    if whole_split and to != "lmms-eval":
        raise EvaluationError(
            f"--whole-split is about the numbers that lmms-eval asks by, not {to}"
        )
    if to == "lm-eval":
        return _lm_eval(responses, task, folder / model)
    if to == "lmms-eval":
        return _lmms_eval(responses, task, model, folder, sample, whole_split)
    if rows is None:
        raise EvaluationError(
            "vlmevalkit scores rows of its own: name its TSV of the task with --rows"
        )
    return _vlmevalkit(responses, task, model, folder, sample, rows, on)


def _document(question: Question) -> dict[str, Any]:
    """What of a question other harnesses keep beside a response."""
    return {
        "id": question.id, "question": question.text, "options": list(question.options),
        "answer": question.answer,
    }  # fmt: skip


def _lm_eval(responses: Responses, task: str, folder: Path) -> Written:
    benchmark, texts = responses.benchmark, responses.texts()
    by_name = {question.id: question for question in benchmark.questions}
    worth: dict[str, list[float] | None] = {}
    for score in score_responses(by_name, responses.records):
        known = worth.setdefault(score.question, [])
        if score.outcome in OPEN:  # a judge's to say: no number at all
            worth[score.question] = None
        elif known is not None:
            known.append(score.worth)
    settings = responses.manifest["settings"]
    lines = []
    for place, question in enumerate(benchmark.questions):
        document, own, known = _document(question), texts[question.id], worth[question.id]
        prompt = prompt_text(question, benchmark.adapter, settings["style"])
        line = {
            "doc_id": place, "doc": document, "target": question.answer,
            "arguments": [[prompt, {
                "until": [], "do_sample": settings["temperature"] > 0,
                "temperature": settings["temperature"], "top_p": settings["top_p"],
                "max_gen_toks": settings["max_tokens"],
            }]],
            "resps": [own], "filtered_resps": own if len(own) == 1 else [own], "filter": "none",
            "metrics": ["exact_match"],
            "doc_hash": _digest(json.dumps(document, indent=2, ensure_ascii=False)),
            "prompt_hash": _digest(prompt), "target_hash": _digest(question.answer),
            "exact_match": None if known is None else sum(known) / len(own),
        }  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path = folder / f"samples_{task}_{_TIME}.jsonl"
    write_whole(path, "".join(lines).encode())
    return Written(
        path=path,
        says="exact_match is our rules' verdict, null where they have none; the task's "
        "process_results(doc, resps[0]) is lm-eval's",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lmms_eval(
    responses: Responses, task: str, model: str, folder: Path, sample: int, whole_split: bool
) -> Written:
    """One response a question: ``from_log`` looks it up by the row's number in the task's split,
    which has the benchmark's rows alone (MathVerse's versions), or all of the files' (MME)."""
    texts, benchmark = responses.texts(), responses.benchmark
    adapter, questions = benchmark.adapter, benchmark.questions
    if adapter.variants == "file":
        raise EvaluationError(
            f"{adapter.name}: its variants are files, each a split of its own at lmms-eval; export "
            "it for vlmevalkit"
        )
    if set(",=") & set(f"{model}{folder}"):
        raise EvaluationError(
            f"lmms-eval cuts its arguments at , and =: name model {model!r} and folder "
            f"{str(folder)!r} without them"
        )
    logs: list[dict[str, Any]] = [
        {
            "doc_id": question.row if whole_split else place, "doc": _document(question),
            "target": question.answer, "resps": [[texts[question.id][sample]]],
        }
        for place, question in enumerate(questions)
    ]  # fmt: skip
    left_out = benchmark.rows - len(questions)
    if whole_split:
        asked = {question.row for question in questions}
        logs += [
            {"doc_id": row, "doc": {}, "target": "", "resps": [[""]]}
            for row in range(benchmark.rows)
            if row not in asked
        ]
    log = {
        "args": {"model": model, "model_args": "", "limit": None},
        "model_configs": {"task": task}, "time": "0101_0000", "logs": logs,
    }  # fmt: skip
    if responses.manifest.get("limit"):
        raise EvaluationError(
            f"{responses.benchmark.adapter.name}: lmms-eval answers every row of a task from a "
            "log; generate without --limit"
        )
    path = folder / f"{model}_{task}.json"
    write_whole(path, msgspec.json.format(msgspec.json.encode(log), indent=1))
    numbers = "in the file" if whole_split or not left_out else "among the rows of this set"
    return Written(
        path=path,
        says=f"# doc_id is the row's number {numbers}, as in lmms-eval's split of it\n"
        + _left_out(left_out, whole_split)
        + f"python -m lmms_eval --model from_log --tasks {shlex.quote(task)} --model_args "
        + shlex.quote(f"logs={folder.resolve()},model_name={model}"),
    )


def _left_out(rows: int, whole_split: bool) -> str:
    if not rows:
        return ""
    if whole_split:
        return f"# {rows:,} rows that were not asked have an empty answer, which counts as wrong\n"
    return (
        f"# without {rows:,} rows that this set leaves out: for a task whose split has the others "
        "alone; for one that has them all, export with --whole-split\n"
    )


def _vlmevalkit(
    responses: Responses, task: str, model: str, folder: Path, sample: int, rows: Path, on: str
) -> Written:
    texts = responses.texts()
    theirs = []
    for raw in read_rows(str(rows)):
        if not isinstance(raw.row, dict):
            raise EvaluationError(str(raw.row))
        theirs.append(raw.row)
    if not theirs:
        raise EvaluationError(f"{rows} holds no row")
    names = _joined(responses.benchmark, theirs, rows, on)
    columns = [name for name in theirs[0] if name not in ("image", "prediction")]
    path = folder / f"{model}_{task}.tsv"
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow([*columns, "prediction"])
        for name, row in zip(names, theirs, strict=True):
            if name is not None:
                cells = [row.get(column) for column in columns]
                writer.writerow([*("" if c is None else c for c in cells), texts[name][sample]])
    partial.replace(path)
    left = sum(name is None for name in names)
    return Written(
        path=path,
        says=f"PRED_FORMAT=tsv vlmutil eval {shlex.quote(task)} {shlex.quote(str(path))}"
        + (f"  # without {left:,} of its rows, which were not asked" if left else ""),
    )


def _joined(
    benchmark: Benchmark, theirs: List[dict[str, Any]], rows: Path, on: str
) -> list[str | None]:
    """Which of our questions each of their rows is; None where it was not asked.

    Raises:
        EvaluationError: not each question is one row.
    """
    questions = benchmark.questions
    ours = {question.id: question.id for question in questions}
    for column in [on] if on else ["index", "id"]:
        found = [ours.get(str(row.get(column))) for row in theirs]
        if _each_once(found, len(ours)):
            return found
    if on:
        hits = len({name for name in found if name is not None})
        raise EvaluationError(
            f"{rows}: its column {on!r} names {hits:,} of the {len(ours):,} questions of "
            f"{benchmark.adapter.name}, and each must be one row"
        )
    by_text = {_bare(question.text): question.id for question in questions}
    found = [by_text.get(_bare(str(row.get("question")))) for row in theirs]
    if len(by_text) == len(questions) and _each_once(found, len(ours)):
        return found
    raise EvaluationError(
        f"{rows}: neither its index, its id nor its question tells which row each of the "
        f"{len(ours):,} questions of {benchmark.adapter.name} is; name the column with --on"
    )


def _each_once(found: List[str | None], count: int) -> bool:
    times = Counter(name for name in found if name is not None)
    return len(times) == count and set(times.values()) == {1}


def _bare(text: str) -> str:
    return " ".join(text.split())
