"""On a GPU: attention over packed sequences against float32.

OVR_KERNELS_GPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import os

import pytest
import torch

from ovr_fast.model.attention import attention_kernel, check_attention, packed_attention
from ovr_fast.records import Segments

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and os.environ.get("OVR_KERNELS_GPU")),
    reason="needs a GPU and OVR_KERNELS_GPU=1",
)

LENGTHS = {
    "long and short": [2300, 130, 1, 2049, 4096, 64, 7],
    "one": [5000],
    "short": [300, 40, 1700],
    "long alone": [2048, 2048],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(28, 4, 128), (7, 1, 128), (16, 16, 80)])
def test_packed_attention(name: str, causal: bool, heads: int, kv_heads: int, width: int) -> None:
    segments = Segments.of(LENGTHS[name]).to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (segments.total, heads + 2 * kv_heads, width)
    drawn = torch.randn(shape, device="cuda", generator=generator).bfloat16()
    upstream = torch.randn(segments.total, heads, width, device="cuda", generator=generator)
    results = []
    for kind in (torch.bfloat16, torch.float32):
        packed = drawn.detach().to(kind).requires_grad_()
        out = packed_attention(
            *packed.split([heads, kv_heads, kv_heads], 1), segments, causal=causal
        )
        (out.float() * upstream).sum().backward()
        results.append((out.float(), packed.grad.float()))
    for what, found, wanted in zip(("output", "gradient"), *results, strict=True):
        error = float((found - wanted).norm() / wanted.norm())
        assert error < 8e-3, f"{attention_kernel('cuda', torch.bfloat16)}: {what} {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (8, 8)])
def test_a_prompt_that_stands_once(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Against float32 where it stands with each response."""
    check_attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        device=torch.device("cuda"),
        dtype=dtype,
        share_prefixes=True,
    )
