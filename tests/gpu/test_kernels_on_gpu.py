"""On a GPU: bfloat16 at the sizes of Qwen2.5-VL-7B, and where 32-bit offsets would overflow.

OVR_KERNELS_GPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import os

import pytest
import torch

from ovr_kernels import fused, parity, reference
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
