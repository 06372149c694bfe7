"""One model and its optimizer on the mesh: score and update. Actor, critic and cold start alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from ovr_fast.batch import PackedBatch
from ovr_fast.config import ModelConfig, OptimizerConfig
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.hf_weights import load_hf, parameter_table, rectangles
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.shape import ModelShape
from ovr_fast.model.vision import VisionTower
from ovr_fast.parallel.checkpoint import Piece
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.parallel.offload import Offload
from ovr_fast.parallel.schedule import LossFunction, forward_backward, forward_only


class NonFinite(RuntimeError):
    """A loss, gradient or weight is not finite. Raised on all ranks, before the optimizer step."""


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
        offload: what leaves the device outside ``on_device``: see ``ParallelConfig.offload``.
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
        offload: str = "none",
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
        self._offload, self._state_away, self._weights_away = offload, Offload(), Offload()
        self._users = 0  # contexts that want the model on the device
        self._losses: list[Tensor] = []
        self._gradient_norms: list[Tensor] = []
        self._leave_device()

    @contextmanager
    def on_device(self, *, weights_alone: bool = False) -> Iterator[None]:
        """While it lasts, what an update needs is on the device; or the weights, to score."""
        self._users += 1
        self._weights_away.back()
        if not weights_alone:
            self._state_away.back()
        yield
        self._users -= 1
        self._leave_device()

    def _leave_device(self) -> None:
        if self._offload == "none" or self._users:
            return
        buffers = self._ddp.buffers
        weights = [buffer.param_data for buffer in buffers]
        held = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._state_away.out([buffer.grad_data for buffer in buffers], keep=False)
        main = [p for group in self._inner.param_groups for p in group["params"]]
        moments = [
            value
            for state in self._inner.state.values()
            for key, value in state.items()
            if key != "step"
        ]
        state = [t for t in (*main, *moments) if t.untyped_storage().data_ptr() not in held]
        self._state_away.out(state, keep=True)
        if self._offload == "model":
            self._weights_away.out(weights, keep=True)

    def update(self, batches: list[PackedBatch], loss: LossFunction) -> dict[str, float]:
        """One optimizer step on a minibatch.

        Args:
            batches: this data-parallel rank's microbatches.
            loss: already scaled to the global minibatch.

        Returns:
            the loss function's sums over all ranks, and "grad_norm" and "lr".

        Raises:
            NonFinite: a loss, the gradient norm or a weight is; the weights are untouched.
        """
        with self.on_device():
            return self._update(batches, loss)

    def _update(self, batches: list[PackedBatch], loss: LossFunction) -> dict[str, float]:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        batches, self._finish_pictures = self.encoder.fill_for_training(batches)
        self._losses.clear()

        def watched(rows_RH: Tensor, batch: PackedBatch):
            scaled, report = loss(rows_RH, batch)
            self._losses.append(scaled.detach())
            return scaled, report

        report = forward_backward(self._ddp, self.mesh, batches, watched)
        rate = learning_rate(
            self.steps_done, self.settings, decay=self.decay, total=self.total_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not (math.isfinite(norm) and all(map(math.isfinite, report.values()))):
            self._stop(f"gradient norm {norm}, sums {report}", batches)
        if self._any_rank(not self._weights_are_finite()):
            self._stop("a weight is not finite", batches)
        self._optimizer.step()
        self.steps_done += 1
        return {**report, "grad_norm": norm, "lr": rate}

    def _weights_are_finite(self) -> bool:
        norms = torch._foreach_norm([p.detach() for p in self.stage.parameters()])
        return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())

    def _any_rank(self, here: bool) -> bool:
        flag = torch.tensor(float(here), device=self.mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _stop(self, what: str, batches: list[PackedBatch]) -> NoReturn:
        """Raises NonFinite, which says on which ranks and microbatches it began."""
        found = [
            f"the loss of microbatch {index} of {len(batches)} "
            f"({batches[index].tokens_T.numel():,} tokens)"
            for index, loss in enumerate(self._losses)
            if not loss.isfinite()
        ]
        if not all(norm.isfinite() for norm in self._gradient_norms):
            found.append("its gradients")
        found += [
            f"weight {name}" for name, p in self.stage.named_parameters() if not p.isfinite().all()
        ][:3]
        everywhere: list = [None] * self.mesh.world
        dist.all_gather_object(everywhere, found, group=self.mesh.patient_group)
        places = "; ".join(
            f"rank {rank}: {', '.join(here)}" for rank, here in enumerate(everywhere) if here
        )
        raise NonFinite(
            f"{self.name}, optimizer step {self.steps_done}: {what}. Not finite on "
            f"{places or 'no rank before the sums over ranks'}. The weights are those of the step "
            "before"
        )

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
        self._gradient_norms = [torch.linalg.vector_norm(b.grad_data) for b in self._ddp.buffers]
        finalize_model_grads(model, None, **groups)

    def pieces(self) -> list[Piece]:
        """Trained weights (in fp32, as the optimizer holds them) and Adam's moments, as this rank's
        rectangles of the whole model's tensors. Frozen parts come from the weights folder."""
        rows = {
            row.ours: row
            for row in parameter_table(
                self.stage.shape, self.mesh.pp, value_head=self.stage.is_critic
            )
        }
        found = []
        main_of = self._main_parameters()
        for name, parameter in self.stage.named_parameters():
            if parameter not in main_of:
                continue  # frozen, or none of it is this data-parallel rank's
            held = self._distributed._get_model_param_range_map(parameter)["param"]
            main = main_of[parameter]
            assert main.numel() == held.end - held.start, name
            moments = self._inner.state[main]
            if not moments:  # the optimizer makes them at its first step
                moments.update(
                    step=torch.tensor(float(self.steps_done)),
                    exp_avg=torch.zeros_like(main),
                    exp_avg_sq=torch.zeros_like(main),
                )
            for what, flat in (
                ("weight", main),
                ("exp_avg", moments["exp_avg"]),
                ("exp_avg_sq", moments["exp_avg_sq"]),
            ):
                for part in rectangles(rows[name], held.start, held.end, self.mesh):
                    found.append(
                        Piece(
                            name=f"{self.name}/{what}/{part.source}",
                            shape=part.shape,
                            offsets=part.offsets,
                            tensor=flat.detach().view(-1)[part.begin : part.end].view(part.sizes),
                            owned=part.first_replica and not getattr(parameter, "shared", False),
                        )
                    )
        return found

    def restored(self, steps_done: int) -> None:
        """Go on after ``steps_done`` steps, once ``pieces`` have been filled."""
        self.steps_done = steps_done
        for state in self._inner.state.values():
            if "step" in state:  # torch's AdamW
                state["step"].fill_(float(steps_done))
        for group in self._inner.param_groups:
            if "step" in group:  # the fused Adam of Apex or Transformer Engine
                group["step"] = steps_done
        self._distributed._copy_main_params_to_model_params()
        self._ddp.start_param_sync(force_sync=True)

    def _main_parameters(self) -> dict[Tensor, Tensor]:
        """This rank's fp32 range of each trained parameter that it has one of. (Megatron's own
        ``model_param_group_index_map`` is wrong where a group mixes bf16 and fp32 parameters, as a
        critic's does: it numbers them in buffer order, the optimizer has the fp32 ones first.)"""
        inner = self._distributed
        pairs = (
            (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
            (inner.model_fp32_groups, inner.shard_fp32_groups),
        )
        return {
            parameter: main
            for parameters, shards in pairs
            for group, mains in zip(parameters, shards, strict=True)
            for parameter, main in zip(group, mains, strict=True)
        }

    @property
    def _distributed(self) -> DistributedOptimizer:
        """Megatron's sharded optimizer of this model."""
        chained = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        assert len(chained) == 1, "one dense model has one optimizer"
        return chained[0]

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """torch's AdamW under Megatron's wrappers."""
        return self._distributed.optimizer
