"""How the model reads machine code, and what it makes of launches; by hand-worked cases."""

from __future__ import annotations

import subprocess
import sys

import pytest
import triton

import report
from ovr_kernels import artefacts, machines, streaming
from ovr_kernels.machine_code import Program, cycles
from ovr_kernels.machines import H100, LATENCY, MACHINES, machine_of
from ovr_kernels.streaming import LAUNCH, Launch, seconds
from support.processes import HUNG_S
from support.toy_run import ROOT

CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   IMAD.WIDE R2, R0, 0x4, R8 ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD R1, R7, R1 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STG.E desc[UR4][R2.64], R1 ;
        /*0060*/               @P2 EXIT ;
        /*0070*/                   MUFU.EX2 R3, R1 ;
        /*0080*/                   STG.E desc[UR4][R2.64], R3 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2) ;
"""


def test_a_program_s_instructions_are_counted_by_unit_and_trips() -> None:
    program = Program.of(CODE)
    found = program.instructions((10,))
    assert found == {"other": 1 + 10 + 2, "fma": 20, "memory": 10 + 2, "special": 1}
    assert cycles(found, 90)["fma"] == 20 * 32 / 128
    assert cycles(found, 80)["special"] == 1 * 32 / 16
    assert cycles(found, 80)["issue"] == sum(found.values()) / 4
    before, behind = program.until_an_exit()
    assert before.instructions((1,)) == {"other": 3, "fma": 2, "memory": 2}
    assert behind.instructions(()) == {"special": 1, "memory": 1, "other": 1}
    with pytest.raises(ValueError, match="1 loops, and 2 were described"):
        program.instructions((1, 1))
    inside = CODE.replace("(.L_x_1)", "(.L_x_0)").replace(".L_x_1:", ".L_x_0:\n.L_x_1:")
    with pytest.raises(ValueError, match="loops within loops"):
        Program.of(inside.replace("/*0050*/", "/*0048*/ BRA `(.L_x_1) ;\n /*0050*/"))


def test_a_warp_alone_waits_for_what_it_reads() -> None:
    """The thread's number 30, the address 5, the load, the sum 5; the next round's address only
    the loop itself."""
    program = Program.of(CODE)
    address = 1 + 30
    load = address + 5
    added = load + LATENCY
    assert program.alone((1,), 1.0) == added + 5 + 1 + 1 + 20 + 1
    # Another round: the branch, an address, the load of it, the sum.
    each = 1 + 1 + 5 + LATENCY
    for rounds in (2, 3, 1000):
        assert program.alone((rounds,), 1.0) - program.alone((1,), 1.0) == (rounds - 1) * each
    assert Program.of(CODE.replace("R7, R1", "R9, R1")).alone((1,), 1.0) < LATENCY
    assert program.until_an_exit()[1].alone((), 4.0) == 4 + 20 + 4


def test_programs_run_in_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each the longest of its bytes, its instructions and one program's way."""
    made = streaming._Compiled(warps=4, resident=2, program=Program.of(CODE))
    monkeypatch.setattr(streaming, "_compiled", lambda case, capability: made)
    wave = 2 * H100.multiprocessors
    alone = made.program.alone((1,), 1.0) / H100.clock

    def of(programs: int, moved: float = 0.0, trips: float = 1) -> float:
        launch = Launch(case="x", bytes=moved, programs=programs, trips=(trips,))
        return seconds(launch, H100) - LAUNCH

    assert of(wave) == pytest.approx(alone)
    assert of(wave + 1) == pytest.approx(2 * alone)
    moved = 100 * alone * H100.bytes
    assert of(wave, moved) == pytest.approx(100 * alone)
    # One program of ten waves' bytes more takes its own way, longer than its bytes.
    assert of(10 * wave + 1, moved) == pytest.approx(
        100 * alone * 10 * wave / (10 * wave + 1) + alone
    )
    assert seconds(Launch(bytes=3e9), H100) == pytest.approx(LAUNCH + 1e-3)
    last = Launch(case="x", bytes=0.0, programs=wave, trips=(1,), tail=True)
    before, behind = made.program.until_an_exit()
    parts = before.alone((1,), 1.0) + behind.alone((), 1.0)
    assert seconds(last, H100) - LAUNCH == pytest.approx(parts / H100.clock)


def test_machines_are_known_by_torch_s_names() -> None:
    assert machine_of("NVIDIA H100 80GB HBM3") is H100
    assert machine_of("NVIDIA A100-SXM4-80GB") is machines.A100
    assert machine_of("NVIDIA H200").bandwidth == 4.8e12
    assert machine_of("cpu") is machine_of("NVIDIA GeForce RTX 4090") is None
    assert H100.operations == pytest.approx(800e12)
    assert H100.bytes == pytest.approx(3.0e12)
    # The data sheets' boost clocks.
    assert [round(each.clock / 1e9, 2) for each in MACHINES] == [1.41, 1.83, 1.83, 1.86]
    assert {each.capability for each in MACHINES} == set(artefacts.TARGETS) == set(machines.LANES)


def test_predictions_stand_beside_what_was_measured() -> None:
    """Of the operators that the device bounds, within five points of the floor on an H100, where
    the same work was measured; and the table of the README is this one."""
    command = "import report; print(report.predicted_beside_measured(report.measured_results()))"
    done = subprocess.run(  # the kernels of this process are interpreted
        [sys.executable, "-c", command], cwd=ROOT / "benchmarks", capture_output=True, text=True,
        timeout=HUNG_S, check=True,
    )  # fmt: skip
    titles, _, *lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    ours, theirs = titles.index("H100"), titles.index("H100, measured")
    rows = {line[0]: line for line in lines}
    for operator in ("linear_logprob forward", "linear_logprob step", "linear_policy_loss step",
                     "rotate", "swiglu step"):  # fmt: skip
        predicted, measured = (
            int(rows[operator][i].split(",")[1].strip(" %")) for i in (ours, theirs)
        )
        assert abs(predicted - measured) <= 5, rows[operator]
    assert all(len(line) == len(titles) for line in lines)
    written = (ROOT / "kernels" / "README.md").read_text()
    if f"Triton {triton.__version__}:" in written:
        assert done.stdout.strip() in written, "run python benchmarks/report.py --only-readme again"


def test_our_measurements_have_the_model_s_names() -> None:
    cases = [
        ("linear_logprob forward", "ours", 1.0),
        ("linear_logprob forward", "matrix product alone", 2.0),
        ("linear_policy_loss step", "ours", 3.0),
        ("linear_policy_loss step", "ours, into a gradient buffer", 4.0),
        ("linear_policy_loss step", "ours, recomputing (four products)", 5.0),
        ("rotate", "ours", 6.0),
        ("attention step", "ours", 7.0),
    ]
    rows: list[dict] = [dict(operator=a, peer=b, median_ms=c) for a, b, c in cases]
    rows.append(dict(operator="value_loss", peer="ours", failed="out of memory"))
    assert report.ours_of(rows) == {
        "linear_logprob forward": 1.0, "linear_policy_loss step": 4.0, "linear_logprob step": 5.0,
        "rotate": 6.0,
    }  # fmt: skip
