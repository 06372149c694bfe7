"""The memory plan beside what a rehearsal's allocator and card gave, layout by layout.

    .venv-gpu/bin/python benchmarks/rehearsal.py --output benchmarks/results/rehearsal.json

Each case is a 7B-wide model of four layers, or a whole model by a file of configs/, two steps,
microbatches of one longest rollout; one rank of each of two pipeline stages, else of the first and
the last, runs alone. Needs ``make gpu-env``, no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from ovr_fast.config import load_config
from ovr_fast.plan.memory import memory_plan
from ovr_fast.shape.model_shape import read_shape

ROOT = Path(__file__).parents[1]
SHORT = [
    "rl.max_prompt_tokens=1024", "rl.max_response_tokens=15360",
    "rl.max_tokens_per_microbatch=16384", "rl.critic_steps=1", "rl.samples_per_prompt=2",
    "rl.context_tokens=[15360]", "rl.context_steps=[]",
]  # fmt: skip


def layout(tensor: int, pipeline: int, data: int, *more: str) -> list[str]:
    """Overrides of a layout."""
    sizes = {"world": tensor * pipeline * data, "tensor": tensor, "pipeline": pipeline}
    return [*(f"parallel.{name}={size}" for name, size in sizes.items()), *more]


SELECTIVE, OFFLOAD = "model.recompute=selective", "parallel.offload=model"
LAYERS = 4  # of the language model
LONG = [
    "rl.max_prompt_tokens=4096", "rl.max_response_tokens=49152",
    "rl.max_tokens_per_microbatch=53248", "rl.context_tokens=[49152]",
]  # fmt: skip
CASES: dict[str, list[str]] = {
    "tensor 2, full": layout(2, 1, 1),
    "tensor 2, selective": layout(2, 1, 1, SELECTIVE),
    "tensor 2, none": layout(2, 1, 1, "model.recompute=none"),
    "1 rank, selective": layout(1, 1, 1, SELECTIVE),
    "1 rank, full": layout(1, 1, 1),
    "1 rank, full, offload model, 53k tokens": layout(1, 1, 1, OFFLOAD, *LONG),
    "data 2, selective": layout(1, 1, 2, SELECTIVE),
    "pipeline 2, selective": layout(1, 2, 1, SELECTIVE),
    "tensor 2 x pipeline 2, selective": layout(2, 2, 1, SELECTIVE),
    "float32, data 2, selective": layout(1, 1, 2, SELECTIVE, "model.dtype=float32"),
    "tensor 2, selective, merger": layout(2, 1, 1, SELECTIVE, "model.train_vision=merger"),
    "tensor 2, selective, full tower": layout(2, 1, 1, SELECTIVE, "model.train_vision=full"),
    "tensor 2, selective, offload model": layout(2, 1, 1, SELECTIVE, OFFLOAD),
    "tensor 2, selective, KL": layout(2, 1, 1, SELECTIVE, "rl.kl_coef=0.01"),
}
SHIPPED: dict[str, tuple[str, list[str]]] = {
    "3B on 1": ("ovr_3b_rl", [
        "parallel.world=1", "rollout.servers=1", "rl.prompts_per_step=8", "rl.samples_per_prompt=8",
    ]),
    "3B on 4": ("ovr_3b_rl", ["parallel.world=4", "rollout.servers=4"]),
    "3B on 8": ("ovr_3b_rl", []),
    "3B on 8, offload optimizer": ("ovr_3b_rl", [
        "parallel.offload=optimizer", "rollout.placement=disaggregated", "rollout.servers=0",
        'rollout.urls=["http://127.0.0.1:8000"]',
    ]),
    "7B on 8": ("ovr_7b_rl", [
        "parallel.world=8", "parallel.pipeline=1", "parallel.offload=model",
        "rollout.placement=colocated", "rollout.servers=8", "rollout.urls=[]",
    ]),
    "7B on 32 of 64": ("ovr_7b_rl", []),
    "7B on 32 of 64, 24k, selective": ("ovr_7b_rl", [
        SELECTIVE, "rl.max_response_tokens=24576", "rl.max_tokens_per_microbatch=28672",
        "rl.context_tokens=[24576]", "rl.context_steps=[]",
    ]),
    "7B on 32 of 64, 32k, selective": ("ovr_7b_rl", [
        SELECTIVE, "rl.max_response_tokens=32768", "rl.max_tokens_per_microbatch=36864",
        "rl.context_tokens=[32768]", "rl.context_steps=[]",
    ]),
    "7B on 32 of 64, merger": ("ovr_7b_rl", ["model.train_vision=merger", "rl.critic_steps=1"]),
    "7B on 32 of 64, full tower": ("ovr_7b_rl", ["model.train_vision=full", "rl.critic_steps=1"]),
    "72B on 64 of 128": ("ovr_72b_rl", []),
    "72B on 128": ("ovr_72b_rl", ["parallel.world=128"]),
}  # fmt: skip
"""Whole models at full length, by the files in configs/."""


def measure(words: list[str], folder: Path, *, name: str = "ovr_7b_rl", layers: int) -> dict:
    """Plan and rehearsal of one layout."""
    config = load_config(ROOT / "configs" / f"{name}.toml", words)
    parallel = config.parallel
    stage = parallel.world // parallel.pipeline  # ranks of a pipeline stage
    ranks = [str(stage * index) for index in sorted({0, parallel.pipeline - 1})]
    command = [
        sys.executable, "-m", "ovr_fast.rehearse", "--config", f"configs/{name}.toml",
        "--layers", str(layers), "--ranks", ",".join(ranks), "--output", str(folder), *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("reports/*.json"))]
    full = any(report["out_of_memory"] for report in reports)
    if not reports or (done.returncode and not full):
        raise RuntimeError(f"{' '.join(words)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    fullest = max(reports, key=lambda report: report["allocated_gib"])
    plan = memory_plan(config, read_shape(folder / "model"), parallel.world, recipe_stage="rl")
    return {
        "plan": {**asdict(plan), "total": plan.total},
        "rank": fullest["rank"],
        **{key: fullest[key] for key in ("allocated_gib", "reserved_gib", "card_gib")},
        "out_of_memory": fullest["out_of_memory"],
        "resident": fullest["resident"],
        "phases": {
            name: row["allocated_gib"] for name, row in fullest["phases"].items() if row["launches"]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*CASES, *SHIPPED], help="names of cases")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = {}
    print(
        "| layout | plan | allocator | card | plan / allocator |\n|---|---|---|---|---|", flush=True
    )
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "rehearsal"
            if name in CASES:
                row = measure([*SHORT, *CASES[name]], place, layers=LAYERS)
            else:
                file, words = SHIPPED[name]
                row = measure(words, place, name=file, layers=0)
        found[name] = row
        cells = [row["plan"]["total"], row["allocated_gib"], row["card_gib"]]
        text = " | ".join(f"{cell:.1f}" for cell in cells)
        failed = f" (out of memory in {row['out_of_memory'][:20]})" if row["out_of_memory"] else ""
        share = row["plan"]["total"] / row["allocated_gib"]
        print(f"| {name}{failed} | {text} | {share:.2f} |", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
