"""Which tokens of a packed microbatch attend in which call."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from ovr_fast.model import attention
from ovr_fast.records import Segments


@pytest.mark.parametrize(
    "lengths",
    [[300], [256, 257], [3, 700, 5, 1, 400, 300, 9], [5, 6], [0, 300, 0, 4], [1000, 2]],
)
def test_long_sequences_alone_are_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    calls = []

    def together(q, k, v, ends, longest, causal):
        found = ends.diff().tolist()
        assert int(ends[0]) == 0
        assert (max(found), sum(found), causal) == (longest, q.shape[0], True)
        calls.append(found)
        return attention._by_length(q, k, v, tuple(found), causal)

    monkeypatch.setattr(attention, "LONG", 256)
    monkeypatch.setattr(attention, "LONG_KERNEL", SDPBackend.MATH)
    monkeypatch.setattr(attention, "_together", together)
    segments = Segments.of(lengths)
    drawn = torch.randn(segments.total, 8, 16, dtype=torch.float64)
    results = []
    for attend in (
        lambda q, k, v: attention._long_alone(q, k, v, segments),
        lambda q, k, v: attention._by_length(q, k, v, segments.lengths, True),
    ):
        packed = drawn.clone().requires_grad_()
        out = attend(*packed.split([4, 2, 2], 1))
        out.square().sum().backward()
        results.append((out, packed.grad))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(length < 256 for call in calls for length in call)


def test_lengths_are_rounded_to_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def attend(q, k, v, **options):
        seen.add(q.shape[2])
        return q

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    for length in range(attention.LONG, 65_537, 61):
        x = torch.empty(length, 1, 1)
        assert attention._alone(x, x, x).shape[0] == length
        assert max(seen) <= 1.04 * length
    assert len(seen) <= 161
