"""Megatron's data parallel and distributed AdamW around one model, with its state on the device or
waiting on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.config import OptimizerConfig
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.observe.ranges import MICROBATCHES
from ovr_fast.parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    DistributedOptimizer,
    finalize_model_grads,
    get_megatron_optimizer,
)
from ovr_fast.parallel.megatron import OptimizerConfig as MegatronOptimizerConfig
from ovr_fast.parallel.offload import Offload


class ShardedAdamW:
    """The trained parameters' gradients and AdamW state, sharded over data-parallel ranks.

    Args:
        model: this rank's pipeline stage, weights loaded.
        settings: betas, decay, clipping.
        offload: what leaves the device between updates: see ``ParallelConfig.offload``.
    """

    def __init__(self, model: Qwen25VLStage, settings: OptimizerConfig, *, offload: str) -> None:
        self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=True,
                average_in_collective=False,
            ),
            model,
        )
        model.config.finalize_model_grads_func = self._finalize
        self.after_backward: Callable[[], None] = lambda: None
        """Called once a minibatch, before gradients are summed over ranks."""
        self.gradient_norms: list[Tensor] = []  # of this rank's buffers, before that sum
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                weight_decay=settings.weight_decay,
                clip_grad=settings.max_grad_norm,
                bf16=model.config.bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.ddp],
            use_gloo_process_groups=model.mesh.device.type == "cuda",
        )
        if model.mesh.device.type == "cuda":
            for group in self.inner.param_groups:  # one pass over the state; foreach makes a dozen
                group.update(fused=True, foreach=False)
        self._offload, self._state, self._weights = offload, Offload(), Offload()
        self._device, self._max_norm, self._norm = model.mesh.device, settings.max_grad_norm, 0.0

    def _finalize(self, model: list, num_tokens=None, **groups) -> None:
        """Megatron's hook after the last microbatch. Losses are scaled already: plain sums."""
        MICROBATCHES.end()
        self.after_backward()
        self.after_backward = lambda: None  # it holds a trained tower's tokens and their gradients
        self.gradient_norms = [torch.linalg.vector_norm(b.grad_data) for b in self.ddp.buffers]
        finalize_model_grads(model, None, **groups)

    def zero_grad(self) -> None:
        """Forget the gradients of the minibatch before."""
        self.ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient, with one wait for the device. A collective.

        Megatron's own, where neither Apex nor Transformer Engine is installed, brings every
        parameter's norm to the host by itself, and clips parameter by parameter: 42 of 63 waits of
        a critic's update on 14 layers (python -m ovr_fast.rehearse).
        """
        self._optimizer.prepare_grads()
        distributed = self.distributed
        gradients = distributed.get_main_grads_for_grad_norm()
        norm = torch.zeros((), device=self._device)
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        squares = norm.square()
        dist.all_reduce(squares, group=distributed.get_grad_stats_parallel_group())
        self._norm = squares.item() ** 0.5
        return self._norm

    def step(self, lr: float) -> None:
        """Clip by the norm that ``gradient_norm`` has found, step at this rate, and gather the new
        weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self._max_norm / (self._norm + 1e-6) if self._max_norm else 1.0
        if scale < 1.0:
            parameters = self.distributed.get_parameters()
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
        self._optimizer.step_with_ready_grads()

    def to_device(self, *, weights_only: bool) -> None:
        """Bring back what waits on the host."""
        self._weights.back()
        if not weights_only:
            self._state.back()

    def to_host(self, *, weights: bool = True) -> None:
        """Move what ``offload`` names off the device, but not the ``weights`` that stay in use."""
        if self._offload == "none":
            return
        buffers = self.ddp.buffers
        parameters = [buffer.param_data for buffer in buffers]
        held = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self._state.out([buffer.grad_data for buffer in buffers], keep=False)
        main = [p for group in self.inner.param_groups for p in group["params"]]
        moments = [
            value
            for state in self.inner.state.values()
            for key, value in state.items()
            if key != "step"
        ]
        state = [t for t in (*main, *moments) if t.untyped_storage().data_ptr() not in held]
        self._state.out(state, keep=True)
        if self._offload == "model" and weights:
            self._weights.out(parameters, keep=True)

    def main_parameters(self) -> dict[Tensor, Tensor]:
        """This rank's fp32 range of each trained parameter that it has one of. (Megatron's own
        ``model_param_group_index_map`` is wrong where a group mixes bf16 and fp32 parameters, as a
        critic's does: it numbers them in buffer order, the optimizer has the fp32 ones first.)"""
        outer = self.distributed
        pairs = (
            (outer.model_float16_groups, outer.shard_fp32_from_float16_groups),
            (outer.model_fp32_groups, outer.shard_fp32_groups),
        )
        return {
            parameter: main
            for parameters, shards in pairs
            for group, mains in zip(parameters, shards, strict=True)
            for parameter, main in zip(group, mains, strict=True)
        }

    def restored(self, steps_done: int) -> None:
        """Go on after ``steps_done`` steps, once the state has been filled from a checkpoint."""
        for state in self.inner.state.values():
            if "step" in state:  # torch's AdamW
                state["step"].fill_(float(steps_done))
        for group in self.inner.param_groups:
            if "step" in group:  # the fused Adam of Apex or Transformer Engine
                group["step"] = steps_done
        self.distributed._copy_main_params_to_model_params()
        self.ddp.start_param_sync(force_sync=True)

    @property
    def distributed(self) -> DistributedOptimizer:
        """Megatron's sharded optimizer of this model."""
        chained = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        assert len(chained) == 1, "one dense model has one optimizer"
        return chained[0]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """torch's AdamW under Megatron's wrappers."""
        return self.distributed.optimizer
