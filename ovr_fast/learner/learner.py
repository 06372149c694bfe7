"""One model and its optimizer on the mesh. Actor, critic and cold start alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from ovr_fast.config import OptimizerConfig
from ovr_fast.learner.checkpointing import learner_pieces
from ovr_fast.learner.finite import NonFinite, all_finite, locate_nonfinite, on_any_rank
from ovr_fast.learner.optimizer import ShardedAdamW
from ovr_fast.learner.passes import compute_logprobs, compute_values
from ovr_fast.learner.rate import learning_rate
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.checkpoint import Piece
from ovr_fast.parallel.schedule import forward_backward
from ovr_fast.records import Microbatch, Minibatch, Targets
from ovr_fast.rl.losses import Loss


class Learner:
    """A model under Megatron's data parallel with its distributed AdamW.

    Args:
        name: "actor", "critic" or "cold_start": in messages and checkpoints.
        model: this rank's pipeline stage, weights loaded.
        vision: encodes images with this model's tower.
        settings: rate, warm-up, betas, decay, clipping.
        decay: "constant" or "cosine".
        total_steps: optimizer steps of the whole recipe stage, for the cosine.
        offload: what leaves the device outside ``on_device``: see ``ParallelConfig.offload``.
    """

    def __init__(
        self,
        name: str,
        model: Qwen25VLStage,
        vision: VisionEncoder,
        settings: OptimizerConfig,
        *,
        decay: str = "constant",
        total_steps: int = 0,
        offload: str = "none",
    ) -> None:
        self.name, self.model, self.vision, self.settings = name, model, vision, settings
        self.mesh = model.mesh
        self.decay, self.total_steps, self.steps_done = decay, total_steps, 0
        self.optimizer = ShardedAdamW(model, settings, offload=offload)
        self._users, self._updaters = 0, 0  # contexts that want the weights, and all, on the device
        self.optimizer.to_host()

    @contextmanager
    def on_device(self, *, weights_only: bool = False) -> Iterator[None]:
        """Inside, what an update needs is on the device; with ``weights_only`` the weights are."""
        self._users += 1
        self._updaters += not weights_only
        self.optimizer.to_device(weights_only=weights_only)
        yield
        self._users -= 1
        self._updaters -= not weights_only
        if not self._users:
            self.optimizer.to_host()
        elif not self._updaters and not weights_only:
            self.optimizer.to_host(weights=False)

    def logprobs(self, microbatches: List[Microbatch], *, temperature: float) -> list[Tensor]:
        """See ``compute_logprobs``."""
        with self.on_device(weights_only=True):
            return compute_logprobs(self.model, self.vision, microbatches, temperature=temperature)

    def values(self, microbatches: List[Microbatch]) -> list[Tensor]:
        """See ``compute_values``."""
        with self.on_device(weights_only=True):
            return compute_values(self.model, self.vision, microbatches)

    def update(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        """One optimizer step.

        Returns:
            the loss function's sums over all microbatches and ranks, and "grad_norm" and "lr".

        Raises:
            NonFinite: a loss, the gradient norm or a weight is; the weights are untouched.
        """
        with self.on_device():
            losses: list[Tensor] = []
            sums = self._forward_backward(minibatch, loss, losses)
            norm = self.optimizer.gradient_norm()
            if not (math.isfinite(norm) and all(map(math.isfinite, sums.values()))):
                raise self._nonfinite(f"gradient norm {norm}, sums {sums}", minibatch, losses)
            if on_any_rank(not all_finite(self.model.parameters()), self.mesh):
                raise self._nonfinite("a weight is not finite", minibatch, losses)
            rate = learning_rate(
                self.steps_done + 1, self.settings, decay=self.decay, total=self.total_steps
            )
            self.optimizer.step(rate)
            self.steps_done += 1
        return {**sums, "grad_norm": norm, "lr": rate}

    def _forward_backward(
        self,
        minibatch: Minibatch,
        loss: Loss,
        losses: list[Tensor],
        *,
        whole_gradients: bool = False,
    ) -> dict[str, float]:
        """Gradients of a minibatch into their buffers; appends each microbatch's loss."""
        self.optimizer.zero_grad()
        filled, self.optimizer.after_backward = self.vision.fill_for_training(
            minibatch.microbatches
        )

        def head(hidden_RH: Tensor, batch: Microbatch, targets: Targets | None):
            scaled, sums = loss(self.model, hidden_RH, batch, targets, minibatch)
            losses.append(scaled.detach())
            return scaled, sums

        return forward_backward(
            self.optimizer.ddp,
            self.mesh,
            replace(minibatch, microbatches=tuple(filled)),
            head,
            whole_gradients=whole_gradients,
        )

    def _nonfinite(self, what: str, minibatch: Minibatch, losses: list[Tensor]) -> NonFinite:
        places = locate_nonfinite(
            self.model, minibatch.microbatches, losses, self.optimizer.gradient_norms, self.mesh
        )
        return NonFinite(
            f"{self.name}, optimizer step {self.steps_done + 1}: {what}. Not finite on {places}. "
            "The weights are those of the step before"
        )

    def gradients(self, minibatch: Minibatch, loss: Loss) -> dict[str, Tensor]:
        """The gradients that ``update`` would step on, by parameter name, whole on every replica.

        For tests that compare layouts; ``update`` itself leaves each replica only its shard.
        """
        self._forward_backward(minibatch, loss, [], whole_gradients=True)
        return {
            name: parameter.main_grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def pieces(self) -> list[Piece]:
        """What a checkpoint holds of this learner: see ``learner_pieces``."""
        return learner_pieces(self.name, self.model, self.optimizer, steps_done=self.steps_done)

    def restored(self, steps_done: int) -> None:
        """Go on after ``steps_done`` steps, once ``pieces`` have been filled."""
        self.steps_done = steps_done
        self.optimizer.restored(steps_done)
