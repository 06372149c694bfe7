"""The head: chunked log-prob from hidden states against whole logits, forward and backward.

    pytest benchmarks --benchmark-only

Times are of one machine and only mean something as ratios within a run. Shapes are Qwen2.5-VL's
vocabulary at a small width, so that both fit a laptop.
"""

from __future__ import annotations

import pytest
import torch

from ovr_kernels import reference as kernels

ROWS, HIDDEN, VOCAB = 512, 256, 151_936


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (ROWS,), generator=generator)


def whole_logits(hidden, weight, targets) -> None:
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    logprobs.gather(1, targets[:, None]).sum().backward()


def chunked(hidden, weight, targets, chunk: int) -> None:
    kernels.linear_logprob(hidden, weight, targets, chunk=chunk)[0].sum().backward()


def test_whole_logits(benchmark, inputs) -> None:
    benchmark.pedantic(whole_logits, inputs, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("chunk", [64, 128, 512])
def test_chunked_logprob(benchmark, inputs, chunk: int) -> None:
    benchmark.pedantic(chunked, (*inputs, chunk), rounds=3, warmup_rounds=1)
