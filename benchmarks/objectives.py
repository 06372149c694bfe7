"""Every objective and baseline that a setting reaches, on the toy: some RL steps each from one cold
start, with one vLLM server for all. That each runs and does what its formula says; which is best,
so few steps do not say.

    python benchmarks/objectives.py --cold-start runs/tiny/cold_start_hf --output FILE.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GROUP = ("rl.advantage=group", "rl.normalize_advantages=false")
CASES: dict[str, tuple[str, ...]] = {
    "PPO with a critic (OVR)": (),
    "PPO, two policy steps, clip-higher": (
        "rl.policy_steps=2", "rl.clip_eps_high=0.28", "rl.dual_clip=3.0",
    ),
    "PPO, KL in the reward (k1)": ("rl.kl_coef=0.01", "rl.kl_in=reward", "rl.kl_estimator=k1"),
    "PPO, KL in the loss (k2), entropy": (
        "rl.kl_coef=0.01", "rl.kl_estimator=k2", "rl.entropy_coef=0.001",
    ),
    "GRPO": (*GROUP, "rl.policy_steps=2", "rl.normalization=sequence_mean", "rl.kl_coef=0.01"),
    "Dr. GRPO": (
        *GROUP, "rl.policy_steps=2", "rl.group_scale=none", "rl.normalization=constant_length",
    ),
    "DAPO": (*GROUP, "rl.policy_steps=2", "rl.clip_eps_high=0.28", "rl.refill=true"),
    "RLOO, REINFORCE": (
        *GROUP, "rl.group_baseline=leave_one_out", "rl.group_scale=none", "rl.objective=reinforce",
    ),
    "CISPO": (*GROUP, "rl.policy_steps=2", "rl.objective=cispo", "rl.clip_eps_high=0.28"),
    "GSPO": (
        *GROUP, "rl.policy_steps=2", "rl.objective=gspo", "rl.normalization=sequence_mean",
        "rl.clip_eps=3e-4", "rl.clip_eps_high=4e-4",
    ),
    "truncated importance weights": (*GROUP, "rl.importance_cap=2.0"),
}  # fmt: skip
TIMEOUT_S = 3600.0
"""Of one objective's run."""
EDGE = 5
"""First and last steps whose rewards are averaged."""


def wait_for(url: str, process: subprocess.Popen, *, seconds: float = 600.0) -> None:
    """Until the server answers."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(2.0)
    sys.exit("the vLLM server did not start")


@contextmanager
def served(config: list[str], words: list[str], port: int) -> Iterator[str]:
    """The address of a vLLM server for all runs, which ends with the context."""
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([
        sys.executable, "-m", "ovr_fast.rollout.serve", *config, "--host", "127.0.0.1", "--port",
        str(port), *words,
    ])  # fmt: skip
    try:
        wait_for(url, server)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def row_of(name: str, folder: Path) -> dict:
    """What a finished run says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "rl"]

    def mean(metric: str, part: list[dict]) -> float:
        return sum(row[metric] for row in part) / len(part)

    # With rl.refill a step's own prompts are those that differ; the others count here as well.
    reward = "rollout/refill_reward" if "rollout/refill_reward" in rows[0] else "rollout/reward"
    return {
        "objective": name,
        "steps": len(rows),
        "reward_first": mean(reward, rows[:EDGE]),
        "reward_last": mean(reward, rows[-EDGE:]),
        "forward_passes": rows[-1]["perf/forward_passes"],
        "train_tflop": sum(row["perf/train_tflop"] for row in rows),
        "clip_frac": mean("actor/clip_frac", rows),
        "kl": mean("actor/kl", rows) if "actor/kl" in rows[0] else None,
        "entropy_last": mean("actor/entropy", rows[-EDGE:]),
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| objective | reward, first 5 | last 5 | passes | training TFLOP | clipped | entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['objective']} | {row['reward_first']:.3f} | {row['reward_last']:.3f} | "
        f"{row['forward_passes']:g} | {row['train_tflop']:.2f} | {row['clip_frac']:.2%} | "
        f"{row['entropy_last']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every objective on the toy.")
    parser.add_argument("--cold-start", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--only", default="", help="names that hold this")
    parser.add_argument(
        "--output", type=Path, required=True, help="what it holds already is not run again"
    )
    arguments = parser.parse_args()
    common = [
        f"model.path={arguments.cold_start}", 'run.stages=["rl"]', f"rl.steps={arguments.steps}",
        f"run.save_every={arguments.steps}", "evaluation.sources=[]",
    ]  # fmt: skip
    config = ["--config", str(arguments.config)]
    rows = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
    done = {row["objective"] for row in rows}
    with served(config, common, arguments.port) as url:
        for name, words in CASES.items():
            if arguments.only not in name or name in done:
                continue
            with tempfile.TemporaryDirectory() as root:
                subprocess.run([
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "1", "-m", "ovr_fast.train", *config, *common, *words,
                    "rollout.servers=0", f'rollout.urls=["{url}"]', f"run.root={root}",
                    "run.name=one", "run.data_cache=runs/data_cache",
                ], check=True, timeout=TIMEOUT_S)  # fmt: skip
                rows.append(row_of(name, Path(root) / "one"))
            arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
