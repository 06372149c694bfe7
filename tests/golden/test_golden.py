"""Numbers do not drift between commits, nor between two starts of the same command."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from golden import golden
from support import toy_run
from support.processes import run_ranks

pytestmark = pytest.mark.slow


def check(name: str, run: Path) -> None:
    found = golden.read_metrics(run / "metrics.jsonl")
    expected = golden.read_metrics(golden.FOLDER / f"{name}.jsonl")
    moved = golden.differences(found, expected, exact=golden.same_machine())
    assert not moved, "\n".join([*moved, "if it should: python tests/golden/golden.py --write"])


def test_both_stages_have_the_golden_numbers(whole_run: Path) -> None:
    check("toy", whole_run)


def test_rl_on_two_ranks_has_the_golden_numbers(workplace: Path, whole_run: Path) -> None:
    run_ranks(2, toy_run.two_ranks(workplace))
    check("two_ranks", workplace / "two_ranks")


def test_a_command_started_five_times_gives_the_same_digits(workplace: Path) -> None:
    """Two at a time, so that they disturb each other."""

    def start(number: int) -> list[dict]:
        name = f"again{number}"
        more = ["--fake-rollouts", "30", "rl.steps=1"]
        run_ranks(1, toy_run.arguments(workplace, name, *more))
        return [golden.kept(row) for row in golden.read_metrics(workplace / name / "metrics.jsonl")]

    with ThreadPoolExecutor(max_workers=2) as pool:
        first, *others = pool.map(start, range(5))
    assert first
    assert first[0]["critic/loss"] > 0
    assert all(other == first for other in others)
