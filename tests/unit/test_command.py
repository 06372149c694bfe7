"""The command line: flags that do not go together, and how a run ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr_fast import train
from ovr_fast.settings import ConfigError
from support.toy_run import ROOT

TINY = str(ROOT / "configs" / "tiny.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config FILE.toml (or --resume DIR) is needed"),
        (["--config", TINY, "--rollouts", "x"], "--rollouts goes with --only train"),
        (["--config", TINY, "--only", "train"], "--only train needs --rollouts PATH"),
        (["--config", TINY, "--fake-rollouts", "0"], "at least 1 token"),
        (["--config", TINY, "--fake-rollouts", "nan"], "at least 1 token"),
        (["--config", TINY, "--fake-rollouts", "9", "--only", "rollout"], "stands alone"),
        (["--resume", "x", "--only", "rollout"], "does not --resume"),
    ],
)
def test_flags_that_do_not_go_together(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        train.parse(words)
    assert message in capsys.readouterr().err


def ending(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["train", *words])
    with pytest.raises(SystemExit) as ended:
        train.main()
    return int(ended.value.code)  # type: ignore[arg-type]


def test_what_a_user_can_mend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert ending(["--config", TINY, "rl.gama=1"], monkeypatch) == 1
    said = capsys.readouterr().err.strip()
    assert said == (
        "ovr_fast.train (rank 0): ConfigError: unknown setting rl.gama; did you mean rl.gamma?"
    )


SLEEPER = """
import signal, time
from ovr_fast import stopping
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests are nohup's
stopping.install()
stopping.LAST_WORDS.append(lambda: print("last words", flush=True))
print("there", flush=True)
while True:
    time.sleep(0.05)
    if stopping.asked_now():
        print("asked", stopping.asked_now(), flush=True)
        while True:  # a microbatch that does not end
            time.sleep(0.05)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    """A process that answers signals as a run does; killed after a while, whatever it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    limit = threading.Timer(60, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


def test_a_hang_up_asks_once(sleeper: subprocess.Popen) -> None:
    """A shell that ends sends one, and the kernel another."""
    process = sleeper
    assert process.stdout is not None
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(1.2)
    assert process.stdout.readline() == "asked SIGHUP\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_run_at_once(number: int, sleeper: subprocess.Popen) -> None:
    process = sleeper
    assert process.stdout is not None
    process.send_signal(number)
    assert process.stdout.readline() == f"asked {signal.Signals(number).name}\n"
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert out == "last words\n"
    assert "ended at once; nothing of the running step is kept" in error
    assert process.returncode == 128 + number


def test_anything_else_keeps_its_trace_with_rank_and_run_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def defect(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(train, "train", defect)
    words = ["--config", TINY, f"run.root={tmp_path}", "run.name=a"]
    assert ending(words, monkeypatch) == 1
    said = capsys.readouterr().err
    assert f"ovr_fast.train (rank 3, run folder {tmp_path / 'a'}) failed:" in said
    assert "Traceback (most recent call last)" in said
    assert 'raise RuntimeError("an illegal memory access")' in said


def settings(*words: str) -> object:
    return train.settings_for(train.parse(["--config", TINY, *words]))


def test_steps_to_trace_are_checked_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="the last step is before the first"):
        settings("--profile", "9:4")
    with pytest.raises(ConfigError, match="has 240 steps"):
        settings("--profile", "241:250")
    with pytest.raises(ConfigError, match="has 108 steps"):
        settings("--profile", "241:250", "--fake-rollouts", "9")


def test_a_dry_run_refuses_what_the_run_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    plan = ["--config", str(ROOT / "configs" / "ovr_7b_rl.toml"), "--dry-run"]
    monkeypatch.setattr("sys.argv", ["train", *plan])
    train.main()
    assert "32 ranks = tensor 4 x pipeline 2 x data 4" in capsys.readouterr().out
    for words, message in (
        (["rl.max_response_tokens=0"], "rl.max_response_tokens=0 must be at least 1"),
        (["parallel.tensor=3"], "does not divide"),
        (
            ["rollout.placement=colocated", "rollout.urls=[]", "rollout.servers=1",
             "parallel.world=8", "parallel.pipeline=1"],
            "needs a server worker on each of the trainer's 8 GPUs",
        ),
    ):  # fmt: skip
        assert ending([*plan, *words], monkeypatch) == 1
        assert message in capsys.readouterr().err


def test_bad_data_and_models_end_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "answer": "1"}\n{"prompt": \n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    rl = ['run.stages=["rl"]', "evaluation.sources=[]", f"run.root={tmp_path}"]
    monkeypatch.chdir(ROOT)
    for words, message in (
        ([f'rl.sources=[{{path="{bad}"}}]'], f"DataError: {bad}:2: not JSON"),
        (["model.path=./nowhere"], "ModelError: model.path='./nowhere' is not a folder"),
        ([f"model.path={other}"], "ModelError: .*'llama' model"),
        (["parallel.tensor=2"], "ConfigError: .*does not divide the 1 processes"),
    ):
        assert ending(["--config", TINY, *rl, *words], monkeypatch) == 1
        assert re.search(re.escape(message).replace(r"\.\*", ".*"), capsys.readouterr().err)
    assert not (tmp_path / "tiny").exists()
