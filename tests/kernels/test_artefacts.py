"""What the compiler makes of the kernels for three GPU generations; no GPU is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from ovr_kernels import artefacts, model
from support.toy_run import ROOT


def test_every_kernel_compiles_without_spills_that_cost_and_the_table_is_current(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ovr_kernels.artefacts", "--json", str(tmp_path / "all.json")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "all.json").read_text())
    assert {row["target"] for row in found} == {"sm_80", "sm_90", "sm_100"}
    products = [row for row in found if row["kernel"].startswith("statistics")]
    assert len(products) == 46  # 23, with even and with ragged counts
    assert all(row["spills"] == 0 for row in found if row not in products)
    assert all(row["loop_spills"] == 0 for row in products)
    assert all(row["matrix"] > 0 for row in products)
    written = (ROOT / "kernels" / "README.md").read_text()
    if f"Triton {triton.__version__}:" in written:
        assert done.stdout.strip() in written, "run python -m ovr_kernels.artefacts again"


def test_a_spill_counts_where_the_products_are() -> None:
    code = ["STL", ".L_x_1:", "LDL", "HGMMA", "HGMMA", "BRA `(.L_x_1)", "STL"]
    assert artefacts.matrix_loops(code, "HGMMA") == [(1, 5)]
    assert artefacts.matrix_loops([".L_x_0:", *code, "BRA `(.L_x_0)"], "HGMMA") == [(2, 6)]
    rotated = [".L_x_1:", "HGMMA", ".L_x_0:", "BRA `(.L_x_1)", "STL", "BRA `(.L_x_0)"]
    two = [*rotated, *(line.replace("_x_", "_x_9") for line in rotated)]
    assert artefacts.matrix_loops(two, "HGMMA") == [(0, 3), (6, 9)]
    assert artefacts.matrix_loops(["STL"], "HGMMA") == []


def test_a_slow_path_s_array_is_no_spill() -> None:
    """What a branch jumps over, a loop included, is one where it writes no other memory."""
    slow = ["@P0 BRA `(.L_x_1)", ".L_x_0:", "STL", "@P1 BRA `(.L_x_0)", "LDL", ".L_x_1:"]
    assert artefacts.always_spilled(slow) == 0
    assert artefacts.always_spilled([*slow[:3], "STG.E [R2], R4", *slow[3:]]) == 2
    assert artefacts.always_spilled(["STL", *slow, "LDL"]) == 2


def test_a_slot_that_one_thread_frees_for_all_is_seen() -> None:
    """Before they have met."""
    right = [
        "DEPBAR.LE gsb0, 0x1 ;",
        "BAR.SYNC.DEFER_BLOCKING 0x0 ;",
        "@!P1 SYNCS.ARRIVE.TRANS64 ;",
    ]
    assert artefacts.FREED.search("\n".join(["BAR.SYNC ;", *right]))
    assert not artefacts.FREED.search("\n".join(["BAR.SYNC ;", right[0], right[2]]))
    assert not artefacts.FREED.search("\n".join([right[0], right[2], right[1], "BRA ;"]))


def test_a_tile_s_epilogue_is_what_stands_around_its_loop_over_the_depth() -> None:
    """In the loop over tiles alone, whatever is before it and after it."""
    code = [
        "/*0000*/ MOV R1, R2 ;", ".L_x_1:", "/*0010*/ @!P0 IMAD R1, R2 ;", ".L_x_2:",
        "/*0020*/ HGMMA.64x256x16.F32 R24 ;", "/*0030*/ @P1 BRA `(.L_x_2) ;",
        "/*0038*/ @P1 BRA `(.L_x_9) ;", "/*003a*/ FSEL R1, R2 ;", "/*003c*/ @P1 BRA `(.L_x_8) ;",
        "/*003e*/ FSEL R1, R2 ;", ".L_x_8:", "/*003f*/ FSEL R1, R2 ;", "/*003f*/ FSEL R1, R2 ;",
        ".L_x_9:",
        "/*0040*/ MUFU.EX2 R4, R5 ;", "/*0050*/ FMNMX R4, R5, R6 ;", "/*0060*/ UIADD3 UR4, UR5 ;",
        "/*0070*/ SHFL.BFLY PT, R4 ;", "/*0080*/ @P2 BRA `(.L_x_1) ;", "/*0090*/ STG.E R4 ;",
    ]  # fmt: skip
    found = model.per_tile("\n".join(code), 90)
    rare = {"alu": 4, "other": 1}  # what branches jump over, once whether by one or by two
    wanted = {"multiply": 1, "special": 1, "alu": 1, "memory": 1, "other": 3}
    for unit, number in rare.items():
        wanted[unit] += number * model.SKIPPED
    assert found == wanted
    epilogue = model.Epilogue(
        kernel="x", capability=90, instructions={"special": 100, "alu": 150, "other": 10},
        product_cycles=5000.0,
    )  # fmt: skip
    assert (epilogue.bound, epilogue.cycles["special"], epilogue.cycles["issue"]) == (
        "special", 1600.0, 520.0,
    )  # fmt: skip
    assert epilogue.share == (1600.0 + model.LATENCY) / 5000.0
    with pytest.raises(ValueError, match="no loop over tiles"):
        model.per_tile("\n".join(code[3:6]), 90)


def test_the_model_predicts_what_an_h100_took() -> None:
    """Beside the vendor's products of the same measurement, within a fifth (the code that was
    measured is another Triton's); and the README has its table."""
    results = json.loads((ROOT / "benchmarks" / "results" / "h100_kernels.json").read_text())
    measured = {(row["operator"], row["peer"]): row.get("median_ms") for row in results["cases"]}
    forward, step = "linear_logprob forward", "linear_policy_loss step"
    alone = measured[forward, "matrix product alone"], measured[step, "three matrix products alone"]
    assert alone == pytest.approx((model.FORWARD_MS, model.PRODUCTS_MS), abs=0.01)
    done = subprocess.run(
        [sys.executable, "-m", "ovr_kernels.model"],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found = re.findall(r"H100, predicted: (.*): ([\d.]+) ms", done.stdout)
    predicted = {name: float(ms) for name, ms in found}
    taken = measured[forward, "ours"], measured[step, "ours, into a gradient buffer"]
    for name, product, whole in zip((forward, step), alone, taken, strict=True):
        assert predicted[name] - product == pytest.approx(whole - product, rel=0.2)
    written = (ROOT / "kernels" / "README.md").read_text()
    if f"Triton {triton.__version__}:" in written:
        table = "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))
        assert table in written, "run python -m ovr_kernels.model again"
