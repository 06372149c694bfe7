"""Checkpoints: written in the background, complete or absent, the same for every layout.

The tensors go through ``torch.distributed.checkpoint``, the format under Megatron's own distributed
checkpoints. Each rank writes just the pieces that it owns, under the names and shapes of the whole
model, so another tensor x pipeline x data layout reads what it needs of them. (Megatron's layer
above gathers the optimizer of a data-parallel group on one rank, and cannot load torch's AdamW.)
A checkpoint is written under a name that no reader looks for and renamed when all of it is there.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ovr_fast.errors import OVRFastError
from ovr_fast.parallel.checksums import (
    HashingFileSystem,
    checksums_of,
    find_damage,
    write_checksums,
)
from ovr_fast.parallel.mesh import Mesh

_NAME = re.compile(r"^(?P<recipe_stage>[a-z_]+)-(?P<step>\d{6})$")


class CheckpointError(OVRFastError, RuntimeError):
    """A checkpoint that cannot be written or read. Names the file and how to mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of one tensor of the whole model, as one rank holds it."""

    name: str  # of the whole tensor
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]  # where this rectangle begins
    tensor: Tensor  # the rectangle, live: read when saving, filled when loading
    owned: bool  # whether this rank writes it; False where another holds the same
    optional: bool = False  # left as it is where a checkpoint has no tensor of this name

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, torch.Size(self.offsets))


class CheckpointWriter:
    """Writes a run's checkpoints beside its training. Every method is a collective of all ranks.

    Args:
        root: folder of the checkpoints.
        mesh: this rank's position and groups.
        keep: checkpoints kept per recipe stage.
        identity: of the run, which its checkpoints carry; rank 0's counts.
        clean: remove what an interrupted run has left half-written.
    """

    def __init__(
        self, root: Path, mesh: Mesh, *, keep: int, identity: str = "", clean: bool = True
    ) -> None:
        self.root, self.mesh, self.keep, self.identity = root, mesh, keep, identity
        self._thread: threading.Thread | None = None
        self._final = root
        self._failure = ""
        if clean and mesh.rank == 0 and root.is_dir():
            for partial in root.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def save(
        self, recipe_stage: str, step: int, pieces: Iterable[Piece], meta: dict[str, Any]
    ) -> None:
        """Begin to write ``pieces``, which must not change from here on (see ``copied``).

        Args:
            meta: what is not a tensor of the model: numbers, strings, lists of them; rank 0's.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._final = final = self.root / f"{recipe_stage}-{step:06d}"
        partial = final.with_name(f"{final.name}.partial")
        if self.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
        own = [piece for piece in pieces if piece.owned]

        def write() -> None:
            try:
                # No copies ahead: they are made on a stream of the thread's device, GPU 0, and the
                # pieces are on the host already.
                writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
                writer.fs = files = HashingFileSystem()
                dcp.save(
                    {},
                    storage_writer=writer,
                    planner=_SavePieces(own),
                    process_group=self.mesh.checkpoint_group,
                )
                # All ranks are done: DCP's last word is a collective.
                written: list = [None] * self.mesh.world if self.mesh.rank == 0 else []
                dist.gather_object(
                    files.checksums, written or None, group=self.mesh.checkpoint_group
                )
                if self.mesh.rank == 0:
                    # Not before: a failure of this rank alone would leave the others waiting.
                    with files.create_stream(partial / "meta.pt", "wb") as file:
                        torch.save(meta, cast(BinaryIO, file))
                        file.flush()
                        os.fsync(file.fileno())
                    checksums = {name: sum_ for part in written for name, sum_ in part.items()}
                    checksums |= files.checksums
                    write_checksums(partial, checksums, _about(final, self.identity))
                    self._complete(partial, final)
            except BaseException as error:  # CheckpointException is no Exception
                self._failure = _blame(error, self.mesh.rank)
                if self.mesh.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)

        self._failure = ""
        dist.barrier(group=self.mesh.control_group)  # the folder is there
        self._thread = threading.Thread(target=write, name=f"write {self._final.name}")
        self._thread.start()

    def _complete(self, partial: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        recipe_stage, _ = split_name(final)
        for old in list_checkpoints(self.root, recipe_stage)[: -self.keep]:
            doomed = old.with_name(f"{old.name}.partial")  # half-removed is not complete
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def poll(self) -> None:
        """Say if the last checkpoint has failed meanwhile. Called once a step.

        Raises:
            CheckpointError: see ``wait``.
        """
        if self._thread is None:
            return
        done = torch.tensor(float(not self._thread.is_alive()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.mesh.control_group)
        if done.item():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is complete.

        Raises:
            CheckpointError: a rank could not write (a full disk, say). What was saved before is
                untouched, and nothing half-written remains.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failures: list = [None] * self.mesh.world
        dist.all_gather_object(failures, self._failure, group=self.mesh.control_group)
        problem = next((failure for failure in failures if failure), "")
        if problem:
            raise CheckpointError(
                f"could not save {self._final}: {problem}; checkpoints saved before are untouched. "
                "Free space, then --resume"
            )


def copied(piece: Piece) -> Piece:
    """The piece with a copy of its values on the host, so that training can go on."""
    return replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True))


def list_checkpoints(root: Path, recipe_stage: str | None = None) -> list[Path]:
    """Complete checkpoints, of one recipe stage or all, the cold start's first, oldest first."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = _NAME.match(path.name)
        if match and path.is_dir() and recipe_stage in (None, match["recipe_stage"]):
            found.append((match["recipe_stage"], int(match["step"]), path))
    return [path for _, _, path in sorted(found)]  # "cold_start" sorts before "rl"


def split_name(path: Path) -> tuple[str, int]:
    """Recipe stage and step of a checkpoint folder."""
    match = _NAME.match(path.name)
    assert match is not None, path
    return match["recipe_stage"], int(match["step"])


def _about(path: Path, identity: str) -> dict[str, Any]:
    recipe_stage, step = split_name(path)
    return {"run": identity, "stage": recipe_stage, "step": step}


def check_whole(path: Path, mesh: Mesh, *, identity: str) -> None:
    """Raises CheckpointError if a checkpoint is not what this run has saved: names the file, and
    the newest other one that is whole. Each rank reads its share of the files. A collective.

    Args:
        identity: of the run.
    """
    damage = _damage(path, mesh, identity)
    if not damage:
        return
    others = [other for other in list_checkpoints(path.parent) if other != path]
    whole = next((o for o in reversed(others) if not _damage(o, mesh, identity)), None)
    raise CheckpointError(
        f"{path}: {damage}. "
        + (
            f"{whole.name} is whole: go on from there with --resume {path.parents[1]} --checkpoint "
            f"{whole.name}"
            if whole
            else "No other checkpoint is whole; start anew"
        )
    )


def _damage(path: Path, mesh: Mesh, identity: str) -> str:
    found: list = [None] * mesh.world
    own = find_damage(path, _about(path, identity), share=mesh.rank, of=mesh.world)
    dist.all_gather_object(found, own, group=mesh.control_group)
    return next(filter(None, found), "")


def weights_checksums(folder: Path, mesh: Mesh) -> dict[str, str]:
    """SHA-256 of a Hugging Face folder's weights, by file name. Each rank reads its share of the
    files. A collective.

    Raises:
        CheckpointError: a file cannot be read; on every rank.
    """
    names = mesh.from_first_rank(lambda: sorted(p.name for p in folder.glob("*.safetensors")))
    found: list = [None] * mesh.world
    own = checksums_of(folder / name for name in names[mesh.rank :: mesh.world])
    dist.all_gather_object(found, own, group=mesh.control_group)
    sums = {name: sum_ for part in found for name, sum_ in part.items()}
    if unread := sorted(name for name, sum_ in sums.items() if not sum_):
        raise CheckpointError(f"{folder / unread[0]} cannot be read")
    return sums


def read_meta(path: Path) -> dict[str, Any]:
    """What ``CheckpointWriter.save`` was given beside the pieces.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in many ways inside the unpickler
        raise CheckpointError(
            f"{path / 'meta.pt'} cannot be read ({_first_line(error)}); remove {path}"
        ) from error


def read_pieces(path: Path, pieces: Iterable[Piece], mesh: Mesh) -> None:
    """Fill the pieces' tensors, whatever layout wrote them. A collective of all ranks.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged.
    """
    try:
        dcp.load(
            {},
            storage_reader=dcp.FileSystemReader(path),
            planner=_LoadPieces(list(pieces)),
            process_group=mesh.checkpoint_group,
        )
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        blame = _blame(error, mesh.rank)
        raise CheckpointError(f"{path} cannot be read ({blame}); remove it") from error


def _blame(error: BaseException, rank: int) -> str:
    """The rank that failed and its cause; DCP raises one exception with all failures everywhere."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (error, _) = next(iter(failures.items()))
    return f"rank {rank}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _SavePieces(DefaultSavePlanner):
    """Writes a list of pieces; DCP checks that those of several ranks cover every tensor once."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {piece.index: piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=piece.chunk,
                        properties=TensorProperties.create_from_tensor(piece.tensor),
                        size=torch.Size(piece.shape),
                    ),
                )
                for index, piece in self.pieces.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[replace(index, index=None)].tensor


class _LoadPieces(DefaultLoadPlanner):
    """Reads what overlaps with a list of pieces."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {piece.index: piece for piece in pieces}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for piece in self.pieces.values():
            saved = self.metadata.state_dict_metadata.get(piece.name)
            if saved is None and piece.optional:
                continue
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"it has no tensor {piece.name}")
            if tuple(saved.size) != piece.shape:
                raise ValueError(
                    f"{piece.name} has shape {list(saved.size)} there and {list(piece.shape)} here"
                )
            items += create_read_items_for_chunk_list(piece.name, saved, [piece.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[replace(index, index=None)].tensor


def rng_pieces(mesh: Mesh) -> list[Piece]:
    """This rank's random-number states. A rank that a checkpoint does not know keeps its own."""
    states = {"cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return [
        Piece(
            name=f"rng/{kind}/{mesh.rank:05d}",
            shape=tuple(state.shape),
            offsets=(0,),
            tensor=state,
            owned=True,
            optional=True,
        )
        for kind, state in states.items()
    ]


def restore_rng(pieces: list[Piece], mesh: Mesh) -> None:
    """Go on from ``rng_pieces`` that ``read_pieces`` has filled."""
    torch.set_rng_state(pieces[0].tensor)
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(pieces[1].tensor, mesh.device)
