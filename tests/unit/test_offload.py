"""Tensors that wait on the host, in buffers of any size."""

from __future__ import annotations

import pytest
import torch

from ovr_fast.parallel import offload
from ovr_fast.parallel.offload import Offload


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_what_waits_comes_back_in_its_views(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(offload, "HOST_CHUNK", chunk)
    tensors = [torch.randn(size) for size in (1, 30, 17)]
    tensors.append(torch.arange(11))
    views, gradients = [t[: len(t) // 2 + 1] for t in tensors], torch.ones(9)
    before = [t.clone() for t in tensors]
    moved = Offload()
    for _ in range(3):
        moved.out([gradients], keep=False)
        moved.out([*tensors, *views], keep=True)  # a storage once, whatever shows it
        assert all(t.untyped_storage().nbytes() == 0 for t in [*tensors, gradients])
        moved.back()
        for tensor, view, value in zip(tensors, views, before, strict=True):
            assert torch.equal(tensor, value)
            assert torch.equal(view, value[: len(view)])
        assert torch.equal(gradients, torch.zeros(9))
    held = sum(buffer.numel() for buffer in moved._host)
    assert held == sum(t.untyped_storage().nbytes() for t in tensors)
    assert max(buffer.numel() for buffer in moved._host) <= chunk
