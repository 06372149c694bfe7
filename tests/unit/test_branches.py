"""Which statements count as a GPU's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovr_fast.rehearse import branches

SOURCE = """
def move(tensor, device):
    if device.type == "cuda":
        pinned = tensor.pin_memory()
        return pinned.to(device)
    elif device.type != "cpu":
        other = tensor
    if not tensor.is_cuda:
        return tensor
    del pinned
    if device.type == "cpu" and tensor.numel():
        return 1
    else:
        both = 2
    return both
"""


def test_branches_and_what_follows_an_early_return() -> None:
    lines = SOURCE.splitlines()
    found = {lines[number - 1].strip() for number in branches.gpu_statements(SOURCE)}
    assert {"pinned = tensor.pin_memory()", "other = tensor", "del pinned", "both = 2"} <= found
    assert "return tensor" not in found
    assert "return 1" in found  # after a return of the CPU's, whatever it asks


@pytest.mark.parametrize(
    ("condition", "answer"),
    [
        ('device.type == "cuda"', True), ('device.type != "cuda"', False), ("tensor.is_cuda", True),
        ('device.type == "cpu"', False), ("not x.is_cuda", False), ("count > 3", None),
        ('x.device.type == "cuda" and count > 3', True),
        ("torch.cuda.get_device_capability() >= (9, 0)", True),
    ],
)  # fmt: skip
def test_what_a_condition_asks(condition: str, answer: bool | None) -> None:
    import ast

    assert branches.asks_for_a_gpu(ast.parse(condition, mode="eval").body) is answer


def test_ranks_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    for line in (3, 5, 3):
        recorder = branches.Recorder()
        recorder.seen = {"ovr_fast/records.py": {line}}
        recorder.write(path)
    assert json.loads(path.read_text()) == {"ovr_fast/records.py": [3, 5]}
    assert "statements of GPU branches were run; left:" in branches.report({})
