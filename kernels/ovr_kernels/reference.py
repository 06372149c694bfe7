"""Each operator in plain PyTorch: the one statement of its mathematics.

Used by the CPU path, by tests and by benchmarks. Depends on torch alone.

Axes: T packed tokens · R rows the head runs on · H hidden · V vocabulary (this rank's shard where
a group is given) · S sequences · N attention heads · D head dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _LinearLogprob(torch.autograd.Function):
    """Log-prob and entropy of targets under ``softmax(hidden @ weight.T / temperature)``.

    Saves only the log-sum-exp and entropy of each row and recomputes the logits of a chunk in
    the backward, so at most ``chunk x V`` float32 logits exist at a time.
    """

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, targets_R, temperature, group, chunk):
        offset, parts = _shard_offset(weight_VH, group), []
        for start in range(0, max(hidden_RH.shape[0], 1), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden_RH[rows], weight_VH, temperature)
            peak = logits.amax(dim=-1)
            _reduce(peak, dist.ReduceOp.MAX, group)
            shifted = logits - peak[:, None]
            weights = shifted.exp()
            local, mine = _local(targets_R[rows], offset, weight_VH.shape[0])
            target = shifted.gather(1, local[:, None]).squeeze(1) * mine
            statistics = torch.stack([weights.sum(-1), (weights * shifted).sum(-1), target])
            _reduce(statistics, dist.ReduceOp.SUM, group)
            total, weighted, target = statistics
            entropy = total.log() - weighted / total
            parts.append(torch.stack([target - total.log(), entropy, peak + total.log()]))
        logprob_R, entropy_R, lse_R = torch.cat(parts, dim=1).unbind(0)
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, entropy_R, lse_R)
        ctx.temperature, ctx.group, ctx.chunk, ctx.offset = temperature, group, chunk, offset
        return logprob_R, entropy_R

    @staticmethod
    def backward(ctx, grad_logprob_R, grad_entropy_R):
        hidden_RH, weight_VH, targets_R, entropy_R, lse_R = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RH)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, hidden_RH.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logprobs = _logits(hidden_RH[rows], weight_VH, ctx.temperature) - lse_R[rows, None]
            probs = logprobs.exp()
            local, mine = _local(targets_R[rows], ctx.offset, weight_VH.shape[0])
            # d logprob / d z_j = [j = target] - p_j ;  d entropy / d z_j = -p_j (log p_j + H)
            grad = -grad_logprob_R[rows, None] * probs
            grad -= grad_entropy_R[rows, None] * probs * (logprobs + entropy_R[rows, None])
            grad.scatter_add_(1, local[:, None], (grad_logprob_R[rows] * mine)[:, None])
            grad /= ctx.temperature
            grad_hidden[rows] = (grad @ weight_VH.float()).to(hidden_RH.dtype)
            grad_weight += grad.t() @ hidden_RH[rows].float()
        _reduce(grad_hidden, dist.ReduceOp.SUM, ctx.group)
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None, None


def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, without ever holding ``[R, V]`` logits.

    Args:
        hidden_RH: [R, H] states that predict the targets.
        weight_VH: [V, H] output embedding; with ``tp_group`` this rank's contiguous shard.
        targets_R: [R] int64 ids in the whole vocabulary.
        temperature: logits are divided by it.
        tp_group: ranks that hold the other shards; None for a whole weight.
        chunk: rows whose logits exist at a time.

    Returns:
        log-probs [R] and entropies [R], float32 nats; both differentiable in hidden and weight.
    """
    return _LinearLogprob.apply(hidden_RH, weight_VH, targets_R, temperature, tp_group, chunk)


def _logits(hidden_RH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    return (hidden_RH.float() @ weight_VH.float().t()) / temperature


def _shard_offset(weight_VH: Tensor, group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group) * weight_VH.shape[0]


def _local(targets: Tensor, offset: int, size: int) -> tuple[Tensor, Tensor]:
    """Index of each target in this shard (0 where it is elsewhere) and whether it is here."""
    local = targets - offset
    mine = (local >= 0) & (local < size)
    return local.where(mine, 0), mine


def _reduce(tensor: Tensor, op, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)


def policy_loss(
    logprobs_R: Tensor,
    advantages_R: Tensor,
    *,
    old_logprobs_R: Tensor | None,
    clip_eps: float,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate per token (Schulman et al. 2017, eq. 7), to be summed and scaled.

    Args:
        logprobs_R: [R] fp32 nats, from the pass being trained.
        advantages_R: [R] fp32.
        old_logprobs_R: [R] fp32 nats from before the first update; None when strictly on-policy,
            where the ratio is 1 and carries the gradient of the log-prob.
        clip_eps: half-width of the clip around a ratio of 1.

    Returns:
        loss [R] and the ratio [R], fp32.
    """
    old = logprobs_R.detach() if old_logprobs_R is None else old_logprobs_R
    ratio_R = (logprobs_R - old).exp()
    clipped_R = ratio_R.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    return -torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R), ratio_R.detach()


def kl_k3(logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token: ``exp(d) - d - 1``, d = reference - policy.

    Schulman, "Approximating KL divergence" (2020), estimator k3. Nats, never negative.
    """
    difference = ref_logprobs_R - logprobs_R
    return difference.exp() - difference - 1.0


def value_loss(
    values_R: Tensor,
    returns_R: Tensor,
    *,
    old_values_R: Tensor | None = None,
    clip_eps: float | None = None,
) -> Tensor:
    """Half the squared error per token; with ``clip_eps`` the larger of unclipped and clipped.

    The clipped form keeps the value within ``clip_eps`` of ``old_values_R``, as in
    Open-Reasoner-Zero; without it this is the paper's ``(V - R)^2`` up to the factor 1/2.

    Returns:
        [R] fp32.
    """
    error_R = (values_R - returns_R).square()
    if clip_eps is not None:
        assert old_values_R is not None
        near_R = old_values_R + (values_R - old_values_R).clamp(-clip_eps, clip_eps)
        error_R = torch.maximum(error_R, (near_R - returns_R).square())
    return 0.5 * error_R


def packed_gae(
    rewards_R: Tensor, values_R: Tensor, cu_seqlens_S1: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed responses (Schulman et al. 2016, eq. 16).

    Sequence s owns tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``; the value after its last token is
    0, so every response is treated as finished.

    Args:
        rewards_R: [R] fp32, reward units; 0 except where a token is rewarded.
        values_R: [R] fp32, the critic's estimate before each token, same units.
        cu_seqlens_S1: [S + 1] integers, starts at 0 and ends at R.
        gamma: discount per token, 0..1.
        gae_lambda: bias/variance dial, 0..1.

    Returns:
        advantages [R] and returns [R], fp32; ``returns == advantages + values``.

    Raises:
        ValueError: ``cu_seqlens`` does not end at R.
    """
    ends = cu_seqlens_S1.tolist()
    if ends[0] != 0 or ends[-1] != rewards_R.numel():
        raise ValueError(f"cu_seqlens covers {ends[0]}..{ends[-1]}, not 0..{rewards_R.numel()}")
    if gamma == 1.0 and gae_lambda == 1.0:  # closed form: reward to go minus value
        returns_R = torch.empty_like(rewards_R)
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            returns_R[start:end] = rewards_R[start:end].flip(0).cumsum(0).flip(0)
        return returns_R - values_R, returns_R
    rewards, values = rewards_R.tolist(), values_R.tolist()
    advantages = [0.0] * len(rewards)
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        running, next_value = 0.0, 0.0
        for t in reversed(range(start, end)):
            delta = rewards[t] + gamma * next_value - values[t]
            running = delta + gamma * gae_lambda * running
            advantages[t], next_value = running, values[t]
    advantages_R = torch.tensor(advantages, dtype=torch.float32, device=rewards_R.device)
    return advantages_R, advantages_R + values_R


def mrope_tables(
    positions_3T: Tensor, *, base: float, head_dim: int, sections: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, head_dim / 2]`` fp32 of M-RoPE (Qwen2-VL, section 2.1).

    Frequency i of the half head turns with the time, height or width position, whichever
    ``sections`` (which sum to ``head_dim / 2``) gives it to.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_3T.device)
    inverse = 1.0 / base ** (exponents / head_dim)
    axis = torch.repeat_interleave(
        torch.arange(3, device=positions_3T.device),
        torch.tensor(sections, device=positions_3T.device),
    )
    angles = positions_3T.float()[axis].t() * inverse
    return angles.cos(), angles.sin()


def rotate(heads_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[T, N, D]`` by tables ``[T, D / 2]``, halves paired as in Llama."""
    first, second = heads_TND.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads_TND.dtype)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation in fp32, scaled in the input's dtype (as Qwen2 does)."""
    wide = hidden.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normal.to(hidden.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return torch.nn.functional.silu(gate) * up
