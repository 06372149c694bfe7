"""How long every operator takes, from its machine code, without a GPU.

    python -m ovr_kernels.model

For four GPUs of three generations (``machines.py``): milliseconds at the shapes of
``benchmarks/peers.py`` and per cent of the floor; ``benchmarks/report.py`` puts what was
measured beside it. What memory bounds is in ``streaming.py``. The head: a tile of logits is a
product and an epilogue. The product is what a vendor's library would take for it; the epilogue is
counted: every instruction of a tile outside the loop over the depth, by the unit that executes it.
One program runs on a multiprocessor, so no other product hides an epilogue:

    predicted time = the vendor's product x (1 + (epilogue + latency) / product), in cycles of a
    tile, and the two small kernels beside it (``streaming.around_the_head``).

Assumed: a segment takes as long as its busiest unit, or as its instructions take to issue, four a
cycle; of what a branch can jump over a quarter is counted (``SKIPPED``); a memory instruction takes
a turn of 32 lanes, whatever its width; ``machines.LATENCY`` cycles before a tile's first operands
are there; a product's cycles are those of its unit at its peak, so that what the vendor's falls
short of it is a lower clock, for the epilogue too; the vendor's products reach on every GPU the
share of the floor that they had on an H100 (``REACHED``). With specialised warps a program is
played event by event (``schedule.py``), with the same latency for each load and ``GAP`` after each
product, at both of ``ALONE``; that L2 delivers 8 % more than it did where it was measured (8 TB/s
at 13.1 ms) is assumed.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ovr_kernels import head, streaming
from ovr_kernels.artefacts import (
    HIDDEN,
    MATRIX,
    TARGETS,
    Case,
    cases,
    compile_case,
    loops,
    matrix_loops,
    skipped,
)
from ovr_kernels.machine_code import cycles, units
from ovr_kernels.machines import H100, LATENCY, MACHINES, PRODUCT, Machine
from ovr_kernels.schedule import Timing, program_cycles
from ovr_kernels.streaming import ROWS, VOCAB

COLUMNS = head.tile_for(90, torch.bfloat16).columns  # of a tile on sm_90

SKIPPED = 0.25
"""Share of tiles that execute what a branch can jump over: the last of a vocabulary, one of 594,
and those that have a target of a group's 64 rows, one in ten where targets are spread evenly and
more in text."""

ALONE = (1.0, 0.4)
"""Share of the units' rates that a group of four warps, one a scheduler, reaches while no other
issues. At least: the epilogue without specialised warps, two warps a scheduler, took an H100 1.0 ms
where 0.8 are predicted, so each of them issued in 0.4 of the cycles."""

GAP = 200.0
"""Cycles from the end of a group's product to its next: some 40 instructions, of which most wait
for each other, and two barriers. A product with a step of 32 takes 256, so it is hidden."""

FORWARD_MS, PRODUCTS_MS = 12.07, 38.25
"""On an H100, 8,192 rows, H 3,584, V 152,064: cuBLAS's product of the forward, and all three
(``benchmarks/results/h100_kernels.json``)."""

_EXIT = re.compile(r"/\*[0-9a-f]{4,}\*/\s+EXIT")


def floor_ms(machine: Machine) -> float:
    """Of one of the head's products."""
    return 2.0 * ROWS * VOCAB * HIDDEN / machine.operations * 1e3


REACHED = floor_ms(H100) / FORWARD_MS, 3 * floor_ms(H100) / PRODUCTS_MS
"""Of the floor, by the vendor's products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What a tile costs beside its product."""

    kernel: str
    capability: int
    instructions: dict[str, float]  # of a warp, by unit; "other" only take their turn to issue
    product_cycles: float
    warps: int = 8  # that execute them: the program's, or a group's

    @property
    def cycles(self) -> dict[str, float]:
        """Of a tile, by unit, and of issuing it all."""
        found = cycles(self.instructions, self.capability)
        return {unit: number * self.warps for unit, number in found.items()}

    @property
    def bound(self) -> str:
        """The unit that it waits for."""
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def share(self) -> float:
        """Of the product's cycles."""
        return (self.cycles[self.bound] + LATENCY) / self.product_cycles

    def share_specialised(self, *, depth: int, slots: int, lead: int) -> list[float]:
        """Of a tile that two groups of four warps fold, at each of ``ALONE``."""
        steps = HIDDEN // depth
        tiles = head.SPLIT_COLUMNS // COLUMNS
        found = []
        for alone in ALONE:
            timing = Timing(
                step=self.product_cycles / steps / 2, fold=self.cycles[self.bound], alone=alone,
                latency=LATENCY, gap=GAP,
            )  # fmt: skip
            cycles = program_cycles(timing, tiles=tiles, steps=steps, slots=slots, lead=lead)
            found.append(cycles / tiles / self.product_cycles - 1.0)
        return found


def per_tile(code: str, capability: int) -> dict[str, float]:
    """A warp's instructions of a tile outside the loop over its depth, by unit; those that a branch
    can jump over as ``SKIPPED``.

    Raises:
        ValueError: there is no loop over tiles around a loop of matrix instructions.
    """
    lines = code.splitlines()
    # What stands behind the program's end are slow paths, which branch back into it.
    end = next((i for i, line in enumerate(lines) if _EXIT.search(line)), len(lines))
    lines = lines[:end]
    inner = next(iter(matrix_loops(lines, MATRIX[capability])), None)
    outer = next(
        (o for o in loops(lines) if inner and o != inner and o[0] <= inner[0] and inner[1] <= o[1]),
        None,
    )
    if inner is None or outer is None:
        raise ValueError("no loop over tiles around a loop of matrix instructions")
    rare = {
        place
        for first, last in skipped(lines)
        if outer[0] <= first and last <= outer[1] and (last < inner[0] or inner[1] < first)
        for place in range(first, last + 1)
    }
    body = [*range(outer[0], inner[0]), *range(inner[1] + 1, outer[1] + 1)]
    every, seldom = (units(lines[place] for place in places) for places in (body, rare))
    return {unit: every[unit] - (1.0 - SKIPPED) * seldom[unit] for unit in every}


def epilogue_of(case: Case, capability: int) -> Epilogue:
    """Of one form of the head."""
    code = compile_case(case, capability).code
    columns = case.constants["BN"]
    assert isinstance(columns, int)
    return Epilogue(
        kernel=case.name,
        capability=capability,
        instructions=per_tile(code, capability),
        product_cycles=2.0 * head.ROWS * columns * HIDDEN / PRODUCT[capability],
        warps=case.warps,
    )


def table(epilogues: list[Epilogue]) -> str:
    """As Markdown: a row a form, cycles of the busiest unit beside the product's of each target."""
    title = "epilogue of a tile, cycles (unit that it waits for), of its product"
    lines = [f"| {title} | {' | '.join(f'sm_{c}' for c in TARGETS)} |", "|---|---|---|---|"]
    for name in dict.fromkeys(each.kernel for each in epilogues):
        row = {each.capability: each for each in epilogues if each.kernel == name}
        cells = [
            f"{each.cycles[each.bound]:,.0f} ({each.bound}), "
            f"{each.cycles[each.bound] / each.product_cycles:.0%}"
            for each in (row[capability] for capability in TARGETS)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Prediction(NamedTuple):
    """Of an operator."""

    ms: float
    floor_ms: float


def of_the_head(
    machine: Machine, *, forward_ms: float | None = None, products_ms: float | None = None
) -> dict[str, Prediction]:
    """The operators without logits, from the vendor's product of the forward and its three (None:
    as ``REACHED``). A step's weight gradient goes into a given buffer, whose reading and writing is
    taken to be hidden under the product."""
    floor = floor_ms(machine)
    forward_ms = forward_ms or floor / REACHED[0]
    products_ms = products_ms or 3 * floor / REACHED[1]
    share = {each.kernel: each.share for each in all_epilogues((machine.capability,))}
    merge, gradients = (1e3 * each for each in streaming.around_the_head(machine))
    forward = forward_ms * (1 + share["statistics, entropy"]) + merge
    with_entropy, without = (
        products_ms + forward_ms * share[form] + merge + gradients
        for form in ("statistics, entropy, store", "statistics, store")
    )
    # Forward without entropy; in the backward the statistics are known.
    recomputed = forward_ms * (1 + share["statistics"]) + without
    return {
        "linear_logprob forward": Prediction(forward, floor),
        "linear_logprob step": Prediction(recomputed, 3 * floor),
        "linear_policy_loss step": Prediction(with_entropy, 3 * floor),
        "linear_cross_entropy step": Prediction(without, 3 * floor),
        "linear_gspo_loss step": Prediction(without, 3 * floor),
    }


def predictions(
    machine: Machine, *, forward_ms: float | None = None, products_ms: float | None = None
) -> dict[str, Prediction]:
    """Of every operator, by its name in ``benchmarks/peers.py``; see ``of_the_head``."""
    found = of_the_head(machine, forward_ms=forward_ms, products_ms=products_ms)
    for name, moved, launches in streaming.operators(machine):
        taken = sum(streaming.seconds(launch, machine) for launch in launches)
        found[name] = Prediction(taken * 1e3, moved / machine.bytes * 1e3)
    return found


def predictions_specialised() -> dict[tuple[str, int], tuple[list[float], float]]:
    """Of the head with specialised warps on an H100, by operator and depth of a step: at each of
    ``ALONE``, and if neither group led."""
    found = {}
    merge, gradients = (1e3 * each for each in streaming.around_the_head(H100))
    for case in cases(90):
        if not (case.gluon and case.constants["ENTROPY"]):
            continue
        epilogue = epilogue_of(case, 90)
        depth, slots, lead = (int(str(case.constants[name])) for name in ("BK", "SLOTS", "LEAD"))
        store = case.constants["STORE"]
        beside = (PRODUCTS_MS + gradients if store else FORWARD_MS) + merge
        led, equal = (
            [beside + FORWARD_MS * share for share in shares]
            for shares in (
                epilogue.share_specialised(depth=depth, slots=slots, lead=lead),
                epilogue.share_specialised(depth=depth, slots=slots, lead=0),
            )
        )
        name = "linear_policy_loss step" if store else "linear_logprob forward"
        found[name, depth] = led, max(equal)
    return found


def of_product(capability: int, epilogues: list[Epilogue]) -> float:
    """Share of the vendor's product that the forward reaches; 1.0 if all else were hidden."""
    (found,) = (
        e for e in epilogues if (e.capability, e.kernel) == (capability, "statistics, entropy")
    )
    return 1.0 / (1.0 + found.share)


@functools.cache
def all_epilogues(targets: tuple[int, ...] = TARGETS) -> list[Epilogue]:
    """Of the forms that a trainer runs, on each target."""
    return [
        epilogue_of(case, capability)
        for capability in targets
        for case in cases(capability)
        if case.product and not case.gluon and not case.constants["BIAS"]
    ]


def main() -> None:
    epilogues = all_epilogues()
    print(table(epilogues))
    for capability in TARGETS:
        print(f"sm_{capability}: {of_product(capability, epilogues):.0%} of the vendor's product")
    for machine in MACHINES:
        for name, found in predictions(machine).items():
            share = found.floor_ms / found.ms
            print(f"{machine.name}, predicted: {name}: {found.ms:.3f} ms, {share:.0%} of the floor")
    tiles = ROWS // head.ROWS * -(-VOCAB // COLUMNS)
    moved = tiles * (head.ROWS + COLUMNS) * HIDDEN * 2 / 1e9
    plain = of_the_head(H100)["linear_logprob forward"]
    print(
        f"H100, operands of the forward out of L2: {moved:.0f} GB, {moved / plain.ms:.1f} TB/s in "
        f"{plain.ms:.1f} ms, {moved / FORWARD_MS:.1f} in the product's {FORWARD_MS:.1f}"
    )
    floor = floor_ms(H100)
    merge, gradients = (1e3 * each for each in streaming.around_the_head(H100))
    hidden = {
        "linear_logprob forward": (FORWARD_MS + merge, floor),
        "linear_policy_loss step": (PRODUCTS_MS + merge + gradients, 3 * floor),
    }
    for (name, depth), ((best, worst), equal) in predictions_specialised().items():
        bound, least = hidden[name]
        print(
            f"H100, specialised warps, steps of {depth}: {name}: {best:.2f} to {worst:.2f} ms, "
            f"{least / best:.1%} to {least / worst:.1%} of the floor; without a lead {equal:.2f} "
            f"ms; with all of it hidden {bound:.2f} ms, {least / bound:.1%}"
        )


if __name__ == "__main__":
    main()
