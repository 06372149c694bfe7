"""The naive way with pictures: every rank encodes every use of every picture in every pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ovr_fast.batch import PackedBatch
from ovr_fast.data.vision import stack_patches
from ovr_fast.model.encoder import PictureEncoder


class NaiveEncoder(PictureEncoder):
    """What the tests and benchmarks compare ``PictureEncoder`` with."""

    def hold(self, pictures) -> None:
        """Nothing is kept."""

    def fill(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        with torch.no_grad():
            return [self._encode_batch(batch) for batch in batches]

    def fill_for_training(
        self, batches: list[PackedBatch]
    ) -> tuple[list[PackedBatch], Callable[[], None]]:
        if not self.trained:
            return self.fill(batches), lambda: None
        return [self._encode_batch(batch) for batch in batches], lambda: None

    def _encode_batch(self, batch: PackedBatch) -> PackedBatch:
        if not batch.pictures:
            return batch
        patches, grids = stack_patches([self.processor(picture) for picture in batch.pictures])
        self._counters.tower_passes += len(batch.pictures)
        tokens = self.tower(patches.to(self.mesh.device), grids)
        sizes = [self._tokens(tuple(grid)) for grid in grids.tolist()]
        return replace(batch, visual_tokens=tuple(tokens.split(sizes)))
