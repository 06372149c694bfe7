"""The parts of Megatron-core that are used here, and the one place that imports it.

Megatron decorates its fused functions with ``torch.compile`` where it defines them. None of them is
called here (the operators are ``ovr_kernels``), but the decoration alone imports Inductor, 2 s of a
trainer's start of 4.5 s (two idle cores). While Megatron is imported the decorator does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without_torch_compile() -> Iterator[None]:
    def decorate(function: Any = None, **options: Any) -> Any:
        return decorate if function is None else function

    compiling = torch.compile
    torch.compile = decorate  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling


with _without_torch_compile():
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer import MegatronModule, TransformerConfig

__all__ = [
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "MegatronModule",
    "ModelType",
    "OptimizerConfig",
    "RowParallelLinear",
    "TransformerConfig",
    "VocabParallelEmbedding",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_megatron_optimizer",
    "parallel_state",
    "scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
]
