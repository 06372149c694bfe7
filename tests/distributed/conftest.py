"""Random models, and what every layout found on them, made once for all distributed tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ranks
from ranks import LAYOUTS
from support.processes import run_ranks
from support.random_models import SHAPES, make_conversations, make_model
from support.toy_run import ROOT


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each shape, and conversations with images."""
    folder = tmp_path_factory.mktemp("models")
    for name in SHAPES:
        make_model(folder / name, name)
    make_conversations(folder / "conversations")
    return folder


@pytest.fixture(scope="session")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What ``ranks.py`` found under every layout, and where it put its files."""
    folder = tmp_path_factory.mktemp("layouts")
    ranks.run(models, folder, "one")  # first: the others go on from its checkpoint
    script = str(ROOT / "tests" / "distributed" / "ranks.py")
    for world in (2, 4):
        names = [name for name, (tp, pp, dp) in LAYOUTS.items() if tp * pp * dp == world]
        run_ranks(world, [script, str(models), str(folder), *names])
    found = {}
    for name in LAYOUTS:
        found[name] = torch.load(folder / f"{name}.pt", weights_only=True)
        found[name]["folder"] = folder / f"{name}.pt"
    return found
