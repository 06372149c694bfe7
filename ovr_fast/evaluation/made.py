"""What an output folder of ``ovr_fast.evaluate`` holds, with the files it was asked from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovr_fast.evaluation import records
from ovr_fast.evaluation.adapter import Adapter, EvaluationError, adapter_of
from ovr_fast.evaluation.generate import digest_of
from ovr_fast.evaluation.question import Benchmark, load_benchmark


def adapters(output: Path) -> list[Adapter]:
    """Those that the responses were made with."""
    found = sorted((output / "responses").glob("*.jsonl"))
    if not found:
        raise EvaluationError(f"{output} holds no responses; generate makes them")
    return [adapter_of(records.read_manifest(path.with_suffix(".json"))) for path in found]


def read(
    output: Path, adapter: Adapter, data: Path
) -> tuple[Benchmark, dict[str, Any], list[records.ResponseRecord]]:
    """A benchmark, what its responses were made with, and they.

    Raises:
        EvaluationError: responses are missing, or the files are not those that were asked from.
    """
    path = output / "responses" / f"{adapter.name}.jsonl"
    manifest = records.read_manifest(path.with_suffix(".json"))
    benchmark = load_benchmark(adapter, data, limit=manifest.get("limit", 0))
    files = {file.name: digest_of(file) for file in benchmark.files}
    if files != manifest["files"]:
        raise EvaluationError(
            f"{path}: the files under {data} are not those that were asked from; score with those"
        )
    responses = records.read_records(path, records.ResponseRecord)
    known = {question.id: question for question in benchmark.questions}
    for record in responses:
        question = known.get(record.question)
        if question is None or question.order != record.order:
            raise EvaluationError(
                f"{path}: its question {record.question!r} is not, or has its options in another "
                f"order, in the files under {data}; score with the files that were asked from"
            )
    samples = manifest["settings"]["samples"]
    if len(responses) != samples * len(known):
        raise EvaluationError(
            f"{path}: {len(responses):,} of {samples * len(known):,} responses; run generate "
            "again, which makes those that are missing"
        )
    return benchmark, manifest, responses
