"""Each operator in plain PyTorch: the one statement of its mathematics.

Used by the CPU path, by tests and by benchmarks. Depends on torch alone. The operators' Triton
forms have the same names and signatures (``ovr_kernels.fused``).

Axes: T packed tokens · R rows the head runs on · H hidden · V vocabulary (this rank's shard where
a group is given) · S sequences · N attention heads · D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_kernels import checks
from ovr_kernels.objective import MAX_LOG_RATIO, PolicyObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatistics:
    """Sums over the tokens of a loss, without gradients."""

    totals: Tensor  # [4] fp32: loss before the weight, ratio, clipped, k3 KL (``objective.TOTALS``)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPolicyStatistics(PolicyStatistics):
    """Those sums, and values per token, [R] fp32, 0 where the row is ignored."""

    logprobs: Tensor  # nats
    entropies: Tensor  # nats


class _LinearLogprob(torch.autograd.Function):
    """Log-prob and entropy of targets under ``softmax(hidden @ weight.T / temperature)``.

    Saves only the log-sum-exp and entropy of each row and recomputes the logits of a chunk in
    the backward, so at most ``chunk x V`` float32 logits exist at a time. In place where it can
    be: on a CPU the passes over the logits cost more than the products (with V 32,768, H 128 and
    22 thousand rows on two cores an update took 17.6 s with 1,024 rows a chunk and new tensors).
    """

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, targets_R, temperature, group, chunk):
        offset, parts = _shard_offset(weight_VH, group), []
        weight_VH = weight_VH.detach()
        for start in range(0, max(hidden_RH.shape[0], 1), chunk):
            rows = slice(start, start + chunk)
            shifted = _logits(hidden_RH[rows], weight_VH, temperature)
            peak = shifted.amax(dim=-1)
            _reduce(peak, dist.ReduceOp.MAX, group)
            shifted -= peak[:, None]
            weights = shifted.exp()
            local, mine = _local(targets_R[rows], offset, weight_VH.shape[0])
            target = shifted.gather(1, local[:, None]).squeeze(1) * mine
            weighted = torch.linalg.vecdot(weights, shifted)
            statistics = torch.stack([weights.sum(-1), weighted, target])
            _reduce(statistics, dist.ReduceOp.SUM, group)
            total, weighted, target = statistics
            entropy = total.log() - weighted / total
            parts.append(torch.stack([target - total.log(), entropy, peak + total.log()]))
        logprob_R, entropy_R, lse_R = torch.cat(parts, dim=1).unbind(0)
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, entropy_R, lse_R)
        ctx.temperature, ctx.group, ctx.chunk, ctx.offset = temperature, group, chunk, offset
        counted = targets_R >= 0
        return logprob_R.where(counted, 0.0), entropy_R.where(counted, 0.0)

    @staticmethod
    def backward(ctx, grad_logprob_R, grad_entropy_R):
        hidden_RH, weight_VH, targets_R, entropy_R, lse_R = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RH)
        grad_weight = torch.zeros_like(weight_VH, dtype=_wide(weight_VH).dtype)
        counted = targets_R >= 0
        grad_logprob_R = grad_logprob_R.where(counted, 0.0) / ctx.temperature
        grad_entropy_R = grad_entropy_R.where(counted, 0.0) / ctx.temperature
        with_entropy = bool(grad_entropy_R.any())
        for start in range(0, hidden_RH.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            by_logprob, by_entropy = grad_logprob_R[rows], grad_entropy_R[rows]
            logprobs = _logits(hidden_RH[rows], weight_VH, ctx.temperature)
            logprobs -= lse_R[rows, None]
            # d logprob / d z_j = [j = target] - p_j ;  d entropy / d z_j = -p_j (log p_j + H)
            if with_entropy:
                probs = logprobs.exp()
                scale = logprobs.add_(entropy_R[rows, None]).mul_(by_entropy[:, None])
                grad = scale.add_(by_logprob[:, None]).mul_(probs).neg_()
            else:
                grad = logprobs.exp_().mul_(-by_logprob[:, None])
            local, mine = _local(targets_R[rows], ctx.offset, weight_VH.shape[0])
            grad.scatter_add_(1, local[:, None], (by_logprob * mine)[:, None])
            grad_hidden[rows] = (grad @ _wide(weight_VH)).to(hidden_RH.dtype)
            grad_weight.addmm_(grad.t(), _wide(hidden_RH[rows]))
        _reduce(grad_hidden, dist.ReduceOp.SUM, ctx.group)
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None, None


CHUNK_LOGITS = 2**22
"""Logits that exist at a time: 16 MiB, which stay in a CPU's cache between the passes over them."""


def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    chunk: int = 1024,
    check_targets: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target (and entropy of each row), never holding ``[R, V]`` logits.

    Args:
        hidden_RH: [R, H] states that predict the targets.
        weight_VH: [V, H] output embedding; with ``tp_group`` this rank's contiguous shard.
        targets_R: [R] int64 or int32 ids in the whole vocabulary; a negative one marks a row to
            ignore.
        temperature: logits are divided by it.
        tp_group: ranks that hold the other shards; None for a whole weight.
        return_entropy: also return the entropies.
        chunk: most rows whose logits exist at a time; fewer where they would be more than
            ``CHUNK_LOGITS``.
        check_targets: look for targets outside the vocabulary, on the device: two launches.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature not over 0.
        RuntimeError: a target is outside the vocabulary; on a GPU with a later call.

    Returns:
        log-probs [R] (and entropies [R]), float32 nats, differentiable in hidden and weight; 0
        where the row is ignored.
    """
    checks.check_rows("linear_logprob", hidden_RH, weight_VH, targets_R, temperature=temperature)
    if check_targets:
        checks.check_targets("linear_logprob", targets_R, weight_VH, tp_group)
    chunk = min(chunk, max(16, CHUNK_LOGITS // weight_VH.shape[0]))
    logprobs_R, entropies_R = _LinearLogprob.apply(
        hidden_RH, weight_VH, targets_R.long(), temperature, tp_group, chunk
    )
    return (logprobs_R, entropies_R) if return_entropy else logprobs_R


def _wide(tensor: Tensor) -> Tensor:
    """In fp32; fp64 stays."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _logits(hidden_RH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    logits = _wide(hidden_RH) @ _wide(weight_VH).t()
    return logits if temperature == 1.0 else logits.div_(temperature)


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


def check_policy_inputs(
    logprobs_R: Tensor,
    advantages_R: Tensor,
    objective: PolicyObjective,
    entropies_R: Tensor | None,
    old_logprobs_R: Tensor | None,
    rollout_logprobs_R: Tensor | None,
    ref_logprobs_R: Tensor | None,
) -> None:
    """Raises ValueError where the objective needs what was not given, or shapes differ."""
    for what, needed, given in (
        ("entropies", objective.entropy_coef != 0, entropies_R),
        ("rollout_logprobs", objective.importance_cap > 0, rollout_logprobs_R),
        ("ref_logprobs", objective.kl_coef != 0, ref_logprobs_R),
    ):
        if needed and given is None:
            raise ValueError(f"the objective needs {what}: {objective}")
    checks.per_token(
        "policy_loss",
        logprobs_R,
        advantages=advantages_R,
        old_logprobs=old_logprobs_R,
        entropies=entropies_R,
        rollout_logprobs=rollout_logprobs_R,
        ref_logprobs=ref_logprobs_R,
    )
    checks.check_floating("policy_loss", logprobs=logprobs_R)


def policy_loss(
    logprobs_R: Tensor,
    advantages_R: Tensor,
    objective: PolicyObjective,
    *,
    entropies: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | float = 1.0,
) -> tuple[Tensor, PolicyStatistics]:
    """Weighted sum of the objective over tokens.

    Args:
        logprobs_R: [R] fp32 nats, from the pass being trained.
        advantages_R: [R] fp32.
        objective: the loss of a token.
        entropies: [R] fp32 nats of the same pass, for an entropy bonus.
        old_logprobs: [R] fp32 nats from before the first update; None when strictly on-policy,
            where the ratio is 1 and carries the gradient of the log-prob.
        rollout_logprobs: [R] fp32 nats as the sampler reported them, for importance weights.
        ref_logprobs: [R] fp32 nats of the reference policy, for the KL term.
        weights: [R] fp32 or one number; a token of weight 0 counts nowhere.

    Returns:
        the loss, fp32, differentiable in log-probs and entropies; and the statistics.

    Raises:
        ValueError: the objective needs something that was not given, or an argument is not one
            number a token.
    """
    check_policy_inputs(
        logprobs_R, advantages_R, objective, entropies, old_logprobs, rollout_logprobs, ref_logprobs
    )
    weights = checks.weights_of("policy_loss", weights, logprobs_R)
    logprobs_R, advantages_R = _wide(logprobs_R), _wide(advantages_R)
    old_R = logprobs_R.detach() if old_logprobs is None else _wide(old_logprobs)
    ratio_R = (logprobs_R - old_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    near_R = ratio_R.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    if objective.kind == "ppo":
        surrogate_R = torch.minimum(ratio_R * advantages_R, near_R * advantages_R)
        if objective.dual_clip:
            bound_R = (objective.dual_clip * advantages_R).where(advantages_R < 0, -torch.inf)
            surrogate_R = surrogate_R.where(surrogate_R >= bound_R, bound_R)
        loss_R = -surrogate_R
    elif objective.kind == "cispo":
        loss_R = -near_R.detach() * advantages_R * logprobs_R
    else:
        loss_R = -advantages_R * logprobs_R
    if objective.importance_cap:
        assert rollout_logprobs is not None
        off_R = (old_R.detach() - _wide(rollout_logprobs)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        loss_R = loss_R * off_R.exp().clamp(max=objective.importance_cap)
    kl_R = torch.zeros_like(loss_R)
    if objective.kl_coef:
        assert ref_logprobs is not None
        kl_R = kl_k3(logprobs_R, _wide(ref_logprobs))
        loss_R = loss_R + objective.kl_coef * kl_R
    if objective.entropy_coef:
        assert entropies is not None
        loss_R = loss_R - objective.entropy_coef * _wide(entropies)
    if not isinstance(weights, Tensor):
        weights = torch.full_like(advantages_R, weights)
    weights = _wide(weights)
    with torch.no_grad():
        rows = torch.stack([loss_R, ratio_R, (near_R != ratio_R).to(loss_R.dtype), kl_R])
        rows = rows.where(weights != 0, 0.0)
        statistics = PolicyStatistics(totals=rows.sum(1))
    return (loss_R * weights).where(weights != 0, 0.0).sum(), statistics


def kl_k3(logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token: ``exp(d) - d - 1``, d = reference - policy.

    Schulman, "Approximating KL divergence" (2020), estimator k3. Nats, never negative. d is limited
    as log-ratios are, to ``MAX_LOG_RATIO``; a token past it has no gradient.
    """
    difference = (ref_logprobs_R - logprobs_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1.0


def gspo_loss(
    logprobs_R: Tensor,
    advantages_S: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """Group sequence policy optimization (Zheng et al. 2025, eq. 5 to 7), mean over sequences.

    The ratio is that of whole responses, to the power of 1 / length, so a token's gradient needs
    all log-probs of its response first: use it on ``linear_logprob``, whose backward makes the
    logits again (four matrix products), not on ``linear_policy_loss``.

    Args:
        logprobs_R: [R] fp32 nats of packed responses.
        advantages_S: [S] fp32, one a response.
        cu_seqlens_S1: [S + 1] integers, boundaries of the responses.
        old_logprobs: [R] fp32 nats; None when strictly on-policy.
    """
    old_R = logprobs_R.detach() if old_logprobs is None else old_logprobs
    lengths_S = torch.diff(cu_seqlens_S1).to(logprobs_R.device)
    owner_R = torch.repeat_interleave(
        torch.arange(lengths_S.numel(), device=logprobs_R.device), lengths_S
    )
    total_S = torch.zeros_like(advantages_S).index_add(0, owner_R, logprobs_R - old_R)
    ratio_S = (total_S / lengths_S).exp()
    near_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_S * advantages_S, near_S * advantages_S).mean()


def linear_policy_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    objective: PolicyObjective,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | float = 1.0,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    chunk: int = 1024,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """``policy_loss`` of ``linear_logprob``.

    Args:
        hidden_RH, weight_VH, targets_R, temperature, tp_group, chunk: as for ``linear_logprob``.
        objective, advantages, old_logprobs, rollout_logprobs, ref_logprobs, weights: as for
            ``policy_loss``; an ignored row weighs nothing.
        weight_gradient: [V, H] fp32 that the weight's gradient is added to, such as Megatron's
            ``main_grad``; the weight itself then gets none. Under ``torch.no_grad`` it is left
            alone; under activation checkpointing, which runs a forward twice, do not give one.

    Raises: see ``linear_logprob`` and ``policy_loss``.

    Returns:
        the loss, fp32, differentiable in hidden and weight; and the statistics.
    """
    name = "linear_policy_loss"
    checks.check_rows(name, hidden_RH, weight_VH, targets_R, temperature=temperature)
    checks.check_buffer(name, weight_gradient, weight_VH)
    checks.per_token(
        name, targets_R, advantages=advantages, old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs,
    )  # fmt: skip
    if check_targets:
        checks.check_targets(name, targets_R, weight_VH, tp_group)
    if weight_gradient is not None:
        buffer, leaf = weight_gradient, weight_VH.detach().requires_grad_()

        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            buffer.add_(parameter.grad)
            parameter.grad = None

        leaf.register_post_accumulate_grad_hook(add)
        weight_VH = leaf
    logprobs_R, entropies_R = linear_logprob(
        hidden_RH,
        weight_VH,
        targets_R,
        temperature=temperature,
        tp_group=tp_group,
        return_entropy=True,
        chunk=chunk,
        check_targets=False,
    )
    weights = checks.weights_of(name, weights, logprobs_R)
    if not isinstance(weights, Tensor):
        weights = torch.full_like(logprobs_R, weights)
    loss, found = policy_loss(
        logprobs_R,
        advantages,
        objective,
        entropies=entropies_R,
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
        weights=weights.where(targets_R >= 0, 0.0),
    )
    return loss, LinearPolicyStatistics(
        logprobs=logprobs_R.detach(), entropies=entropies_R.detach(), totals=found.totals
    )


def linear_cross_entropy(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    weights: Tensor | float = 1.0,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    chunk: int = 1024,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """Weighted sum of ``-log p``; arguments and results as for ``linear_policy_loss``."""
    return linear_policy_loss(
        hidden_RH,
        weight_VH,
        targets_R,
        PolicyObjective(kind="reinforce"),
        advantages=torch.ones(targets_R.shape, dtype=torch.float32, device=targets_R.device),
        weights=weights,
        temperature=temperature,
        tp_group=tp_group,
        weight_gradient=weight_gradient,
        chunk=chunk,
        check_targets=check_targets,
    )


def value_loss(
    values_R: Tensor,
    returns_R: Tensor,
    *,
    old_values: Tensor | None = None,
    clip_eps: float | None = None,
) -> Tensor:
    """Sum of half the squared errors; with ``clip_eps`` the larger of unclipped and clipped.

    The clipped form keeps the value within ``clip_eps`` of ``old_values``, as in
    Open-Reasoner-Zero; without it this is the paper's ``(V - R)^2`` up to the factor 1/2.

    Args:
        values_R, returns_R, old_values: [R], reward units; computed in fp32.
        clip_eps: None or 0: no clipping.

    Returns:
        fp32 scalar, differentiable in the values.

    Raises:
        ValueError: other shapes, clipping without old values, a negative ``clip_eps``.
    """
    checks.check_value_loss(values_R, returns_R, old_values, clip_eps)
    values_R, returns_R = _wide(values_R), _wide(returns_R)
    error_R = (values_R - returns_R).square()
    if clip_eps:
        assert old_values is not None
        old_R = _wide(old_values)
        near_R = old_R + (values_R - old_R).clamp(-clip_eps, clip_eps)
        error_R = torch.maximum(error_R, (near_R - returns_R).square())
    return 0.5 * error_R.sum()


def packed_gae(
    rewards_R: Tensor, values_R: Tensor, cu_seqlens_S1: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed responses (Schulman et al. 2016, eq. 16).

    Sequence s owns tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``; the value after its last token is
    0, so every response is treated as finished.

    Args:
        rewards_R: [R], reward units; 0 except where a token is rewarded. Computed in fp32.
        values_R: [R] fp32, the critic's estimate before each token, same units.
        cu_seqlens_S1: [S + 1] integers, starts at 0 and ends at R.
        gamma: discount per token, 0..1.
        gae_lambda: bias/variance dial, 0..1.

    Returns:
        advantages [R] and returns [R], fp32; ``returns == advantages + values``.

    Raises:
        ValueError: ``cu_seqlens`` does not end at R, other shapes, discounts outside 0..1.
    """
    checks.check_gae(rewards_R, values_R, cu_seqlens_S1, gamma, gae_lambda)
    rewards_R, values_R = _wide(rewards_R), _wide(values_R)
    ends = cu_seqlens_S1.tolist()
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


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """Inverse frequency and position axis of each rotary pair of a head."""

    inverse: Tensor  # [D / 2] fp32, inverse frequencies, radians a position
    axes: Tensor  # [D / 2] int32, which row of the positions a pair rotates with


def mrope_table(
    *, base: float, head_dim: int, sections: tuple[int, int, int], device: torch.device
) -> RotaryTable:
    """M-RoPE (Qwen2-VL, section 2.1): rotary pair i uses the time, height or width position,
    whichever ``sections`` (which sum to ``head_dim / 2``) assigns it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32)
    axes = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(sections))
    return RotaryTable((1.0 / base ** (exponents / head_dim)).to(device), axes.to(device))


def axial_table(*, base: float, head_dim: int, device: torch.device) -> RotaryTable:
    """The vision tower's 2D rotary embedding: the first half of the pairs uses a patch's row, the
    second its column."""
    quarter = head_dim // 4
    exponents = torch.arange(quarter, dtype=torch.float32) * 2
    inverse = 1.0 / base ** (exponents / (head_dim // 2))
    axes = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), quarter)
    return RotaryTable(inverse.repeat(2).to(device), axes.to(device))


def rotate(
    heads_TND: Tensor, positions_AT: Tensor, table: RotaryTable, *, rotary_heads: int
) -> Tensor:
    """Rotary embedding of the first ``rotary_heads`` heads, halves paired as in Llama.

    Args:
        heads_TND: [T, N, D]; may be overwritten.
        positions_AT: [axes, T] int64.
        table: of the rotation.
        rotary_heads: heads to rotate; the others pass through.

    Returns:
        [T, N, D].

    Raises:
        ValueError: shapes that do not fit, or more heads to rotate than there are.
    """
    checks.check_rotation(heads_TND, positions_AT, table.inverse, table.axes, rotary_heads)
    angles = positions_AT.float()[table.axes.long()].t() * table.inverse
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = _wide(heads_TND[:, :rotary_heads]).chunk(2, dim=-1)
    mixed = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([mixed.to(heads_TND.dtype), heads_TND[:, rotary_heads:]], dim=1)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, in fp32; scaled in the input's dtype (as
    Qwen2 does).

    Args:
        hidden: [..., H].
        weight: [H].
        eps: added to the mean square.

    Raises:
        ValueError: the weight is of another width, dtype or device.
    """
    checks.check_norm("rms_norm", hidden, weight, eps)
    wide = _wide(hidden)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normal.to(hidden.dtype)


def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``rms_norm`` of ``hidden + residual``, and that sum; all of one dtype."""
    checks.check_norm("add_rms_norm", hidden, weight, eps, residual)
    total = hidden + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 I] to [..., I]: ``silu(first half) * second half``.

    Raises:
        ValueError: the last axis is odd.
    """
    checks.check_gate_up(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
