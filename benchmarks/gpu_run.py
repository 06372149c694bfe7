"""The whole step on this machine's GPU: vLLM samples, the trainer updates, the weights go back, all
on one card (the engine asleep while the trainer works, the models on the host while it samples).

    python benchmarks/gpu_run.py --output benchmarks/results/gpu_run.json [section.key=value ...]

Qwen2.5-VL-3B at its full depth by ``configs/ovr_3b_rl.toml``, with random weights, the toy's
tokenizer, an image in every prompt, and responses that all run to their limit: their words mean
nothing, so half of them are rewarded, by their length in characters. The first step counts apart
(compilation, first allocations); the others are the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from gpu_step import ROOT, write_random_model
from ovr_fast.config import DataSource, load_config
from ovr_fast.model.hf_weights import parameter_table
from ovr_fast.observe.clock import TRAINING
from ovr_fast.rehearse.hollow import write_prompts
from ovr_fast.rehearse.stand_ins import keep_off_the_disk
from ovr_fast.settings import to_toml
from ovr_fast.shape.model_shape import read_shape

CONFIG, SHAPE = "ovr_3b_rl", "Qwen2.5-VL-3B-Instruct"
STEPS = 3
GRACE_S = 20.0
"""For a process that is cut off, to write where it stood."""
STACKS_EVERY_S = 30.0
WORDS = [
    "parallel.world=1", "rollout.servers=1", "rl.prompts_per_step=16", "rl.samples_per_prompt=4",
    "rl.max_prompt_tokens=512", "rl.max_response_tokens=1024", "rl.context_tokens=[1024]",
    "rl.context_steps=[]", "rl.max_tokens_per_microbatch=16384", "rl.critic_steps=1",
    "rl.actor.warmup_steps=1", "rl.critic.warmup_steps=1", "rollout.compile=false",
]  # fmt: skip
REWARD = "def score(response, answer):\n    return float(len(response) % 2)\n"
PHASES = ("rollout", "generate", *TRAINING, "weight_sync", "other")


def write_run(folder: Path, model: Path, words: list[str], steps: int) -> Path:
    """The run's TOML, with its prompts and its reward beside it."""
    config = load_config(ROOT / "configs" / f"{CONFIG}.toml", [*WORDS, *words])
    prompts, reward = folder / "prompts.jsonl", folder / "reward.py"
    count = config.rl.prompts_per_step * steps
    write_prompts(prompts, count=count, tokens=config.rl.max_prompt_tokens)
    reward.write_text(REWARD)
    config = replace(
        config,
        model=replace(config.model, path=str(model)),
        rl=replace(config.rl, steps=steps, sources=(DataSource(path=str(prompts)),)),
        evaluation=replace(config.evaluation, sources=(), every=0),
        reward=replace(config.reward, function=f"{reward}:score"),
        run=replace(
            config.run, root=str(folder), name="run", stages=("rl",), record_rollouts=False,
            save_every=10**6, export_every=0,
        ),
    )  # fmt: skip
    path = folder / "run.toml"
    path.write_text(to_toml(config))
    return path


def summary(rows: list[dict], model: Path) -> dict[str, float]:
    """Medians of the steps after the first."""
    size = sum(
        2 * math.prod(tensor.shape)
        for row in parameter_table(read_shape(model), 1, value_head=False)
        for tensor in row.tensors
    )
    late = rows[1:] or rows

    def median(key: str) -> float:
        return statistics.median(row.get(key, 0.0) for row in late)

    def rate(amount: float, seconds: float) -> float:
        return amount / seconds if seconds else 0.0

    found = {f"{name}_s": median(f"time/{name}_s") for name in PHASES}
    return found | {
        "step_s": median("time/step_s"),
        "sampled_tokens_per_s": rate(median("rollout/response_tokens"), found["generate_s"]),
        "mfu": median("perf/mfu"),
        "sync_gb_per_s": rate(size / 1e9, found["weight_sync_s"]),
        "logprob_gap": median("rollout/logprob_gap"),
        "first_logprob_gap": rows[0]["rollout/logprob_gap"],
        "kl": median("rollout/kl"),
        "memory_gib": max(row["memory/peak_gib"] for row in rows),
    }


def run(toml: Path, log: Path, limit: float) -> tuple[int, float]:
    """The trainer's command: its exit status and its seconds. What it has not done within the
    limit is cut off, and every process of it writes where it stood."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        __file__, "--rank", "--config", str(toml),
    ]  # fmt: skip
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGABRT)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(GRACE_S)
    return process.returncode, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"PPO steps ({STEPS})")
    parser.add_argument("--layers", type=int, default=0, help="of the language model (all)")
    parser.add_argument("--limit", type=float, default=600, help="seconds (600)")
    parser.add_argument("--model", type=Path, help="kept between calls; made where it is not there")
    parser.add_argument("--log", type=Path, help="gets what the run and its server print")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = arguments.model or folder / "model"
        began = time.perf_counter()
        if not model.exists():  # in a process of its own, whose memory on the card goes with it
            layers = str(arguments.layers)
            subprocess.run([sys.executable, __file__, "--write", str(model), layers], check=True)
        toml = write_run(folder, model, arguments.overrides, arguments.steps)
        wrote = time.perf_counter() - began
        log = arguments.log or folder / "log"
        status, seconds = run(toml, log, arguments.limit)
        said = log.read_text()
        with log.open("a") as file:
            more = [*sorted(folder.glob("run/logs/*.log")), *folder.glob("stacks.log")]
            file.writelines(path.read_text() for path in more)
        metrics = folder / "run" / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # the last may be cut off
        rows = [row for row in map(json.loads, whole) if row["stage"] == "rl"]
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "config": [CONFIG, *WORDS, *arguments.overrides],
            "layers": read_shape(model).layers,
            "model_written_s": wrote,
            "whole_command_s": seconds,
            "summary": summary(rows, model) if rows else {},
            "steps": rows,
            "says": said.splitlines()[:200],
        }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"model written in {wrote:.0f} s, run of {seconds:.0f} s")
    print("| figure | median after the first step |\n|---|---|")
    for name, value in result["summary"].items():
        print(f"| {name} | {value:.4g} |")
    if status:
        sys.exit(f"the run ended with {status}:\n{said[-3000:]}")


def rank() -> None:
    """The trainer's command without its checkpoint at the end, which is 69 GiB."""
    from ovr_fast import train

    config = Path(sys.argv[sys.argv.index("--config") + 1])
    with (config.parent / "stacks.log").open("w") as stacks:  # where a run that is cut off stood
        faulthandler.dump_traceback_later(STACKS_EVERY_S, repeat=True, file=stacks)
        sys.argv = ["ovr_fast.train", *sys.argv[2:]]
        keep_off_the_disk()
        train.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank()
    elif sys.argv[1:2] == ["--write"]:
        write_random_model(Path(sys.argv[2]), SHAPE, layers=int(sys.argv[3]))
    else:
        main()
