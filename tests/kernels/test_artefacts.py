"""What the compiler makes of the kernels for three GPU generations; no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import triton

from ovr_kernels import artefacts
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
    assert len(products) == 15
    assert all(row["spills"] == 0 for row in found if row not in products)
    assert all(row["loop_spills"] == 0 for row in products)
    assert all(row["matrix"] > 0 for row in products)
    written = (ROOT / "kernels" / "README.md").read_text()
    if f"Triton {triton.__version__}:" in written:
        assert done.stdout.strip() in written, "run python -m ovr_kernels.artefacts again"


def test_a_spill_counts_where_the_products_are() -> None:
    code = "\n".join(["STL", ".L_x_1:", "LDL", "HGMMA", "HGMMA", "BRA `(.L_x_1)", "STL"])
    assert artefacts.SPILL.findall(artefacts.matrix_loop(code, "HGMMA")) == ["LDL"]
    assert artefacts.matrix_loop("STL", "HGMMA") == ""
