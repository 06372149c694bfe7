"""Checkpoints: complete or absent, one file a rank, the oldest dropped.

A checkpoint is written under a name that no reader looks for and renamed when every rank has
finished. It belongs to the layout (tensor x pipeline x data) that wrote it; to change the layout,
start from the run's Hugging Face folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ovr_fast.parallel.mesh import Mesh

_NAME = re.compile(r"^(?P<stage>[a-z_]+)-(?P<step>\d{6})$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. Names the file and the way out."""


def write_checkpoint(
    root: Path, *, stage: str, step: int, state: dict[str, Any], mesh: Mesh, keep: int
) -> Path:
    """Save each rank's ``state``. A collective of all ranks.

    Raises:
        CheckpointError: a rank could not write (a full disk, say). What was saved before is
            untouched, and nothing half-written remains.
    """
    final = root / f"{stage}-{step:06d}"
    partial = root / f"{final.name}.partial"
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    failure = ""
    try:
        path = partial / f"rank-{mesh.rank:05d}.pt"
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        failure = f"rank {mesh.rank}: {error}"
    failures: list = [None] * mesh.world
    dist.all_gather_object(failures, failure)
    problem = next((f for f in failures if f), "")
    if mesh.rank == 0:
        if problem:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            layout = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}
            (partial / "layout.json").write_text(json.dumps(layout))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in list_checkpoints(root, stage)[:-keep]:
                shutil.rmtree(old)
    dist.barrier()
    if problem:
        raise CheckpointError(
            f"could not save {final}: {problem}; checkpoints saved before are untouched. Free "
            "space, then --resume"
        )
    return final


def list_checkpoints(root: Path, stage: str | None = None) -> list[Path]:
    """Complete checkpoints, of one stage or all, the cold start's first, oldest first."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = _NAME.match(path.name)
        if match and path.is_dir() and stage in (None, match["stage"]):
            found.append((match["stage"], int(match["step"]), path))
    return [path for _, _, path in sorted(found)]  # "cold_start" sorts before "rl"


def split_name(path: Path) -> tuple[str, int]:
    """Stage and step of a checkpoint folder."""
    match = _NAME.match(path.name)
    assert match is not None, path
    return match["stage"], int(match["step"])


def read_checkpoint(path: Path, mesh: Mesh) -> dict[str, Any]:
    """This rank's state.

    Raises:
        CheckpointError: another layout wrote it, or a file is damaged.
    """
    layout = json.loads((path / "layout.json").read_text())
    if layout != {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}:
        raise CheckpointError(
            f"{path} was written by tensor x pipeline x data = {layout['tp']} x {layout['pp']} x "
            f"{layout['dp']}, this run is {mesh.tp} x {mesh.pp} x {mesh.dp}; resume with the same "
            "layout, or start a new run from the Hugging Face folder"
        )
    file = path / f"rank-{mesh.rank:05d}.pt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in many ways inside the unpickler
        raise CheckpointError(f"{file} cannot be read ({error}); remove {path}") from error
