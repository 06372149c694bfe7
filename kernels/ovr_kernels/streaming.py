"""How long the operators take that read and write memory once, from their machine code.

An operator is a few launches. Programs run in waves of as many as fit in a GPU's registers, threads
and shared memory, and a wave takes the longest of three:

    its bytes at what memory delivers · its instructions, on the busiest unit of a multiprocessor ·
    a program's own way from load to load, where one scheduler's warps do not fill it alone.

For most of them that is their bytes: agreement with a measurement says that the launches are those
and the bandwidth is reached. Assumed: bandwidth as ``machines.BYTES_REACHED`` of the data sheet,
whatever is read beside what is written; a program's own way by ``machine_code.Program.alone``,
``machines.LATENCY`` for every load; programs of a wave end together; ``LAUNCH`` for each kernel,
none hidden under another. The host is not in it: what is shorter than its launches from Python
(``policy_loss``) takes what those take, and ``packed_gae`` also copies lengths to the device in
each call.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ovr_kernels import head
from ovr_kernels.artefacts import (
    HIDDEN,
    INTERMEDIATE,
    SHARED_LIMIT,
    cases,
    compile_case,
)
from ovr_kernels.machine_code import Program, cycles
from ovr_kernels.machines import Machine

# What is predicted is what benchmarks/peers.py measures: Qwen2.5-VL-7B.
ROWS, VOCAB = 8192, 152_064  # of the head
TOKENS, HEADS, KV_HEADS, HEAD_DIM = LAYER = 32_768, 28, 4, 128
GAE_TOKENS, GAE_SEQUENCES = 25_000_000, 1024
LOSS_TOKENS = 1_000_000

LAUNCH = 3e-6
"""Seconds from the end of one kernel to the first loads of the next."""

REGISTERS, THREADS, PROGRAMS = 65_536, 2048, 32
"""Of a multiprocessor, at most (CUDA programming guide, compute capabilities)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Of one of ``artefacts.cases``, or of an elementwise kernel of torch's (``case`` is empty)."""

    bytes: float  # read and written, by all programs
    case: str = ""
    programs: int = 1
    trips: tuple[float, ...] = ()  # of each loop of a program, in the order of the code
    tail: bool = False  # what stands behind the first exit is for the program that ends last


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiled:
    warps: int
    resident: int  # programs, on a multiprocessor
    program: Program


@functools.cache
def _compiled(case: str, capability: int) -> _Compiled:
    (found,) = (each for each in cases(capability) if each.name == case)
    made = compile_case(found, capability)
    used = re.search(r"REG:(\d+)", made.usage)
    assert used is not None, made.usage
    threads = found.warps * 32
    resident = min(
        REGISTERS // (math.ceil(int(used[1]) / 8) * 8 * threads),
        THREADS // threads,
        PROGRAMS,
        SHARED_LIMIT[capability] // max(1, made.shared_bytes),
    )
    return _Compiled(warps=found.warps, resident=resident, program=Program.of(made.code))


def seconds(launch: Launch, machine: Machine) -> float:
    """Of one launch."""
    if not launch.case:
        return LAUNCH + launch.bytes / machine.bytes
    code = _compiled(launch.case, machine.capability)
    turn = max(1.0, code.warps / 4)  # as many warps share a scheduler
    program, trips, taken = code.program, launch.trips, LAUNCH
    if launch.tail:
        program, tail = program.until_an_exit()
        taken += tail.alone(trips[len(program.loops) :], turn) / machine.clock
        trips = trips[: len(program.loops)]
    used = cycles(program.instructions(trips), machine.capability)
    busiest = max(used.values()) * code.warps / machine.clock
    alone = program.alone(trips, turn) / machine.clock
    left = launch.programs
    while left:
        wave = min(left, code.resident * machine.multiprocessors)
        taken += max(
            wave / launch.programs * launch.bytes / machine.bytes,
            math.ceil(wave / machine.multiprocessors) * busiest,
            alone,
        )
        left -= wave
    return taken


def _losses(name: str) -> list[Launch]:
    """Forward and backward of a loss per token that reads three arrays."""
    programs = math.ceil(LOSS_TOKENS / 1024)
    sums = 5 if name.startswith("policy") else 1
    rounds = math.ceil(programs / 1024)
    return [
        Launch(bytes=4),  # the counter
        Launch(
            case=name,
            bytes=16.0 * LOSS_TOKENS,
            programs=programs,
            trips=(rounds,) * sums,
            tail=True,
        ),
        Launch(bytes=4),  # the upstream gradient, a 1
        Launch(bytes=8.0 * LOSS_TOKENS),  # times it
    ]


def operators(machine: Machine) -> Iterator[tuple[str, float, list[Launch]]]:
    """Each operator: its name in ``benchmarks/peers.py``, the bytes that have to move, and what it
    launches. Forward and backward where it has one ("step")."""
    yield "policy_loss", 16.0 * LOSS_TOKENS, _losses("policy loss")
    yield "value_loss", 16.0 * LOSS_TOKENS, _losses("value loss, clipped")
    for closed in (True, False):
        blocks = math.ceil(GAE_TOKENS / GAE_SEQUENCES / 1024)
        yield (
            f"packed_gae{', closed form' if closed else ''}",
            16.0 * GAE_TOKENS,
            [
                Launch(
                    case=f"packed GAE{', gamma = lambda = 1' if closed else ''}",
                    bytes=16.0 * GAE_TOKENS,
                    programs=GAE_SEQUENCES,
                    trips=(blocks,),
                )
            ],
        )
    rotary = HEADS + KV_HEADS
    rotated = 4.0 * TOKENS * rotary * HEAD_DIM + 24.0 * TOKENS
    steps = math.ceil(rotary / 16)
    # An axis, a position, then heads; no angle of 32,768 needs either loop of the reduction.
    rotation = Launch(case="rotate", bytes=rotated, programs=TOKENS, trips=(0, 0, steps))
    yield "rotate", rotated, [rotation]
    row = 2.0 * HIDDEN * TOKENS  # bytes of all
    for name, add in (("rms_norm step", 0), ("add_rms_norm step", 1)):
        programs = 2 * machine.multiprocessors
        kind = ", residual added" if add else ""
        rows = math.ceil(TOKENS / programs)
        moved = row * (2 + 2 * add), row * (3 + add)
        partial = 4.0 * programs * HIDDEN  # the weight's gradient, a row a program
        yield (
            name,
            sum(moved),
            [
                Launch(case=f"RMS norm{kind}", bytes=moved[0], programs=TOKENS),
                Launch(
                    case=f"RMS norm backward{kind}",
                    bytes=moved[1] + partial,
                    programs=programs,
                    trips=(rows,),
                ),
                Launch(bytes=partial),
                Launch(bytes=6.0 * HIDDEN),
            ],
        )
    wide = 2.0 * INTERMEDIATE * TOKENS
    programs = TOKENS * math.ceil(INTERMEDIATE / 1024)
    yield (
        "swiglu step",
        8 * wide,
        [
            Launch(case="SwiGLU", bytes=3 * wide, programs=programs),
            Launch(case="SwiGLU backward", bytes=5 * wide, programs=programs),
        ],
    )


def around_the_head(machine: Machine) -> tuple[float, float]:
    """Seconds beside the head's products: merging a chunk's statistics, and its exponentials into
    logit gradients."""
    parts = math.ceil(VOCAB / head.SPLIT_COLUMNS)
    merge = Launch(
        case="merge",
        bytes=(4 * parts + 4) * 4.0 * ROWS,
        programs=ROWS // 256,
        trips=(parts,),
    )
    columns = head.tile_for(machine.capability, torch.bfloat16).columns
    gradients = Launch(
        case="logit gradients",
        bytes=4.0 * ROWS * VOCAB,
        programs=VOCAB // columns * (ROWS // head.GRADIENT_ROWS),
        trips=(head.GRADIENT_ROWS / 16,),
    )
    return seconds(merge, machine), seconds(gradients, machine)
