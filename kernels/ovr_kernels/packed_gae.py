"""Generalized advantage estimation of packed responses: a segmented reverse scan.

Fused: temporal differences, discounted sum from the end of each response, returns. Nothing is
saved; there is no backward. Counted: 8 bytes read and 8 written a token. One program a response
walks from its end in blocks, so the longest response bounds the time of a batch, not its sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovr_kernels import checks


@triton.jit
def _after(factor_late, value_late, factor_early, value_early):
    """x -> value_early + factor_early (value_late + factor_late x): later tokens come first."""
    return factor_early * factor_late, value_early + factor_early * value_late


@triton.jit
def gae_kernel(
    rewards,  # [R] fp32
    values,  # [R] fp32
    ends,  # [S + 1] int64
    advantages,  # [R] fp32 out
    returns,  # [R] fp32 out
    gamma,
    decay,  # gamma x lambda
    UNDISCOUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One response."""
    start = tl.load(ends + tl.program_id(0))
    end = tl.load(ends + tl.program_id(0) + 1)
    carried = 0.0
    for block in range(tl.cdiv((end - start).to(tl.int32), BLOCK)):
        # Place 0 of a block is its latest token.
        token = end - 1 - block * BLOCK - tl.arange(0, BLOCK)
        here = token >= start
        reward = tl.load(rewards + token, mask=here, other=0.0)
        value = tl.load(values + token, mask=here, other=0.0)
        if UNDISCOUNTED:  # reward to go; the values cancel, and so do not round
            factor = tl.full([BLOCK], 1.0, tl.float32)
            step = reward
        else:
            following = tl.load(values + token + 1, mask=here & (token + 1 < end), other=0.0)
            factor = tl.where(here, decay, 1.0)
            step = tl.where(here, reward + gamma * following - value, 0.0)
        factor, step = tl.associative_scan((factor, step), 0, _after)
        found = step + factor * carried
        last = tl.arange(0, BLOCK) == BLOCK - 1
        carried = tl.sum(tl.where(last, found, 0.0))
        if UNDISCOUNTED:
            tl.store(returns + token, found, mask=here)
            tl.store(advantages + token, found - value, mask=here)
        else:
            tl.store(returns + token, found + value, mask=here)
            tl.store(advantages + token, found, mask=here)


def packed_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """See ``reference.packed_gae``."""
    checks.check_gae(rewards, values, cu_seqlens, gamma, gae_lambda)
    rewards, values = rewards.detach().float(), values.detach().float()
    if rewards.is_cuda and not cu_seqlens.is_cuda:
        cu_seqlens = cu_seqlens.pin_memory().to(rewards.device, non_blocking=True)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    sequences = cu_seqlens.numel() - 1
    if sequences:
        gae_kernel[(sequences,)](
            rewards.contiguous(),
            values.contiguous(),
            cu_seqlens.to(rewards.device, torch.int64),
            advantages,
            returns,
            gamma,
            gamma * gae_lambda,
            UNDISCOUNTED=gamma == 1.0 and gae_lambda == 1.0,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return advantages, returns
