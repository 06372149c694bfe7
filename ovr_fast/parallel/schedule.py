"""Microbatches through Megatron's pipeline schedule, scored or trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from tqdm import tqdm

from ovr_fast.batch import PackedBatch
from ovr_fast.parallel.mesh import Mesh

LossFunction = Callable[[Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""From the last stage's output and its batch to (scaled loss, sums to report)."""


def forward_only(
    model: nn.Module,
    mesh: Mesh,
    batches: list[PackedBatch],
    head: Callable[[Tensor, PackedBatch], Tensor],
) -> list[Tensor]:
    """Run ``batches`` without gradients.

    Args:
        model: a stage, wrapped in Megatron's data parallel or not.
        batches: this data-parallel rank's microbatches, the same on its whole pipeline.
        head: from the last stage's output [R, H] to [R] fp32.

    Returns:
        ``head``'s results, one a microbatch, on every rank of the pipeline.
    """
    if not batches:
        return []
    with torch.no_grad():
        results = _run(model, batches, mesh, head, training=False)
    if mesh.pp == 1:
        return results
    sizes = [batch.targets_R.numel() for batch in batches]
    if mesh.last_stage:
        flat = torch.cat(results)
    else:
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=mesh.device)
    dist.broadcast(flat, mesh.last_stage_rank, group=mesh.pp_group)
    return list(flat.split(sizes))


def forward_backward(
    model: nn.Module,
    mesh: Mesh,
    batches: list[PackedBatch],
    loss: LossFunction,
    *,
    whole_gradients: bool = False,
) -> dict[str, float]:
    """Accumulate the gradients of all ``batches`` and reduce them over all ranks.

    ``loss`` must already be scaled to the global minibatch: the gradient is the plain sum over
    microbatches and data-parallel ranks.

    Args:
        whole_gradients: leave the whole gradient on every replica instead of its share.

    Returns:
        The reported sums of all microbatches of all data-parallel ranks, on every rank.
    """
    reports = _run(model, batches, mesh, loss, training=True, force_all_reduce=whole_gradients)
    return sum_over_ranks(reports, mesh)


def sum_over_ranks(reports: list[dict[str, Tensor]], mesh: Mesh) -> dict[str, float]:
    """Sums of what the last stages reported, over microbatches and data-parallel ranks."""
    names: list[str] = []
    total = torch.zeros(0, dtype=torch.float64)
    if mesh.last_stage:
        names = sorted(reports[0])
        rows = [torch.stack([report[n].double().cpu() for n in names]) for report in reports]
        total = torch.stack(rows).sum(0).to(mesh.device)
        dist.all_reduce(total, group=mesh.dp_group)
    if mesh.pp > 1:
        box = [(names, total.tolist())]
        dist.broadcast_object_list(box, mesh.last_stage_rank, group=mesh.pp_group)
        names, values = box[0]
    else:
        values = total.tolist()
    return dict(zip(names, values, strict=True))


def _run(
    model: nn.Module,
    batches: list[PackedBatch],
    mesh: Mesh,
    head: Callable,
    *,
    training: bool,
    force_all_reduce: bool = False,
) -> list:
    def forward_step(iterator: Iterator[PackedBatch], stage: nn.Module):
        batch = next(iterator).to(mesh.device)
        output = stage(batch)

        def finish(output: Tensor, non_loss_data: bool = False):
            if non_loss_data:
                return head(output, batch)
            scaled, report = head(output, batch)
            return scaled, torch.zeros((), dtype=torch.int), report

        return output, finish

    bar = tqdm(
        batches,
        desc="update" if training else "score",
        unit="microbatch",
        leave=False,
        disable=None if mesh.rank == 0 else True,  # None: only on a terminal
    )
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(bar),
        model=[model],
        num_microbatches=len(batches),
        seq_length=1,  # the true length travels with each tensor (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=not training,
        collect_non_loss_data=not training,
        force_all_reduce=force_all_reduce,
    )
