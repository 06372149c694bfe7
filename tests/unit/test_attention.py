"""Which tokens of a packed microbatch attend in which call."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from ovr_fast.model import attention
from ovr_fast.records import Branches, Segments
from ovr_kernels.parity import ParityError


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


BRANCHED = {
    "one group": ([5, 3, 9, 1], [-1, 0, 0, 0]),
    "two groups and rows of their own": (
        [7, 300, 4, 4, 6, 260, 2, 9, 3],
        [-1, -1, 0, 0, -1, 4, 4, 4, -1],
    ),
    "a long prefix": ([400, 3, 2, 300, 5], [-1, 0, 0, 0, -1]),
    "branches away from their prefix": ([4, 5, 3, 2, 6], [-1, -1, 0, 1, 0]),
}


def written_out(lengths: list[int], prefixes: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Lengths, and packed places, of what a layout without branches would hold; and in it the place
    of each packed token (of a prefix: with its first branch)."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    own = [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
    rows = [
        own[i] if prefix < 0 else own[prefix] + own[i]
        for i, prefix in enumerate(prefixes)
        if prefix >= 0 or i not in prefixes
    ]
    places = [place for row in rows for place in row]
    return [len(row) for row in rows], places, [places.index(i) for i in range(sum(lengths))]


@pytest.mark.parametrize("kernel", ["sdpa by length", "cudnn", "torch varlen"])
@pytest.mark.parametrize("name", BRANCHED)
def test_a_prefix_that_stands_once_is_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: str
) -> None:
    """Forward and backward, against every branch with its prefix to itself."""
    calls: list[str] = []

    def together(q, k, v, ends, longest, causal):
        assert causal
        calls.append("varlen")
        return attention._by_length(q, k, v, tuple(ends.diff().tolist()), causal)

    lengths, prefixes = BRANCHED[name]
    segments = Segments.of(lengths, prefixes)
    drawn = torch.randn(segments.total, 8, 16, dtype=torch.float64)
    upstream = torch.randn(segments.total, 4, 16, dtype=torch.float64)
    rows, places, back = written_out(lengths, prefixes)

    def plainly(q, k, v):
        q, k, v = q[places], k[places], v[places]
        return attention._by_length(q, k, v, tuple(rows), True)[back]

    packed = drawn.clone().requires_grad_()
    wanted = plainly(*packed.split([4, 2, 2], 1))
    (wanted_gradient,) = torch.autograd.grad((wanted * upstream).sum(), packed)
    monkeypatch.setattr(attention, "LONG", 256)
    monkeypatch.setattr(attention, "LONG_KERNEL", SDPBackend.MATH)
    monkeypatch.setattr(attention, "_together", together)
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: kernel)
    packed = drawn.clone().requires_grad_()
    q, k, v = packed.split([4, 2, 2], 1)
    found = attention.packed_attention(q, k, v, segments, causal=True)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), packed)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert ("varlen" in calls) == (kernel != "sdpa by length")


def test_the_gate_at_the_start_sees_a_prefix_that_learns_of_one_branch_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its gradient is a sum over all of its branches."""
    options = dict(heads=4, kv_heads=2, head_dim=16, device=torch.device("cpu"))
    kernels = {torch.bfloat16: "torch varlen", torch.float32: "sdpa by length"}
    monkeypatch.setattr(attention, "attention_kernel", lambda _, dtype: kernels[dtype])

    def together(q, k, v, ends, longest, causal):
        return attention._by_length(q, k, v, tuple(ends.diff().tolist()), causal)

    def of_the_first(found, rows, bounds, **options):
        some = bounds.diff() > 0
        first = rows[found[bounds[:-1].clamp(max=len(found) - 1)]]
        return torch.where(some[:, None], first, 0)

    monkeypatch.setattr(attention, "_together", together)
    attention.check_attention(**options, dtype=torch.bfloat16, share_prefixes=True)
    take = attention._Take.backward

    def backward(ctx, new):
        with monkeypatch.context() as patch:
            if new.dtype == torch.bfloat16:
                patch.setattr(attention.F, "embedding_bag", of_the_first)
            return take(ctx, new)

    monkeypatch.setattr(attention._Take, "backward", staticmethod(backward))
    attention.check_attention(**options, dtype=torch.bfloat16)
    with pytest.raises(ParityError, match=r"its gradient differs .* rl\.share_prefixes=false"):
        attention.check_attention(**options, dtype=torch.bfloat16, share_prefixes=True)


def test_a_branch_goes_on_from_a_root_before_it() -> None:
    for prefixes in ([0, -1], [-1, 0, 1], [-1, 2, -1], [-2, -1]):
        with pytest.raises(ValueError, match=r"segment \d goes on from"):
            Branches.of((1,) * len(prefixes), tuple(prefixes))
    branches = Segments.of([4, 2, 3, 5, 1], [-1, 0, 0, -1, 3]).branches
    assert branches is not None
    assert branches.shared == ((4, 2), (5, 1))
    assert branches.shared_tokens == 4
    assert branches.whole.lengths == (6, 7, 6)
    places = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert branches.expand.index_N.tolist() == places
    assert branches.collapse.index_N.tolist() == [places.index(token) for token in range(15)]
    assert Segments.of([4, 2], [-1, -1]).branches is None


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
