"""The page: what is on it, in which order."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from ovr_fast.behaviours.study import agreements, corrected_text
from ovr_fast.evaluation import comparison, statistics
from ovr_fast.evaluation.adapter import EvaluationError
from ovr_fast.report.figures import PANELS, Drawing, Figure, Panel
from ovr_fast.report.runs import STAGES, ReportError, Run, differing, read_json, read_run
from ovr_fast.report.samples import Sample, choose

MOST_RUNS = 8
MOST_BYTES = 10_000_000
"""Of a page that mail and code hosts still show."""
SECTIONS = {
    "Reward and outcomes": ("reward", "outcomes", "prompts"),
    "Length": ("length", "length_by_outcome", "repeat"),
    "Health": ("gap", "entropy", "explained_variance", "value", "gradients", "clipping",
               "staleness"),
    "Cold start": ("cold_start_loss",),
}  # fmt: skip
EXAMPLES = 2
"""Of a behaviour on which two analyses differ."""
COST = ("speed", "packing", "memory")

Table = tuple[tuple[str, ...], list[tuple[Any, ...]], int]
"""Head, rows, and how many columns hold words."""


@dataclass(slots=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    says: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # folded: (name, text)

    @property
    def id(self) -> str:
        """Its anchor."""
        return self.title.lower().replace(" ", "-")

    @property
    def empty(self) -> bool:
        """It has nothing to show."""
        return not (self.tables or self.figures or self.samples or self.texts)


def write_report(
    folders: List[Path], output: Path, *, evaluations: List[Path] = (),
    behaviours: List[Path] = (), title: str = "", axis: str = "steps",
    groups: dict[str, tuple[str, ...]] | None = None, quotes: bool = True,
) -> Path:  # fmt: skip
    """Write ``report.html`` with its figures and numbers; its path.

    Args:
        folders: of runs.
        evaluations: folders of ``ovr_fast.evaluate``.
        behaviours: folders of ``ovr_fast.behaviours``.
        axis: of curves: "steps", or "tokens" of responses.
        groups: names of runs that are drawn as one: their mean, and their range.
        quotes: whether words of benchmarks' responses may stand on the page.

    Raises:
        ReportError, BehaviourError, EvaluationError: a folder does not hold what it should; nothing
            is written then.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ReportError(f"two runs have one name: {', '.join(names)}; rename a folder")
    _check_groups(groups or {}, names)
    drawing = Drawing(output, axis=axis, groups=groups)
    if (colours := len(drawing.lines(runs))) > MOST_RUNS:
        raise ReportError(
            f"{colours} runs; a page shows {MOST_RUNS}, a colour each: name fewer, or --group"
        )
    models = [folder.resolve().name for folder in evaluations]
    if len(set(models)) < len(models):
        raise ReportError(f"two evaluations have one name: {', '.join(models)}; rename a folder")
    measured = [
        (name, read_json(folder, "results.json", ("benchmark", "score", "questions", "protocol")))
        for name, folder in zip(models, evaluations, strict=True)
    ]
    analysed = [
        row
        for folder in behaviours
        for row in read_json(folder, "behaviours.json", ("kind", "behaviour", "responses", "judge"))
    ]
    compared, agreed = _comparisons(evaluations), _agreements(behaviours, quotes)
    drawing.prepare()
    panels = {panel.name: panel for panel in PANELS}

    def drawn(wanted: List[str]) -> list[Figure]:
        found = [drawing.panel(panels[name], runs) for name in wanted]
        return [figure for figure in found if figure is not None]

    phases = drawing.phases(runs)
    sections = [
        Section(title="Accuracy", figures=drawing.accuracy(runs), tables=_accuracies(runs)),
        *(Section(title=name, figures=drawn(wanted)) for name, wanted in SECTIONS.items()),
        _benchmarks(measured, compared, drawing),
        _behaviours(analysed, agreed, drawing),
        Section(title="Samples", samples=[sample for run in runs for sample in choose(run)]),
        Section(
            title="Cost", tables=_cost(runs),
            figures=[*([phases] if phases else []), *drawn(COST)],
        ),
        _provenance(runs),
    ]  # fmt: skip
    page = output / "report.html"
    text = _template().render(
        title=title or ", ".join(names),
        subtitle=_subtitle(runs),
        overview=[{"name": run.name, "tiles": _tiles(run)} for run in runs],
        sections=[section for section in sections if not section.empty],
    )
    partial = page.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(page)
    return page


def _check_groups(groups: dict[str, tuple[str, ...]], runs: List[str]) -> None:
    members = [name for names in groups.values() for name in names]
    if unknown := [name for name in members if name not in runs]:
        raise ReportError(f"a group names {unknown[0]!r}, which is none of {', '.join(runs)}")
    if len(set(members)) < len(members):
        raise ReportError("a run is in two groups")
    if taken := [name for name in groups if name in runs and name not in groups[name]]:
        raise ReportError(f"a group has the name of a run outside it: {taken[0]!r}")


def _template() -> Any:
    import jinja2

    source = files("ovr_fast.report").joinpath("page.html.j2").read_text()
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)


def _subtitle(runs: List[Run]) -> str:
    said = []
    for run in runs:
        done = {row["stage"]: row["step"] for row in run.rows}
        steps = ", ".join(f"{STAGES[s]} {n} steps" for s, n in done.items() if n)
        model = run.config.get("model", {}).get("path", "")
        said.append(f"{run.name}: {model}; {steps}")
    return " · ".join(said)


def _tiles(run: Run) -> list[dict[str, str]]:
    tiles = [
        {"what": f"{name}, at the end", "value": _score(points[-1][2])}
        for name, points in run.accuracies().items()
    ]
    for what, metric, form in (
        ("reward of the last step", "rollout/reward", "{:.2f}"),
        ("tokens a response, last step", "rollout/length_tokens", "{:,.0f}"),
        ("log-prob gap, nats", "rollout/logprob_gap", "{:.1e}"),
    ):
        if found := run.series(run.sampling, metric):
            tiles.append({"what": what, "value": form.format(found[-1][1])})
    if hours := run.hours().get("step"):
        world = int(run.environment.get("world", 1))
        devices = run.environment.get("devices") or []
        tiles.append({"what": "hours", "value": f"{hours:.2g}"})
        if devices:
            tiles.append({"what": "GPU-hours of the trainer", "value": f"{hours * world:,.0f}"})
    return tiles


def _accuracies(runs: List[Run]) -> list[Table]:
    """The last accuracy of each stage, by set and run."""
    rows = []
    stages = [s for s in STAGES if any(row["stage"] == s for run in runs for row in run.rows)]
    for run in runs:
        for name, points in run.accuracies().items():
            last = {stage: (value, error) for stage, _, value, error in points}
            cells = [_with_error(*last[stage]) if stage in last else "" for stage in stages]
            rows.append((run.name, name, *cells))
    return [(("run", "set", *(STAGES[stage] for stage in stages)), rows, 2)] if rows else []


def _score(value: float | None) -> str:
    """A share in percent; another number as it is."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if value <= 1 else f"{value:,.1f}"


def _with_error(value: float, error: float | None) -> str:
    shown = _score(value)
    if error is None:
        return shown
    return f"{shown} ± {100 * error:.1f}" if value <= 1 else f"{shown} ± {error:,.1f}"


def _benchmarks(
    measured: List[tuple[str, list[dict]]], compared: list[Table], drawing: Drawing
) -> Section:
    """Scores with their errors, their intervals side by side, and what is better than what."""
    rows, points = [], []
    for model, results in measured:
        for row in results:
            score, name = row["score"], row["benchmark"]
            sampling = row.get("sampling_error")
            points.append((name, model, score["value"], score["low"], score["high"]))
            whole = score["value"] is None or score["value"] <= 1
            low, high, error, over_samples = (
                "" if value is None else f"{value:.3f}" if whole else f"{value:,.1f}"
                for value in (score["low"], score["high"], score["error"], sampling)
            )
            rows.append((
                name, model, _score(score["value"]), error, over_samples,
                f"{low} to {high}" if low else "", f"{row['questions']:,}",
                f"{row['response_tokens']:,.0f}", row["protocol"],
            ))  # fmt: skip
    panel = Panel(
        name="benchmarks", title="Scores", stage="rl", metrics={},
        says="With 95 % intervals over questions; scores that are no share are in the table alone.",
    )  # fmt: skip
    figure = drawing.intervals(panel, [p for p in points if p[2] is not None and p[2] <= 1])
    head = ("benchmark", "model", "score", "error over questions", "over samples",
            "95 % interval", "questions", "tokens", "protocol")  # fmt: skip
    return Section(
        title="Benchmarks",
        says="Two errors beside a score: over questions, as if others of the kind had been asked, "
        "and over samples of these. Scores compare only under one protocol.",
        tables=[(head, sorted(rows), 2), *compared] if rows else [],
        figures=[figure] if figure else [],
    )


def _comparisons(folders: List[Path]) -> list[Table]:
    """Each two evaluations, benchmark by benchmark where both have its scores: question by
    question, or why they may not be compared. Holm's correction is over all of the table."""
    found: list[tuple[str, comparison.Comparison]] = []
    refused: list[tuple[Any, ...]] = []
    with_scores = [folder for folder in folders if any((folder / "scores").glob("*.jsonl"))]
    for first, second in combinations(with_scores, 2):
        names = f"{first.resolve().name} to {second.resolve().name}"
        for benchmark in comparison.common(first, second):
            try:
                found += [(names, e) for e in comparison.compare(first, second, [benchmark])]
            except EvaluationError as error:
                said = str(error)
                for folder in (first, second):
                    said = said.replace(str(folder), folder.resolve().name)
                refused.append((said, names, "", "", "", "", ""))
    corrected = statistics.holm([each.difference.p for _, each in found])
    rows = [
        (
            each.what, names, f"{100 * each.difference.value:+.1f}",
            f"{100 * each.difference.low:+.1f} to {100 * each.difference.high:+.1f}", _p_value(p),
            f"{each.difference.wins} · {each.difference.losses}",
            f"{100 * each.difference.smallest:.1f}",
        )
        for (names, each), p in zip(found, corrected, strict=True)
    ]  # fmt: skip
    head = ("paired comparison", "from … to", "difference, points", "95 % interval",
            "p, Holm's", "better · worse", "it could show")  # fmt: skip
    rows = sorted([*rows, *refused])
    return [(head, rows, 2)] if rows else []


def _p_value(value: float) -> str:
    return "" if value != value else "<0.001" if value < 0.001 else f"{value:.3f}"


def _behaviours(analysed: List[dict[str, Any]], agreed: list[Table], drawing: Drawing) -> Section:
    """Emergence of the eight behaviours, and of visual ones over their counterparts."""
    shares, ratios, points, bars = [], [], [], []
    several = len({row["judge"] for row in analysed}) > 1
    for row in analysed:
        name, behaviour = row["responses"], row["behaviour"].replace("_", " ")
        name = f"{name} ({row['judge']})" if several else name
        estimable = row["value"] is not None
        interval = f"{_percent(row['low'])} to {_percent(row['high'])}" if estimable else ""
        if row["kind"] == "share":
            points.append((behaviour, name, row["value"], row["low"], row["high"]))
            shares.append((
                behaviour, name, _percent(row["value"]), interval, corrected_text(row),
                f"{row['mean_count']:.2f}", row["judge"],
            ))  # fmt: skip
        else:
            if estimable and not row["note"]:
                bars.append((behaviour, name, row["value"], row["low"], row["high"]))
            counts = f"{row['visual']} / {row['linguistic']} of {row['traces']}"
            ratios.append((behaviour, name, _percent(row["value"]), interval, counts, row["note"]))
    panels = (
        Panel(name="behaviours", title="Share of responses that show it", stage="rl", metrics={},
              says="With 95 % intervals (Jeffreys)."),
        Panel(name="transfer", title="Visual over linguistic", stage="rl", metrics={},
              says="Behaviour transfer rate, with 95 % intervals (Dirichlet)."),
    )  # fmt: skip
    found = [drawing.intervals(panels[0], points), drawing.intervals(panels[1], bars)]
    tables: list[Table] = []
    if shares:
        tables = [
            (("behaviour", "responses", "share", "95 % interval", "corrected", "a response",
              "judge"), sorted(shares), 2),
            (("transfer", "responses", "rate", "95 % interval", "visual / linguistic", "note"),
             sorted(ratios), 2),
        ]  # fmt: skip
    return Section(
        title="Behaviours",
        says="The rate of a visual behaviour over that of its linguistic counterpart, on the same "
        "responses. It also moves by its denominator: read it with both shares.",
        tables=[*tables, *agreed],
        figures=[figure for figure in found if figure],
    )  # fmt: skip


def _agreements(folders: List[Path], quotes: bool) -> list[Table]:
    """Each two analyses of the same responses: how far they agree, and where they do not."""
    rows: list[tuple[Any, ...]] = []
    examples: list[tuple[Any, ...]] = []
    for first, second in combinations(folders, 2):
        names = f"{first.resolve().name}, {second.resolve().name}"
        for each in agreements(first, second):
            behaviour = each.behaviour.replace("_", " ")
            rows.append((
                behaviour, each.responses, names, f"{each.same:.1%}", _number(each.kappa),
                _number(each.ac1), _number(each.rank), each.common,
            ))  # fmt: skip
            examples += [
                (behaviour, f"{each.responses}: {question}", names, a or "-", b or "-")
                for question, a, b in each.differing[:EXAMPLES]
            ]
    head = ("behaviour", "responses", "analyses", "equal", "kappa", "AC1", "rank correlation",
            "responses read")  # fmt: skip
    tables: list[Table] = [(head, sorted(rows), 3)] if rows else []
    if examples and quotes:
        head_of_quotes = (
            "where they differ",
            "response",
            "analyses",
            "the first quotes",
            "the second",
        )
        tables.append((head_of_quotes, examples, 5))
    return tables


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: Any) -> str:
    return "" if value is None or value != value else f"{value:.3g}"


def _cost(runs: List[Run]) -> list[Table]:
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        hours = run.hours()
        whole = hours.get("step", 0.0)
        tokens = sum(value for _, value in run.series(run.sampling, "rollout/response_tokens"))
        tflop = sum(value for s in STAGES for _, value in run.series(s, "perf/train_tflop"))
        mfu = run.series("rl", "perf/mfu")
        rows.append((
            run.name, f"{whole:.3g}", str(run.environment.get("world", "")),
            f"{tokens:,.0f}", f"{tflop:,.0f}", f"{mfu[-1][1]:.1%}" if mfu else "",
        ))  # fmt: skip
    head = ("run", "hours", "ranks", "response tokens", "TFLOP of training", "MFU, last step")
    return [(head, rows, 1)]


def _provenance(runs: List[Run]) -> Section:
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        about = run.environment
        packages = ", ".join(f"{k} {v}" for k, v in (about.get("packages") or {}).items())
        changed = " with uncommitted changes" if about.get("uncommitted_changes") else ""
        machine = ", ".join(about.get("devices") or []) or about.get("machine", "")
        commit = f"{(about.get('commit') or '')[:12]}{changed}"
        rows.append((run.name, about.get("time", ""), commit, machine, packages))
    tables: list[Table] = [(("run", "began", "commit", "machine", "packages"), rows, 5)]
    if len(runs) > 1 and (found := differing(runs)):
        head = ("setting", *(run.name for run in runs))
        tables.append((head, [(key, *values) for key, values in found], 1 + len(runs)))
    texts = []
    for run in runs:
        config = run.folder / "config.toml"
        texts.append((f"settings of {run.name}", config.read_text()))
    return Section(title="Provenance", tables=tables, texts=texts)
