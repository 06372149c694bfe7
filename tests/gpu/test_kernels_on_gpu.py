"""On a GPU: bfloat16 at the sizes of Qwen2.5-VL-7B, and where 32-bit offsets would overflow.

OVR_KERNELS_GPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ovr_kernels import fused, head, parity, reference
from ovr_kernels.objective import PolicyObjective

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and os.environ.get("OVR_KERNELS_GPU")),
    reason="needs a GPU and OVR_KERNELS_GPU=1, which leaves the kernels compiled",
)


def test_parity_at_the_models_shapes() -> None:
    shapes = parity.Shapes(
        hidden=3584, vocab=152_064, intermediate=18_944, heads=36, head_dim=128, rope_base=1e6,
        sections=(16, 24, 24), vision_hidden=1280, vision_intermediate=3420, vision_head_dim=80,
    )  # fmt: skip
    parity.check_parity(shapes, device=torch.device("cuda"), dtype=torch.bfloat16)


SMALL = [
    parity.Shapes(
        hidden=200, vocab=1009, intermediate=344, heads=3, head_dim=32, rope_base=1e4,
        sections=(4, 6, 6), vision_hidden=72, vision_intermediate=100, vision_head_dim=24,
    ),
    parity.Shapes(
        hidden=65, vocab=515, intermediate=35, heads=1, head_dim=12, rope_base=1e4,
        sections=(2, 2, 2), vision_hidden=33, vision_intermediate=17, vision_head_dim=12,
    ),
]  # fmt: skip
"""Sizes that end within a tile, with rows that a tensor descriptor takes and rows that it does
not: what compute-sanitizer is run over (``benchmarks/on_gpu.sh``)."""


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shapes", SMALL, ids=["aligned", "odd"])
def test_parity_at_small_shapes(shapes: parity.Shapes, kind: torch.dtype) -> None:
    parity.check_parity(shapes, device=torch.device("cuda"), dtype=kind)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="for sm_90"
)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("store", [False, True], ids=["", "store"])
@pytest.mark.parametrize("pipeline", [head.LONG, head.SHORT], ids=["long", "short"])
@pytest.mark.parametrize(
    ("count", "width", "vocab"), [(1, 64, 8), (300, 263, 1001), (4096, 3584, 152_064)]
)
def test_specialised_warps_give_what_the_others_do(
    count: int, width: int, vocab: int, store: bool, pipeline: head.Pipeline, kind: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both make the same products, and sums of them in another order."""
    generator = torch.Generator("cuda").manual_seed(count)
    hidden = torch.randn(count, width, device="cuda", generator=generator).to(kind)
    weight = torch.randn(vocab, width, device="cuda", generator=generator).to(kind) / 8
    targets = torch.randint(vocab, (count,), device="cuda", generator=generator)
    targets[::3] = -1
    operand = head.Head(weight=weight, bias=None, options=reference.LogitOptions())

    def statistics() -> tuple[reference.RowValues, head.ScaledExponentials | None]:
        return head.row_statistics(hidden, operand, targets, entropy=True, store=store)

    usual, stored = statistics()
    tile = replace(head.tile_for(90, kind), specialised=pipeline)
    monkeypatch.setattr(head, "tile_for", lambda capability, dtype: tile)
    for _ in range(5):  # what a race spoils may be right at times
        found, also = statistics()
        for name in ("logprobs", "entropies"):
            torch.testing.assert_close(
                getattr(found, name), getattr(usual, name), atol=2e-5, rtol=1e-5
            )
        if stored is not None and also is not None:
            torch.testing.assert_close(also.reference, stored.reference, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(also.values, stored.values, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 8192, 14_123, 65_537])
@pytest.mark.parametrize("vocab", [1000, 151_936, 152_064])
def test_log_probs_at_every_size(count: int, vocab: int) -> None:
    generator = torch.Generator("cuda").manual_seed(count)
    hidden = torch.randn(count, 512, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(vocab, 512, device="cuda", generator=generator).bfloat16() / 8
    targets = torch.randint(vocab, (count,), device="cuda", generator=generator)
    found, entropy = fused.linear_logprob(hidden, weight, targets, return_entropy=True)
    for rows in torch.arange(count, device="cuda").split(512):
        logs = (hidden[rows].double() @ weight.double().t()).log_softmax(-1)
        wanted = logs.gather(1, targets[rows, None])[:, 0]
        assert ((found[rows] - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()
        wanted = -(logs.exp() * logs).sum(-1)
        assert ((entropy[rows] - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()
    alone = fused.linear_logprob(hidden[-1:], weight, targets[-1:])
    assert torch.equal(alone[0], found[-1])


def test_the_ratio_of_a_first_step_is_exactly_one() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(3001, 3584, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(152_064, 3584, device="cuda", generator=generator).bfloat16() / 60
    targets = torch.randint(152_064, (3001,), device="cuda", generator=generator)
    with torch.no_grad():
        old = fused.linear_logprob(hidden, weight, targets)
        _, found = fused.linear_policy_loss(
            hidden, weight, targets, PolicyObjective(), advantages=torch.ones_like(old),
            old_logprobs=old, chunk=1000,
        )  # fmt: skip
    assert torch.equal(found.logprobs, old)
    assert float(found.totals[1]) == 3001.0


def test_gradients_of_several_chunks() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(3000, 512, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(20_000, 512, device="cuda", generator=generator).bfloat16() / 8
    targets = torch.randint(20_000, (3000,), device="cuda", generator=generator)
    advantages = torch.randn(3000, device="cuda", generator=generator)
    results = []
    for operators, kind in ((fused, torch.bfloat16), (reference, torch.float64)):
        x, w = (t.detach().clone().to(kind).requires_grad_() for t in (hidden, weight))
        loss, _ = operators.linear_policy_loss(
            x, w, targets, PolicyObjective(entropy_coef=0.01), advantages=advantages, chunk=1000
        )
        loss.backward()
        results.append((x.grad, w.grad))
    for found, wanted in zip(*results, strict=True):
        assert parity.relative_error(found, wanted) <= 3e-3


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 30.0},
    "temperature": {"temperature": 0.7},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-4},
    "all but smoothing": {"bias": True, "softcap": 15.0, "z_loss": 1e-4, "reduction": "mean"},
}  # fmt: skip


def drawn(
    rows: int, width: int, vocab: int, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, its bias and targets, a third of them ignored."""
    generator = torch.Generator("cuda").manual_seed(rows)
    hidden = torch.randn(rows, width, device="cuda", generator=generator).to(kind)
    weight = (2 * torch.randn(vocab, width, device="cuda", generator=generator) / width**0.5).to(
        kind
    )
    bias = torch.randn(vocab, device="cuda", generator=generator).to(kind) / 2
    targets = torch.randint(vocab, (rows,), device="cuda", generator=generator)
    targets[::3] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_form_of_the_cross_entropy(feature: str, kind: torch.dtype) -> None:
    hidden, weight, bias, targets = drawn(2500, 896, 32_003, kind)
    given = dict(FEATURES[feature])
    leaves = [hidden, weight, *([bias] if given.pop("bias", False) else [])]
    results = []
    for operators, exact in ((fused, kind), (reference, torch.float64)):
        own = [leaf.detach().to(exact).requires_grad_() for leaf in leaves]
        loss, _ = operators.linear_cross_entropy(
            own[0], own[1], targets, bias=own[2] if len(own) > 2 else None, chunk=1000, **given
        )
        loss.backward()
        results.append((loss.detach().double(), [leaf.grad.double() for leaf in own]))
    (loss, gradients), (wanted, right) = results
    torch.testing.assert_close(loss, wanted, rtol=2e-5, atol=2e-5)
    for found, exactly in zip(gradients, right, strict=True):
        assert parity.relative_error(found, exactly) <= 3e-3


@pytest.mark.parametrize("chunk", [700, 4096], ids=["chunks", "one chunk"])
def test_gspo(chunk: int) -> None:
    hidden, weight, _, targets = drawn(2500, 896, 32_003, torch.bfloat16)
    ends = torch.tensor([0, 500, 500, 1300, 2500], device="cuda")
    with torch.no_grad():
        old = fused.linear_logprob(hidden, weight, targets)
        old = (old + 2e-4).where(targets >= 0, 0.0)
    results = []
    for operators, kind in ((fused, torch.bfloat16), (reference, torch.float64)):
        x, w = (t.detach().clone().to(kind).requires_grad_() for t in (hidden, weight))
        loss, _ = operators.linear_gspo_loss(
            x, w, targets, advantages=torch.tensor([1.0, 5.0, -1.0, 2.0], device="cuda"),
            cu_seqlens=ends, old_logprobs=old, chunk=chunk,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach().double(), x.grad, w.grad))
    found, wanted = results
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for mine, exactly in zip(found[1:], wanted[1:], strict=True):
        assert parity.relative_error(mine, exactly) <= 3e-3


def test_rows_without_a_gradient_are_left_out() -> None:
    """The backward of ``linear_logprob`` gathers the others; their gradient is as if alone."""
    hidden, weight, _, targets = drawn(2500, 896, 32_003, torch.bfloat16)
    upstream = torch.zeros(2500, device="cuda")
    upstream[100:1700:7] = torch.linspace(-1, 1, len(upstream[100:1700:7]), device="cuda")
    results = []
    for operators, kind in ((fused, torch.bfloat16), (reference, torch.float64)):
        x, w = (t.detach().clone().to(kind).requires_grad_() for t in (hidden, weight))
        operators.linear_logprob(x, w, targets).backward(upstream.to(torch.float32))
        results.append((x.grad, w.grad))
    for found, exactly in zip(*results, strict=True):
        assert parity.relative_error(found, exactly) <= 3e-3


def test_a_compiled_call_is_one_operator() -> None:
    hidden, weight, _, targets = drawn(1000, 512, 4003, torch.bfloat16)
    with torch.no_grad():
        wanted = fused.linear_logprob(hidden, weight, targets)
        found = torch.compile(fused.linear_logprob, fullgraph=True)(hidden, weight, targets)
    assert torch.equal(found, wanted)
