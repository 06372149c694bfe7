"""Figures of a report: SVG whose colours the page sets, PNG, and the numbers behind them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovr_fast.observe.clock import PHASES
from ovr_fast.report.runs import STAGES, Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7a5195", "#6b6b6b")
"""Okabe and Ito's, for colour-blind readers, yellow darkened; the page has its own for the dark."""
_INK, _LINE = "#010203", "#040506"
_MARKED = [f"#fe{n:02x}fd" for n in range(len(COLOURS))]
WIDTH, HEIGHT = 5.4, 3.0  # inches


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A figure of curves over the steps of one stage."""

    name: str
    title: str
    says: str  # below the figure
    stage: str
    metrics: dict[str, str]  # metric: label
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None


PANELS = [
    Panel(name="reward", title="Reward", stage="rl", low=0, says="Mean over a step's rollouts.",
          metrics={"rollout/reward": "reward"}),
    Panel(name="outcomes", title="Outcomes", stage="rl", low=0, high=1,
          says="Shares of a step's responses.",
          metrics={f"reward/{name}": name.replace("_", " ") for name in (
              "correct", "wrong", "truncated", "no_answer", "timeout", "crash")}),
    Panel(name="prompts", title="Prompts that teach", stage="rl", low=0, high=1,
          says="Only a prompt whose samples differ in reward moves the policy.",
          metrics={"rollout/mixed_prompts": "samples differ", "rollout/solved_prompts":
                   "one is right", "rollout/all_right_prompts": "all are right"}),
    Panel(name="length", title="Response length", stage="rl", low=0,
          says="Tokens. The limit moves with the context schedule.",
          metrics={"rollout/length_tokens": "mean", "rollout/length_p50_tokens": "median",
                   "rollout/length_p90_tokens": "nine of ten are shorter",
                   "rollout/limit_tokens": "limit"}),
    Panel(name="length_by_outcome", title="Length by outcome", stage="rl", low=0, says="Tokens.",
          metrics={"rollout/length_correct_tokens": "correct",
                   "rollout/length_wrong_tokens": "all others"}),
    Panel(name="repeat", title="Repetition", stage="rl", low=0,
          says="Share of sequences of 16 tokens that stood in the response before.",
          metrics={"rollout/repeat": "repeated"}),
    Panel(name="entropy", title="Entropy of the policy", stage="rl", low=0,
          says="Nats a token, before the step's first update.",
          metrics={"actor/entropy": "entropy"}),
    Panel(name="gap", title="Sampler and trainer", stage="rl", logarithmic=True,
          says="How far vLLM's log-probs are from the trainer's, nats; no more than rounding.",
          metrics={"rollout/logprob_gap": "mean difference", "rollout/kl": "KL (k3)"}),
    Panel(name="explained_variance", title="What the critic explains", stage="rl", high=1,
          says="1 less the share of the returns' variance that its values leave.",
          metrics={"critic/explained_variance": "explained variance"}),
    Panel(name="value", title="Values and returns", stage="rl",
          says="Means over response tokens.",
          metrics={"critic/value": "value", "critic/return": "return"}),
    Panel(name="gradients", title="Gradient norms", stage="rl", low=0, says="Before clipping.",
          metrics={"actor/grad_norm": "actor", "critic/grad_norm": "critic"}),
    Panel(name="clipping", title="Clipping", stage="rl", low=0,
          says="Share of tokens whose ratio the objective clips.",
          metrics={"actor/clip_frac": "clipped"}),
    Panel(name="staleness", title="Age of the sampling weights", stage="rl", low=0,
          says="Steps, over trained tokens.",
          metrics={"rollout/staleness": "mean", "rollout/staleness_max": "oldest"}),
    Panel(name="cold_start_loss", title="Cold-start loss", stage="cold_start", low=0,
          says="Nats a target token.", metrics={"cold_start/loss": "loss"}),
    Panel(name="speed", title="Speed", stage="rl", low=0,
          says="Response tokens a second, of the time that every step takes.",
          metrics={"perf/tokens_per_second": "tokens/s"}),
    Panel(name="packing", title="Empty places in microbatches", stage="rl", low=0,
          says="Share of tokens that hold nothing.", metrics={"pack/empty_share": "empty"}),
    Panel(name="memory", title="Peak memory", stage="rl", low=0, says="GiB on the fullest rank.",
          metrics={"memory/peak_gib": "allocated"}),
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Of a curve."""

    step: int
    place: float  # on the axis
    value: float
    low: float  # of a group's runs
    high: float


Curve = list[Point]
AXES = {"steps": "step", "tokens": "response tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the page."""

    name: str
    title: str
    says: str
    svg: str


class Drawing:
    """Draws figures and keeps what is behind them.

    Args:
        folder: gets ``png/NAME.png`` and ``data/NAME.csv``.
        axis: of curves, one of ``AXES``.
        groups: names of runs that are one curve, their mean, and a band from the least to the
            largest.
    """

    def __init__(
        self, folder: Path, *, axis: str = "steps", groups: dict[str, tuple[str, ...]] | None = None
    ) -> None:
        self._folder, self._axis = folder, axis
        self._groups = groups or {}

    def prepare(self) -> None:
        """Make the folders."""
        (self._folder / "png").mkdir(parents=True, exist_ok=True)
        (self._folder / "data").mkdir(exist_ok=True)

    def panel(self, panel: Panel, runs: List[Run]) -> Figure | None:
        """Curves of all runs; None where no run has one of the metrics. With several runs a colour
        is a run and a dash is a metric; with one a colour is a metric."""
        curves: list[tuple[str, Curve, int, int]] = []
        stages = [run.sampling if panel.stage == "rl" else panel.stage for run in runs]
        lines = self.lines(runs)
        found = {
            metric: [self._curve(own, panel.stage, metric) for _, own in lines]
            for metric in panel.metrics
        }
        shown = [m for m, each in found.items() if any(each)]
        # A share that is 0 throughout says nothing beside one that is not.
        moving = [m for m in shown if any(p.value for each in found[m] for p in each)]
        shown = moving or shown
        alone = len(lines) == 1
        if not alone:  # more than two dashes of a colour are one
            shown = shown[:2]
        for place, (name, _) in enumerate(lines):
            for number, metric in enumerate(shown):
                label = panel.metrics[metric]
                if not alone:
                    label = f"{name}: {label}" if len(shown) > 1 else name
                colour, dash = (number, 0) if alone else (place, number)
                curves.append((label, found[metric][place], colour, dash))
        if not shown:
            return None

        def draw(axes: Any, colours: List[str]) -> None:
            for label, points, colour, dash in curves:
                few = len(points) < 3
                places = [p.place for p in points]
                own = colours[colour % len(colours)]
                axes.plot(
                    places, [p.value for p in points], label=_shown(label), color=own, lw=1.4,
                    marker="o" if few else "", ms=3, ls=("-", "--", ":", "-.")[dash % 4],
                )  # fmt: skip
                if any(p.low < p.high for p in points):
                    axes.fill_between(
                        places, [p.low for p in points], [p.high for p in points], color=own,
                        alpha=0.18, lw=0,
                    )  # fmt: skip
            axes.set_xlabel(f"{STAGES[stages[0]]} {AXES[self._axis]}")
            if panel.logarithmic and any(p.value > 0 for _, points, *_ in curves for p in points):
                number_axis(axes)
            else:
                axes.set_ylim(bottom=panel.low, top=panel.high)
            if len(curves) > 1:
                _legend(axes)

        table = [
            (label, stages[0], p.step, p.place, p.value, p.low, p.high)
            for label, points, *_ in curves
            for p in points
        ]
        header = ("curve", "stage", "step", "place", "value", "least", "largest")
        return self._figure(panel, draw, header, table)

    def lines(self, runs: List[Run]) -> list[tuple[str, list[Run]]]:
        """What gets a colour: groups where their first run stands, and runs in none."""
        grouped = {name: group for group, names in self._groups.items() for name in names}
        found: dict[str, list[Run]] = {}
        for run in runs:
            found.setdefault(grouped.get(run.name, run.name), []).append(run)
        return list(found.items())

    def _curve(self, runs: List[Run], stage: str, metric: str) -> Curve:
        """Of one run its points; of several their mean and range at each step that all have."""
        stages = [run.sampling if stage == "rl" else stage for run in runs]
        each = [dict(run.series(s, metric)) for run, s in zip(runs, stages, strict=True)]
        steps = [step for step in each[0] if all(step in own for own in each)]
        places = [
            run.tokens(s) if self._axis == "tokens" else {step: float(step) for step in steps}
            for run, s in zip(runs, stages, strict=True)
        ]
        points = []
        for step in steps:
            values = [own[step] for own in each]
            points.append(
                Point(
                    step=step, place=float(np.mean([own[step] for own in places])),
                    value=float(np.mean(values)) if len(values) > 1 else values[0],
                    low=min(values), high=max(values),
                )
            )  # fmt: skip
        return points

    def accuracy(self, runs: List[Run]) -> list[Figure]:
        """Held-out accuracy over the stages, a figure a set, with two standard errors."""
        names = dict.fromkeys(name for run in runs for name in run.accuracies())
        return [self._accuracy(name, number, runs) for number, name in enumerate(names, 1)]

    def _accuracy(self, name: str, number: int, runs: List[Run]) -> Figure:
        points = [run.accuracies().get(name, []) for run in runs]
        # Of all runs, in the order of stages and steps.
        order = [*STAGES]
        places = sorted(
            {(stage, step) for each in points for stage, step, *_ in each},
            key=lambda place: (order.index(place[0]), place[1]),
        )
        table = [
            (run.name, *point) for run, each in zip(runs, points, strict=True) for point in each
        ]
        lines = self.lines(runs)

        def draw(axes: Any, colours: List[str]) -> None:
            for number, (label, members) in enumerate(lines):
                own: dict[int, list[tuple[float, float]]] = {}
                names = {run.name for run in members}
                for run_name, stage, step, value, error in table:
                    if run_name in names:
                        at = own.setdefault(places.index((stage, step)), [])
                        at.append((value, 2 * (error or 0.0)))
                middles = [float(np.mean([value for value, _ in at])) for at in own.values()]
                bars = [at[0][1] for at in own.values()], [at[0][1] for at in own.values()]
                if len(members) > 1:  # from the least to the largest of the group
                    pairs = list(zip(own.values(), middles, strict=True))
                    bars = (
                        [middle - min(value for value, _ in at) for at, middle in pairs],
                        [max(value for value, _ in at) - middle for at, middle in pairs],
                    )
                axes.errorbar(
                    list(own), middles, yerr=np.maximum(0.0, bars), marker="o", ms=3.5, capsize=2,
                    lw=1.4, color=colours[number % len(colours)], label=_shown(label),
                )  # fmt: skip
            labels = [
                f"{STAGES[stage]} {step}" if step else STAGES[stage] for stage, step in places
            ]
            axes.set_xticks(range(len(places)), labels, rotation=30, ha="right", fontsize=8)
            axes.set_ylim(0, 1 if all(row[3] <= 1 for row in table) else None)
            if len(lines) > 1:
                _legend(axes)

        panel = Panel(
            name=f"accuracy_{number}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}", title=name,
            stage="rl", metrics={}, says="Share of right answers; bars are two standard errors "
            "over questions, where the run measured them, or a group's range.",
        )  # fmt: skip
        return self._figure(panel, draw, ("run", "stage", "step", "accuracy", "error"), table)

    def intervals(
        self, panel: Panel, rows: List[tuple[str, str, float | None, float | None, float | None]]
    ) -> Figure | None:
        """Numbers with their intervals: (what, series, value, low, high), None where there is no
        interval, and not drawn where there is no value."""
        drawn = [
            (what, each, value, value if low is None else low, value if high is None else high)
            for what, each, value, low, high in rows
            if value is not None
        ]
        if not drawn:
            return None
        names = list(dict.fromkeys(row[0] for row in drawn))
        series = list(dict.fromkeys(row[1] for row in drawn))

        def draw(axes: Any, colours: List[str]) -> None:
            for number, each in enumerate(series):
                own = [row for row in drawn if row[1] == each]
                shift = (number - (len(series) - 1) / 2) * 0.22
                values = [row[2] for row in own]
                bars = [(row[2] - row[3], row[4] - row[2]) for row in own]
                axes.errorbar(
                    values, [names.index(row[0]) + shift for row in own], fmt="o", ms=4, capsize=2,
                    xerr=np.maximum(0.0, bars).T,
                    color=colours[number % len(colours)], label=_shown(each), lw=1.4,
                )  # fmt: skip
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.invert_yaxis()
            axes.set_xlim(left=0)
            if len(series) > 1:
                _legend(axes)

        height = max(HEIGHT * 0.6, 0.42 * len(names) + 0.9)
        return self._figure(
            panel, draw, ("what", "series", "value", "low", "high"), rows, height=height
        )

    def phases(self, runs: List[Run]) -> Figure | None:
        """Where the time went: hours of each phase, a bar a run."""
        hours = [run.hours() for run in runs]
        shown = [phase for phase in PHASES if any(each.get(phase, 0.0) for each in hours)]
        if not shown:
            return None

        def draw(axes: Any, colours: List[str]) -> None:
            ends = [0.0] * len(runs)
            for number, phase in enumerate(shown):
                own = [each.get(phase, 0.0) for each in hours]
                axes.barh(
                    range(len(runs)), own, left=ends, height=0.6, label=phase.replace("_", " "),
                    color=colours[number % len(colours)], alpha=1.0 if number < 8 else 0.55,
                )  # fmt: skip
                ends = [end + more for end, more in zip(ends, own, strict=True)]
            axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=8)
            axes.invert_yaxis()
            axes.set_xlabel("hours")
            _legend(axes, columns=4)

        panel = Panel(
            name="phases", title="Time by phase", says="Hours of the first rank, the whole run.",
            stage="rl", metrics={},
        )  # fmt: skip
        table = [
            (run.name, phase, each.get(phase, 0.0))
            for run, each in zip(runs, hours, strict=True)
            for phase in shown
        ]
        return self._figure(
            panel, draw, ("run", "phase", "hours"), table, height=1.5 + 0.45 * len(runs)
        )

    def _figure(
        self, panel: Panel, draw: Any, header: tuple[str, ...], table: List[tuple], *,
        height: float = HEIGHT,
    ) -> Figure:  # fmt: skip
        svg = io.StringIO()
        _render(draw, height, _INK, _LINE, _MARKED, svg, "svg")
        png = self._folder / "png" / f"{panel.name}.png"
        _render(draw, height, "#222222", "#dddddd", COLOURS, png, "png")
        with open(self._folder / "data" / f"{panel.name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(table)
        return Figure(
            name=panel.name, title=panel.title, says=panel.says, svg=_for_page(svg.getvalue())
        )


def _shown(name: str) -> str:
    """In a legend, which leaves out what begins with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def _legend(axes: Any, *, columns: int = 2) -> None:
    """Above the axes, where no curve is."""
    axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0))


def _render(
    draw: Any, height: float, ink: str, line: str, colours: List[str], target: Any, kind: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "ovr_fast", "text.color": ink,
        "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": line, "grid.linewidth": 0.6, "font.size": 9, "axes.axisbelow": True,
        "text.parse_math": False,  # a name with two dollar signs is a name
    }  # fmt: skip
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes, colours)
        clear = kind == "svg"
        figure.savefig(
            target, format=kind, transparent=clear, dpi=130,
            metadata={"Date": None, "Creator": None} if clear else None,
        )  # fmt: skip
        plt.close(figure)


def number_axis(axes: Any) -> None:
    """A logarithmic y axis, labelled in plain text: mathematics is not parsed in a report."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))


def _for_page(svg: str) -> str:
    """The SVG element alone, as wide as there is room, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, name in ((_INK, "ink"), (_LINE, "line")):
        svg = svg.replace(colour, f"var(--{name})")
    for number, colour in enumerate(_MARKED):
        svg = svg.replace(colour, f"var(--c{number})")
    return svg
