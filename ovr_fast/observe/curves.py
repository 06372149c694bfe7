"""Plots of one run, and of several seeds of one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ovr_fast.observe.clock import PHASES

_EVALUATION = "eval/"


def _axes(columns: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 3.6), layout="constrained")
    return plt, figure, axes


def accuracy_points(rows: list[dict]) -> dict[str, list[tuple[str, int, float]]]:
    """Per evaluation set: (stage, step, accuracy) in order."""
    points: dict[str, list[tuple[str, int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(_EVALUATION) and key.endswith("/accuracy"):
                name = key.removeprefix(_EVALUATION).removesuffix("/accuracy")
                points.setdefault(name, []).append((row["stage"], row["step"], value))
    return points


def draw_run(rows: list[dict], path: Path) -> None:
    """Held-out accuracy, reward and length, critic (without one, prompts whose samples differ),
    seconds by phase: four panels of one run."""
    if not rows:
        return
    plt, figure, (left, middle, right, last) = _axes(4)
    for name, points in sorted(accuracy_points(rows).items()):
        left.plot(range(len(points)), [p[2] for p in points], marker="o", ms=3, label=name)
        left.set_xticks(range(len(points)))
        labels = [f"{stage} {step}" for stage, step, _ in points]
        left.set_xticklabels(labels, rotation=60, ha="right", fontsize=7)
    left.set(title="held-out accuracy", ylim=(0, 1.02))
    if accuracy_points(rows):
        left.legend(fontsize=7)
    rl = [row for row in rows if row["stage"] == "rl" and "rollout/reward" in row]
    steps = [row["step"] for row in rl]
    middle.plot(steps, [row["rollout/reward"] for row in rl], color="tab:green")
    middle.set(title="rollout/reward", xlabel="RL step", ylim=(0, 1.02))
    length = middle.twinx()
    length.plot(steps, [row["rollout/length_tokens"] for row in rl], color="tab:gray", lw=0.8)
    length.set_ylabel("rollout/length_tokens", color="tab:gray")
    name = "critic/explained_variance"
    if not any(name in row for row in rl):
        name = "rollout/mixed_prompts"
    right.plot(steps, [row.get(name, float("nan")) for row in rl], color="tab:purple")
    right.set(title=name, xlabel="RL step", ylim=(-0.5 if "critic" in name else 0, 1.02))
    timed = {phase: [row.get(f"time/{phase}_s", 0.0) for row in rl] for phase in PHASES}
    shown = {phase: seconds for phase, seconds in timed.items() if sum(seconds) > 0}
    if shown:
        colours = plt.get_cmap("tab20").colors
        last.stackplot(steps, *shown.values(), labels=list(shown), colors=colours, step="mid")
        last.legend(fontsize=6, ncols=2, loc="upper right")
    last.set(title="time/PHASE_s", xlabel="RL step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_seeds(runs: list[list[dict]], path: Path) -> dict[str, dict[str, list[float]]]:
    """The three curves of several seeds in one figure: base, cold start, RL, by evaluation set.

    Returns:
        ``{set: {"base": [per seed], "cold_start": [...], "rl": [...]}}``, the last accuracy of
        each stage.
    """
    plt, figure, (left, right) = _axes(2)
    per_run = [accuracy_points(rows) for rows in runs]
    table: dict[str, dict[str, list[float]]] = {}
    for number, name in enumerate(sorted(per_run[0])):
        colour = f"C{number}"
        stages = {
            stage: [
                [p[2] for p in points[name] if p[0] == stage][-1]
                for points in per_run
                if any(p[0] == stage for p in points[name])
            ]
            for stage in ("base", "cold_start", "rl")
        }
        table[name] = stages
        kept = [stage for stage in stages if stages[stage]]
        means = [np.mean(stages[stage]) for stage in kept]
        left.errorbar(
            range(len(kept)),
            means,
            yerr=[
                means - np.array([min(stages[s]) for s in kept]),
                np.array([max(stages[s]) for s in kept]) - means,
            ],
            marker="o", capsize=3, color=colour, label=name,
        )  # fmt: skip
        left.set_xticks(range(len(kept)))
        left.set_xticklabels(["base", "after cold start", "after RL"][: len(kept)])
        for points in per_run:
            curve = [(p[1], p[2]) for p in points[name] if p[0] == "rl"]
            start = [p[2] for p in points[name] if p[0] == "cold_start"][-1:]
            curve = [(0, value) for value in start] + curve
            right.plot(*zip(*curve, strict=True), color=colour, lw=1.0, alpha=0.8)
    left.set(title=f"held-out accuracy, mean and range of {len(runs)} seeds", ylim=(0, 1.02))
    left.legend(fontsize=8)
    right.set(title="during RL, a line a seed", xlabel="RL step", ylim=(0, 1.02))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw several seeds of a run in one figure and print their accuracies."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="figure, PNG")
    arguments = parser.parse_args()
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in arguments.runs
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    table = draw_seeds(rows, arguments.output)
    print("| held-out set | base | after cold start | after RL |\n|---|---|---|---|")
    for name, stages in table.items():
        cells = [
            f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
            for values in stages.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
