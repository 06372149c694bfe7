"""What ``rollout.max_staleness=1`` does to a real run: the toy with a vLLM server on one core and
the trainer on another, strictly on-policy and one step behind.

    python benchmarks/overlap_toy.py [--model runs/tiny/cold_start_hf] [--steps 12] [--json FILE]

Each has a core of its own, as sampling and training have GPUs of their own where rollouts are
disaggregated. A step then takes as long as the longer of the two, not both. Needs ``make train``'s
data; takes about 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from objectives import TIMEOUT_S, served
from workload import write_result

MODES = {
    "strictly on-policy": (),
    "max_staleness=1": ("rollout.max_staleness=1", "rl.importance_cap=2.0"),
}
WARM_UP = 3
"""Steps before those that are measured: compilation, and the first one has nothing ahead."""


def seconds_of(folder: Path) -> dict[str, float]:
    """Medians of a run's steps; the last one samples nothing ahead."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = rows[WARM_UP:-1]

    def median(metric: str) -> float:
        return statistics.median(row[metric] for row in rows)

    step, waited = median("time/step_s"), median("time/generate_s")
    return {
        "step_s": step,
        "waited_for_responses_s": waited,
        "trained_s": step - waited,
        "servers_idle": median("servers/idle"),
        "staleness": median("rollout/staleness"),
        "tokens": median("rollout/response_tokens"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One step behind, on two cores.")
    parser.add_argument("--model", default="ovr_fast/toy/base_model", help="Hugging Face folder")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--port", type=int, default=8322)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("overlap_toy: sampling and training need a core each, and there is one")
    config = ["--config", str(arguments.config)]
    common = [
        f"model.path={arguments.model}", 'run.stages=["rl"]', f"rl.steps={arguments.steps}",
        f"run.save_every={arguments.steps}", "evaluation.sources=[]",
    ]  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {}
    os.sched_setaffinity(0, cores[:1])  # children keep it
    with served(config, common, arguments.port) as url:
        os.sched_setaffinity(0, cores[1:2])
        for name, words in MODES.items():
            with tempfile.TemporaryDirectory() as root:
                subprocess.run([
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "1", "-m", "ovr_fast.train", *config, *common, *words,
                    "rollout.servers=0", f'rollout.urls=["{url}"]', f"run.root={root}",
                    "run.name=one", "run.data_cache=runs/data_cache",
                ], check=True, timeout=TIMEOUT_S)  # fmt: skip
                found[name] = seconds_of(Path(root) / "one")
    alone = found["strictly on-policy"]
    sampling, training = alone["waited_for_responses_s"], alone["trained_s"]
    print(f"sampling {sampling:.2f} s and training {training:.2f} s a step: "
          f"{sampling + training:.2f} s one after the other, {max(sampling, training):.2f} s side "
          "by side at best")  # fmt: skip
    print(
        "| rollouts | step | waits for responses | server idle | staleness |\n|---|---|---|---|---|"
    )
    for name, row in found.items():
        print(
            f"| {name} | {row['step_s']:.2f} s | {row['waited_for_responses_s']:.2f} s | "
            f"{row['servers_idle']:.0%} | {row['staleness']:.2f} |"
        )
    if arguments.json:
        write_result(arguments.json, modes=found)


if __name__ == "__main__":
    main()
