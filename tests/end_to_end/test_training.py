"""The real engine and whole runs: both stages, weights in step, kill and resume, bad endings."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ovr_fast.data.rollouts import read_rollouts
from support.processes import HUNG_S, kill_tree, run_ranks
from support.served import ServedNode, processes_logging_to
from support.toy_run import BASE_MODEL, ROOT, arguments

pytestmark = pytest.mark.slow

STOP_S, SIGUSR1_S = 20.0, 60.0
"""From a signal to the end of a run, on a busy machine; the second one ends its step first."""

CACHE = f"torchinductor_{getpass.getuser()}"

OF_SAMPLING = tuple(
    f"rollout/{name}" for name in ("stale", "sampled", "trained", "kept", "dropped")
)
"""Metrics that a run on recorded rollouts does not have."""


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_behind_what_it_promises(whole_run: Path) -> None:
    for name in (
        "config.toml", "env.json", "metrics.jsonl", "rollouts.jsonl", "curves.png",
        "hf/model.safetensors", "hf/config.json", "hf/tokenizer.json",
        "cold_start_hf/model.safetensors", "checkpoints/rl-000004/.metadata",
        "checkpoints/cold_start-000003/meta.pt", "rollouts/000004.parquet",
    ):  # fmt: skip
        assert (whole_run / name).is_file(), name
    assert list((whole_run / "tensorboard").iterdir())
    assert not list(whole_run.rglob("*.partial"))
    rows = metrics(whole_run)
    assert [(r["stage"], r["step"]) for r in rows] == [
        ("base", 0), *[("cold_start", i) for i in (1, 2, 3)], *[("rl", i) for i in (1, 2, 3, 4)],
    ]  # fmt: skip
    for row in rows[4:]:
        for key in (
            "rollout/reward", "rollout/length_tokens", "rollout/logprob_gap", "actor/clip_frac",
            "actor/grad_norm", "critic/loss", "critic/explained_variance", "time/generate_s",
            "time/other_s", "memory/peak_gib", "rollout/truncated", "rollout/kl",
            "pack/empty_share", "pack/imbalance", "perf/train_tflop", "perf/tflops_per_rank",
        ):  # fmt: skip
            assert key in row, key
    rollouts = [json.loads(line) for line in (whole_run / "rollouts.jsonl").open()]
    assert {"prompt", "images", "response", "answer", "outcome"} <= rollouts[0].keys()


def test_the_engine_stays_in_step_with_the_trainer(whole_run: Path) -> None:
    steps = [row for row in metrics(whole_run) if row["stage"] == "rl"]
    assert max(row["rollout/logprob_gap"] for row in steps) < 1e-3
    assert [row["rollout/policy_version"] for row in steps] == [0, 1, 2, 3]
    # Strictly on-policy: the ratio is one and nothing is clipped.
    assert all(row["actor/ratio"] == 1.0 and row["actor/clip_frac"] == 0.0 for row in steps)


def test_the_cold_start_changes_the_language_model_alone(whole_run: Path) -> None:
    before = load_file(BASE_MODEL / "model.safetensors")
    after = load_file(whole_run / "cold_start_hf" / "model.safetensors")
    final = load_file(whole_run / "hf" / "model.safetensors")
    assert set(before) == set(after) == set(final)
    for name, tensor in before.items():
        if name.startswith("visual."):
            assert torch.equal(tensor.float(), after[name]), name
            assert torch.equal(tensor.float(), final[name]), name
    assert not torch.equal(before["lm_head.weight"].float(), after["lm_head.weight"])


def test_transformers_loads_the_result(whole_run: Path) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(whole_run / "hf")
    assert model.config.model_type == "qwen2_5_vl"
    assert AutoTokenizer.from_pretrained(whole_run / "hf").chat_template


def test_the_context_grows_during_the_run(whole_run: Path) -> None:
    steps = [row for row in metrics(whole_run) if row["stage"] == "rl"]
    assert [row["rollout/limit_tokens"] for row in steps] == [12, 12, 40, 40]
    assert steps[0]["rollout/length_max_tokens"] <= 12 < steps[3]["rollout/length_max_tokens"]
    assert steps[0]["rollout/truncated"] > 0


def run_until_killed(workplace: Path, phase: str, turn: int, *more: str) -> None:
    """The run "killed", until its trainer SIGKILLs itself."""
    arguments_ = arguments(workplace, "killed", *more)
    script = str(ROOT / "tests" / "end_to_end" / "killed.py")
    words = [script, "SIGKILL", phase, str(turn), *arguments_[2:]]
    output = run_ranks(1, words, check=False)
    assert output.returncode == -signal.SIGKILL, f"{phase} {turn}: {output.stdout[-2000:]}"


def same_metrics(one: list[dict], two: list[dict], *, but: tuple[str, ...] = ()) -> None:
    assert [(r["stage"], r["step"]) for r in one] == [(r["stage"], r["step"]) for r in two]
    for a, b in zip(one, two, strict=True):
        for key in a:
            if key.startswith(("time/", "perf/tok", "perf/tfl", "memory/", "servers/", *but)):
                continue
            if key in ("rollout/logprob_gap", "rollout/kl"):
                # vLLM's own log-probs depend, in the last bits, on which requests shared a batch.
                assert a[key] == pytest.approx(b[key], abs=1e-5)
            else:
                assert a[key] == b[key], (a["stage"], a["step"], key)


def test_a_run_killed_four_times_ends_with_the_same_numbers(
    workplace: Path, whole_run: Path, running_server: ServedNode
) -> None:
    """In generation, before the first RL checkpoint; then, from the one at step 2, in the critic's
    updates, in a weight sync, and in saving step 4. The first time the servers are the trainer's
    and end with it; then they run on, and each trainer finds them as the one before left them."""
    killed = workplace / "killed"
    run_until_killed(workplace, "generate", 2)
    deadline = time.monotonic() + 60
    while found := processes_logging_to(killed / "logs"):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    running_server.wait()
    resume = [
        "--resume",
        str(killed),
        "rollout.servers=0",
        f"rollout.urls={running_server.address}",
    ]
    run_until_killed(workplace, "critic", 3, *resume)
    run_until_killed(workplace, "transfer", 4, *resume)
    run_until_killed(workplace, "index", 1, *resume)
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == ["cold_start-000002", "cold_start-000003", "rl-000002", "rl-000004.partial"]
    output = run_ranks(1, arguments(workplace, "killed") + resume).stdout
    assert f"resumed from {killed / 'checkpoints' / 'rl-000002'}" in output
    same_metrics(metrics(whole_run), metrics(killed))
    for name, tensor in load_file(whole_run / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(killed / "hf" / "model.safetensors")[name]), name


def run_until_stopped(by: str, phase: str, turn: int, words: list[str]) -> tuple[int, str]:
    """A run that a signal ends: its code and its last line. It ends within seconds, and nothing of
    it stays: no trace, no process, no file in temporary folders but in a cache."""
    script = str(ROOT / "tests" / "end_to_end" / "killed.py")
    with tempfile.TemporaryDirectory() as temporary:
        shared = set(Path("/dev/shm").iterdir())
        signalled = [script, by, phase, str(turn), *words]
        done = run_ranks(1, signalled, check=False, temporary=Path(temporary))
        (at,) = re.findall(rf"killed.py: {by} at (\S+)", done.stdout)
        took = time.time() - float(at)
        assert "Traceback" not in done.stdout, done.stdout[-3000:]
        assert took < (SIGUSR1_S if by == "SIGUSR1" else STOP_S), (phase, took)
        assert set(Path("/dev/shm").iterdir()) <= shared
        # What Inductor has compiled, if it had to, is for the next server.
        assert {path.name for path in Path(temporary).iterdir()} <= {CACHE}
    return done.returncode, done.stdout.strip().splitlines()[-1]


def test_a_run_stopped_three_times_ends_with_the_same_numbers(
    workplace: Path, whole_run: Path, running_server: ServedNode
) -> None:
    """By SIGTERM while it samples, with a checkpoint of the step before; by SIGINT in an update, of
    which nothing is kept; by SIGUSR1, after the step. Each time one line says how to go on. The
    first time the server is the run's own, and ends with it."""
    run = workplace / "stopped"
    words = arguments(workplace, "stopped", "run.save_every=100")[2:]
    for by, phase, turn, code, kept in (
        ("SIGTERM", "generate", 2, 143, "rl step 1"),
        ("SIGINT", "actor", 1, 130, "rl step 1"),
        ("SIGUSR1", "targets", 1, 0, "rl step 2"),
    ):
        found = run_until_stopped(by, phase, turn, words)
        assert found == (code, f"stopped by {by}: go on after {kept} with --resume {run}")
        assert not processes_logging_to(run / "logs")
        if "--resume" not in words:
            words += ["--resume", str(run), "rollout.servers=0"]
            words += [f"rollout.urls={running_server.address}"]
    run_ranks(1, ["-m", "ovr_fast.train", *words])
    # On a busy machine some responses have begun when a signal comes: they are sampled anew.
    broken_off = ("rollout/sampled_tokens", "rollout/dropped_stop_tokens")
    same_metrics(metrics(whole_run), metrics(run), but=broken_off)
    for one, two in zip(metrics(whole_run), metrics(run), strict=True):
        if one["stage"] == "rl":
            assert one["rollout/dropped_stop_tokens"] == 0
            sampled, dropped = (two[name] for name in broken_off)
            assert sampled - dropped == one["rollout/sampled_tokens"]
    for name, tensor in load_file(whole_run / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(run / "hf" / "model.safetensors")[name]), name


@pytest.mark.parametrize(
    ("by", "phase", "turn", "kept"),
    [
        ("SIGINT", "start", 3, ""),
        ("SIGTERM", "update", 2, ""),
        ("SIGTERM", "save", 1, "cold_start step 2"),
        ("SIGTERM", "evaluate", 1, ""),
        ("SIGINT", "weight_sync", 2, "rl step 1"),
    ],
)
def test_a_run_stops_at_any_time(
    by: str, phase: str, turn: int, kept: str, workplace: Path, whole_run: Path,
    running_server: ServedNode,
) -> None:  # fmt: skip
    """In its start, the cold start, a checkpoint, an evaluation, and a sync; what is whole then is
    kept."""
    run = workplace / f"stops_in_{phase}"
    more = ['run.stages=["cold_start"]', "evaluation.sources=[]"]
    if phase in ("evaluate", "weight_sync"):
        more = [
            'run.stages=["rl"]',
            f"model.path={whole_run / 'cold_start_hf'}",
            "run.save_every=1",
        ]
        more += ["rollout.servers=0", f"rollout.urls={running_server.address}"]
    found = run_until_stopped(by, phase, turn, arguments(workplace, run.name, *more)[2:])
    line = (
        f": go on after {kept} with --resume {run}"
        if kept
        else "; there is no checkpoint to go on from"
    )
    assert found == (128 + signal.Signals[by], f"stopped by {by}{line}")


def test_recorded_rollouts_replay_to_the_same_numbers(workplace: Path, whole_run: Path) -> None:
    """The training half alone, without vLLM."""
    more = [f"model.path={whole_run / 'cold_start_hf'}", "--only", "train"]
    more += ["--rollouts", str(whole_run / "rollouts")]
    run_ranks(1, arguments(workplace, "replayed", *more))
    steps = [row for row in metrics(whole_run) if row["stage"] == "rl"]
    same_metrics(
        [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in steps],
        metrics(workplace / "replayed"),
        but=OF_SAMPLING,
    )
    assert not (workplace / "replayed" / "logs").exists()
    a, b = (load_file(run / "hf/model.safetensors") for run in (whole_run, workplace / "replayed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_the_rollout_half_alone(
    workplace: Path, whole_run: Path, running_server: ServedNode
) -> None:
    """By a server that holds other weights at first: those that the run before left there. It is
    found by the file that ``rollout.serve`` registered it with."""
    more = [f"model.path={whole_run / 'cold_start_hf'}", "rl.steps=1", "--only", "rollout"]
    more += ["rollout.servers=0", "rollout.expect=1"]
    run_ranks(1, arguments(workplace, "sampled", *more))
    found = read_rollouts(workplace / "sampled" / "rollouts" / "000001.parquet")
    expected = read_rollouts(whole_run / "rollouts" / "000001.parquet")
    assert (found.step, found.prompts) == (expected.step, expected.prompts)
    for a, b in zip(found.rollouts, expected.rollouts, strict=True):
        assert np.array_equal(a.response_tokens, b.response_tokens)
        assert (a.reward, a.outcome) == (b.reward, b.outcome)


def test_synthetic_rollouts_a_trace_and_what_is_not_finite(workplace: Path) -> None:
    """Three steps without vLLM at a rate that ruins the actor: a trace, and one message."""
    run = workplace / "ruined"
    more = ["--fake-rollouts", "30", "--profile", "1:1", "run.save_every=1", "rl.actor.lr=1e38"]
    result = run_ranks(1, arguments(workplace, "ruined", *more), check=False)
    assert result.returncode != 0
    assert "longest phases: " in result.stdout
    trace = gzip.decompress((run / "trace" / "rank-00000.json.gz").read_bytes()).decode()
    for name in ("critic", "actor", "linear_policy_loss", "rms_norm", "packed_gae"):
        assert f'"name": "{name}"' in trace, name
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("ovr_fast.train (rank")]
    batch = run / "nonfinite" / "000002.parquet"
    for part in (
        "NonFinite: rl step 2: actor, optimizer step 2", "rank 0: the loss of microbatch 0 of",
        f"The last good checkpoint is {run / 'checkpoints' / 'rl-000001'}", str(batch),
    ):  # fmt: skip
        assert part in line, (part, line)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = ["--resume", str(run), "--only", "train", "--rollouts", str(batch)]
    result = run_ranks(1, ["-m", "ovr_fast.train", *again], check=False)
    assert "NonFinite: rl step 2: actor, optimizer step 2" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = run_ranks(1, ["-m", "ovr_fast.train", "--resume", str(run)], check=False)
    assert "trains on synthetic rollouts: resume it with --fake-rollouts" in result.stdout


def test_rollouts_are_sampled_ahead_and_go_on_over_steps(
    workplace: Path, whole_run: Path, running_server: ServedNode
) -> None:
    """Killed in between; no token is lost or sampled twice."""
    run = workplace / "ahead"
    words = arguments(
        workplace, "ahead", f"model.path={whole_run / 'cold_start_hf'}", 'run.stages=["rl"]',
        "evaluation.sources=[]", "rl.steps=5", "rl.context_tokens=[]", "rl.context_steps=[]",
        "rollout.max_staleness=2", "rollout.partial=true", "rl.importance_cap=2.0",
        "run.record_rollouts=true", "rollout.max_in_flight=2", "rollout.servers=0",
        f"rollout.urls={running_server.address}",
    )[2:]  # fmt: skip
    script = str(ROOT / "tests" / "end_to_end" / "killed.py")
    assert run_ranks(1, [script, "SIGKILL", "actor", "4", *words], check=False).returncode == -9
    done = run_ranks(1, ["-m", "ovr_fast.train", *words, "--resume", str(run)])
    assert "those of weights up to 2 steps old are weighed by at most 2 for it" in done.stdout
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["rollout/staleness_max"] <= 2
        trained, kept = row["rollout/trained_tokens"], row["rollout/kept_tokens"]
        assert row["rollout/sampled_tokens"] == trained + kept
    assert max(row["rollout/staleness"] for row in rows) > 0
    assert rows[-1]["rollout/kept_tokens"] == 0
    versions = {
        tuple(span.version for span in rollout.versions)
        for step in range(1, 6)
        for rollout in read_rollouts(run / "rollouts" / f"{step:06d}.parquet").rollouts
    }
    assert any(len(spans) > 1 for spans in versions), versions
    again = arguments(
        workplace, "ahead_again", f"model.path={whole_run / 'cold_start_hf'}", "rl.steps=5",
        "rl.context_tokens=[]", "rl.context_steps=[]", "rollout.max_staleness=2",
        "rollout.partial=true", "rl.importance_cap=2.0", "--only", "train", "--rollouts",
        str(run / "rollouts"),
    )  # fmt: skip
    run_ranks(1, again)  # without vLLM
    same_metrics(rows, metrics(workplace / "ahead_again"), but=OF_SAMPLING)
    a, b = (
        load_file(folder / "hf/model.safetensors") for folder in (run, run.parent / "ahead_again")
    )
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_two_pipeline_stages_of_two_tensor_ranks_train_too(
    workplace: Path, whole_run: Path, running_server: ServedNode
) -> None:
    """Scoring responses while others are sampled; on the recorded ones they wait for all, and the
    updates are the same."""
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "rl.steps=2", "rl.critic_steps=2"]
    layout += ["parallel.offload=model", "model.recompute=selective"]
    layout += ["rl.max_tokens_per_microbatch=512"]
    more = ["rollout.servers=0", f"rollout.urls={running_server.address}"]
    more += ["rl.score_while_sampling=true", "run.record_rollouts=true", "rollout.max_in_flight=4"]
    output = run_ranks(4, arguments(workplace, "wide", *layout, *more)).stdout
    assert "rollout: disaggregated, weights by gloo, the servers stay" in output
    one, many = metrics(whole_run), metrics(workplace / "wide")
    for a, b in zip(one[1:4], many[1:4], strict=True):  # the cold start has no sampling in it
        assert b["cold_start/loss"] == pytest.approx(a["cold_start/loss"], rel=1e-4)
        assert b["cold_start/grad_norm"] == pytest.approx(a["cold_start/grad_norm"], rel=1e-3)
    early = [row for row in many if row["stage"] == "rl"]
    assert max(row["rollout/logprob_gap"] for row in early) < 1e-3
    assert min(row["time/hidden_s"] for row in early) > 0
    cold_start, rollouts = (workplace / "wide" / name for name in ("cold_start_hf", "rollouts"))
    again = [f"model.path={cold_start}", "--only", "train", "--rollouts", str(rollouts)]
    run_ranks(4, arguments(workplace, "waits", *layout, *again))
    late = metrics(workplace / "waits")
    for a, b in zip(early, late, strict=True):
        assert "time/hidden_s" not in b
        for key in ("actor/grad_norm", "critic/grad_norm", "critic/loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def failing(workplace: Path, *more: str, timeout_s: float = 180) -> str:
    """The one message of a run that must end with an error, and quickly."""
    result = run_ranks(1, arguments(workplace, "bad", *more), timeout_s=timeout_s, check=False)
    assert result.returncode != 0
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("ovr_fast.train (rank")]
    return line


def test_a_missing_weight_is_named(workplace: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(BASE_MODEL, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    more = ['run.stages=["cold_start"]', "evaluation.sources=[]", f"model.path={broken}"]
    message = failing(workplace, *more, "run.name=bad2")
    assert "weight model.layers.1.mlp.up_proj.weight is missing" in message


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_torchrun(workplace: Path, by: signal.Signals) -> None:
    """Which passes a signal on, or is killed and cannot."""
    run, launcher = workplace / f"by_{by.name}", ["-m", "torch.distributed.run", "--standalone"]
    words = arguments(
        workplace, run.name, "--fake-rollouts", "30", "rl.steps=500", 'run.stages=["rl"]',
        "evaluation.sources=[]", "run.save_every=1",
    )  # fmt: skip
    log, temporary = workplace / f"{run.name}.log", workplace / f"tmp_{by.name}"
    temporary.mkdir()
    with open(log, "w") as output:
        torchrun = subprocess.Popen(
            [sys.executable, *launcher, "--nproc-per-node", "2", *words],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        )  # fmt: skip
    ranks: list[psutil.Process] = []
    try:
        wait_for_rl_step(2, run, torchrun, log)
        ranks = psutil.Process(torchrun.pid).children(recursive=True)
        assert len(ranks) >= 2
        torchrun.send_signal(by)
        _, alive = psutil.wait_procs(ranks, timeout=40)
        assert not alive
    finally:
        kill_tree(torchrun)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
    said = log.read_text()
    (line,) = [one for one in said.splitlines() if one.startswith("stopped by SIGTERM: ")]
    assert re.fullmatch(rf"stopped by SIGTERM: go on after rl step \d+ with --resume {run}", line)
    assert "ovr_fast.train (rank" not in said
    assert not [*temporary.glob("torchelastic_*")]


def rl_steps(run: Path) -> int:
    """Whose rows are written."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"stage": "rl"') if path.exists() else 0


def wait_for_rl_step(step: int, run: Path, process: subprocess.Popen, log: Path) -> None:
    """Until its row is written."""
    deadline = time.monotonic() + HUNG_S
    while rl_steps(run) < step:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def test_a_server_that_is_not_there_ends_the_run(workplace: Path) -> None:
    more = ["rollout.servers=0", 'rollout.urls=["http://127.0.0.1:9"]', "run.name=bad3"]
    assert "is the server running?" in failing(workplace, *more)


def test_servers_that_freeze_and_die_change_no_number(workplace: Path, whole_run: Path) -> None:
    """One of two is frozen, and the other takes over; when that is killed the first is being
    started anew. The run ends with the numbers of one whose only server was left alone. (``make
    soak`` disturbs one 20 times.)"""
    more = ["rollout.servers=2", "rollout.probe_timeout_s=5"]
    command = [sys.executable, *arguments(workplace, "dies", *more)]
    run, log = workplace / "dies", workplace / "dies.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=stream, stderr=subprocess.STDOUT,
            # As the run that it is compared with: two threads add up in another order.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        servers: list[int] = []
        for step, by in ((2, signal.SIGSTOP), (3, signal.SIGKILL)):
            wait_for_rl_step(step, run, process, log)
            if not servers:
                own = processes_logging_to(run / "logs")
                servers = [pid for pid in own if os.getsid(pid) == pid]  # the others are children
                assert len(servers) == 2
            os.killpg(servers.pop(), by)
        process.wait(timeout=HUNG_S)
    finally:
        kill_tree(process)
    output = log.read_text()
    assert process.returncode == 0, output[-3000:]
    assert "server 0 failed" in output
    assert "server 1 failed" in output
    assert output.count("waits for weights") >= 1
    same_metrics(metrics(whole_run), metrics(run))
    for name, tensor in load_file(whole_run / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(run / "hf" / "model.safetensors")[name]), name
