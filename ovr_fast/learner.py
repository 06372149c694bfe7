"""One model and its optimizer on the mesh: score and update. Actor, critic and cold start alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch import Tensor

from ovr_fast.batch import PackedBatch
from ovr_fast.config import ModelConfig, OptimizerConfig
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.hf_weights import load_hf
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.shape import ModelShape
from ovr_fast.model.vision import VisionTower
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.parallel.schedule import LossFunction, forward_backward, forward_only


class NonFinite(RuntimeError):
    """A loss or gradient is not a number. Raised on all ranks, before the optimizer step."""


def learning_rate(step: int, settings: OptimizerConfig, *, decay: str, total: int) -> float:
    """Rate of optimizer step ``step`` (0 is the first): linear warm-up, then constant or cosine."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if decay == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    half = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return settings.min_lr + (settings.lr - settings.min_lr) * half


def build_stage(
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
    """This rank's stage, filled from a Hugging Face folder."""
    stage = Qwen25VLStage(
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
    load_hf(stage, weights)
    return stage


def head_of(
    operator: Callable,
    stage: Qwen25VLStage,
    rows_RH: Tensor,
    batch: PackedBatch,
    temperature: float,
) -> Callable:
    """An operator of the output head (``linear_logprob`` and its like), bound to a microbatch."""
    return partial(
        operator,
        rows_RH,
        stage.output_weight,
        batch.targets_R,
        temperature=temperature,
        tp_group=stage.mesh.tp_group if stage.mesh.tp > 1 else None,
    )


def policy_head(
    stage: Qwen25VLStage, rows_RH: Tensor, batch: PackedBatch, *, temperature: float
) -> Callable:
    """``linear_policy_loss`` of a microbatch, but for its objective and tokens; the gradient of the
    output embedding goes straight into Megatron's buffer."""
    head = head_of(stage.operators.linear_policy_loss, stage, rows_RH, batch, temperature)
    return partial(head, weight_gradient=stage.output_gradient)


def cross_entropy_head(stage: Qwen25VLStage, rows_RH: Tensor, batch: PackedBatch) -> Callable:
    """``linear_cross_entropy`` of a microbatch, but for its weights."""
    head = head_of(stage.operators.linear_cross_entropy, stage, rows_RH, batch, 1.0)
    return partial(head, weight_gradient=stage.output_gradient)


def score_logprobs(
    stage: Qwen25VLStage,
    batches: list[PackedBatch],
    encoder: PictureEncoder,
    *,
    temperature: float,
) -> list[Tensor]:
    """Log-probs [R] of the response tokens of each microbatch, without gradients."""

    def head(rows_RH: Tensor, batch: PackedBatch) -> Tensor:
        return head_of(stage.operators.linear_logprob, stage, rows_RH, batch, temperature)()

    return forward_only(stage, stage.mesh, encoder.fill(batches), head)


def score_values(
    stage: Qwen25VLStage, batches: list[PackedBatch], encoder: PictureEncoder
) -> list[Tensor]:
    """The critic's values [R] of each microbatch, without gradients."""
    batches = encoder.fill(batches)
    return forward_only(stage, stage.mesh, batches, lambda rows_RH, _: stage.value_head(rows_RH))


class Learner:
    """A stage under Megatron's data parallel with its distributed AdamW.

    Args:
        name: "actor", "critic" or "cold_start", for messages.
        stage: the model, weights loaded.
        encoder: of the pictures, with this model's tower.
        settings: rate, warm-up, betas, decay, clipping.
        decay: "constant" or "cosine".
        total_steps: optimizer steps of the whole stage, for the cosine.
    """

    def __init__(
        self,
        name: str,
        stage: Qwen25VLStage,
        encoder: PictureEncoder,
        settings: OptimizerConfig,
        *,
        decay: str = "constant",
        total_steps: int = 0,
    ) -> None:
        self.name, self.stage, self.encoder, self.settings = name, stage, encoder, settings
        self._finish_pictures: Callable[[], None] = lambda: None
        self.mesh = stage.mesh
        self.decay, self.total_steps, self.steps_done = decay, total_steps, 0
        self._ddp = DistributedDataParallel(
            stage.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=True,
                average_in_collective=False,
            ),
            stage,
        )
        stage.config.finalize_model_grads_func = self._finalize
        bf16 = stage.config.bf16
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                weight_decay=settings.weight_decay,
                clip_grad=settings.max_grad_norm,
                bf16=bf16,
                params_dtype=stage.config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self._ddp],
            use_gloo_process_groups=self.mesh.device.type == "cuda",
        )

    def update(self, batches: list[PackedBatch], loss: LossFunction) -> dict[str, float]:
        """One optimizer step on a minibatch.

        Args:
            batches: this data-parallel rank's microbatches.
            loss: already scaled to the global minibatch.

        Returns:
            the loss function's sums over all ranks, and "grad_norm" and "lr".

        Raises:
            NonFinite: the loss or the gradient norm is; the weights are untouched.
        """
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        batches, self._finish_pictures = self.encoder.fill_for_training(batches)
        report = forward_backward(self._ddp, self.mesh, batches, loss)
        rate = learning_rate(
            self.steps_done, self.settings, decay=self.decay, total=self.total_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm) or not all(map(math.isfinite, report.values())):
            raise NonFinite(
                f"{self.name}: gradient norm {norm}, sums {report} at optimizer step "
                f"{self.steps_done}; the weights are those of the step before. Lower the learning "
                "rate or look at the last rollouts, and --resume from the last checkpoint"
            )
        self._optimizer.step()
        self.steps_done += 1
        return {**report, "grad_norm": norm, "lr": rate}

    def gradients(self, batches: list[PackedBatch], loss: LossFunction) -> dict[str, Tensor]:
        """The gradients that ``update`` would step on, by parameter name, whole on every replica.

        For comparing layouts; ``update`` itself leaves each replica only its share of them.
        """
        self._ddp.zero_grad_buffer()
        batches, self._finish_pictures = self.encoder.fill_for_training(batches)
        forward_backward(self._ddp, self.mesh, batches, loss, whole_gradients=True)
        return {
            name: parameter.main_grad.clone()
            for name, parameter in self.stage.named_parameters()
            if parameter.requires_grad
        }

    def _finalize(self, model: list, num_tokens=None, **groups) -> None:
        """After the last microbatch: the tower's gradients, then plain sums over ranks (the losses
        are scaled already)."""
        self._finish_pictures()
        finalize_model_grads(model, None, **groups)

    def state_dict(self) -> dict:
        """This rank's weights, optimizer state and step count, all on the CPU."""
        shards = [[_copy(p) for p in group["params"]] for group in self._inner.param_groups]
        state = {
            index: {key: _copy(value) for key, value in entry.items()}
            for index, entry in self._inner.state_dict()["state"].items()
        }
        return {
            "steps_done": self.steps_done,
            "weights": {n: _copy(p) for n, p in self.stage.named_parameters()},
            "optimizer_shards": shards,
            "optimizer_state": state,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict`` of the same rank of the same layout, bit for bit."""
        self.steps_done = state["steps_done"]
        with torch.no_grad():
            for name, parameter in self.stage.named_parameters():
                parameter.copy_(state["weights"][name])
            for group, saved in zip(
                self._inner.param_groups, state["optimizer_shards"], strict=True
            ):
                for parameter, value in zip(group["params"], saved, strict=True):
                    parameter.copy_(value)
        packed = self._inner.state_dict()
        packed["state"] = state["optimizer_state"]
        self._inner.load_state_dict(packed)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """torch's AdamW under Megatron's wrappers."""
        chained = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        assert len(chained) == 1, "one dense model has one optimizer"
        return chained[0].optimizer


def _copy(value):
    """A tensor on the CPU that shares nothing with the original; other values as they are."""
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
