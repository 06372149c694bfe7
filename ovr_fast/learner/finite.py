"""A step that is not finite stops on all ranks, before the optimizer, and says where it began."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ovr_fast.errors import OVRFastError
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Microbatch


class NonFinite(OVRFastError, RuntimeError):
    """A loss, gradient or weight is not finite. Raised on all ranks, before the optimizer step."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether the norms of all tensors are finite, with one transfer to the host."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def on_any_rank(flag: bool, mesh: Mesh) -> bool:
    """Whether ``flag`` holds on any rank. A collective."""
    found = torch.tensor(float(flag), device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def locate_nonfinite(
    model: nn.Module,
    microbatches: Iterable[Microbatch],
    losses: list[Tensor],
    gradient_norms: list[Tensor],
    mesh: Mesh,
) -> str:
    """Which ranks have a non-finite loss, gradient or weight, in words. A collective.

    Args:
        model: this rank's pipeline stage.
        microbatches: of the minibatch.
        losses: one a microbatch on the last stage; none elsewhere.
        gradient_norms: of this rank's gradient buffers, before the sum over ranks.
    """
    microbatches = list(microbatches)
    found = [
        f"the loss of microbatch {index} of {len(microbatches)} "
        f"({microbatches[index].tokens_T.numel():,} tokens)"
        for index, loss in enumerate(losses)
        if not loss.isfinite()
    ]
    if not all(norm.isfinite() for norm in gradient_norms):
        found.append("its gradients")
    found += [f"weight {name}" for name, p in model.named_parameters() if not p.isfinite().all()][
        :3
    ]
    everywhere: list = [None] * mesh.world
    dist.all_gather_object(everywhere, found, group=mesh.control_group)
    places = "; ".join(
        f"rank {rank}: {', '.join(items)}" for rank, items in enumerate(everywhere) if items
    )
    return places or "no rank before the sums over ranks"
