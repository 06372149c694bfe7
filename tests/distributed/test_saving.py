"""Saving: complete or absent, on a full disk too."""

from __future__ import annotations

import itertools
import json
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ovr_fast.average import average
from ovr_fast.config import ModelConfig
from ovr_fast.errors import ModelError
from ovr_fast.learner.passes import build_model
from ovr_fast.model.hf_weights import (
    HFReader,
    HFTensor,
    Parameter,
    generation_config,
    rectangles,
    save_hf,
)
from ovr_fast.parallel.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Piece,
    check_whole,
    copied,
    list_checkpoints,
    read_meta,
    read_pieces,
)
from ovr_fast.parallel.checksums import find_damage
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.shape.model_shape import read_shape
from support.image_run import lone_mesh
from support.processes import run_ranks
from support.random_models import make_model
from support.toy_run import BASE_MODEL


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return lone_mesh()


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


def piece(tensor: torch.Tensor, name: str = "x") -> Piece:
    """A whole tensor of a model on one rank."""
    shape = tuple(tensor.shape)
    return Piece(name=name, shape=shape, offsets=(0,) * len(shape), tensor=tensor, owned=True)


def test_a_full_disk_is_one_message_and_loses_nothing(mesh: Mesh, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, mesh, keep=2)
    writer.save("rl", 1, [piece(torch.arange(4))], {"step": 1})
    writer.wait()
    with full_disk(10_000):
        writer.save("rl", 2, [piece(torch.zeros(100_000))], {"step": 2})
        with pytest.raises(CheckpointError, match="saved before are untouched"):
            writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["rl-000001"]
    found = torch.zeros(4, dtype=torch.int64)
    read_pieces(tmp_path / "rl-000001", [piece(found)], mesh)
    assert found.tolist() == [0, 1, 2, 3]
    assert read_meta(tmp_path / "rl-000001") == {"step": 1}


@pytest.mark.slow
def test_one_rank_s_full_disk_is_every_rank_s_error(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "failing_disk.py")
    output = run_ranks(2, [script, str(tmp_path)], timeout_s=120).stdout
    for step, full in ((2, 1), (3, 0)):
        for rank in (0, 1):
            path = tmp_path / f"rl-{step:06d}"
            assert f"rank {rank}: could not save {path}: rank {full}: " in output
    assert [path.name for path in tmp_path.iterdir()] == ["rl-000001"]


def test_training_goes_on_while_a_checkpoint_is_written(mesh: Mesh, tmp_path: Path) -> None:
    """What is saved is what was there when ``save`` returned, whenever it reaches the disk."""
    writer, weight = CheckpointWriter(tmp_path, mesh, keep=2), torch.ones(1000)
    writer.save("rl", 1, [copied(piece(weight))], {})
    weight.fill_(2.0)
    while not (tmp_path / "rl-000001").exists():
        writer.poll()
    found = torch.zeros(1000)
    read_pieces(tmp_path / "rl-000001", [piece(found)], mesh)
    assert torch.equal(found, torch.ones(1000))


def test_the_oldest_go_and_an_interrupted_one_is_never_found(mesh: Mesh, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, mesh, keep=2)
    for step in range(1, 5):
        writer.save("rl", step, [piece(torch.zeros(1))], {})
    writer.save("cold_start", 9, [piece(torch.zeros(1))], {})
    writer.wait()
    (tmp_path / "rl-000009.partial").mkdir()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["cold_start-000009", "rl-000003", "rl-000004"]
    CheckpointWriter(tmp_path, mesh, keep=2)
    assert not (tmp_path / "rl-000009.partial").exists()


def test_a_checkpoint_is_what_was_saved(mesh: Mesh, tmp_path: Path) -> None:
    """A thousand flipped bits, cut files and files of another run or step: each is found."""
    for run in ("a", "b"):
        writer = CheckpointWriter(tmp_path / run / "checkpoints", mesh, keep=3, identity=run)
        for step in (1, 2):
            weights = torch.randn(200, generator=torch.Generator().manual_seed(step + ord(run)))
            writer.save("rl", step, [piece(weights)], {"step": step, "row": run})
        writer.wait()
    ours, other = (tmp_path / run / "checkpoints" for run in ("a", "b"))
    last = ours / "rl-000002"
    check_whole(last, mesh, identity="a")
    names = sorted(path.name for path in last.iterdir())
    assert names == [".metadata", "__0_0.distcp", "checksums.json", "meta.pt"]
    rng = random.Random(0)
    for turn in range(1000):
        name = rng.choice(names)
        file = last / name
        whole = file.read_bytes()
        match turn % 4:
            case 0 | 1:
                bits = bytearray(whole)
                bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
                file.write_bytes(bits)
            case 2:
                file.write_bytes(whole[: rng.randrange(len(whole))])
            case 3:
                giver = rng.choice([other / "rl-000002", ours / "rl-000001"]) / name
                assert giver.read_bytes() != whole
                file.write_bytes(giver.read_bytes())
        with pytest.raises(
            CheckpointError, match="rl-000001 is whole.*--checkpoint rl-000001"
        ) as e:
            check_whole(last, mesh, identity="a")
        assert name in str(e.value) or "it is of" in str(e.value), (turn, name)
        about = {"run": "a", "stage": "rl", "step": 2}
        assert any(find_damage(last, about, share=rank, of=3) for rank in range(3))
        file.write_bytes(whole)
    check_whole(last, mesh, identity="a")
    with pytest.raises(CheckpointError, match="it is of run 'a', not 'b'"):
        check_whole(last, mesh, identity="b")
    shutil.copytree(other / "rl-000002", ours / "rl-000003")
    with pytest.raises(CheckpointError, match="it is of run 'b', not 'a'.*rl-000002 is whole"):
        check_whole(ours / "rl-000003", mesh, identity="a")
    (last / "stray").touch()
    with pytest.raises(CheckpointError, match="stray is not its own"):
        check_whole(last, mesh, identity="a")
    (last / "stray").unlink()
    first = (ours / "rl-000001" / "meta.pt").read_bytes()
    (ours / "rl-000001" / "meta.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="meta.pt has changed .*rl-000002 is whole"):
        check_whole(ours / "rl-000001", mesh, identity="a")  # asked for by name
    (ours / "rl-000001" / "meta.pt").write_bytes(first)
    (last / "meta.pt").unlink()
    (ours / "rl-000001" / "meta.pt").unlink()
    with pytest.raises(CheckpointError, match="meta.pt is missing. No other checkpoint is whole"):
        check_whole(last, mesh, identity="a")


def test_what_a_checkpoint_lacks_is_named(mesh: Mesh, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, mesh, keep=1)
    writer.save("rl", 1, [piece(torch.zeros(8))], {})
    writer.wait()
    path = tmp_path / "rl-000001"
    with pytest.raises(CheckpointError, match="no tensor y"):
        read_pieces(path, [piece(torch.zeros(8), "y")], mesh)
    with pytest.raises(CheckpointError, match=r"x has shape \[8\] there and \[9\] here"):
        read_pieces(path, [piece(torch.zeros(9))], mesh)
    for file in path.iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="rl-000001 cannot be read"):
        read_pieces(path, [piece(torch.zeros(8))], mesh)
    with pytest.raises(CheckpointError, match="meta.pt cannot be read"):
        read_meta(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rectangles_cover_every_layout_of_a_parameter(data) -> None:
    """Any flat cut of any tensor rank's shard, put into whole tensors and taken out again."""
    tp = data.draw(st.sampled_from([1, 2, 4]))
    cuts = data.draw(st.sampled_from([(0,), (0, 0, 0), (1,), (None,)]))
    sources = tuple(
        HFTensor(f"s{i}", (4 * data.draw(st.integers(1, 3)), 4 * 3), cut)
        for i, cut in enumerate(cuts)
    )
    row = Parameter("p", 0, sources)
    whole = {s.name: torch.full(s.shape, -1) for s in sources}
    for rank in range(tp):
        place = SimpleNamespace(tp=tp, tp_rank=rank)
        shards = [
            torch.arange(s.shape[0] * s.shape[1]).view(s.shape)
            if s.cut is None
            else torch.arange(s.shape[0] * s.shape[1]).view(s.shape).chunk(tp, s.cut)[rank]
            for s in sources
        ]
        flat = torch.cat(shards).flatten()
        ends = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=4)))
        for start, end in itertools.pairwise([0, *ends, len(flat)]):
            mine = flat[start:end]
            for part in rectangles(row, start, end, place):  # type: ignore[arg-type]
                (r, c), (h, w) = part.offsets, part.sizes
                target = whole[part.tensor][r : r + h, c : c + w]
                values = mine[part.begin : part.end].view(h, w)
                assert not part.first_replica or (target == -1).all()
                target.copy_(values)
    for source in sources:
        size = source.shape[0] * source.shape[1]
        assert torch.equal(whole[source.name], torch.arange(size).view(source.shape))


def test_a_hugging_face_folder_is_whole_or_what_it_was(mesh: Mesh, tmp_path: Path) -> None:
    model = build_model(
        read_shape(BASE_MODEL), mesh, ModelConfig(path="-", dtype="float32"), weights=BASE_MODEL
    )
    save_hf(model, tmp_path / "hf", like=BASE_MODEL)
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert '"dtype": "float32"' in (tmp_path / "hf" / "config.json").read_text()
    with full_disk(100_000), pytest.raises(OSError, match="could not save"):
        save_hf(model, tmp_path / "hf", like=BASE_MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before


def test_an_export_holds_the_model_and_nothing_else_of_the_base(mesh: Mesh, tmp_path: Path) -> None:
    """Whatever weights lie beside the base's, under whatever name, the next stage reads the
    trained ones."""
    base = tmp_path / "base"
    shutil.copytree(BASE_MODEL, base)
    (base / "model.safetensors").rename(base / "weights.safetensors")
    for name in (
        "consolidated.00.pth", "optimizer.pt", "pytorch_model.bin.index.json", "model.gguf",
        "trainer_state.json", "training_args.bin", "README.md",
    ):  # fmt: skip
        (base / name).write_text("{}")
    for name in ("LICENSE", "merges.txt", "special_tokens_map.json"):
        (base / name).write_text("{}")
    settings = ModelConfig(path="-", dtype="float32")
    model = build_model(read_shape(base), mesh, settings, weights=base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    save_hf(model, tmp_path / "hf", like=base)
    kept = {path.name for path in BASE_MODEL.iterdir()}
    found = {path.name for path in (tmp_path / "hf").iterdir()}
    assert found == kept | {"LICENSE", "merges.txt", "special_tokens_map.json"}
    again = build_model(read_shape(base), mesh, settings, weights=tmp_path / "hf")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.safetensors", "holds two sets of weights: .* is in model.safetensors and in"),
        ("adapter_model.safetensors", "holds an adapter"),
    ],
)
def test_a_folder_with_two_sets_of_weights_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    shutil.copytree(BASE_MODEL, tmp_path / "base")
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "base" / name)
    with pytest.raises(ModelError, match=message):
        HFReader(tmp_path / "base")


def test_large_models_are_cut_into_files(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(
        read_shape(BASE_MODEL), mesh, ModelConfig(path="-", dtype="float32"), weights=BASE_MODEL
    )
    monkeypatch.setattr("ovr_fast.model.hf_weights.SHARD_BYTES", 2_000_000)
    save_hf(model, tmp_path / "hf", like=BASE_MODEL)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    again = build_model(
        read_shape(tmp_path / "hf"), mesh, ModelConfig(path="-", dtype="float32"),
        weights=tmp_path / "hf",
    )  # fmt: skip
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_average_of_models(mesh: Mesh, tmp_path: Path) -> None:
    shape, settings = read_shape(BASE_MODEL), ModelConfig(path="-", dtype="float32")
    model = build_model(shape, mesh, settings, weights=BASE_MODEL)
    for number, factor in enumerate((1.0, 2.0, 6.0)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        save_hf(model, tmp_path / f"hf_{number}", like=BASE_MODEL)
    average([tmp_path / f"hf_{number}" for number in range(3)], tmp_path / "mean")
    base, mean = (load_file(f / "model.safetensors") for f in (BASE_MODEL, tmp_path / "mean"))
    assert set(base) == set(mean)
    for name, tensor in base.items():  # 1, 2 and 12 times the base
        torch.testing.assert_close(mean[name], tensor.float() * 5.0)
    assert (tmp_path / "mean" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="mean exists"):
        average([tmp_path / "hf_0"], tmp_path / "mean")


def test_a_bases_sampling_does_not_survive(tmp_path: Path) -> None:
    """Qwen2.5-VL's own file, whose repetition penalty vLLM would apply by default."""
    base = {
        "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
        "eos_token_id": [151645, 151643], "repetition_penalty": 1.05, "temperature": 1e-06,
        "top_k": 1, "top_p": 0.001,
    }  # fmt: skip
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(base))
    ids = {key: value for key, value in base.items() if key.endswith("token_id")}
    trained = {"do_sample": True, "top_k": 0, "repetition_penalty": 1.0}
    at_one = ids | trained | {"temperature": 1.0, "top_p": 1.0}
    assert generation_config(tmp_path, None) == at_one
    cooler = generation_config(tmp_path, {"temperature": 0.7, "top_p": 0.9})
    assert cooler == ids | trained | {"temperature": 0.7, "top_p": 0.9}
    path.write_text(json.dumps(cooler))  # of an export, which an average is like
    assert generation_config(tmp_path, None) == cooler
    path.unlink()
    assert generation_config(tmp_path, None) == trained | {"temperature": 1.0, "top_p": 1.0}


def test_models_of_different_shapes_have_no_average(tmp_path: Path) -> None:
    other = make_model(tmp_path / "wide", "wide")
    with pytest.raises(ValueError, match="not of the shape of"):
        average([BASE_MODEL, other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    assert not (tmp_path / "mean.partial").exists()
