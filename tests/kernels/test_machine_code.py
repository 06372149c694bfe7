"""How the model reads machine code, and what it makes of launches; by hand-worked cases."""

from __future__ import annotations

import subprocess
import sys

import pytest
import triton

import report
from ovr_kernels import artefacts, machine_code, machines, streaming
from ovr_kernels.machine_code import Program, cycles
from ovr_kernels.machines import H100, LATENCY, MACHINES, machine_of
from ovr_kernels.streaming import LAUNCH, Launch, seconds
from support.processes import HUNG_S
from support.toy_run import ROOT

MODELLED = [
    "linear_logprob forward", "linear_logprob step", "linear_policy_loss step",
    "linear_cross_entropy step", "linear_gspo_loss step", "policy_loss", "value_loss",
    "packed_gae, closed form", "packed_gae", "rotate", "rms_norm step", "add_rms_norm step",
    "swiglu step",
]  # fmt: skip

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
    assert found == {"other": 1 + 10 + 2, "fma": 10, "multiply": 10, "memory": 10 + 2, "special": 1}
    assert cycles(found, 90)["fma"] == 10 * 32 / 128
    assert cycles(found, 90)["multiply"] == 10 * 32 / 64
    assert cycles(found, 80)["special"] == 1 * 32 / 16
    assert cycles(found, 80)["issue"] == sum(found.values()) / 4
    before, behind = program.until_an_exit()
    assert before.instructions((1,)) == {"other": 3, "fma": 1, "multiply": 1, "memory": 2}
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


@pytest.mark.parametrize(
    ("line", "results", "operands"),
    [
        ("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "R4 R5 R6 R7", "UR4 R2 R3 P0 R4 R5 R6 R7"),
        ("STG.E.128 desc[UR4][R2.64], R8", "", "UR4 R2 R3 R8 R9 R10 R11"),
        ("STS [R10+0x80], R62", "", "R10 R62"),
        ("ISETP.GE.AND P0, PT, R3, R4.reuse, PT", "P0", "R3 R4"),
        ("SHFL.UP PT, R34, R61, 0x1, RZ", "R34", "R61"),
        ("IADD3 R44, P6, -R11, UR9, RZ", "R44 P6", "R11 UR9"),
        ("IADD3 R1, P0, P1, R2, R3, RZ", "R1 P0 P1", "R2 R3"),
        ("IADD3.X R45, R45, -0x1, RZ, P6, !PT", "R45", "R45 P6"),
        ("IMAD.WIDE R2, R0, 0x4, R8", "R2 R3", "R0 R8 R9"),
        ("LOP3.LUT P0, R5, R6, 0x7f, RZ, 0xc0, !PT", "P0 R5", "R6"),
        ("REDUX.OR UR4, R5", "UR4", "R5"),
        ("RED.E.ADD desc[UR4][R2.64], R5", "", "UR4 R2 R3 R5"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "", ""),
    ],
)
def test_what_an_instruction_writes_and_reads(line: str, results: str, operands: str) -> None:
    found = machine_code._instruction(f"        /*0010*/  {line} ;")
    assert found is not None
    assert set(found.results) == set(results.split())
    assert set(found.operands) == set(operands.split())


def test_machines_are_known_by_torch_s_names() -> None:
    assert machine_of("NVIDIA H100 80GB HBM3") is H100
    assert machine_of("NVIDIA A100-SXM4-80GB") is machines.A100
    assert machine_of("NVIDIA H200").bandwidth == 4.8e12
    assert machine_of("NVIDIA B200") is MACHINES[-1]
    for other in ("cpu", "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
                  "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe",
                  "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):  # fmt: skip
        assert machine_of(other) is None
    assert H100.operations == pytest.approx(800e12)
    assert H100.bytes == pytest.approx(3.0e12)
    # At which a multiprocessor's matrix unit makes the data sheets' peaks.
    assert [round(each.clock / 1e9, 2) for each in MACHINES] == [1.41, 1.83, 1.83, 1.86]
    assert {each.capability for each in MACHINES} == set(artefacts.TARGETS) == set(machines.LANES)


def test_our_operators_run_as_they_are_measured() -> None:
    """The reference forms at small shapes, where there is no GPU."""
    ours = [case for case in report.all_cases() if case.peer.startswith("ours")]
    for case in ours:
        case.build()()
    names = {case.operator for case in ours} | {"linear_logprob step"}
    assert {name for name in names if not name.startswith("attention")} == set(MODELLED)


def test_predictions_stand_beside_what_was_measured() -> None:
    """Within five points of the floor on an H100, but for those of which the README says what was
    left out (the host, a fill of zeros) or that it is not explained; and its table is this one."""
    command = "import report; print(report.predicted_beside_measured(report.measured_results()))"
    done = subprocess.run(  # the kernels of this process are interpreted
        [sys.executable, "-c", command], cwd=ROOT / "benchmarks", capture_output=True, text=True,
        timeout=HUNG_S, check=True,
    )  # fmt: skip
    titles, _, *lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    ours, theirs = titles.index("H100"), titles.index("H100, measured")
    rows = {line[0]: line for line in lines}
    assert list(rows) == MODELLED
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
