"""A vocabulary over 2 and 4 ranks, with and without sequence parallel, equals the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_merge_to_the_whole(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_ranks(ranks, [str(Path(__file__).with_name("tensor_ranks.py"))])
