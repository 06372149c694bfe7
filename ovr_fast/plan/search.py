"""Which layouts of a number of GPUs fit, and which cost the fewest GPU-hours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ovr_fast.config import Config
from ovr_fast.plan.hours import Workload, check_lengths, context_stages, run_hours
from ovr_fast.plan.layout import check_layout
from ovr_fast.plan.memory import memory_plan
from ovr_fast.plan.rates import Rates
from ovr_fast.settings import ConfigError
from ovr_fast.shape.model_shape import ModelShape

NODE = 8
"""GPUs of a machine: rollout.placement=colocated is for one."""
MARGIN = 0.03
"""Of a card, that a layout must leave: the plan's own error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout that fits."""

    gpu_hours: float
    days: float
    config: Config
    train_gpus: int
    rollout_gpus: int
    card_gib: float

    @property
    def words(self) -> str:
        """The settings that make it, for a command line."""
        parallel, rollout = self.config.parallel, self.config.rollout
        return (
            f"parallel.world={parallel.world} parallel.tensor={parallel.tensor} "
            f"parallel.pipeline={parallel.pipeline} parallel.offload={parallel.offload} "
            f"model.recompute={self.config.model.recompute} "
            f"rl.max_tokens_per_microbatch={self.config.rl.max_tokens_per_microbatch} "
            f"rollout.placement={rollout.placement} rollout.tensor={rollout.tensor} "
            f"rollout.servers={rollout.servers} rollout.urls=[]"
        )


def layouts(config: Config, shape: ModelShape, gpus: int) -> Iterator[tuple[int, int, Config]]:
    """(trainer GPUs, rollout GPUs, settings) of every layout that is tried."""
    longest = config.rl.max_prompt_tokens + config.rl.max_response_tokens
    worlds = {1 << power for power in range(gpus.bit_length())} | set(range(8, gpus, 8))
    if gpus <= NODE:
        worlds.add(gpus)
    for world, tensor, pipeline, recompute, fold, width, offload in itertools.product(
        sorted(worlds),
        (1, 2, 4, 8),
        (size for size in (1, 2, 4, 8, 16) if size <= shape.layers),
        ("selective", "full"),
        (1, 2),
        (1, 2, 4, 8),
        ("none", "optimizer", "model"),
    ):
        colocated = world == gpus
        rollout = world if colocated else gpus - world
        if world > gpus or world % (tensor * pipeline) or rollout % width:
            continue
        if colocated and (gpus > NODE or offload != "model"):  # vLLM needs the room
            continue
        if colocated and config.rl.score_while_sampling:
            continue
        yield world, rollout, _settings(
            config, world=world, tensor=tensor, pipeline=pipeline, recompute=recompute,
            offload=offload, tokens=fold * longest, width=width, servers=rollout // width,
            colocated=colocated,
        )  # fmt: skip


def _settings(
    config: Config,
    *,
    world: int,
    tensor: int,
    pipeline: int,
    recompute: str,
    offload: str,
    tokens: int,
    width: int,
    servers: int,
    colocated: bool,
) -> Config:
    return replace(
        config,
        model=replace(config.model, recompute=recompute),
        parallel=replace(
            config.parallel, world=world, tensor=tensor, pipeline=pipeline, offload=offload
        ),
        rl=replace(config.rl, max_tokens_per_microbatch=tokens),
        rollout=replace(
            config.rollout,
            tensor=width,
            servers=servers,
            urls=(),
            placement="colocated" if colocated else "disaggregated",
        ),
    )


def search(
    config: Config, shape: ModelShape, rates: Rates, workload: Workload, gpus: int
) -> list[Candidate]:
    """Layouts that fit, the cheapest first.

    Raises:
        ConfigError: responses are longer than the settings let them be, or the settings do not go
            with a layout.
    """
    for _, limit in context_stages(config):
        check_lengths(workload, limit)
    found: dict[tuple, Candidate] = {}
    for train, rollout, tried in layouts(config, shape, gpus):
        sampling = tried.rollout.tensor, tried.rl.max_tokens_per_microbatch
        key = replace(tried.parallel, offload="none"), tried.model.recompute, sampling
        if key in found:
            continue  # it fits with less moved to the host
        try:
            check_layout(tried, shape, train)
            card = memory_plan(tried, shape, train, recipe_stage="rl").card
            if card > (1 - MARGIN) * rates.rates["memory_gib"].value:
                continue
            hours, parts = run_hours(
                tried, shape, rates, workload, train_gpus=train, rollout_gpus=rollout
            )
        except ConfigError:
            continue  # heads, ranks or rollouts do not divide, or a server lacks the memory
        days = sum(steps * step.step_s for steps, step in parts) / 86_400
        found[key] = Candidate(
            gpu_hours=hours,
            days=days,
            config=tried,
            train_gpus=train,
            rollout_gpus=rollout,
            card_gib=card,
        )
    return sorted(found.values(), key=lambda candidate: candidate.gpu_hours)
