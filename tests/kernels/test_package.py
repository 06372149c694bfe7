"""The operators as a package of their own: what it imports, and its README's example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import ovr_kernels
from ovr_kernels import fused, reference
from support.toy_run import ROOT

KERNELS = ROOT / "kernels"


def run(code: str, **environment: str) -> str:
    """The output of Python code that finds this package alone."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/",
        env={**os.environ, "PYTHONPATH": str(KERNELS), **environment},
    )  # fmt: skip
    return done.stdout


def test_the_example_of_the_readme_runs_without_the_trainer_or_triton() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    code = "\n".join(blocks)
    said = run(code + "\nimport sys; print(loss.item(), 'ovr_fast' in sys.modules, "
               "'triton.language' in sys.modules)")  # fmt: skip
    assert said.split()[1:] == ["False", "False"]


def test_the_package_says_what_it_is() -> None:
    about = tomllib.loads((KERNELS / "pyproject.toml").read_text())["project"]
    assert about["name"] == "ovr-kernels"
    assert [re.split("[<>=]", need)[0] for need in about["dependencies"]] == ["torch"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", ovr_kernels.__version__)
    assert (KERNELS / "ovr_kernels" / "py.typed").is_file()
    assert set(fused.__all__) <= set(dir(reference))


def test_every_launch_states_whether_products_and_sums_are_fused() -> None:
    """Triton's default changes with 3.10, and the head's log-probs follow from it."""
    for file in (KERNELS / "ovr_kernels").glob("*.py"):
        if file.name != "artefacts.py":
            code = file.read_text()
            assert code.count("enable_fp_fusion=True") == code.count("num_warps="), file.name
