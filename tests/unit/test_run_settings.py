"""Settings of servers, evaluation and the run folder change what they say they change."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ovr_fast import stopping
from ovr_fast.config import Config, load_config
from ovr_fast.evaluation.heldout import HeldOut
from ovr_fast.records import ImageLimits, Prompt, RolloutBatch
from ovr_fast.rollout.client import Address, Client, ServerFailed
from ovr_fast.rollout.placement import Placement
from ovr_fast.rollout.server import _GUARD, STOP_S, Server, ServerOptions, _session
from ovr_fast.run.folder import RunFolder
from ovr_fast.run.run import Run
from support.image_run import a_rollout, an_image, lone_mesh
from support.toy_run import ROOT

PROMPT = Prompt(id="p", data_source="s", messages=(), images=(), answer="1", response=None)


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.toml", list(overrides))


def options(*overrides: str, sleeps: bool = False, backend: str = "gloo") -> ServerOptions:
    placement = Placement(transfer_backend=backend, sleeps=sleeps)
    images = ImageLimits(count=2, width=84, height=56)
    return ServerOptions.of(config(*overrides), placement, model=Path("m"), images=images)


def test_a_server_is_started_with_the_settings() -> None:
    more = ["rollout.tensor=2", "rollout.gpu_memory_utilization=0.5", "rollout.kv_cache_gib=3"]
    made = options(*more, "run.seed=7", "rollout.compile=false", "model.dtype=bfloat16")
    words = made.command(["--port", "8000"])

    def after(flag: str) -> str:
        return words[words.index(flag) + 1]

    assert after("--port") == "8000"
    assert after("--tensor-parallel-size") == "2"
    assert after("--gpu-memory-utilization") == "0.5"
    assert after("--seed") == "7"
    assert after("--dtype") == "bfloat16"
    assert after("--max-model-len") == str(192 + 96)
    assert json.loads(after("--limit-mm-per-prompt")) == {
        "image": {"count": 2, "width": 84, "height": 56}, "video": {"count": 0},
    }  # fmt: skip
    assert "--enforce-eager" in words
    assert "--enable-sleep-mode" not in words
    environment = made.environment(devices="4,5")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    plain = options(sleeps=True, backend="ipc").command([])
    assert "--enforce-eager" not in plain
    assert "--enable-sleep-mode" in plain
    assert "--no-enable-chunked-prefill" not in plain


class Idle(ServerOptions):
    """A process that is no server."""

    def command(self, listen: list[str]) -> list[str]:
        return [sys.executable, "-c", "import time; print('compiling', flush=True); time.sleep(60)"]


class Busy(ServerOptions):
    """A process that works and never answers."""

    def command(self, listen: list[str]) -> list[str]:
        return [sys.executable, "-c", "while True: pass"]


@pytest.mark.parametrize(
    ("kind", "patience", "message"), [(Idle, 30.0, "was silent for"), (Busy, 1.5, "did not end")]
)
def test_a_start_is_given_up_on_silence_or_at_the_limit(
    kind: type[ServerOptions],
    patience: float,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ovr_fast.rollout.server.PATIENCE", patience)
    fields = {name: getattr(options(), name) for name in ServerOptions.__slots__}
    server = Server(kind(**fields), log=tmp_path / "log", devices=None)
    began = time.monotonic()
    client = Client()
    with pytest.raises(ServerFailed, match=rf"{message}.*startup_timeout_s=2\).*{tmp_path}"):
        client.run(server.ready(client, 2.0))
    client.close()
    assert 2.0 < time.monotonic() - began < 30
    assert server.process.poll() is not None


class Stubborn(ServerOptions):
    """A process, and one that it starts, which ignore SIGTERM."""

    def command(self, listen: list[str]) -> list[str]:
        return ["sh", "-c", "trap '' TERM; sleep 300 & echo there; wait; sleep 300"]


@pytest.mark.parametrize("leader_first", [False, True])
def test_a_killed_server_is_gone_with_all_that_it_started(
    leader_first: bool, tmp_path: Path
) -> None:
    """Its memory is another's then; and once: its number may be another's too."""
    fields = {name: getattr(options(), name) for name in ServerOptions.__slots__}
    server = Server(Stubborn(**fields), log=tmp_path / "log", devices=None)
    folder = Path(server._folder)
    deadline = time.monotonic() + 20
    while "there" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    session = server.process.pid
    assert len([*_session(session)]) == 2
    if leader_first:
        server.process.kill()
    server.kill()
    assert [*_session(session)] == []
    assert not folder.exists()
    assert server.kill_unseen not in stopping.LAST_WORDS
    server._rest = lambda: pytest.fail("it looks for processes again")  # type: ignore[method-assign]
    server.kill()


TRAINER = """
import sys, time
from pathlib import Path
from test_run_settings import Idle, Server, ServerOptions, options
fields = {name: getattr(options(), name) for name in ServerOptions.__slots__}
print(Server(Idle(**fields), log=Path(sys.argv[1]), devices=None).process.pid, flush=True)
time.sleep(60)
"""


def test_a_frozen_server_ends_with_its_trainer(tmp_path: Path) -> None:
    """Which is killed, and cannot end it; a signal waits until somebody wakes it."""
    places = [str(ROOT / "tests"), str(ROOT / "tests" / "unit"), os.environ.get("PYTHONPATH", "")]
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
    )  # fmt: skip
    assert trainer.stdout is not None
    session = int(trainer.stdout.readline())
    assert [*_session(session)]
    os.killpg(session, signal.SIGSTOP)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 30
    try:
        while [*_session(session)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


def test_the_guard_of_a_server_spares_its_resource_trackers() -> None:
    """Which free the shared memory of what it kills."""
    leader = subprocess.Popen(["sh"], stdin=subprocess.PIPE, start_new_session=True, text=True)
    tracker = f"{sys.executable} -c 'import time; time.sleep(60)  # resource_tracker'"
    try:
        assert leader.stdin is not None
        leader.stdin.write(f"sleep 60 &\n{tracker} &\nwait\n")
        leader.stdin.flush()
        deadline = time.monotonic() + 20
        while len([*_session(leader.pid)]) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        others = {process for process, _ in _session(leader.pid)}
        guard = _GUARD.replace(f"sleep {STOP_S:g}", "sleep 0.5")
        subprocess.run(["sh", "-c", guard, str(leader.pid)], stdin=subprocess.DEVNULL, check=False)
        leader.wait(timeout=20)
        (left,) = {process for process, _ in _session(leader.pid)}
        assert left in others
        assert b"resource_tracker" in Path(f"/proc/{left}/cmdline").read_bytes()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)


def test_a_checkpoint_that_is_due_is_written_though_the_run_is_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal that comes in the middle of it waits."""
    written: list[int] = []

    def save_state(writer, stage: str, step: int, *rest, **more) -> None:
        stopping._Request.now = "SIGTERM"
        stopping.check()
        written.append(step)

    monkeypatch.setattr(stopping._Request, "now", "")
    monkeypatch.setattr("ovr_fast.run.run.save_state", save_state)
    run = SimpleNamespace(
        clock=lambda name: contextlib.nullcontext(), writer=None, recipe_stage="rl", mesh=None,
        rollout_kind="vllm", last_row={}, weights={},
    )  # fmt: skip
    Run.save(run, 7, {})  # type: ignore[arg-type]
    assert written == [7] == [run.saved]


def test_a_server_that_cannot_be_ended_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovr_fast.rollout.server.STOP_S", 0.2)
    fields = {name: getattr(options(), name) for name in ServerOptions.__slots__}
    server = Server(Idle(**fields), log=tmp_path / "log", devices=None)
    rest = server._rest
    server._rest = lambda: [*rest(), 2**22 + 1]  # type: ignore[method-assign]  # no process
    with pytest.raises(ServerFailed, match=rf"processes .*{2**22 + 1} of the vLLM .* not free"):
        server.kill()
    server._rest = rest  # type: ignore[method-assign]
    server.kill()


def test_a_server_s_sockets_are_nobody_else_s_and_not_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control routes ask nobody for a key; a socket's path has 108 bytes, whatever TMPDIR is."""
    fields = {name: getattr(options(), name) for name in ServerOptions.__slots__}
    long, short = tmp_path / ("x" * 120), Path(tempfile.mkdtemp(dir="/tmp"))
    long.mkdir()
    for parent, found in ((short, short), (long, Path("/tmp"))):
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        server = Server(Idle(**fields), log=tmp_path / "log", devices=None)
        folder = Path(server._folder)
        try:
            assert folder.parent == found
            assert folder.stat().st_mode & 0o777 == 0o700
            assert len(f"{folder}/{uuid.uuid4()}") < 108
            assert server.address.url == f"unix:{folder}/vllm"
        finally:
            server.kill()
        assert not folder.exists()
    assert not [*long.iterdir()]
    short.rmdir()


def test_weights_are_sent_from_the_trainer_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovr_fast.rollout import weight_sync

    told = []
    factory = weight_sync.WeightTransferTrainerFactory
    monkeypatch.setattr(factory, "trainer_init", lambda info, **_: told.append(info))
    mesh = SimpleNamespace(rank=0)
    weight_sync.WeightSync(
        mesh, client=None, addresses=(Address("http://a"), Address("http://b")), workers=2,
        address="10.0.0.7", port=0, backend="gloo", timeout_s=1.0,
    )  # type: ignore[arg-type]  # fmt: skip
    (info,) = told
    assert (info.master_address, info.world_size) == ("10.0.0.7", 5)


def test_evaluations_are_due_every_so_many_steps_and_at_the_end() -> None:
    def due(every: int) -> list[int]:
        held_out = HeldOut(
            {}, fleet=SimpleNamespace(sleep=lambda: None), verifier=None, mesh=None,
            max_tokens=1, every=every,
        )  # type: ignore[arg-type]  # fmt: skip
        held_out.measure = lambda: {"x": 1.0}  # type: ignore[method-assign]
        return [step for step in range(1, 8) if held_out.measure_if_due(step, last=7)]

    assert due(3) == [3, 6, 7]
    assert due(0) == [7]


def test_exports_and_checkpoints_are_due_every_so_many_steps() -> None:
    def due(method: str, *overrides: str) -> list[int]:
        made: list[str] = []
        run = SimpleNamespace(
            config=config(*overrides), last_step=7, export=lambda learner, name: made.append(name)
        )
        if method == "export":
            for step in range(1, 8):
                Run.export_if_due(run, step, None)  # type: ignore[arg-type]
            return [int(name.removeprefix("hf_")) for name in made]
        return [step for step in range(1, 8) if Run.save_is_due(run, step)]  # type: ignore[arg-type]

    assert due("export", "run.export_every=3") == [3, 6]
    assert due("export") == []
    assert due("save", "run.save_every=5") == [5, 7]


@pytest.mark.parametrize(
    ("error", "changed", "kept"),
    [
        (ServerFailed("no server was left"), False, [4]),
        (ServerFailed("no server was left"), True, []),  # by a phase that has ended
        (stopping.Stopped("SIGTERM"), False, [4]),
        (ValueError("a defect"), False, []),
    ],
    ids=["lost", "lost in an update", "stopped", "defect"],
)
def test_what_ends_a_step_keeps_the_one_before(
    error: Exception, changed: bool, kept: list[int]
) -> None:
    """A checkpoint of it is written where every rank has the error, at one place."""
    for together in (True, False):
        saved: list[int] = []
        run = SimpleNamespace(profiler=SimpleNamespace(before=print), _save_last=saved.append)

        def fail(error: Exception = error) -> None:
            raise error

        def end(run=run, together=together, fail=fail) -> None:
            with Run.step(run, 5) as step:  # type: ignore[arg-type]
                step.changed = changed
                if together:
                    lone_mesh().on_first_rank(fail, otherwise=None)
                fail()

        error.together = False  # type: ignore[attr-defined]
        with pytest.raises(type(error), match=str(error)):
            end()
        assert saved == (kept if together else [])


def test_readable_rollouts_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict] = []
    board = SimpleNamespace(log=shown.append, finish=lambda: shown.append({"finished": True}))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: shown.append(options) or board)
    )
    tokens = torch.arange(3).numpy()
    rollouts = tuple(a_rollout(0, sample, tokens, tokens, reward=1.0) for sample in range(6))
    image = an_image(0, (900, 300))
    batch = RolloutBatch(step=2, prompts=(replace(PROMPT, images=(image,)),), rollouts=rollouts)
    folder = RunFolder(tmp_path / "run", config("run.wandb=true", "run.name=a"))
    for count in (0, 2):
        settings = config(f"run.readable_rollouts={count}")
        run = SimpleNamespace(log=folder, config=settings, recipe_stage="rl")
        Run.record_rollouts(run, 2, batch)  # type: ignore[arg-type]
    row = {"rollout/reward": 0.5, "rollout/length_tokens": 3.0, "critic/explained_variance": 0.0}
    folder.record("rl", 2, row)
    folder.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 2]
    assert [row["pictures"] for row in rows] == [[f"pictures/{image.digest[:16]}.jpg"]] * 2
    with Image.open(tmp_path / "run" / rows[0]["pictures"][0]) as small:
        assert small.size == (85, 256)
    assert shown[0]["name"] == "a"
    assert shown[1:] == [{f"rl/{key}": value for key, value in row.items()}, {"finished": True}]
    described = (tmp_path / "run" / "config.toml").read_text()
    assert "# Discount per token, 0..1. OVR. (at least 0 and at most 1)" in described
    assert os.path.getsize(tmp_path / "run" / "curves.png") > 0
