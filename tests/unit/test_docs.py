"""Every command in ``docs/`` runs, as it stands there; every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.toy_run import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
THERE = ("ovr_fast", "configs", "kernels", "launch", "benchmarks")
"""Of the repository, that commands name."""


def test_there_are_few_pages_and_the_readme_names_each() -> None:
    readme = (ROOT / "README.md").read_text()
    assert 0 < len(PAGES) <= 5
    for page in PAGES:
        assert f"](docs/{page.name})" in readme


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_run(page: Path, tmp_path: Path) -> None:
    for name in THERE:
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + "".join(blocks)], cwd=tmp_path, text=True,
        env=os.environ | {"PATH": path}, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
