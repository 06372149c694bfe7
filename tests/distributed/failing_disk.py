"""Two ranks save; the disk of the one that is named is full at the second checkpoint: ROOT RANK."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import torch

from ovr_fast.parallel.checkpoint import CheckpointError, CheckpointWriter, Piece
from ovr_fast.parallel.mesh import start_mesh


def main(root: Path, full: int) -> None:
    mesh = start_mesh(tensor=1, pipeline=1)
    writer = CheckpointWriter(root, mesh, keep=2)
    values = torch.full((50_000,), float(mesh.rank))
    piece = Piece(
        name="x", shape=(100_000,), offsets=(50_000 * mesh.rank,), tensor=values, owned=True
    )
    writer.save("rl", 1, [piece], {})
    writer.wait()
    if mesh.rank == full:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    writer.save("rl", 2, [piece], {})
    try:
        writer.wait()
    except CheckpointError as error:
        print(f"rank {mesh.rank}: {error}", flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
