"""Device memory for whoever needs it next: tensors that wait on the host meanwhile, and caches."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def release_memory() -> None:
    """Give memory that nothing uses back to the GPU, for another process or a larger tensor."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


HOST_CHUNK = 2**30
"""Bytes of a host buffer. The pinned allocator rounds each request up to a power of two: 34.5 GiB
in one piece would hold 64."""


class Offload:
    """Empties the storages under some tensors and fills them again, so that every view of them,
    Megatron's among them, stays what it was. The host's buffers, pinned beside a GPU, are kept."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, int, list[Tensor] | None]] = []
        self._host: list[Tensor] = []

    def out(self, tensors: Iterable[Tensor], *, keep: bool) -> None:
        """Free the device memory of ``tensors``; those on the host already are left alone.

        Args:
            keep: copy the values to the host first, at most once until ``back``; without, they
                come back as zeros.
        """
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        storages = [storage for storage in found.values() if storage.nbytes()]
        if keep:
            self._make_room(sum(storage.nbytes() for storage in storages), storages)
        start = 0
        for storage in storages:
            size = storage.nbytes()
            pieces = self._pieces(start, size) if keep else None
            if pieces is not None:
                for piece, part in _pairs(pieces, storage):
                    piece.copy_(part, non_blocking=True)  # on the stream that fills it anew
            storage.resize_(0)
            self._away.append((storage, size, pieces))
            start += size

    def back(self) -> None:
        """Bring back all that ``out`` has taken."""
        for storage, size, pieces in self._away:
            storage.resize_(size)
            if pieces is None:
                _bytes(storage).zero_()
            else:
                for piece, part in _pairs(pieces, storage):
                    part.copy_(piece, non_blocking=True)
        self._away.clear()

    def _make_room(self, size: int, storages: list[torch.UntypedStorage]) -> None:
        missing = size - sum(chunk.numel() for chunk in self._host)
        while missing > 0:
            pin = storages[0].device.type == "cuda"
            chunk = torch.empty(min(missing, HOST_CHUNK), dtype=torch.uint8, pin_memory=pin)
            self._host.append(chunk)
            missing -= chunk.numel()

    def _pieces(self, start: int, size: int) -> list[Tensor]:
        """The host's bytes from ``start`` on."""
        pieces = []
        for chunk in self._host:
            piece = chunk[max(start, 0) : max(start + size, 0)]
            if piece.numel():
                pieces.append(piece)
            start -= chunk.numel()
        return pieces


def _pairs(pieces: list[Tensor], storage: torch.UntypedStorage) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece on the host and its bytes of the storage."""
    parts = _bytes(storage).split([piece.numel() for piece in pieces])
    return zip(pieces, parts, strict=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
