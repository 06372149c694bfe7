"""Which layouts of a number of GPUs fit, and which cost the fewest GPU-hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ovr_fast.config import Config
from ovr_fast.plan.hours import Workload, run_hours
from ovr_fast.plan.layout import check_layout
from ovr_fast.plan.memory import memory_plan
from ovr_fast.plan.rates import Rates
from ovr_fast.settings import ConfigError
from ovr_fast.shape.model_shape import ModelShape


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
            f"rollout.placement={rollout.placement} rollout.tensor={rollout.tensor}"
        )


def layouts(config: Config, gpus: int) -> Iterator[tuple[Config, int, int]]:
    """(settings, trainer GPUs, rollout GPUs) of every layout that is tried."""
    powers = [1 << power for power in range(gpus.bit_length())]
    longest = config.rl.max_prompt_tokens + config.rl.max_response_tokens
    for world in dict.fromkeys([*(p for p in powers if p < gpus), *range(8, gpus, 8), gpus]):
        colocated = world == gpus
        if colocated and gpus > 8:  # rollout.placement=colocated is for one node
            continue
        for tensor in (1, 2, 4, 8):
            for pipeline in (1, 2, 4):
                if world % (tensor * pipeline):
                    continue
                for recompute in ("selective", "full"):
                    for fold in (1, 2):
                        for width in (1, 2, 4):
                            yield (
                                replace(
                                    config,
                                    model=replace(config.model, recompute=recompute),
                                    parallel=replace(
                                        config.parallel, world=world, tensor=tensor,
                                        pipeline=pipeline, offload="model" if colocated else "none",
                                    ),
                                    rl=replace(config.rl, max_tokens_per_microbatch=fold * longest),
                                    rollout=replace(
                                        config.rollout, tensor=width,
                                        placement="colocated" if colocated else "disaggregated",
                                    ),
                                ),
                                world,
                                world if colocated else gpus - world,
                            )  # fmt: skip


def search(
    config: Config, shape: ModelShape, rates: Rates, workload: Workload, gpus: int
) -> list[Candidate]:
    """Layouts that fit, the cheapest first."""
    found = []
    for tried, train, rollout in layouts(config, gpus):
        try:
            check_layout(tried, shape, train)
            card = memory_plan(tried, shape, train, recipe_stage="rl").card
            if card > rates.rates["memory_gib"].value:
                continue
            hours, parts = run_hours(
                tried, shape, rates, workload, train_gpus=train, rollout_gpus=rollout
            )
        except ConfigError:
            continue  # does not divide
        days = sum(steps * step.total_s for steps, step in parts) / 86_400
        found.append(
            Candidate(
                gpu_hours=hours,
                days=days,
                config=tried,
                train_gpus=train,
                rollout_gpus=rollout,
                card_gib=card,
            )  # fmt: skip
        )
    return sorted(found, key=lambda candidate: candidate.gpu_hours)
