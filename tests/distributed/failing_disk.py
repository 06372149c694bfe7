"""Two ranks save to ROOT; then the disk of rank 1 is full, then that of rank 0."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import torch

from ovr_fast.parallel.checkpoint import CheckpointError, CheckpointWriter, Piece
from ovr_fast.parallel.mesh import start_mesh


def main(root: Path) -> None:
    mesh = start_mesh(tensor=1, pipeline=1)
    writer = CheckpointWriter(root, mesh, keep=2)
    values = torch.full((50_000,), float(mesh.rank))
    piece = Piece(
        name="x", shape=(100_000,), offsets=(50_000 * mesh.rank,), tensor=values, owned=True
    )
    writer.save("rl", 1, [piece], {})
    writer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for step, full in ((2, 1), (3, 0)):
        if mesh.rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        writer.save("rl", step, [piece], {})
        try:
            writer.wait()
        except CheckpointError as error:
            print(f"rank {mesh.rank}: {error}", flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
