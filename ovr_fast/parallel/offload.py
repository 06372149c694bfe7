"""Tensors that leave a device for the host while another model needs the room, and come back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Offload:
    """Empties the storages under some tensors and fills them again, so that every view of them,
    Megatron's among them, stays what it was. On a CPU the host's copy is an ordinary one."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, torch.UntypedStorage | None, int]] = []

    def out(self, tensors: Iterable[Tensor], *, keep: bool) -> None:
        """Free the device memory of ``tensors``.

        Args:
            keep: copy the values to the host first; without, they come back as zeros.
        """
        for storage in {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors
        }.values():
            size = storage.nbytes()
            if not size:
                continue
            copy = None
            if keep:
                pinned = torch.empty(
                    size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda"
                )
                copy = pinned.untyped_storage()
                copy.copy_(storage)
            storage.resize_(0)
            self._away.append((storage, copy, size))

    def back(self) -> None:
        """Bring back all that ``out`` has taken."""
        for storage, copy, size in self._away:
            storage.resize_(size)
            if copy is None:
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
            else:
                storage.copy_(copy)
        self._away.clear()
