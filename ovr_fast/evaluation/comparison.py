"""Two evaluations, question by question."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path

from ovr_fast.evaluation import statistics
from ovr_fast.evaluation.adapter import EvaluationError, adapter_of
from ovr_fast.evaluation.records import ScoreRecord, read_manifest, read_records
from ovr_fast.evaluation.results import OPEN
from ovr_fast.evaluation.statistics import Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of one benchmark."""

    benchmark: str
    what: str  # that is compared: its score, or the mean of its questions where that is another
    first: float  # mean of the questions
    second: float
    difference: Difference
    p_corrected: float  # by Holm, over the benchmarks that were compared together
    first_open: float  # share of answers that nothing has decided; they count as wrong
    second_open: float


def scored(folder: Path) -> list[str]:
    """Benchmarks that an evaluation holds scores of.

    Raises:
        EvaluationError: it holds none.
    """
    found = sorted(path.stem for path in (folder / "scores").glob("*.jsonl"))
    if not found:
        raise EvaluationError(f"{folder} holds no scores; score makes them")
    return found


def compare(first: Path, second: Path, benchmarks: List[str] | None = None) -> list[Comparison]:
    """Every benchmark that both have, or of some.

    Raises:
        EvaluationError: they have none in common, or one was asked or scored otherwise in one.
    """
    rows = []
    for name in common(first, second) if benchmarks is None else benchmarks:
        check_alike(first, second, name)
        both = [_of(folder, name) for folder in (first, second)]
        means, opened, clusters = zip(*both, strict=True)
        names = sorted(means[0])
        if names != sorted(means[1]):
            raise EvaluationError(f"{name}: {first} and {second} have other questions")
        found = statistics.paired(
            [means[0][q] for q in names], [means[1][q] for q in names],
            [clusters[0].get(q, q) for q in names],
        )  # fmt: skip
        rows.append((name, means, opened, found))
    if not rows:
        raise EvaluationError(f"{first} and {second} have no scored benchmark in common")
    corrected = statistics.holm([found.p for *_, found in rows])
    return [
        Comparison(
            benchmark=name, what=_what(first, name), difference=found, p_corrected=p,
            first=sum(means[0].values()) / len(means[0]),
            second=sum(means[1].values()) / len(means[1]),
            first_open=opened[0], second_open=opened[1],
        )
        for (name, means, opened, found), p in zip(rows, corrected, strict=True)
    ]  # fmt: skip


def common(first: Path, second: Path) -> list[str]:
    """Benchmarks that both hold scores of."""
    return [name for name in scored(first) if name in scored(second)]


def check_alike(first: Path, second: Path, name: str) -> None:
    """Whether two numbers may be compared.

    Raises:
        EvaluationError: they may not; says what differs.
    """
    both = (first, second)
    asked = [read_manifest(folder / "responses" / f"{name}.json") for folder in both]
    for key in ("protocol", "limit", "files"):
        if asked[0].get(key) != asked[1].get(key):
            raise EvaluationError(
                f"{name}: {first} and {second} were made with another {key}, so their "
                "numbers are not comparable"
            )
    by = [read_manifest(folder / "scores" / f"{name}.json") for folder in both]
    for key in ("judge", "adapter"):
        if by[0].get(key) != by[1].get(key):
            raise EvaluationError(
                f"{name}: {first} and {second} were scored with another {key}; score both alike"
            )


def _what(folder: Path, name: str) -> str:
    adapter = adapter_of(read_manifest(folder / "responses" / f"{name}.json"))
    return name if adapter.aggregate == "mean" else f"{name} (mean of its questions)"


def _of(folder: Path, name: str) -> tuple[dict[str, float], float, dict[str, str]]:
    """Means of the questions' samples, the share that is open, and the questions' clusters.

    Raises:
        EvaluationError: its questions come in clusters, which the scores do not say.
    """
    scores = read_records(folder / "scores" / f"{name}.jsonl", ScoreRecord)
    found: dict[str, list[float]] = {}
    for each in scores:
        found.setdefault(each.question, []).append(each.worth)
    said = read_manifest(folder / "scores" / f"{name}.json")
    clusters = said.get("clusters")
    adapter = adapter_of(read_manifest(folder / "responses" / f"{name}.json"))
    if adapter.cluster and not isinstance(clusters, dict):
        raise EvaluationError(
            f"{folder}: the scores of {name} do not say which questions belong together; score it "
            "again"
        )
    means = {question: sum(values) / len(values) for question, values in found.items()}
    opened = sum(score.outcome in OPEN for score in scores) / max(1, len(scores))
    return means, opened, clusters or {}
