"""Saving: complete or absent, on a full disk too."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import BASE_MODEL
from ovr_fast.average import average
from ovr_fast.config import ModelConfig
from ovr_fast.learner import build_stage
from ovr_fast.model.hf_weights import save_hf
from ovr_fast.model.shape import read_shape
from ovr_fast.parallel.checkpoint import (
    CheckpointError,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from ovr_fast.parallel.mesh import Mesh, start_mesh
from random_models import make_model


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return start_mesh(tensor=1, pipeline=1)


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow past ``after_bytes``, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_message_and_loses_nothing(mesh: Mesh, tmp_path: Path) -> None:
    options = dict(stage="rl", mesh=mesh, keep=2)
    small = {"step": 1, "x": torch.arange(4)}
    write_checkpoint(tmp_path, step=1, state=small, **options)
    with full_disk(10_000), pytest.raises(CheckpointError, match="saved before are untouched"):
        write_checkpoint(tmp_path, step=2, state={"x": torch.zeros(100_000)}, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["rl-000001"]
    assert torch.equal(read_checkpoint(tmp_path / "rl-000001", mesh)["x"], small["x"])


def test_the_oldest_go_and_an_interrupted_one_is_never_found(mesh: Mesh, tmp_path: Path) -> None:
    for step in range(1, 5):
        write_checkpoint(tmp_path, stage="rl", step=step, state={"step": step}, mesh=mesh, keep=2)
    write_checkpoint(tmp_path, stage="cold_start", step=9, state={}, mesh=mesh, keep=2)
    (tmp_path / "rl-000009.partial").mkdir()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["cold_start-000009", "rl-000003", "rl-000004"]


def test_another_layout_and_a_damaged_file_are_named(mesh: Mesh, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, stage="rl", step=1, state={}, mesh=mesh, keep=1)
    (path / "rank-00000.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="rank-00000.pt cannot be read"):
        read_checkpoint(path, mesh)
    (path / "layout.json").write_text('{"tp": 2, "pp": 1, "dp": 1}')
    with pytest.raises(CheckpointError, match="2 x 1 x 1, this run is 1 x 1 x 1"):
        read_checkpoint(path, mesh)


def test_a_hugging_face_folder_is_whole_or_what_it_was(mesh: Mesh, tmp_path: Path) -> None:
    stage = build_stage(
        read_shape(BASE_MODEL), mesh, ModelConfig(path="-", dtype="float32"), weights=BASE_MODEL
    )
    save_hf(stage, tmp_path / "hf", like=BASE_MODEL)
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert '"dtype": "float32"' in (tmp_path / "hf" / "config.json").read_text()
    with full_disk(100_000), pytest.raises(OSError, match="could not save"):
        save_hf(stage, tmp_path / "hf", like=BASE_MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before


def test_large_models_are_cut_into_files(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = build_stage(
        read_shape(BASE_MODEL), mesh, ModelConfig(path="-", dtype="float32"), weights=BASE_MODEL
    )
    monkeypatch.setattr("ovr_fast.model.hf_weights.SHARD_BYTES", 2_000_000)
    save_hf(stage, tmp_path / "hf", like=BASE_MODEL)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    again = build_stage(
        read_shape(tmp_path / "hf"), mesh, ModelConfig(path="-", dtype="float32"),
        weights=tmp_path / "hf",
    )  # fmt: skip
    for (name, a), (_, b) in zip(stage.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_average_of_models(mesh: Mesh, tmp_path: Path) -> None:
    shape, settings = read_shape(BASE_MODEL), ModelConfig(path="-", dtype="float32")
    stage = build_stage(shape, mesh, settings, weights=BASE_MODEL)
    for number, factor in enumerate((1.0, 2.0, 6.0)):
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.mul_(factor)
        save_hf(stage, tmp_path / f"hf_{number}", like=BASE_MODEL)
    average([tmp_path / f"hf_{number}" for number in range(3)], tmp_path / "mean")
    base, mean = (load_file(f / "model.safetensors") for f in (BASE_MODEL, tmp_path / "mean"))
    assert set(base) == set(mean)
    for name, tensor in base.items():  # 1, 2 and 12 times the base
        torch.testing.assert_close(mean[name], tensor.float() * 5.0)
    assert (tmp_path / "mean" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="mean exists"):
        average([tmp_path / "hf_0"], tmp_path / "mean")


def test_models_of_different_shapes_have_no_average(tmp_path: Path) -> None:
    other = make_model(tmp_path / "wide", "wide")
    with pytest.raises(ValueError, match="wide: weight .* (is missing|has shape)"):
        average([BASE_MODEL, other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    assert not (tmp_path / "mean.partial").exists()
