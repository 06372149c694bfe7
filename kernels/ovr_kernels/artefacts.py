"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory.

    python -m ovr_kernels.artefacts [--json FILE]

Compiles ahead of time for sm_80, sm_90 and sm_100, reads the machine code with the tools that come
with Triton, prints a table, and exits with 1 where a gate fails: a register spilled to memory
outside of a function's slow path (by a matrix product in the loop over its depth, or more than 64
in all: some 30 a tile beside 57,000 cycles of products cost nothing that an H100 shows), more
shared memory than the target has, a matrix product without the target's matrix instruction, or on
sm_90 one whose loop waits for each. Spills move with Triton's version, so this runs again at each
upgrade.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from ovr_kernels import head, mrope, packed_gae, policy_loss, rms_norm, swiglu

TARGETS = (80, 90, 100)
MOST_SPILLS = 64  # of a matrix product, outside its loop
SPILL = re.compile(r"\b(?:STL|LDL)\b")
MATRIX = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}
"""Each target's matrix instruction."""

FREED = re.compile(r"DEPBAR\.LE gsb0, 0x1((?!SYNCS\.ARRIVE).)*BAR\.SYNC.*?SYNCS\.ARRIVE", re.S)
"""One thread frees a slot: that the products of all are done it knows where all have met."""

_RESULT = re.compile(r"\b(STG|REDG?|ATOMG?|UTMA\w+)\b")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*`\((\.L_x_\d+)\)")

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes a program may have (CUDA programming guide, compute capabilities)."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HIDDEN, INTERMEDIATE = 3584, 18944  # Qwen2.5-VL-7B


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel as a launcher would call it. ``types`` holds every argument in order: Triton's name
    of a type, or the value of a constant. Pointers and widths are multiples of 16."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, object]
    constants: dict[str, object]
    warps: int
    stages: int = 3
    product: bool = False
    gluon: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What was read from a compiled kernel."""

    kernel: str
    target: str
    ragged: bool  # counts that are no multiples of 16
    registers: int
    spills: int  # instructions that move registers to local memory and back
    loop_spills: int  # those among the matrix instructions
    shared_bytes: int
    matrix: int  # matrix instructions of the target (HMMA, HGMMA, UTC*MMA)
    failures: tuple[str, ...]


def cases(capability: int) -> Iterator[Case]:
    """Every kernel, at the shapes of Qwen2.5-VL-7B in bfloat16."""
    tile = head.tile_for(capability, torch.bfloat16)
    for store, entropy, form in (
        (False, False, False), (False, True, False), (True, False, False), (True, True, False),
        (True, False, True),
    ):  # fmt: skip
        types: dict[str, object] = dict.fromkeys(head.statistics_kernel.arg_names, "i32")
        types |= dict.fromkeys(("partial", "reference", "bias"), "*fp32")
        types |= {"bias": "*bf16"} if form else {}
        types |= {"targets": "*i64", "scale": "fp32", "softcap": "fp32"}
        if tile.pointers:
            types |= dict.fromkeys(("hidden", "weight", "scaled"), "*bf16")
        else:
            types |= {
                "hidden": f"tensordesc<bf16[{head.ROWS}, {tile.depth}]>",
                "weight": f"tensordesc<bf16[{tile.columns}, {tile.depth}]>",
                "scaled": f"tensordesc<bf16[{head.ROWS}, {tile.columns}]>" if store else "*fp32",
            }
        yield Case(
            name=f"statistics{', entropy' if entropy else ''}{', store' if store else ''}"
            f"{', bias, softcap, mean' if form else ''}",
            kernel=head.statistics_kernel,
            types=types,
            constants=dict(
                STORE=store,
                ENTROPY=entropy,
                BIAS=form,
                SOFTCAP=form,
                VALUES=5 if form else 4,
                POINTERS=tile.pointers,
                BM=head.ROWS,
                BN=tile.columns,
                BK=tile.depth,
                SPLIT_TILES=head.SPLIT_COLUMNS // tile.columns,
                GROUP=head.ROW_BLOCKS_A_GROUP,
                SLICES=tile.slices,
                PRECISION="tf32",
            ),
            warps=8,
            stages=tile.store_stages if store else tile.stages,
            product=True,
        )
    if capability == 90:
        yield from _specialised(tile)
    yield _plain(
        "merge", head.merge_kernel, constants=dict(FINISH=True, ENTROPY=True, VALUES=4, BLOCK=256),
        integers=("rows", "parts"), floats=("scale", "mean_scale"), longs=("targets",),
    )  # fmt: skip
    for entropy, form in ((False, False), (True, False), (True, True)):
        yield _plain(
            f"logit gradients{', entropy' if entropy else ''}{', all terms' if form else ''}",
            head.gradient_kernel,
            constants=dict(
                ENTROPY=entropy,
                NORMALIZER=form,
                MEAN=form,
                SOFTCAP=form,
                BLOCK=16,
                BN=tile.columns,
            ),
            integers=(
                "rows",
                "kept_rows",
                "rows_a_program",
                "columns",
                "scaled_stride",
                "first_id",
            ),  # fmt: skip
            floats=("inverse_temperature", "cap_scale"),
            longs=("targets",),
            types={"scaled": "*bf16", "kept": "*i32"},
            warps=8,
            stages=1,
        )
    settings = ("weight", "clip_low", "clip_high", "dual_clip", "importance_cap", "kl_coef",
                "entropy_coef", "max_log_ratio")  # fmt: skip
    for every in (False, True):
        yield _plain(
            f"policy loss{', everything on' if every else ''}",
            policy_loss.policy_kernel,
            constants=dict(KIND=0, HAS_OLD=True, HAS_WEIGHTS=every, DUAL=every, IMPORTANCE=every,
                           KL=3 * every, ENTROPY=every, BLOCK=policy_loss.BLOCK),
            integers=("tokens", "programs"), floats=settings, types={"counter": "*i32"},
        )  # fmt: skip
    yield _plain(
        "value loss, clipped",
        policy_loss.value_kernel,
        constants=dict(CLIP=True, BLOCK=policy_loss.BLOCK),
        integers=("tokens", "programs"), floats=("clip_eps",), types={"counter": "*i32"},
    )  # fmt: skip
    for closed in (True, False):
        yield _plain(
            f"packed GAE{', gamma = lambda = 1' if closed else ''}",
            packed_gae.gae_kernel,
            constants=dict(UNDISCOUNTED=closed, BLOCK=1024),
            floats=("gamma", "decay"), longs=("ends",),
        )  # fmt: skip
    for name, half in (("rotate", 64), ("rotate, vision tower", 40)):
        yield _plain(
            name,
            mrope.rotate_kernel,
            constants=dict(HALF=half, WIDTH=64, HEADS=16),
            integers=("tokens", "rotary_heads", "token_stride", "head_stride", "axis_stride"),
            floats=("direction",), longs=("positions",), types={"heads": "*bf16", "axes": "*i32"},
            warps=2,
        )  # fmt: skip
    block = triton.next_power_of_2(HIDDEN)
    for add in (False, True):
        yield _plain(
            f"RMS norm{', residual added' if add else ''}",
            rms_norm.norm_kernel,
            constants=dict(ADD=add, BLOCK=block), integers=("width",), floats=("eps",), warps=8,
            types=dict.fromkeys(("hidden", "residual", "weight", "out", "total"), "*bf16"),
        )  # fmt: skip
    for add, scale in ((False, True), (True, True), (True, False)):
        yield _plain(
            f"RMS norm backward{', residual added' if add else ''}"
            f"{'' if scale else ', weight frozen'}",
            rms_norm.norm_backward_kernel,
            constants=dict(ADD=add, SCALE=scale, BLOCK=block),
            integers=("rows", "width", "rows_a_program"), warps=8,
            types=dict.fromkeys(
                ("upstream", "total_upstream", "hidden", "weight", "gradient"), "*bf16"
            ),
        )  # fmt: skip
    for name, kernel in (
        ("SwiGLU", swiglu.swiglu_kernel),
        ("SwiGLU backward", swiglu.swiglu_backward_kernel),
    ):
        arrays = ("gate_up", "out", "upstream", "gradient")
        yield _plain(
            name, kernel, constants=dict(BLOCK=1024), integers=("width",),
            types={n: "*bf16" for n in kernel.arg_names if n in arrays},
        )  # fmt: skip


def _specialised(tile: head.Tile) -> Iterator[Case]:
    """The head with specialised warps."""
    from ovr_kernels import specialised

    def blocks(*shape: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([*shape], gl.bfloat16)
        return f"tensordesc<bf16{[*shape]},{layout!r}>"

    for short, store, entropy in itertools.product((False, True), repeat=3):
        pipeline = head.SHORT if short else head.LONG
        types: dict[str, object] = dict.fromkeys(specialised.specialised_kernel.arg_names, "i32")
        types |= {"targets": "*i64", "partial": "*fp32", "reference": "*fp32", "scale": "fp32"}
        types |= {
            "hidden": blocks(head.ROWS, pipeline.depth),
            "weight": blocks(tile.columns, pipeline.depth),
            "scaled": blocks(head.ROWS // 2, tile.columns) if store else "*fp32",
        }
        yield Case(
            name=f"statistics{', entropy' if entropy else ''}{', store' if store else ''}, "
            f"specialised warps{', short steps' if short else ''}",
            kernel=specialised.specialised_kernel,
            types=types,
            constants=dict(
                STORE=store,
                ENTROPY=entropy,
                BN=tile.columns,
                BK=pipeline.depth,
                SLOTS=pipeline.slots[store],
                LEAD=pipeline.lead[store],
                SPLIT_TILES=head.SPLIT_COLUMNS // tile.columns,
                GROUP=head.ROW_BLOCKS_A_GROUP,
                SLICES=specialised.SLICES,
                FOLDER=specialised.FOLDER_REGISTERS,
                LOADER=specialised.LOADER_REGISTERS,
            ),
            warps=4,
            product=True,
            gluon=True,
        )


def _plain(
    name: str,
    kernel,
    *,
    constants: dict[str, object],
    integers: tuple[str, ...] = (),
    floats: tuple[str, ...] = (),
    longs: tuple[str, ...] = (),
    types: dict[str, str] | None = None,
    warps: int = 4,
    stages: int = 3,
) -> Case:
    """A kernel whose other arguments all point to fp32."""
    every: dict[str, object] = dict.fromkeys(kernel.arg_names, "*fp32")
    every |= dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    every |= dict.fromkeys(longs, "*i64") | (types or {})
    return Case(
        name=name, kernel=kernel, types=every, constants=constants, warps=warps, stages=stages
    )


class Compiled(NamedTuple):
    """What the compiler made of a case."""

    code: str  # machine code, by nvdisasm
    usage: str  # cuobjdump's line of registers
    shared_bytes: int


COUNTS = ("rows", "kept_rows", "rows_a_program", "first_id", "tokens")
"""Arguments that are multiples of 16 in some launches, which Triton compiles apart."""


def compile_case(case: Case, capability: int, *, ragged: bool = False) -> Compiled:
    """One case for one target, as a launch with multiples of 16 for ``COUNTS`` compiles it, or one
    with others."""
    names = case.kernel.arg_names
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    widths = ("columns", "depth", "hidden_stride", "weight_stride", "scaled_stride", "width",
              "token_stride", "head_stride")  # fmt: skip
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if str(types[name]).startswith("*") or name in widths or (name in COUNTS and not ragged)
    }
    source = GluonASTSource if case.gluon else ASTSource
    compiled = triton.compile(
        source(case.kernel, types, dict(case.constants), divisible),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": case.warps,
            "num_stages": case.stages,
            "enable_fp_fusion": True,
        },  # fmt: skip
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return Compiled(
            code=_tool("nvdisasm", "-c", file.name),
            usage=_tool("cuobjdump", "-res-usage", file.name),
            shared_bytes=compiled.metadata.shared,
        )


def always_spilled(lines: list[str]) -> int:
    """Spills but those of a function's slow path, which a branch jumps over and which writes no
    other memory: a cosine has an array of its own there, for angles over 105,615."""
    rare = {
        place
        for first, last in skipped(lines)
        if not any(_RESULT.search(line) for line in lines[first : last + 1])
        for place in range(first, last + 1)
    }
    return sum(bool(SPILL.search(line)) and i not in rare for i, line in enumerate(lines))


def inspect(case: Case, capability: int, *, ragged: bool = False) -> Artefact:
    """Compile one case for one target and read its machine code; see ``compile_case``."""
    code, usage, shared_bytes = compile_case(case, capability, ragged=ragged)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage[:300]}")
    instruction = MATRIX[capability]
    spills = len(SPILL.findall(code))
    matrix = len(re.findall(instruction, code))
    lines = code.splitlines()
    found = matrix_loops(lines, instruction) if case.product else []
    bodies = ["\n".join(lines[first : last + 1]) for first, last in found]
    loop_spills = sum(len(SPILL.findall(body)) for body in bodies)
    failures = []
    always = always_spilled(lines)
    if loop_spills or (spills > MOST_SPILLS if case.product else always):
        failures.append(f"{loop_spills or (spills if case.product else always)} spills")
    if capability == 90 and any("DEPBAR.LE gsb0, 0x1" not in body for body in bodies):
        failures.append("its loop waits for each matrix instruction")
    if case.gluon and not all(FREED.search(body) for body in bodies):
        failures.append("a slot is freed before all of its readers have met")
    if shared_bytes > SHARED_LIMIT[capability]:
        failures.append(f"{shared_bytes:,} bytes of shared memory")
    if case.product and len(bodies) != (2 if case.gluon else 1):
        failures.append(f"{len(bodies)} loops of matrix instructions")
    return Artefact(
        kernel=case.name,
        target=f"sm_{capability}",
        ragged=ragged,
        registers=int(registers.group(1)),
        spills=spills,
        loop_spills=loop_spills,
        shared_bytes=shared_bytes,
        matrix=matrix,
        failures=tuple(failures),
    )


Loop = tuple[int, int]
"""First and last line: a label, and a branch back to it."""


def loops(lines: list[str]) -> list[Loop]:
    """Of a program, innermost first."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    found = [
        (labels[m[1]], i)
        for i, line in enumerate(lines)
        if (m := _BRANCH.search(line)) and labels.get(m[1], i) < i
    ]
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def skipped(lines: list[str]) -> list[Loop]:
    """What conditional branches jump over: the lines between them and their labels."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    return [
        (i + 1, labels[m[1]] - 1)
        for i, line in enumerate(lines)
        if (m := _BRANCH.search(line)) and "@" in line and labels.get(m[1], 0) > i
    ]


def matrix_loops(lines: list[str], instruction: str) -> list[Loop]:
    """Those that hold a matrix instruction and no part of another such loop: one, or one of each
    group of warps."""
    places = [i for i, line in enumerate(lines) if re.search(instruction, line)]
    found: list[Loop] = []
    for first, last in loops(lines):
        holds = any(first < i < last for i in places)
        if holds and all(last < a or b < first for a, b in found):
            found.append((first, last))
    return found


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def inspect_all() -> list[Artefact]:
    """Every kernel for every target, with even counts and with ragged ones where it has some."""
    work = [
        (case, capability, ragged)
        for capability in TARGETS
        for case in cases(capability)
        for ragged in (False, True)
        if not ragged or any(name in COUNTS for name in case.kernel.arg_names)
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda item: inspect(item[0], item[1], ragged=item[2]), work))


def table(artefacts: list[Artefact]) -> str:
    """As Markdown: a row a kernel, registers / spills / shared KiB of each target, of even and
    ragged counts the larger."""
    targets = [f"sm_{capability}" for capability in TARGETS]
    lines = [
        f"| Triton {triton.__version__}: registers / spills / shared KiB | {' | '.join(targets)} |",
        f"|---|{'---|' * len(targets)}",
    ]
    for name in dict.fromkeys(artefact.kernel for artefact in artefacts):
        cells = []
        for target in targets:
            both = [a for a in artefacts if (a.kernel, a.target) == (name, target)]
            largest = (
                max((getattr(each, what) for each in both), default=0)
                for what in ("registers", "spills", "shared_bytes")
            )
            registers, spills, shared = largest
            cells.append(f"{registers} / {spills} / {shared / 1024:.0f}" if both else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_kernels.artefacts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="also write everything here")
    arguments = parser.parse_args()
    found = inspect_all()
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(artefact) for artefact in found], indent=1))
    failed = [artefact for artefact in found if artefact.failures]
    for artefact in failed:
        form = "ragged" if artefact.ragged else "even"
        print(f"{artefact.kernel} on {artefact.target}, {form}: {', '.join(artefact.failures)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
