"""Ranks and groups: tensor, pipeline and data parallel, on NCCL or gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ovr_fast.config import data_parallel_size
from ovr_fast.errors import OVRFastError
from ovr_fast.parallel.megatron import parallel_state

T = TypeVar("T")

# A rank that never reaches a collective of the models is a failure elsewhere.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Rank 0 alone talks to the servers and checks answers, for hours at 24k tokens a response; it has
# time limits of its own for both, and always comes back with a result or an error.
FIRST_RANK_TIMEOUT = timedelta(days=7)
# The slowest rank's share of a checkpoint, on a slow filesystem.
CHECKPOINT_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This process's place in the tensor x pipeline x data grid."""

    rank: int
    world: int
    device: torch.device
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup  # the ranks of one replica: tensor x pipeline
    model_rank: int  # this rank among them
    control_group: dist.ProcessGroup  # all ranks, gloo; for waiting while rank 0 works alone
    checkpoint_group: dist.ProcessGroup  # all ranks, gloo; for the thread that writes checkpoints

    def barrier(self) -> None:
        """Wait until every rank is here, however long rank 0 takes. A collective."""
        if self.world > 1:
            dist.barrier(group=self.control_group)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's Python value on every rank, however long rank 0 takes. A collective."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, group=self.control_group)
        return box[0]

    def on_first_rank(self, work: Callable[[], T], *, otherwise: T) -> T:
        """Do ``work`` on rank 0 while the others wait. A collective.

        Returns:
            what ``work`` returned, on rank 0; ``otherwise`` on the others.

        Raises:
            Exception: what ``work`` raised, on every rank.
        """
        result, failure = otherwise, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:  # every rank has to leave the collective, then fail alike
                failure = error
                if isinstance(error, OVRFastError):
                    error.together = True
        failure = self.broadcast_object(failure)
        if failure is not None:
            raise failure
        return result

    def any_rank(self, word: str) -> str:
        """The first word of a rank that has one, on every rank; "" where none has. A collective."""
        if self.world == 1:
            return word
        found = [""] * self.world
        dist.all_gather_object(found, word, group=self.control_group)
        return next(filter(None, found), "")

    def from_first_rank(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0, and give every rank its result. A collective.

        Raises:
            Exception: what ``work`` raised, on every rank.
        """
        found: list[T] = self.on_first_rank(lambda: [work()], otherwise=[])
        return self.broadcast_object(found)[0]

    def scatter_to_replicas(self, values: list[Any]) -> Any:
        """One Python value for each data-parallel replica, from rank 0 to all ranks of it.

        Each value crosses the network once to its replica and then inside it. A collective.

        Args:
            values: by data-parallel rank; only rank 0's list is read.
        """
        if self.world == 1:
            return values[0]
        # Beyond the time limits of the groups below: rank 0 may have worked for hours.
        self.barrier()
        value: Any = None
        if self.rank == 0:
            firsts = dist.get_process_group_ranks(self.dp_group)  # rank 0's: model rank 0 of each
            value = values[0]
            for replica, rank in enumerate(firsts[1:], 1):
                dist.send_object_list([values[replica]], rank, group=self.control_group)
        elif self.model_rank == 0:
            box = [None]
            dist.recv_object_list(box, 0, group=self.control_group)
            value = box[0]
        if self.tp * self.pp == 1:
            return value
        box = [value]
        first = dist.get_process_group_ranks(self.model_group)[0]
        dist.broadcast_object_list(box, first, group=self.model_group, device=torch.device("cpu"))
        return box[0]

    def gather_from_replicas(self, value: T) -> list[T]:
        """One Python value of each data-parallel replica (its first rank's), by replica, on rank 0;
        nothing elsewhere. A collective."""
        if self.world == 1:
            return [value]
        self.barrier()
        if self.rank == 0:
            values = [value]
            for rank in dist.get_process_group_ranks(self.dp_group)[1:]:
                box: list[Any] = [None]
                dist.recv_object_list(box, rank, group=self.control_group)
                values.append(box[0])
            return values
        if self.model_rank == 0:
            dist.send_object_list([value], 0, group=self.control_group)
        return []

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_process_group_ranks(self.pp_group)[-1]


def start_mesh(*, tensor: int, pipeline: int) -> Mesh:
    """Join the process group that torchrun describes and build the Megatron groups.

    One process without torchrun is a world of one.

    Raises:
        ConfigError: the layout does not divide the world.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    data_parallel_size(world, tensor=tensor, pipeline=pipeline)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        from ovr_fast.parallel import cpu

        cpu.enable()
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:
            store = dist.HashStore()
            dist.init_process_group(
                backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT
            )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=device.type == "cuda",
    )
    replica = parallel_state.get_model_parallel_group()
    return Mesh(
        rank=rank,
        world=world,
        device=device,
        tp=tensor,
        pp=pipeline,
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        model_group=replica,
        model_rank=dist.get_rank(replica),
        control_group=dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT),
        checkpoint_group=dist.new_group(backend="gloo", timeout=CHECKPOINT_TIMEOUT),
    )
