"""A toy run that is disturbed at random, beside one that is left alone: both must end alike.

    make soak            (or: python tests/end_to_end/soak.py [--steps 40] [--events 20] [--seed 0])

Two servers. At random moments one is killed or frozen, or the trainer is killed, or asked to stop,
and started again with --resume. At the end tokens, rewards, versions and weights of both runs are
compared, and what the disturbance cost is printed. Takes 20 to 35 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from safetensors.torch import load_file

from ovr_fast.data.rollouts import read_rollouts
from support import toy_run
from support.processes import kill_tree
from support.toy_run import ROOT

KINDS = ("kill a server", "freeze a server", "kill the trainer", "stop the trainer")


def command(workplace: Path, name: str, steps: int) -> list[str]:
    """Of ``python``: RL from the shipped base."""
    return toy_run.arguments(
        workplace, name, 'run.stages=["rl"]', f"rl.steps={steps}", "run.record_rollouts=true",
        "run.save_every=3", "rl.context_tokens=[]", "rl.context_steps=[]",
        "evaluation.sources=[]", "rollout.servers=2", "rollout.probe_timeout_s=5",
        "rollout.sync_timeout_s=60",
        "rl.actor.lr=1e-4",
    )  # fmt: skip


def servers_of(run: Path) -> list[int]:
    """Leaders of the sessions whose output goes to the run's logs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            output, pid = os.readlink(process / "fd" / "1"), int(process.name)
            if output.startswith(f"{run}/logs/") and os.getsid(pid) == pid:
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def start(words: list[str], log: Path) -> subprocess.Popen:
    with open(log, "a") as output:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def disturb(words: list[str], run: Path, log: Path, *, events: int, rng: random.Random) -> Counter:
    """The run, with ``events`` disturbances, to its end."""
    done: Counter[str] = Counter()
    process = start(words, log)
    resume = [*words, "--resume", str(run)]
    try:
        while sum(done.values()) < events:
            first = last_step(run)
            wanted = first + rng.choice([1, 1, 2])
            while process.poll() is None and last_step(run) < wanted:
                time.sleep(0.05)
            if process.poll() is not None:
                break
            time.sleep(rng.uniform(0.0, 1.5))
            kind = rng.choice(KINDS)
            if kind.endswith("server"):
                found = servers_of(run)
                if not found:
                    continue
                victim = rng.choice(found)
                by = signal.SIGKILL if kind.startswith("kill") else signal.SIGSTOP
                os.killpg(victim, by)
            else:
                by = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
                process.send_signal(by)
                process.wait(timeout=120)
                have = any((run / "checkpoints").glob("rl-??????"))
                if not have:
                    subprocess.run(["rm", "-rf", str(run)], check=True)
                process = start(resume if have else words, log)
            done[kind] += 1
            print(f"{sum(done.values()):3d}. after step {last_step(run)}: {kind}", flush=True)
        process.wait(timeout=1200)
        if process.returncode != 0:
            raise SystemExit(f"the disturbed run ended with {process.returncode}; see {log}")
    finally:
        kill_tree(process)
    if sum(done.values()) < events:
        raise SystemExit(f"the run ended before it was disturbed {events} times: more --steps")
    return done


def rollouts_of(run: Path, steps: int) -> Counter[tuple[int, str, int]]:
    """Step, prompt and number of each that was learned from."""
    found: Counter[tuple[int, str, int]] = Counter()
    for step in range(1, steps + 1):
        batch = read_rollouts(run / f"rollouts/{step:06d}.parquet")
        found.update((step, batch.prompt_of(r).id, r.sample_index) for r in batch.rollouts)
    return found


def differences(calm: Path, disturbed: Path, steps: int) -> list[str]:
    """Where the two runs are not the same."""
    found = []
    for step in range(1, steps + 1):
        name = f"rollouts/{step:06d}.parquet"
        one, other = read_rollouts(calm / name), read_rollouts(disturbed / name)
        if [p.id for p in one.prompts] != [p.id for p in other.prompts]:
            found.append(f"step {step}: other prompts")
        if len(one.rollouts) != len(other.rollouts):
            found.append(f"step {step}: {len(other.rollouts)} rollouts")
            continue
        for a, b in zip(one.rollouts, other.rollouts, strict=True):
            same = np.array_equal(a.response_tokens, b.response_tokens) and a.reward == b.reward
            if not same or a.versions != b.versions:
                found.append(f"step {step}: {one.prompt_of(a).id} sample {a.sample_index}")
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (calm, disturbed)
    ]
    if [r["step"] for r in rows[0]] != [r["step"] for r in rows[1]]:
        found.append("other rows of metrics")
    weights = load_file(disturbed / "hf" / "model.safetensors")
    for name, tensor in load_file(calm / "hf" / "model.safetensors").items():
        if not torch.equal(tensor, weights[name]):
            found.append(f"weights: {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        workplace = Path(folder)
        toy_run.write_data(workplace / "toy_data")
        began = time.monotonic()
        calm = start(command(workplace, "calm", arguments.steps), workplace / "calm.log")
        if calm.wait(timeout=1200):
            sys.exit((workplace / "calm.log").read_text()[-3000:])
        quiet = time.monotonic() - began
        print(f"left alone: {arguments.steps} steps, {quiet:.0f} s", flush=True)
        began = time.monotonic()
        words = command(workplace, "disturbed", arguments.steps)
        run, log = workplace / "disturbed", workplace / "disturbed.log"
        rng = random.Random(arguments.seed)
        try:
            done = disturb(words, run, log, events=arguments.events, rng=rng)
        except BaseException:
            print(log.read_text()[-4000:])
            raise
        took = time.monotonic() - began
        found = differences(workplace / "calm", run, arguments.steps)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lost = {
            k: sum(r.get(f"servers/{k}", 0) for r in rows)
            for k in ("restarts", "retries", "lost_s")
        }
        before, after = (rollouts_of(each, arguments.steps) for each in (workplace / "calm", run))
        print("disturbed: " + ", ".join(f"{count} x {kind}" for kind, count in done.items()))
        print(
            f"{took:.0f} s, {took - quiet:.0f} more; servers started anew {lost['restarts']:.0f}, "
            f"requests sent again {lost['retries']:.0f}, seconds without one {lost['lost_s']:.0f} "
            f"(of the steps that were kept); {(before - after).total()} rollouts lost, "
            f"{(after - before).total()} double"
        )
        print("\n".join(found) if found else "tokens, rewards, versions and weights are the same")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
