"""Wrong kernels must not pass: the parity gate catches each planted error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ovr_kernels import head, mrope, packed_gae, parity, policy_loss, rms_norm

SHAPES = parity.Shapes(
    hidden=40, vocab=1000, intermediate=24, heads=3, head_dim=16, rope_base=1e6,
    sections=(2, 3, 3), vision_hidden=32, vision_intermediate=20, vision_head_dim=12,
    temperature=0.7,
)  # fmt: skip

PLANTED = [
    # module, kernel, right, wrong
    (head, "statistics_kernel", "acc, -1e30)", "acc, 0.0)"),  # padding counts as exp(0)
    (head, "statistics_kernel", "total *= tl.exp2(step)", "total *= 1.0"),
    (head, "merge_kernel", "total = tl.exp2(step) * total", "total = total"),
    (head, "gradient_kernel", "gradient -= wanted", "gradient += wanted"),  # entropy's sign
    (head, "gradient_kernel", "inverse_temperature\n        target", "1.0\n        target"),
    (policy_loss, "policy_kernel", "1.0 + clip_high", "1.0 + 2.0 * clip_high"),
    (policy_loss, "value_kernel", "tl.where(inside, near, 0.0)", "near"),
    (packed_gae, "gae_kernel", "mask=here & (token + 1 < end)", "mask=here"),  # leaks
    (mrope, "rotate_kernel", "second * cos + first * sin", "second * cos - first * sin"),
    (rms_norm, "norm_backward_kernel", "above - normal * (", "above - 0.0 * ("),
]


@pytest.mark.parametrize(("module", "kernel", "right", "wrong"), PLANTED)
def test_a_planted_error_is_caught(
    module: ModuleType,
    kernel: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Path(module.__file__ or "").read_text()
    assert source.count(right) >= 1, right
    path = tmp_path / "planted.py"
    path.write_text(source.replace(right, wrong))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", planted)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(module, kernel, getattr(planted, kernel))
    # Two tiles a split, so that a vocabulary of 1,000 has sums to rescale and parts to merge.
    monkeypatch.setattr(head, "SPLIT_COLUMNS", 512)
    with pytest.raises(parity.ParityError):
        parity.check_parity(SHAPES, device=torch.device("cpu"), dtype=torch.float16)
