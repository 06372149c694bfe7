"""The naive way with images: every rank encodes every use of every image in every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ovr_fast.data.images import stack_patches
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.records import Microbatch


class NaiveEncoder(VisionEncoder):
    """What the tests and benchmarks compare ``VisionEncoder`` with."""

    def encode_step(self, batches: Sequence[Microbatch]) -> None:
        """Nothing is kept."""

    def fill(self, batches: Sequence[Microbatch]) -> list[Microbatch]:
        with torch.no_grad():
            return [self._encode_batch(batch) for batch in batches]

    def fill_for_training(
        self, batches: Sequence[Microbatch]
    ) -> tuple[list[Microbatch], Callable[[], None]]:
        if not self.trained:
            return self.fill(batches), lambda: None
        return [self._encode_batch(batch) for batch in batches], lambda: None

    def _encode_batch(self, batch: Microbatch) -> Microbatch:
        if not batch.images:
            return batch
        patches, grids = stack_patches([self.processor(image) for image in batch.images])
        self._counters.tower_passes += len(batch.images)
        tokens = self.tower(patches.to(self.mesh.device), grids)
        sizes = [self._tokens(tuple(grid)) for grid in grids.tolist()]
        return replace(batch, visual_tokens=tuple(tokens.split(sizes)))
