"""How long two groups of warps that fold and one warp that loads take, without a GPU: the
partitions of ``specialised.py`` event by event.

The matrix unit is shared by the products that were begun, as is the issue of instructions by the
groups that fold. What L2 and shared memory deliver in a cycle has no limit here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Cycles on a multiprocessor that nobody else uses.

    Args:
        step: of a group's product with one step.
        fold: of a group's instructions outside its products, a tile.
        alone: share of the rate of ``fold`` that a group reaches while the other does not fold.
        latency: from the loading of a slot to its operands.
        gap: from the end of a product to the beginning of the next but one.

    Raises:
        ValueError: a step or a fold takes no time.
    """

    step: float
    fold: float
    alone: float
    latency: float
    gap: float

    def __post_init__(self) -> None:
        if min(self.step, self.fold, self.alone) <= 0.0:
            raise ValueError(f"{self}: step, fold and alone are over 0")


@dataclass(slots=True)
class _Group:
    """One that folds."""

    leader: _Group | None
    begun: int = 0  # products
    done: int = 0
    tiles: int = 0  # folded
    products: list[float] = field(default_factory=list)  # cycles left of those that were begun
    folding: float = 0.0  # cycles left
    freed: int = 0  # slots, in the order of the steps
    ready: float = 0.0  # when it can begin a product after the end of the last one


def program_cycles(timing: Timing, *, tiles: int, steps: int, slots: int, lead: int) -> float:
    """From a program's first load to its last fold.

    Args:
        tiles: of the program.
        steps: of a tile.
        slots: in shared memory.
        lead: steps of a tile that the first group has multiplied when the second begins it.

    Raises:
        ValueError: the groups wait for ever.
    """
    first = _Group(None)
    groups = (first, _Group(first))
    now = 0.0
    loads: list[float] = []  # when each step's operands are there
    while True:
        moved = True
        while moved:  # all that takes no time
            room = slots + min(group.freed for group in groups)
            moved = len(loads) < min(room, tiles * steps)
            if moved:
                loads.append(now + timing.latency)
            for group in groups:
                moved |= _advance(group, timing, now, loads, steps=steps, tiles=tiles, lead=lead)
        if all(group.tiles == tiles for group in groups):
            return now
        multiply = [group for group in groups if group.products]
        folding = [group for group in groups if group.folding]
        rate = 1.0 / max(1, len(multiply))
        fold_rate = min(timing.alone, 1.0 / max(1, len(folding)))
        wait = min(
            math.inf, math.inf,
            *(group.products[0] / rate for group in multiply),
            *(group.folding / fold_rate for group in folding),
            *(at - now for at in loads[min(g.begun for g in groups) :] if at > now),
            *(group.ready - now for group in groups if group.ready > now),
        )  # fmt: skip
        if wait == math.inf:
            raise ValueError(f"with {slots} slots and a lead of {lead} the groups wait for ever")
        now += wait
        for group in multiply:
            group.products[0] -= wait * rate
            if group.products[0] < 1e-6:
                del group.products[0]
                group.done += 1
                group.ready = now + timing.gap
        for group in folding:
            group.folding -= wait * fold_rate
            if group.folding < 1e-6:
                group.folding = 0.0
                group.tiles += 1


def _advance(
    group: _Group, timing: Timing, now: float, loads: list[float], *, steps: int, tiles: int,
    lead: int,
) -> bool:  # fmt: skip
    """What a group does at once; whether that was something."""
    if group.folding or group.tiles == tiles:
        return False
    start = group.tiles * steps
    if group.begun == start + steps:  # the tile's products are all begun
        freed = max(group.freed, group.begun - 1) if group.done >= group.begun - 1 else group.freed
        moved, group.freed = freed > group.freed, freed
        if group.done == group.begun:
            group.freed, group.folding = group.begun, timing.fold
            return True
        return moved
    if group.begun - group.done > 1:  # one product follows another while a third waits
        return False
    moved = False
    if group.begun > start + 1 and group.freed < group.begun - 1:
        group.freed, moved = group.begun - 1, True
    led = start + min(lead, steps)
    behind = group.leader is not None and lead > 0 and group.leader.freed < led
    there = group.begun < len(loads) and loads[group.begun] <= now
    if (group.begun == start and behind) or not there or now < group.ready:
        return moved
    group.products.append(timing.step)
    group.begun += 1
    return True
