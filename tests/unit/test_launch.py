"""The launchers ask for what the commands take: run with stand-ins of srun and ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr_fast.config import load_config
from ovr_fast.train import parse
from support.toy_run import ROOT

RECORD = """#!{python}
import json, os, sys, time
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
words = " ".join(sys.argv)
if name == "scontrol" and "hostnames" in words:
    print("n1\\nn2\\nn3\\nn4")
elif name == "getent":
    print("10.0.0.1 n1")
elif "ovr_fast.rollout.serve" in words:
    time.sleep(60)
elif "ovr_fast.train" in words:
    stop = os.path.join(os.environ["ROOT"], "r", "stop")
    for _ in range(int(os.environ.get("TRAINS", "0"))):
        if os.path.exists(stop):
            break
        time.sleep(0.1)
"""


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """An environment whose srun, scontrol, getent and ssh only write down what they are asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "getent", "ssh"):
        (folder / name).write_text(RECORD.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "PYTHON": sys.executable, "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_ID": "7",
        "ROOT": str(tmp_path / "runs"),
    }  # fmt: skip


def calls(environment: dict[str, str]) -> list[list[str]]:
    return [json.loads(line) for line in Path(environment["CALLS"]).read_text().splitlines()]


def settings_after(words: list[str], flag: str) -> list[str]:
    return words[words.index(flag) :]


def test_slurm_starts_both_halves_with_the_same_settings(commands: dict[str, str]) -> None:
    more = ["rollout.tensor=2", "rl.steps=3"]
    script = ["bash", "launch/slurm.sh", "configs/ovr_7b_rl.toml", "r", "1", *more]
    subprocess.run(script, cwd=ROOT, env={**commands, "TRAINS": "20"}, check=True, timeout=60)
    made = calls(commands)
    (serve,) = [c for c in made if "ovr_fast.rollout.serve" in " ".join(c)]
    (train,) = [c for c in made if "ovr_fast.train" in c]
    assert "--nodelist=n2,n3,n4" in serve
    assert "--nodelist=n1" in train
    assert "--rdzv-endpoint=10.0.0.1:29500" in train
    arguments = parse(train[train.index("ovr_fast.train") + 1 :])
    config = load_config(ROOT / arguments.config, arguments.overrides)
    assert (config.rollout.expect, config.rollout.servers) == (12, 0)
    assert (config.rollout.transfer_address, config.rl.steps) == ("10.0.0.1", 3)
    assert settings_after(serve, "--config")[2:] == arguments.overrides
    assert not any("requeue" in call for call in made)


def test_slurm_goes_on_and_stops_before_its_limit(commands: dict[str, str]) -> None:
    run = Path(commands["ROOT"]) / "r"
    (run / "checkpoints" / "rl-000004").mkdir(parents=True)
    script = ["bash", "launch/slurm.sh", "configs/ovr_7b_rl.toml", "r", "2"]
    process = subprocess.Popen(script, cwd=ROOT, env={**commands, "TRAINS": "600"})
    deadline = time.monotonic() + 30
    while not (Path(commands["CALLS"]).exists() and "ovr_fast.train" in str(calls(commands))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    made = calls(commands)
    (train,) = [c for c in made if "ovr_fast.train" in c]
    assert train[train.index("ovr_fast.train") + 1 :][:2] == ["--resume", str(run)]
    assert (run / "stop").exists()
    assert made[-1] == ["scontrol", "requeue", "7"]


def test_servers_of_several_gpus_are_counted(commands: dict[str, str]) -> None:
    """By the file's rollout.tensor = 4."""
    script = ["bash", "launch/slurm.sh", "configs/ovr_72b_rl.toml", "r", "1"]
    subprocess.run(script, cwd=ROOT, env={**commands, "TRAINS": "20"}, check=True, timeout=60)
    (train,) = [c for c in calls(commands) if "ovr_fast.train" in c]
    assert "rollout.expect=6" in train


def test_ssh_starts_both_halves(commands: dict[str, str]) -> None:
    script = ["bash", "launch/ssh.sh", "configs/ovr_7b_rl.toml", "r", "a", "b c", "rl.steps=3"]
    subprocess.run(script, cwd=ROOT, env={**commands, "TRAINS": "20"}, check=True, timeout=60)
    made = {call[4]: call[5] for call in calls(commands)}
    assert set(made) == {"a", "b", "c"}
    assert "--host c" in made["c"]
    assert "rollout.expect=16" in made["a"]
    assert "rollout.transfer_address=a" in made["b"]


def test_slurm_needs_nodes_for_both(commands: dict[str, str]) -> None:
    script = ["bash", "launch/slurm.sh", "x.toml", "r", "4"]
    done = subprocess.run(script, cwd=ROOT, env=commands, capture_output=True, text=True)
    assert done.returncode == 2
    assert "4 of 4 nodes train, which leaves 0 to sample" in done.stderr
