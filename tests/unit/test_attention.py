"""Which tokens of a packed microbatch attend in which call."""

from __future__ import annotations

import contextlib

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

    def together(q, k, v, ends, causal):
        found = ends.queries_S1.diff().tolist()
        assert int(ends.queries_S1[0]) == 0
        assert ends.keys_S1 is ends.queries_S1
        assert (max(found), sum(found), causal) == (ends.most_queries, q.shape[0], True)
        assert ends.most_keys == ends.most_queries
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


def varying(q, k, v, ends: attention.Ends, *, from_the_end: bool = True) -> torch.Tensor:
    """A variable-length kernel: causal, and counting from either end of the keys."""
    sizes = [x.diff().tolist() for x in (ends.queries_S1, ends.keys_S1)]
    outputs = []
    for one in zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True):
        own, keys, values = (x.transpose(0, 1)[None] for x in one)
        seen = torch.ones(own.shape[2], keys.shape[2], dtype=torch.bool)
        seen = seen.tril(keys.shape[2] - own.shape[2] if from_the_end else 0)
        out = torch.nn.functional.scaled_dot_product_attention(
            own, keys, values, attn_mask=seen, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", ["sdpa by length", "cudnn", "torch varlen"])
@pytest.mark.parametrize("name", BRANCHED)
def test_a_prefix_that_stands_once_is_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: str
) -> None:
    """Forward and backward, against every branch with its prefix to itself."""
    calls: list[str] = []

    def together(q, k, v, ends, causal):
        """``varlen_attn`` as its documentation has it: causality counts from the end."""
        assert causal
        calls.append("varlen")
        sizes = [x.diff().tolist() for x in (ends.queries_S1, ends.keys_S1)]
        assert [max(size) for size in sizes] == [ends.most_queries, ends.most_keys]
        return varying(q, k, v, ends)

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


def test_the_gate_at_the_start_knows_causality_from_the_other_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that counted causality from the start would hide half of the prompt."""
    options = dict(heads=4, kv_heads=2, head_dim=16, device=torch.device("cpu"))
    kernels = {torch.bfloat16: "torch varlen", torch.float32: "sdpa by length"}
    monkeypatch.setattr(attention, "attention_kernel", lambda _, dtype: kernels[dtype])
    for from_the_end in (True, False):

        def together(q, k, v, ends, causal, from_the_end=from_the_end):
            return varying(q, k, v, ends, from_the_end=from_the_end)

        monkeypatch.setattr(attention, "_together", together)
        attention.check_attention(**options, dtype=torch.bfloat16)
        expected = (
            contextlib.nullcontext()
            if from_the_end
            else pytest.raises(ParityError, match=r"its output differs .* rl\.share_prefixes=false")
        )
        with expected:
            attention.check_attention(**options, dtype=torch.bfloat16, share_prefixes=True)


def test_a_branch_goes_on_from_a_root_before_it() -> None:
    for prefixes in ([0, -1], [-1, 0, 1], [-1, 2, -1], [-2, -1]):
        with pytest.raises(ValueError, match=r"segment \d goes on from"):
            Branches.of((1,) * len(prefixes), tuple(prefixes))
    branches = Segments.of([4, 2, 3, 5, 1], [-1, 0, 0, -1, 3]).branches
    assert branches is not None
    assert branches.shared == ((4, 2), (5, 1))
    assert branches.shared_tokens == 4
    assert branches.keys.lengths == (6, 7, 6)
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
