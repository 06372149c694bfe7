"""Microbatches through Megatron's pipeline schedule, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ovr_fast import stopping
from ovr_fast.observe.ranges import MICROBATCHES, named_range
from ovr_fast.parallel.megatron import get_forward_backward_func
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Microbatch, Minibatch, Targets

TRACED = 2
"""Microbatches of a pass that ``--profile`` keeps, beside those that fill the pipeline."""

TrainedHead = Callable[[Tensor, Microbatch, Targets | None], tuple[Tensor, dict[str, Tensor]]]
"""From the last stage's output, its microbatch and targets to (scaled loss, sums to report)."""


def forward_only(
    model: nn.Module,
    mesh: Mesh,
    microbatches: List[Microbatch],
    head: Callable[[Tensor, Microbatch], Tensor],
) -> list[Tensor]:
    """Run ``microbatches`` without gradients.

    Args:
        model: a pipeline stage, wrapped in Megatron's data parallel or not.
        microbatches: this data-parallel rank's, the same on its whole pipeline.
        head: from the last stage's output [R, H] to [R] fp32.

    Returns:
        ``head``'s results, one a microbatch, on every rank of the pipeline.
    """
    if not microbatches:
        return []

    def without_targets(output: Tensor, batch: Microbatch, _: Targets | None) -> Tensor:
        return head(output, batch)

    pairs = [(microbatch, None) for microbatch in microbatches]
    with torch.no_grad():
        results = _run(model, pairs, mesh, without_targets, training=False)
    return on_every_stage(results, microbatches, mesh)


def on_every_stage(
    results: list[Tensor], microbatches: List[Microbatch], mesh: Mesh
) -> list[Tensor]:
    """What the last stage has, [R] fp32 for each microbatch, on every rank of the pipeline. A
    collective of it."""
    if mesh.pp == 1:
        return results
    sizes = [microbatch.labels_R.numel() for microbatch in microbatches]
    if mesh.last_stage:
        flat = torch.cat(results)
    else:
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=mesh.device)
    dist.broadcast(flat, mesh.last_stage_rank, group=mesh.pp_group)
    return list(flat.split(sizes))


def forward_backward(
    model: nn.Module,
    mesh: Mesh,
    minibatch: Minibatch,
    head: TrainedHead,
    *,
    whole_gradients: bool = False,
) -> dict[str, float]:
    """Accumulate the gradients of a minibatch and reduce them over all ranks.

    The loss must already be scaled to the global minibatch: the gradient is the plain sum over
    microbatches and data-parallel ranks.

    Args:
        whole_gradients: leave the whole gradient on every replica instead of its shard.

    Returns:
        The reported sums of all microbatches of all data-parallel ranks, on every rank.
    """
    pairs = list(zip(minibatch.microbatches, minibatch.targets, strict=True))
    reports = _run(model, pairs, mesh, head, training=True, force_all_reduce=whole_gradients)
    return sum_over_ranks(reports, mesh)


def sum_over_ranks(reports: list[dict[str, Tensor]], mesh: Mesh) -> dict[str, float]:
    """Sums of what the last stages reported, over microbatches and data-parallel ranks."""
    names: list[str] = []
    total = torch.zeros(0, dtype=torch.float64)
    if mesh.last_stage:
        names = sorted(reports[0])
        rows = [torch.stack([report[name].double() for name in names]) for report in reports]
        total = torch.stack(rows).sum(0)
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
    pairs: List[tuple[Microbatch, Targets | None]],
    mesh: Mesh,
    head: Callable,
    *,
    training: bool,
    force_all_reduce: bool = False,
) -> list:
    def forward_step(iterator: Iterator, stage: nn.Module):
        stopping.check()
        number, (microbatch, targets) = next(iterator)
        MICROBATCHES.begin(number, kept=mesh.pp - 1 + TRACED)
        with named_range(f"microbatch {number}"):
            microbatch = microbatch.to(mesh.device)
            output = stage(microbatch)

        def finish(output: Tensor, non_loss_data: bool = False):
            if non_loss_data:
                return head(output, microbatch, targets)
            scaled, report = head(output, microbatch, targets)
            return scaled, torch.zeros((), dtype=torch.int), report

        return output, finish

    bar = tqdm(
        pairs,
        desc="update" if training else "forward",
        unit="microbatch",
        leave=False,
        disable=None if mesh.rank == 0 else True,  # None: only on a terminal
    )
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=enumerate(bar),
        model=[model],
        num_microbatches=len(pairs),
        seq_length=1,  # the true length travels with each tensor (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=not training,
        collect_non_loss_data=not training,
        force_all_reduce=force_all_reduce,
    )
    MICROBATCHES.end()
    return results
