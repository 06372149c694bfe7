"""Where vLLM servers run beside the trainer, and how weights reach them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ovr_fast.config import Config, RolloutConfig
from ovr_fast.settings import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How servers and trainer share the machine."""

    transfer_backend: str  # "gloo", "nccl", or "ipc" for servers on the trainer's own GPUs
    sleeps: bool  # whether servers give their GPU memory back while the trainer works

    @classmethod
    def of(cls, rollout: RolloutConfig, *, on_gpu: bool) -> Placement:
        """The placement of a trainer on GPUs, or on a CPU where both share the cores."""
        colocated = rollout.placement == "colocated"
        backend = ("ipc" if colocated else "nccl") if on_gpu else "gloo"
        return cls(transfer_backend=backend, sleeps=on_gpu and colocated)


def check_placement(config: Config, *, world: int, local_world: int, on_gpu: bool) -> None:
    """Raises ConfigError if colocated servers do not cover the trainer's GPUs exactly or would wake
    beside a trainer that stays there."""
    rollout = config.rollout
    if rollout.placement == "disaggregated" or not on_gpu:
        return
    if local_world != world:
        raise ConfigError(
            "rollout.placement=colocated is for one node; on several use disaggregated"
        )
    if rollout.servers * rollout.tensor != world:
        raise ConfigError(
            f"rollout.placement=colocated needs a server worker on each of the trainer's {world} "
            f"GPUs: rollout.servers={rollout.servers} x rollout.tensor={rollout.tensor} is "
            f"{rollout.servers * rollout.tensor}"
        )
    if rollout.max_staleness and not rollout.partial:
        raise ConfigError(
            "rollout.max_staleness samples the next steps while the trainer works, and colocated "
            "servers sleep then: set rollout.partial=true, or rollout.placement=disaggregated"
        )
    if config.parallel.offload != "model":
        raise ConfigError(
            "rollout.placement=colocated needs parallel.offload=model: with "
            f"{config.parallel.offload!r} the trainer's weights and optimizer state stay on the "
            "GPUs on which the servers then wake"
        )


def server_devices(number: int, *, tensor: int, colocated: bool) -> str:
    """``CUDA_VISIBLE_DEVICES`` of a server on this node: the trainer's own GPUs, or those after.

    Raises:
        ConfigError: this node has fewer GPUs.
    """
    first = number * tensor
    if not colocated:
        first += int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = range(first, first + tensor)
    if not (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        if 0 < (there := torch.cuda.device_count()) <= wanted[-1]:
            raise ConfigError(
                f"server {number} needs GPU number {wanted[-1]}, counted from 0, and this node has "
                f"{there}: lower rollout.servers or rollout.tensor, or the trainer's ranks here"
            )
        return ",".join(map(str, wanted))
    known = visible.split(",")
    if wanted[-1] >= len(known):
        raise ConfigError(
            f"server {number} needs GPU number {wanted[-1]} of CUDA_VISIBLE_DEVICES={visible}"
        )
    return ",".join(known[i] for i in wanted)
