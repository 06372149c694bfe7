"""Device memory for whoever needs it next: tensors that wait on the host meanwhile, and caches."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor


def release_memory() -> None:
    """Give memory that nothing uses back to the GPU, for another process or a larger tensor."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Offload:
    """Empties the storages under some tensors and fills them again, so that every view of them,
    Megatron's among them, stays what it was. One host buffer holds all of them, pinned beside a
    GPU, and is kept: the pinned allocator rounds each request up to a power of two."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, Tensor | None, int]] = []
        self._host = torch.empty(0, dtype=torch.uint8)

    def out(self, tensors: Iterable[Tensor], *, keep: bool) -> None:
        """Free the device memory of ``tensors``; those on the host already are left alone.

        Args:
            keep: copy the values to the host first, at most once until ``back``; without, they
                come back as zeros.
        """
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        storages = [storage for storage in found.values() if storage.nbytes()]
        # Each begins at a multiple of 16 bytes, for whatever its dtype is.
        starts = [0]
        for storage in storages:
            starts.append(starts[-1] + -(-storage.nbytes() // 16) * 16)
        if keep and self._host.numel() < starts[-1]:
            pin = storages[0].device.type == "cuda"
            self._host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
        for storage, start in zip(storages, starts[:-1], strict=True):
            size = storage.nbytes()
            copy = self._host[start : start + size] if keep else None
            if copy is not None:
                copy.copy_(_bytes(storage), non_blocking=True)  # on the stream that fills it anew
            storage.resize_(0)
            self._away.append((storage, copy, size))

    def back(self) -> None:
        """Bring back all that ``out`` has taken."""
        for storage, copy, size in self._away:
            storage.resize_(size)
            if copy is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(copy, non_blocking=True)
        self._away.clear()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
