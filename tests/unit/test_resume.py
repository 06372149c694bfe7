"""What a resumed run may change, and where it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ovr_fast.config import Config, RLConfig, load_config
from ovr_fast.data.errors import DataError
from ovr_fast.data.rollouts import write_rollouts
from ovr_fast.parallel.checkpoint import CheckpointError, weights_checksums
from ovr_fast.records import Prompt, RolloutBatch
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.rollout.given import RecordedRollouts, SyntheticRollouts
from ovr_fast.run.folder import RunFolder
from ovr_fast.run.lines import accuracy_line
from ovr_fast.run.resume import check_resume, check_run_folder
from ovr_fast.run.run import Run, check_weights
from ovr_fast.settings import ConfigError, settings_of, to_toml
from support.image_run import a_rollout, lone_mesh
from support.toy_run import ROOT


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.toml", list(overrides))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(to_toml(config(), described=True))
    return tmp_path


def test_settings_that_would_make_another_run_are_refused(saved: Path) -> None:
    changed = {"rl.steps": "200", "rl.actor.lr": "1e-5", "parallel.world": "1", "run.keep": "5"}
    check_resume(config(*(f"{key}={value}" for key, value in changed.items())), saved)
    may_change = {setting.name for setting in settings_of(config()) if setting.rule.may_change}
    assert set(changed) <= may_change
    for key, value in (("run.seed", "1"), ("rl.gamma", "0.5"), ("evaluation.prompts", "3")):
        with pytest.raises(ConfigError, match=f"{key} was .* and is {value} now"):
            check_resume(config(f"{key}={value}"), saved)


@pytest.mark.parametrize("section", ["cold_start", "rl", "evaluation"])
def test_data_sources_may_not_be_added_or_removed(section: str, saved: Path) -> None:
    first = '{path="runs/toy_data/rl_images.parquet", weight=3.0}'
    for sources in (f"[{first}]", f"[{first}, {first}, {first}]"):
        with pytest.raises(ConfigError, match=rf"{section}\.sources"):
            check_resume(config(f"{section}.sources={sources}"), saved)


def test_a_limit_that_was_reached_stays_when_the_schedule_changes() -> None:
    limits = dict(context_tokens=(10, 20, 30), max_response_tokens=30, context_patience=2)
    scheduled = ContextCurriculum(RLConfig(**limits, context_steps=(3, 7)))
    for step in range(1, 5):
        scheduled.observe(step, 5.0)
    assert scheduled.limit(4) == 20
    free = ContextCurriculum(RLConfig(**limits))
    free.restore(scheduled.state())
    assert free.limit(5) == 20


def batch(step: int) -> RolloutBatch:
    prompt = Prompt(id="p", data_source="s", messages=(), images=(), answer="1", response=None)
    tokens = torch.arange(3).numpy()
    return RolloutBatch(
        step=step, prompts=(prompt,), rollouts=(a_rollout(0, 0, tokens, tokens, reward=1.0),)
    )


def test_recorded_rollouts_go_on_after_the_last_file_whatever_its_number(tmp_path: Path) -> None:
    for step in (3, 5, 9):
        write_rollouts(tmp_path / f"{step:06d}.parquet", batch(step))
    mesh = SimpleNamespace(on_first_rank=lambda work, otherwise: work())

    def source(steps_done: int, *, replay: bool = False) -> RecordedRollouts:
        return RecordedRollouts(
            tmp_path, steps_done=steps_done, replay=replay, vocabulary=10**6, mesh=mesh
        )  # type: ignore[arg-type]

    first = source(0)
    assert first.last_step(100) == 3
    assert first.last_step(2) == 2
    assert [first.next(step, max_tokens=1).step for step in (1, 2)] == [3, 5]
    resumed = source(2)
    resumed.restore(first.state())
    assert resumed.last_step(100) == 3
    assert resumed.next(3, max_tokens=1).step == 9
    with pytest.raises(DataError, match="no rollouts after step 9"):
        source(3).restore(resumed.state())
    tried = source(4, replay=True)  # other rollouts on a run's checkpoint: its state names no file
    tried.restore({"drawn": [1], "position": 1})
    assert tried.last_step(4) == 6
    assert tried.next(5, max_tokens=1).step == 5


def test_a_source_of_another_kind_begins_anew() -> None:
    stream = SimpleNamespace(restore=lambda state: pytest.fail("nothing to go on from"))
    source = SyntheticRollouts(
        config(), stream=stream, shape=SimpleNamespace(image_token_id=1, video_token_id=2),
        chat=None, mean_tokens=1.0, mesh=None,
    )  # type: ignore[arg-type]  # fmt: skip
    source.restore({"file_step": 3})
    source.restore({})


def rows_of(folder: Path, *rows: object, end: str = "") -> Path:
    """A run folder with these rows of metrics."""
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows) + end
    (folder / "metrics.jsonl").write_text(text)
    (folder / "identity").write_text("x")
    return folder


def test_a_row_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    one, two = {"stage": "rl", "step": 1, "x": 0.5}, {"stage": "rl", "step": 2, "x": float("nan")}
    for name, kept, end in (
        ("torn", [one], '{"stage": "rl", "st'),
        ("lost", [one], ""),
        ("whole", [one, two], ""),
        ("later", [one, two, {"stage": "rl", "step": 3}], ""),
    ):
        folder = rows_of(tmp_path / name, *kept, end=end)
        RunFolder(folder, config(), keep_until=("rl", 2), last_row=two).close()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2], name
        assert math.isnan(rows[1]["x"])


@pytest.mark.parametrize(
    "line", ["not json", "[1, 2]", '{"stage": "rl"}', '{"stage": "other", "step": 1}', "\xff\xfe"]
)
def test_rows_of_a_stranger_are_one_message(line: str, tmp_path: Path) -> None:
    folder = rows_of(tmp_path / "run", end=f"{line}\n" + '{"stage": "rl", "step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:1 is not a row .*move the file away"):
        RunFolder(folder, config(), keep_until=("rl", 2))
    alone = rows_of(tmp_path / "alone", end=f"{line}\n")  # its last line is no row cut short
    with pytest.raises(ConfigError, match=r"metrics.jsonl:1 is not a row .*move the file away"):
        RunFolder(alone, config(), keep_until=("rl", 2))


def test_rows_in_another_encoding_are_a_stranger_s(tmp_path: Path) -> None:
    folder = rows_of(tmp_path / "run")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        row = '{"stage": "rl", "step": 1}\n{"stage": "rl", "step": 2}\n'.encode(encoding)
        (folder / "metrics.jsonl").write_bytes(row)
        with pytest.raises(ConfigError, match=r"metrics.jsonl:1 is not a row .*move the file away"):
            RunFolder(folder, config(), keep_until=("rl", 2))


def test_what_is_no_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder: it has no config.toml"):
        check_run_folder(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "rl-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checksums.json").touch()
    (tmp_path / "run" / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"--resume \S+/run --checkpoint rl-000002"):
        check_run_folder(checkpoint)


def test_what_a_stage_began_with_is_what_it_goes_on_with(tmp_path: Path) -> None:
    """Frozen parts and the reference are read from there, not from a checkpoint."""
    weights, saved = tmp_path / "hf", tmp_path / "checkpoints" / "rl-000002"
    weights.mkdir()
    saved.mkdir(parents=True)
    for name in ("a", "b"):
        (weights / f"{name}.safetensors").write_bytes(name.encode() * 100)

    before = weights_checksums(weights, lone_mesh())
    assert sorted(before) == ["a.safetensors", "b.safetensors"]
    torch.save({"weights": before}, saved / "meta.pt")
    (weights / "README.md").write_text("changed")
    check_weights(saved, weights, lone_mesh())
    run = object.__new__(Run)
    run.checkpoint, run.mesh = saved, lone_mesh()
    run.note_weights("rl", weights)
    assert run.weights == before

    def refused(why: str) -> None:
        with pytest.raises(CheckpointError, match=why):
            check_weights(saved, weights, lone_mesh())

    (weights / "b.safetensors").write_bytes(b"b" * 99 + b"c")
    refused(r"b.safetensors is not what it was: .*rl-000002 .*put it back")
    run.note_weights("cold_start", weights)  # another stage's
    assert run.weights != before
    (weights / "b.safetensors").unlink()
    refused(r"b.safetensors is missing: .*put it back")
    (weights / "b.safetensors").write_bytes(b"b" * 100)
    (weights / "c.safetensors").write_bytes(b"")
    refused(r"c.safetensors is new: .*take it away")
    (weights / "c.safetensors").unlink()
    (weights / "c.safetensors").mkdir()
    refused(r"c.safetensors cannot be read")
    torch.save({}, saved / "meta.pt")
    refused("was written by an earlier version")


def test_the_accuracy_line_names_whole_sets() -> None:
    metrics = {
        "eval/math/easy/accuracy": 0.5,
        "eval/math/easy/no_answer": 0.1,
        "eval/a/accuracy": 1,
    }
    assert accuracy_line(metrics) == "math/easy 50.0% | a 100.0%"
    assert accuracy_line({"rollout/reward": 1.0}) == ""
