"""From scores of responses to a benchmark's number, with its errors and what stands beside it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence as List
from dataclasses import asdict
from typing import Any

import numpy as np

from ovr_fast.evaluation import statistics
from ovr_fast.evaluation.adapter import EvaluationError
from ovr_fast.evaluation.question import Benchmark, Question
from ovr_fast.evaluation.records import ResponseRecord, ScoreRecord
from ovr_fast.evaluation.statistics import Estimate

OPEN = ("undecided", "missing")


def question_scores(
    benchmark: Benchmark, scores: List[ScoreRecord], *, open_as: float = 0.0
) -> dict[str, list[float]]:
    """From 0 to 1, each question's samples.

    Args:
        open_as: what one that neither rules nor a judge have decided counts.

    Raises:
        EvaluationError: a question has no score, or fewer than others.
    """
    found: dict[str, list[float]] = {question.id: [] for question in benchmark.questions}
    for score in sorted(scores, key=lambda each: each.key):
        if score.question not in found:
            raise EvaluationError(
                f"{benchmark.adapter.name}: a score of question {score.question!r}, which the "
                "files do not hold"
            )
        worth = open_as if score.outcome in OPEN else score.worth
        found[score.question].append(worth)
    counts = Counter(map(len, found.values()))
    if len(counts) > 1 or 0 in counts:
        raise EvaluationError(
            f"{benchmark.adapter.name}: its questions have {sorted(counts)} responses; run "
            "generate again, which makes those that are missing"
        )
    return found


def estimate(benchmark: Benchmark, worth: dict[str, list[float]]) -> dict[str, Estimate]:
    """The benchmark's numbers by their names; the first is its score."""
    questions, kind = benchmark.questions, benchmark.adapter.aggregate
    means = {name: float(np.mean(samples)) for name, samples in worth.items()}
    if kind == "mean":
        values, clusters = [means[q.id] for q in questions], [q.cluster for q in questions]
        return {"score": statistics.mean(values, clusters)}
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.cluster].append(question)
    if kind == "worst_of":
        worst = np.array([math.prod(means[q.id] for q in group) for group in groups.values()])
        average = [float(np.mean([means[q.id] for q in group])) for group in groups.values()]
        names = list(groups)
        return {
            "score": statistics.bootstrap(lambda drawn: float(worst[drawn].mean()), len(worst)),
            "average": statistics.mean(average, names),
        }
    if kind == "wemath":
        return _wemath(groups, means)
    if kind == "hallusion":
        return _hallusion(groups, means)
    if kind == "f1":
        return _f1(groups, worth)
    return _pairs(groups, means)


def _wemath(groups: dict[str, list[Question]], means: dict[str, float]) -> dict[str, Estimate]:
    """We-Math's score: composites that are right with their steps, and half of those that are wrong
    though all steps are right. "Strict": with all steps right, "loose": with one at least. Means of
    samples stand in for right and wrong, which is unbiased where samples are independent."""
    parts = []
    for group in groups.values():
        whole = [means[q.id] for q in group if "multi" in q.variant]
        steps = [means[q.id] for q in group if "multi" not in q.variant]
        if len(whole) != 1 or not steps:
            raise EvaluationError(
                f"composite {group[0].cluster}: {len(whole)} whole problems and {len(steps)} steps"
            )
        every, none = math.prod(steps), math.prod(1.0 - step for step in steps)
        parts.append((whole[0] * every, whole[0] * (1.0 - none), (1.0 - whole[0]) * every))
    table = np.array(parts).reshape(-1, 3)

    def score(column: int) -> Estimate:
        return statistics.bootstrap(
            lambda drawn: float((table[drawn, column] + 0.5 * table[drawn, 2]).mean()), len(table)
        )

    return {"score": score(0), "loose": score(1)}


def _hallusion(groups: dict[str, list[Question]], means: dict[str, float]) -> dict[str, Estimate]:
    """HallusionBench's mean of three accuracies: of questions, of figures all of whose questions
    are right, and of questions that are right on all of their figures. A set's figures share its
    questions, so sets are redrawn; a question's variant is "figure/question"."""
    rows = []
    for group in groups.values():
        counts = [sum(means[q.id] for q in group), len(group)]
        for part in (0, 1):  # the figure, the question
            together: dict[str, list[float]] = defaultdict(list)
            for question in group:
                together[question.variant.split("/", 1)[part]].append(means[question.id])
            counts += [sum(map(math.prod, together.values())), len(together)]
        rows.append(counts)
    table = np.array(rows)

    def score(drawn: np.ndarray) -> float:
        sums = table[drawn].sum(0)
        return float((sums[0::2] / sums[1::2]).mean())

    return {"score": statistics.bootstrap(score, len(table))}


def _f1(groups: dict[str, list[Question]], worth: dict[str, list[float]]) -> dict[str, Estimate]:
    """F1 of "yes" over clusters; an answer to a "no" that is wrong counts as "yes"."""
    counts = np.zeros((len(groups), 3))
    for place, group in enumerate(groups.values()):
        for question in group:
            right = float(np.mean(worth[question.id]))
            if question.answer.strip().lower() in ("yes", "true"):
                counts[place] += (right, 0.0, 1.0 - right)
            else:
                counts[place, 1] += 1.0 - right

    def f1(drawn: np.ndarray) -> float:
        true, false, missed = counts[drawn].sum(0)
        return float(2 * true / max(1e-12, 2 * true + false + missed))

    return {"score": statistics.bootstrap(f1, len(counts))}


def _pairs(groups: dict[str, list[Question]], means: dict[str, float]) -> dict[str, Estimate]:
    """MME's sum over tasks of accuracy and of accuracy of pairs, in points; a picture's questions
    are a cluster, its first group the task."""
    tasks = sorted({_task(group[0]) for group in groups.values()})
    table = np.array([
        (tasks.index(_task(group[0])), sum(means[q.id] for q in group), len(group),
         math.prod(means[q.id] for q in group))
        for group in groups.values()
    ])  # fmt: skip

    def total(drawn: np.ndarray) -> float:
        rows, points = table[drawn], 0.0
        for task in range(len(tasks)):
            own = rows[rows[:, 0] == task]
            if len(own):
                points += own[:, 1].sum() / own[:, 2].sum() + own[:, 3].mean()
        return float(100 * points)

    return {"score": statistics.bootstrap(total, len(table))}


def _task(question: Question) -> str:
    return question.groups[0][1] if question.groups else ""


def summarize(
    benchmark: Benchmark, responses: List[ResponseRecord], scores: List[ScoreRecord]
) -> dict[str, Any]:
    """Everything that a table or a report says of one benchmark."""
    worth = question_scores(benchmark, scores)
    generous = question_scores(benchmark, scores, open_as=1.0)
    found = estimate(benchmark, worth)
    count = len(scores)
    outcomes = Counter(score.outcome for score in scores)
    finished = [score for score in scores if score.outcome != "truncated"]
    open_ones = sum(outcomes[name] for name in OPEN)
    by_rule = [s for s in finished if s.rule != "judge" and s.outcome in ("correct", "wrong")]
    return {
        "benchmark": benchmark.adapter.name,
        "questions": len(benchmark.questions),
        "samples": count // len(benchmark.questions),
        **{name: asdict(value) for name, value in found.items()},
        "sampling_error": (
            statistics.sampling_error(list(worth.values()))
            if benchmark.adapter.aggregate == "mean"
            else math.nan
        ),
        "score_if_undecided_were_right": (
            estimate(benchmark, generous)["score"].value if open_ones else found["score"].value
        ),
        "shares": {name: outcomes[name] / count for name in sorted(outcomes)},
        "decided_by_rule": len(by_rule) / count,
        "extracted_by": dict(
            sorted((k, v / count) for k, v in Counter(s.extracted_by for s in scores).items())
        ),
        "score_of_finished": (float(np.mean([s.worth for s in finished])) if finished else 0.0),
        "response_tokens": float(np.mean([record.response_tokens for record in responses])),
        "groups": _groups(benchmark, worth),
    }


def _groups(benchmark: Benchmark, worth: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Mean and questions of each value of a group column."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question in benchmark.questions:
        for name, value in question.groups:
            found[name][value].append(float(np.mean(worth[question.id])))
    return {
        name: {v: {"score": float(np.mean(x)), "questions": len(x)} for v, x in sorted(by.items())}
        for name, by in found.items()
    }


def table(results: List[dict[str, Any]]) -> str:
    """Results as Markdown, scores and errors in percent."""
    lines = [
        "| benchmark | questions x samples | score | 95 % interval | error: questions · samples | "
        "truncated | no answer | undecided | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        score, shares = result["score"], result["shares"]
        points = 1 if result["score"]["value"] > 1.5 else 100
        shown = f"{points * score['value']:.1f}"
        generous = result["score_if_undecided_were_right"]
        if generous != score["value"]:
            shown += f" to {points * generous:.1f}"
        for extra in ("average", "loose"):
            if extra in result:
                shown += f" ({extra} {100 * result[extra]['value']:.1f})"
        undecided = sum(shares.get(name, 0.0) for name in OPEN)
        lines.append(
            f"| {result['benchmark']} | {result['questions']:,} x {result['samples']} | {shown} | "
            f"{_points(points * score['low'])} to {_points(points * score['high'])} | "
            f"{_points(points * score['error'])} · {_points(100 * result['sampling_error'])} | "
            f"{shares.get('truncated', 0.0):.1%} | {shares.get('no_answer', 0.0):.1%} | "
            f"{undecided:.1%} | {result['response_tokens']:,.0f} |"
        )
    few = [r["benchmark"] for r in results if r["score"]["clusters"] < statistics.FEW]
    if few:
        lines.append(
            f"\nFewer than {statistics.FEW} independent questions: {', '.join(few)}; their "
            "intervals are Student's, or the bootstrap's, which is too narrow there."
        )
    return "\n".join(lines)


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
