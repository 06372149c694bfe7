"""Wrong kernels must not pass: the parity gate catches each planted error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_edges
import test_features
import test_interpreted
import torch

from ovr_kernels import (
    PolicyObjective,
    fused,
    head,
    mrope,
    packed_gae,
    parity,
    policy_loss,
    rms_norm,
)

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


EDGES = [
    (head, "statistics_kernel", "acc += own[None, :]", "acc += 0.9 * own[None, :]"),
    (head, "statistics_kernel", "mask=number < columns - column_start)", "mask=number < 5)"),
    (head, "statistics_kernel", "acc = _capped(acc, softcap)", "acc = _capped(acc, 2.0 * softcap)"),
    (head, "statistics_kernel", "summed += tl.sum", "summed = tl.sum"),  # the last tile's alone
    (head, "merge_kernel", "summed += tl.load", "summed = tl.load"),
    (head, "merge_kernel", "tl.where(counted, logprob, 0.0)", "logprob"),
    (head, "merge_kernel", "tl.where(logprob > 0.0, 0.0, logprob)", "logprob + 0.0"),
    (head, "gradient_kernel", "gradient *= 1.0 - (z", "gradient *= 1.0 + (z"),
    (head, "gradient_kernel", "gradient += (wanted *", "gradient -= (wanted *"),
    (head, "gradient_kernel", "gradient += wanted[:, None]", "gradient += 0.0 * wanted[:, None]"),
    (policy_loss, "policy_kernel", "tl.minimum(tl.exp(off), importance_cap)", "tl.exp(off)"),
    (
        policy_loss,
        "policy_kernel",
        "tl.where(difference == distance, kl_coef * (1.0 - growth), 0.0)",
        "kl_coef * (1.0 - growth)",
    ),
]


def plant(
    module: ModuleType, kernel: str, right: str, wrong: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A kernel with an error in it takes the place of the right one."""
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


@pytest.mark.parametrize(("module", "kernel", "right", "wrong"), PLANTED)
def test_a_planted_error_is_caught(
    module: ModuleType,
    kernel: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(module, kernel, right, wrong, tmp_path, monkeypatch)
    with pytest.raises(parity.ParityError):
        parity.check_parity(SHAPES, device=torch.device("cpu"), dtype=torch.float16)


def probe() -> None:
    """What looks at the edges."""
    test_features.check("fused", (6, 16, 600), torch.float32, bias=True, softcap=3.0,
                        label_smoothing=0.3, z_loss=0.1)  # fmt: skip
    logprobs = fused.linear_logprob(torch.ones(2, 8), torch.ones(9, 8), torch.tensor([-1, 2]))
    assert logprobs[0] == 0
    test_interpreted.test_a_certain_targets_log_prob_is_not_above_zero()
    test_edges.test_a_far_reference_is_limited_as_ratios_are()
    capped = PolicyObjective(importance_cap=1.5)
    far = -8.0 * torch.ones(6)
    both = test_edges.both("policy_loss", policy=capped, rollout_logprobs=far)
    test_edges.close(*(loss for loss, _ in both))


@pytest.mark.parametrize(("module", "kernel", "right", "wrong"), EDGES)
def test_an_error_at_an_edge_is_caught(
    module: ModuleType,
    kernel: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(module, kernel, right, wrong, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        probe()


def test_without_an_error_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SPLIT_COLUMNS", 512)
    probe()
