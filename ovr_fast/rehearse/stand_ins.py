"""All that a rehearsal replaces, in the trainer and below it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend
from torch.testing._internal.distributed import fake_pg

from ovr_fast.learner.optimizer import ShardedAdamW
from ovr_fast.parallel import schedule
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import RolloutBatch
from ovr_fast.rollout import given
from ovr_kernels.objective import TOTALS

assert fake_pg  # importing it registers the backend "fake", whose collectives return at once


REPORTED = (*TOTALS, "entropy", "logprob_gap", "rollout_kl", "tokens", "ratios")
"""What the last pipeline stage tells the others of a loss."""


def put(owner: Any, **replacements: Any) -> None:
    """Replace attributes of a module or class."""
    for name, replacement in replacements.items():
        assert hasattr(owner, name), f"{owner} has no {name}: the rehearsal is behind the trainer"
        setattr(owner, name, replacement)


def switch_off_numbers() -> None:
    """Comparisons of kernels with their references, of servers with the trainer, checks for finite
    values, moments of a batch, and sizes that depend on values."""
    import ovr_fast.learner.learner as learner
    import ovr_fast.model.attention as attention
    import ovr_fast.recipe.metrics as metrics
    import ovr_fast.rl.losses as losses
    import ovr_kernels.parity as parity
    from ovr_fast.rollout.canary import Canary

    nonzero = torch.Tensor.nonzero

    def every_index(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.is_cuda and self.dim() == 1:
            return torch.arange(self.numel(), device=self.device).unsqueeze(1)
        return nonzero(self, *args, **options)

    put(torch.Tensor, nonzero=every_index)
    # cuDNN plans with the card's own numbers; FlashAttention keeps the same tensors.
    put(attention, LONG_KERNEL=SDPBackend.FLASH_ATTENTION)
    torch.backends.cuda.enable_cudnn_sdp(False)
    norm = ShardedAdamW.gradient_norm

    def real_norm(optimizer: ShardedAdamW) -> float:
        optimizer._norm = abs(norm(optimizer))  # of old bytes it may be the root of less than 0
        return optimizer._norm

    put(ShardedAdamW, gradient_norm=real_norm)
    put(parity, relative_error=lambda a, b: 0.0 if a.shape == b.shape else math.inf)
    finite = SimpleNamespace(isfinite=lambda number: True)
    put(learner, math=finite, all_finite=lambda tensors: True)
    put(Canary, judge=lambda canary, gaps, *, version: None)

    def moments(parts: list, group: Any) -> tuple[float, float, float]:
        wide = torch.cat(parts).double()
        sums = torch.stack([torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()])
        dist.all_reduce(sums, group=group)
        sums.tolist()
        return float(wide.numel()), 0.0, 1.0

    sums = schedule.sum_over_ranks

    def ones(reports: list, mesh: Mesh) -> dict[str, float]:
        """Ones under the loss's names, which a rank that is alone is not told."""
        return dict.fromkeys(sums(reports, mesh) or REPORTED, 1.0)

    put(schedule, sum_over_ranks=ones)
    put(losses, global_moments=moments)
    put(metrics, global_moments=moments)


def say_nothing_of_numbers() -> None:
    """The trainer's line of a step would show rewards, rates and MFU that mean nothing."""
    import ovr_fast.recipe.ppo as ppo
    import ovr_fast.recipe.sft as sft

    def line(number: int, last: int, metrics: dict[str, float]) -> str:
        return f"step {number}/{last}: {metrics['time/step_s']:.1f} s on the host"

    put(ppo, step_line=line)
    put(sft, cold_start_line=line)


def keep_off_the_disk() -> None:
    """Neither checkpoints nor exported models: those of a real size would fill it."""
    from ovr_fast.run.run import Run

    put(Run, save=lambda run, *arguments, **options: None)
    put(Run, export=lambda run, learner, name: run.folder / name)


UNIQUE_ID_BYTES = 128  # ncclUniqueId


class PeersAreThere(dist.Store):
    """A store that answers as if all peers had just written what is asked for."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world

    def set(self, key: str, value: Any) -> None:
        """Nobody reads it."""

    def get(self, key: str) -> bytes:
        """The id of a communicator, which is all that a group asks its first rank for."""
        return bytes(UNIQUE_ID_BYTES)

    def add(self, key: str, amount: int) -> int:
        """Every rank has come."""
        return self.world

    def check(self, keys: list[str]) -> bool:
        """Nobody asks for a dump."""
        return False

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """They are there."""


def be_alone() -> None:
    """NCCL groups answer at once (``PRETEND_ALONE``), gloo groups too; what rank 0 would give this
    rank, this rank makes itself."""
    init, new_group = dist.init_process_group, dist.new_group
    world = int(os.environ["WORLD_SIZE"])
    store = PeersAreThere(world)  # held here: C++ calls these methods as long as Python has it

    def init_alone(backend: str, **options: Any) -> None:
        init(
            "cpu:fake,cuda:nccl",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=world,
            timeout=options["timeout"],
        )

    def new_group_alone(*arguments: Any, **options: Any) -> Any:
        if options.get("backend") == "gloo":
            options["backend"] = "fake"
        return new_group(*arguments, **options)

    def batch(step: int, prompts: tuple, rollouts: list, mesh: Mesh) -> RolloutBatch:
        return RolloutBatch(step=step, prompts=prompts, rollouts=tuple(rollouts))

    put(
        dist,
        init_process_group=init_alone,
        new_group=new_group_alone,
        broadcast_object_list=lambda *arguments, **options: None,
    )
    put(
        Mesh,
        broadcast_object=lambda mesh, value: value,
        on_first_rank=lambda mesh, work, *, otherwise: work(),
        scatter_to_replicas=lambda mesh, values: values[mesh.dp_rank],
        gather_from_replicas=lambda mesh, value: [value] * mesh.dp,
    )
    put(given, first_rank_batch=batch)
    _agree_on_shapes()


def _agree_on_shapes() -> None:
    """Pipeline stages tell each other the shape of what they send. Hidden states come from the
    stage before, and gradients from the one after, in the order of the microbatches, whose lengths
    this rank knows."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    run = schedule._run
    forward: Iterator[int] = iter(())  # tokens of the microbatches that have not come
    backward: Iterator[int] = iter(())

    def run_and_note(model: Any, pairs: Any, mesh: Mesh, head: Any, **options: Any) -> Any:
        nonlocal forward, backward
        lengths = [microbatch.tokens_T.numel() // mesh.tp for microbatch, _ in pairs]
        forward, backward = iter(lengths), iter(lengths)
        return run(model, pairs, mesh, head, **options)

    def shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
        def shape(come: bool, lengths: Iterator[int]) -> Any:
            return torch.Size((next(lengths), 1, self.config.hidden_size)) if come else [0, 0, 0]

        return shape(recv_prev, forward), shape(recv_next, backward)

    put(schedule, _run=run_and_note)
    put(P2PCommunicator, _communicate_shapes=shapes)
