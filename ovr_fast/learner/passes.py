"""Forward passes without gradients: log-probs and values of packed responses."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ovr_fast.config import ModelConfig
from ovr_fast.model.hf_weights import load_hf
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.vision import VisionTower
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.observe.ranges import name_layers
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.parallel.schedule import forward_only
from ovr_fast.records import Microbatch
from ovr_fast.shape.model_shape import ModelShape


def build_model(
    shape: ModelShape,
    mesh: Mesh,
    settings: ModelConfig,
    *,
    weights: str | Path,
    value_head: bool = False,
    train_vision: str | None = None,
    tower: VisionTower | None = None,
    seed: int = 0,
) -> Qwen25VLStage:
    """This rank's pipeline stage, filled from a Hugging Face folder. Arguments as for
    ``Qwen25VLStage``; ``train_vision`` None is the setting's."""
    model = Qwen25VLStage(
        shape,
        mesh,
        dtype=getattr(torch, settings.dtype),
        value_head=value_head,
        train_vision=settings.train_vision if train_vision is None else train_vision,
        kernels=settings.kernels,
        tower=tower,
        recompute=settings.recompute,
        seed=seed,
    )
    load_hf(model, weights)
    name_layers(model.layers)
    return model


def compute_logprobs(
    model: Qwen25VLStage,
    vision: VisionEncoder,
    microbatches: List[Microbatch],
    *,
    temperature: float,
) -> list[Tensor]:
    """Log-probs [R] fp32 nats of the response tokens of each microbatch."""

    def head(hidden_RH: Tensor, batch: Microbatch) -> Tensor:
        return model.logprobs(hidden_RH, batch, temperature=temperature)

    return forward_only(model, model.mesh, vision.fill(microbatches), head)


def compute_values(
    model: Qwen25VLStage, vision: VisionEncoder, microbatches: List[Microbatch]
) -> list[Tensor]:
    """A critic's values [R] fp32, reward units, before each response token of each microbatch."""

    def head(hidden_RH: Tensor, batch: Microbatch) -> Tensor:
        return model.values(hidden_RH)

    return forward_only(model, model.mesh, vision.fill(microbatches), head)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class FrozenModel:
    """A model that is never trained: the KL reference, or the base when servers first get it."""

    model: Qwen25VLStage
    vision: VisionEncoder

    @contextmanager
    def on_device(self, *, weights_only: bool = True) -> Iterator[None]:
        """No-op: it is never offloaded."""
        yield

    def logprobs(self, microbatches: List[Microbatch], *, temperature: float) -> list[Tensor]:
        """See ``compute_logprobs``."""
        return compute_logprobs(self.model, self.vision, microbatches, temperature=temperature)
