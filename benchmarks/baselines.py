"""PPO's critic against a group's baseline on the toy: the same cold start, prompts and number of
samples a step, several seeds; held-out accuracy by steps, and by what the trainer computed. Without
a critic a step is less work: that baseline goes on until it has done as much.

    python benchmarks/baselines.py --cold-start runs/tiny/cold_start_hf \
        --output benchmarks/results/baselines_toy.json --figure benchmarks/results/baselines_toy.png

One vLLM server for all runs. What the output file holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

from objectives import GROUP, TIMEOUT_S, served
from ovr_fast.config import load_config
from ovr_fast.plan.flops import ppo_passes

CASES: dict[str, tuple[str, ...]] = {"critic (PPO)": (), "group's mean (GRPO)": GROUP}
SETS = {"images": "pictures", "text_twins": "text twins"}
COLOURS = ("#3b6fb6", "#c4622d")


def steps_of(config: Path, words: tuple[str, ...], steps: int) -> int:
    """Steps of the trainer's decoder work that ``steps`` of the settings' own are."""
    passes = [ppo_passes(load_config(config, list(more)).rl).decoder for more in ((), words)]
    return round(steps * passes[0] / passes[1])


def curve(folder: Path) -> list[dict[str, float]]:
    """Of a finished run: reward, operations so far, accuracy where it was taken."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    points, tflop = list[dict[str, float]](), 0.0
    for row in map(json.loads, lines):
        if row["stage"] == "rl":
            tflop += row["perf/train_tflop"]
        elif row["stage"] != "base":
            continue
        point = {"step": row["step"], "train_tflop": tflop}
        point |= {k: v for k, v in row.items() if k.endswith("/accuracy")}
        points.append(point | {k: row[k] for k in ("rollout/reward",) if k in row})
    return points


def table(runs: list[dict]) -> str:
    """The last accuracies, as the mean of the seeds and their range."""
    names = [f"eval/{name}/accuracy" for name in SETS]
    lines = ["| baseline | seeds | steps | pictures | text twins | training TFLOP |"]
    lines.append("|---|---|---|---|---|---|")
    for case in CASES:
        found = [run["curve"] for run in runs if run["case"] == case]
        if not found:
            continue
        cells = []
        for name in names:
            last = [points[-1][name] for points in found]
            cells.append(f"{statistics.mean(last):.1%} ({min(last):.1%} to {max(last):.1%})")
        tflop = statistics.mean(points[-1]["train_tflop"] for points in found)
        lines.append(
            f"| {case} | {len(found)} | {found[0][-1]['step']} | {' | '.join(cells)} | "
            f"{tflop:.1f} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict], path: Path) -> None:
    """Accuracy by steps and by operations: the mean of the seeds, and each of them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharey="row")
    for row, (name, title) in zip(axes, SETS.items(), strict=True):
        for axis, key in zip(row, ("step", "train_tflop"), strict=True):
            for case, colour in zip(CASES, COLOURS, strict=True):
                found = [
                    [point for point in run["curve"] if f"eval/{name}/accuracy" in point]
                    for run in runs
                    if run["case"] == case
                ]
                for points in found:
                    axis.plot(
                        [point[key] for point in points],
                        [100 * point[f"eval/{name}/accuracy"] for point in points],
                        color=colour, alpha=0.3, linewidth=1,
                    )  # fmt: skip
                columns = list(zip(*found, strict=True))
                axis.plot(
                    [statistics.mean(point[key] for point in points) for points in columns],
                    [
                        100 * statistics.mean(point[f"eval/{name}/accuracy"] for point in points)
                        for points in columns
                    ],
                    color=colour, linewidth=2, marker="o", label=case,
                )  # fmt: skip
            axis.set_xlabel("steps" if key == "step" else "operations of the trainer, TFLOP")
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"held-out {title}, % right")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="A critic against a group's baseline, on the toy.")
    parser.add_argument("--cold-start", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--steps", type=int, default=32, help="with a critic")
    parser.add_argument("--every", type=int, default=16, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--port", type=int, default=8322)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    common = [
        f"model.path={arguments.cold_start}", 'run.stages=["rl"]',
        "run.save_every=1000000", f"evaluation.every={arguments.every}",
    ]  # fmt: skip
    steps = {
        case: steps_of(arguments.config, words, arguments.steps) for case, words in CASES.items()
    }
    config = ["--config", str(arguments.config)]
    output: Path = arguments.output
    about = {"settings": common, "steps": steps}
    kept = json.loads(output.read_text()) if output.is_file() else about | {"runs": []}
    if {name: kept.get(name) for name in about} != about:
        sys.exit(f"{output} holds runs of other settings: {kept['settings']}, {kept.get('steps')}")
    runs = kept["runs"]
    done = {(run["case"], run["seed"]) for run in runs}
    with served(config, common, arguments.port) as url:
        for seed in arguments.seeds:
            for case, words in CASES.items():
                if (case, seed) in done:
                    continue
                with tempfile.TemporaryDirectory() as root:
                    subprocess.run([
                        sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "1", "-m", "ovr_fast.train", *config, *common, *words,
                        f"rl.steps={steps[case]}", "rollout.servers=0",
                        f'rollout.urls=["{url}"]', f"run.root={root}", "run.name=one",
                        f"run.seed={seed}", "run.data_cache=runs/data_cache",
                    ], check=True, timeout=TIMEOUT_S)  # fmt: skip
                    found = {"case": case, "seed": seed, "curve": curve(Path(root) / "one")}
                runs.append(found)
                text = json.dumps(about | {"runs": runs}, indent=1)
                output.write_text(text + "\n")
                print(table(runs), flush=True)
    if arguments.figure:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
