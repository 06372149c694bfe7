"""The trainer's step on this machine's GPU, layout by layout: seconds and MFU by phase, and the
allocator's peak beside the memory plan and beside a rehearsal of the same layout.

    python benchmarks/gpu_step.py --output benchmarks/results/gpu_step.json

The layouts of one rank of ``rehearsal.py``: a 7B-wide model of a few layers with random weights,
eight responses of full length a step, a microbatch each; the last step counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ovr_fast.config import DataSource, load_config
from ovr_fast.model import attention
from ovr_fast.observe.clock import TRAINING, Clock
from ovr_fast.plan.memory import memory_plan
from ovr_fast.rehearse.hollow import rehearsal_config, write_hollow_model, write_prompts
from ovr_fast.rehearse.stand_ins import keep_off_the_disk
from ovr_fast.settings import to_toml
from ovr_fast.shape.folder import PUBLISHED
from ovr_fast.shape.model_shape import read_shape
from rehearsal import CASES, LAYERS, SHORT

ROOT = Path(__file__).parents[1]
GIB = 2**30
STEPS = 3
ATTENTION = "OVR_FAST_BENCHMARK_ATTENTION"
ONE_RANK = [name for name in CASES if name.startswith("1 rank")]


def microbatches(name: str) -> int:
    """Of a step of this layout."""
    return 2 if "53k" in name else 8


def write_random_model(folder: Path, shape_of: str, *, layers: int) -> None:
    """The published shape with ``layers`` layers and random weights: products of zeros run faster
    than those of numbers do, and a loss of zeros has no gradient."""
    write_hollow_model(folder, PUBLISHED / shape_of / "config.json", layers=layers)
    generator = torch.Generator("cuda").manual_seed(0)
    for path in sorted(folder.glob("*.safetensors")):
        weights = {}
        for name, tensor in load_file(path).items():
            if tensor.dim() == 1:  # norms are 1, biases 0
                weights[name] = torch.full_like(tensor, float("norm" in name or "ln_q" in name))
            else:
                drawn = torch.randn(tensor.shape, generator=generator, device="cuda") * 0.02
                weights[name] = drawn.to(tensor.dtype).cpu()
        save_file(weights, path)


def measure(name: str, model: Path, folder: Path, profile: str | None) -> dict:
    """One layout, in a process of its own."""
    words = [*SHORT, *CASES[name], f"model.path={model}"]
    config = load_config(ROOT / "configs" / "ovr_7b_rl.toml", words)
    config = rehearsal_config(config, replicas=1, folder=folder, steps=STEPS)
    rl = replace(config.rl, prompts_per_step=microbatches(name) // config.rl.samples_per_prompt)
    prompts = folder / "data" / "prompts.jsonl"
    write_prompts(prompts, count=rl.prompts_per_step * STEPS, tokens=rl.max_prompt_tokens)
    config = replace(
        config,
        model=replace(config.model, path=str(model)),
        rl=replace(rl, sources=(DataSource(path=str(prompts)),)),
        evaluation=replace(config.evaluation, sources=(), every=0),
        run=replace(config.run, name="run", stages=("rl",)),
    )
    toml = folder / "run.toml"
    toml.write_text(to_toml(config))
    command = [
        sys.executable, __file__, "--rank", str(folder / "memory.json"), "--config", str(toml),
        "--fake-rollouts", str(100 * rl.max_response_tokens),
        *(["--profile", profile] if profile else []),
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{name}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    plan = memory_plan(config, read_shape(model), 1, recipe_stage="rl")
    memory = json.loads((folder / "memory.json").read_text())
    return {
        "plan": {**asdict(plan), "total": plan.total},
        **memory,
        "allocated_gib": max(phase["allocated_gib"] for phase in memory["phases"].values()),
        "whole_command_s": time.perf_counter() - began,
        # Each phase begins its peak anew, so the row's own is not the step's.
        "steps": [{k: v for k, v in row.items() if k != "memory/peak_gib"} for row in rows],
        "says": done.stdout.splitlines(),
    }


def rank() -> None:
    """The trainer's command, with the peak memory of each of its phases written to a file."""
    path = Path(sys.argv[2])
    sys.argv = ["ovr_fast.train", *sys.argv[3:]]
    time_phase = Clock.__call__
    phases: dict[str, dict[str, float]] = {}
    free = [float("inf")]

    depth = [0]

    @contextmanager
    def watched(self: Clock, name: str) -> Iterator[None]:
        depth[0] += 1
        if depth[0] == 1:
            torch.cuda.reset_peak_memory_stats()
        try:
            with time_phase(self, name):
                yield
        finally:
            depth[0] -= 1
        row = phases.setdefault(name, {"allocated_gib": 0.0, "reserved_gib": 0.0})
        row["allocated_gib"] = max(row["allocated_gib"], torch.cuda.max_memory_allocated() / GIB)
        row["reserved_gib"] = max(row["reserved_gib"], torch.cuda.max_memory_reserved() / GIB)
        free[0] = min(free[0], torch.cuda.mem_get_info()[0] / GIB)

    Clock.__call__ = watched  # type: ignore[method-assign]
    keep_off_the_disk()
    if ATTENTION in os.environ:
        usual = attention.attention_kernel
        attention.attention_kernel = lambda device, dtype: (  # type: ignore[assignment]
            usual(device, dtype) if dtype is torch.float32 else os.environ[ATTENTION]
        )
    from ovr_fast import train

    started = torch.cuda.mem_get_info()
    try:
        train.main()
    finally:
        found = {"device": torch.cuda.get_device_name(), "phases": phases}
        path.write_text(json.dumps(found | {"card_gib": started[1] / GIB - free[0]}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=ONE_RANK, help="names of layouts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--attention", help="this kernel of ovr_fast/model/attention.py")
    parser.add_argument("--model", type=Path, help="kept between calls; made where it is not there")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps of each layout")
    parser.add_argument("--traces", type=Path, default=Path("traces"), help="gets the traces")
    arguments = parser.parse_args()
    result: dict = {"torch": torch.__version__, "layouts": {}}
    print("| layout | step s | MFU | allocator | plan / allocator |\n|---|---|---|---|---|")
    if arguments.attention:
        os.environ[ATTENTION] = arguments.attention
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or Path(scratch) / "model"
        if not model.exists():  # in a process of its own, whose memory on the card goes with it
            subprocess.run([sys.executable, __file__, "--write", str(model)], check=True)
        for name in arguments.only:
            folder = Path(scratch) / name.replace(" ", "-").replace(",", "")
            folder.mkdir()
            row = result["layouts"][name] = measure(name, model, folder, arguments.profile)
            last = row["steps"][-1]
            seconds = sum(last.get(f"time/{phase}_s", 0.0) for phase in TRAINING)
            peak, planned = row["allocated_gib"], row["plan"]["total"]
            print(
                f"| {name} | {seconds:.2f} | {last.get('perf/mfu', 0.0):.1%} | {peak:.1f} | "
                f"{planned / peak:.2f} |",
                flush=True,
            )
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
            for trace in folder.rglob("rank-*.json.gz"):
                arguments.traces.mkdir(parents=True, exist_ok=True)
                shutil.move(trace, arguments.traces / f"{folder.name}.json.gz")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank()
    elif sys.argv[1:2] == ["--write"]:
        write_random_model(Path(sys.argv[2]), "Qwen2.5-VL-7B-Instruct", layers=LAYERS)
    else:
        main()
