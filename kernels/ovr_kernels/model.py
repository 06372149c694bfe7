"""Where the head's time goes, from its machine code, without a GPU.

    python -m ovr_kernels.model

A tile of logits is a product and an epilogue. The product is what a vendor's library would take for
it; the epilogue is counted: every instruction of a tile outside the loop over the depth, by the
unit that executes it. One program runs on a multiprocessor, so no other product hides an epilogue:

    predicted time = the vendor's product x (1 + (epilogue + fill) / product), in cycles of a tile.

Assumed: a segment takes as long as its busiest unit, or as its instructions take to issue, four a
cycle; both branches of a condition are counted; a memory instruction takes a turn of 32 lanes,
whatever its width; ``FILL`` cycles before a tile's first operands are there; a product's cycles are
those of its unit at its peak, so that what the vendor's falls short of it is a lower clock, for the
epilogue too. With specialised warps a program is played event by event (``schedule.py``), with
``FILL`` cycles for each load and ``GAP`` after each product, at both of ``ALONE``; that L2 delivers
8 % more than it did where it was measured (8 TB/s at 13.1 ms) is assumed. The vendor's products
were measured on an H100 (``benchmarks/report.py``, ``benchmarks/results/h100_kernels.json``), at
whatever clock they had: the epilogue is taken to run at the same. Units' rates: CUDA programming
guide, throughput of native arithmetic instructions.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch

from ovr_kernels import head
from ovr_kernels.artefacts import (
    HIDDEN,
    MATRIX,
    TARGETS,
    Case,
    cases,
    compile_case,
    loops,
    matrix_loops,
)
from ovr_kernels.schedule import Timing, program_cycles

COLUMNS = head.tile_for(90, torch.bfloat16).columns  # of a tile on sm_90

FILL = 800.0
"""Cycles from a tile's first load to its operand, assumed: the latency of the L2 or of HBM and the
barriers around it."""

ALONE = (1.0, 0.45)
"""Share of the units' rates that a group of four warps, one a scheduler, reaches while no other
issues. At least: the epilogue without specialised warps, two warps a scheduler, took an H100 1.0 ms
where 0.9 are predicted, so each of them issued in 0.45 of the cycles."""

GAP = 200.0
"""Cycles from the end of a group's product to its next: some 40 instructions, of which most wait
for each other, and two barriers. A product with a step of 32 takes 256, so it is hidden."""

FORWARD_MS, PRODUCTS_MS = 12.07, 38.25
"""On an H100, 8,192 rows, H 3,584, V 152,064: cuBLAS's product of the forward, and all three."""

GRADIENT_MS = 8192 * 152_064 * 4 / 3.0e12 * 1e3
"""Exponentials into logit gradients: 16-bit numbers read and written, at 3.0 TB/s."""

PRODUCT = {80: 2048, 90: 4096, 100: 8192}
"""Operations a cycle of a multiprocessor's matrix unit, 16-bit operands."""

LANES = {
    80: {"fma": 64, "alu": 64, "special": 16, "memory": 32},
    90: {"fma": 128, "alu": 64, "special": 16, "memory": 32},
    100: {"fma": 128, "alu": 64, "special": 16, "memory": 32},
}
"""Lanes of a multiprocessor, a cycle, by unit."""

_UNITS = (
    ("special", r"MUFU|F2I|I2F|F2F\b|POPC|FLO"),
    ("memory", r"LD|ST|SHFL|ATOM|RED|MATCH|VOTE\.ANY"),
    ("fma", r"FADD|FMUL|FFMA|FSWZADD|IMAD"),
    ("alu", r"FMNMX|FSEL|FSET|FCHK|LOP|IADD|ISETP|SEL|SHF|PRMT|LEA|F2FP|I?MNMX|VI|PLOP|MOV|P2R"),
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)")
_EXIT = re.compile(r"/\*[0-9a-f]{4,}\*/\s+EXIT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What a tile costs beside its product."""

    kernel: str
    capability: int
    instructions: dict[str, int]  # of a warp, by unit; "other" only take their turn to issue
    product_cycles: float
    warps: int = 8  # that execute them: the program's, or a group's

    @property
    def cycles(self) -> dict[str, float]:
        """Of a tile, by unit, and of issuing it all."""
        lanes = LANES[self.capability]
        found = {
            unit: self.instructions.get(unit, 0) * self.warps * 32 / lanes[unit] for unit in lanes
        }
        return found | {"issue": sum(self.instructions.values()) * self.warps / 4}

    @property
    def bound(self) -> str:
        """The unit that it waits for."""
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def share(self) -> float:
        """Of the product's cycles."""
        return (self.cycles[self.bound] + FILL) / self.product_cycles

    def share_specialised(self, *, depth: int, slots: int, lead: int) -> list[float]:
        """Of a tile that two groups of four warps fold, at each of ``ALONE``."""
        steps = HIDDEN // depth
        tiles = head.SPLIT_COLUMNS // COLUMNS
        found = []
        for alone in ALONE:
            timing = Timing(
                step=self.product_cycles / steps / 2, fold=self.cycles[self.bound], alone=alone,
                latency=FILL, gap=GAP,
            )  # fmt: skip
            cycles = program_cycles(timing, tiles=tiles, steps=steps, slots=slots, lead=lead)
            found.append(cycles / tiles / self.product_cycles - 1.0)
        return found


def unit_of(name: str) -> str:
    """Which unit executes an instruction; uniform ones and control flow: "other"."""
    for unit, pattern in _UNITS:
        if re.match(pattern, name):
            return unit
    return "other"


def per_tile(code: str, capability: int) -> Counter[str]:
    """A warp's instructions of a tile outside the loop over its depth, by unit.

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
    body = lines[outer[0] : inner[0]] + lines[inner[1] + 1 : outer[1] + 1]
    found = (m["name"] for line in body if (m := _INSTRUCTION.search(line)))
    return Counter(unit_of(name) for name in found)


def epilogue_of(case: Case, capability: int) -> Epilogue:
    """Of one form of the head."""
    code = compile_case(case, capability).code
    columns = case.constants["BN"]
    assert isinstance(columns, int)
    return Epilogue(
        kernel=case.name,
        capability=capability,
        instructions=dict(per_tile(code, capability)),
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


def predictions(
    epilogues: list[Epilogue], *, forward_ms: float = FORWARD_MS, products_ms: float = PRODUCTS_MS
) -> dict[str, float]:
    """Milliseconds on an H100 at the shapes of ``FORWARD_MS``, by ``report.py``'s names: the
    forward, with entropy, and the step into a gradient buffer; from the vendor's products."""
    share = {each.kernel: each.share for each in epilogues if each.capability == 90}
    step = products_ms + forward_ms * share["statistics, entropy, store"] + GRADIENT_MS
    return {
        "linear_logprob forward": forward_ms * (1 + share["statistics, entropy"]),
        "linear_policy_loss step": step,
    }


def predictions_specialised() -> dict[tuple[str, int], tuple[list[float], float]]:
    """The same with specialised warps, by operator and depth of a step: at each of ``ALONE``, and
    if neither group led."""
    found = {}
    for case in cases(90):
        if not case.gluon:
            continue
        epilogue = epilogue_of(case, 90)
        depth, slots, lead = (int(str(case.constants[name])) for name in ("BK", "SLOTS", "LEAD"))
        store = case.constants["STORE"]
        beside = PRODUCTS_MS + GRADIENT_MS if store else FORWARD_MS
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
    floor = 2 * 8192 * 152_064 * HIDDEN / 800e12 * 1e3  # of a product
    tiles = 8192 // head.ROWS * -(-152_064 // COLUMNS)
    moved = tiles * (head.ROWS + COLUMNS) * HIDDEN * 2 / 1e9
    plain_ms = predictions(epilogues)["linear_logprob forward"]
    print(
        f"H100, operands of the forward out of L2: {moved:.0f} GB, {moved / plain_ms:.1f} TB/s in "
        f"{plain_ms:.1f} ms, {moved / FORWARD_MS:.1f} in the product's {FORWARD_MS:.1f}"
    )
    specialised = predictions_specialised()
    bounds = (FORWARD_MS, floor), (PRODUCTS_MS + GRADIENT_MS, 3 * floor)
    for (name, ms), (bound, least) in zip(predictions(epilogues).items(), bounds, strict=True):
        print(f"H100, predicted: {name}: {ms:.2f} ms, {least / ms:.0%} of the floor")
        for (of, depth), ((best, worst), equal) in specialised.items():
            if of == name:
                print(
                    f"  with specialised warps, steps of {depth}: {best:.2f} to {worst:.2f} ms, "
                    f"{least / best:.1%} to {least / worst:.1%}; without a lead {equal:.2f} ms"
                )
        print(f"  with all of it hidden {bound:.2f} ms, {least / bound:.1%} of the floor")


if __name__ == "__main__":
    main()
