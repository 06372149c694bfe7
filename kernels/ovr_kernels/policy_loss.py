"""Policy and value losses per token: loss, gradient and statistics in one launch.

Fused: ratio, clip, importance weight, KL, entropy bonus, token weight, and the sums over tokens.
Saved for the backward: the gradient itself, [R] fp32 (and one for the entropy). Counted: at most
28 bytes read and 8 written a token, against about 60 launches of the same in eager torch. Sums
are in a fixed order: each program adds its tokens, the program that finishes last adds the
programs, so two runs agree in every bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovr_kernels import checks, reference
from ovr_kernels.compiled import plain_while_compiling
from ovr_kernels.objective import KINDS, KL_ESTIMATORS, MAX_LOG_RATIO, PolicyObjective
from ovr_kernels.reference import PolicyStatistics, check_policy_inputs

BLOCK = 1024


@triton.jit
def _sum_in_order(partial, counter, totals, values: tl.constexpr, programs, BLOCK: tl.constexpr):
    """The last program to get here adds all programs' sums, in their order."""
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == programs - 1:
        for value in tl.static_range(values):
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, programs, BLOCK):
                program = start + tl.arange(0, BLOCK)
                total += tl.load(
                    partial + value * programs + program,
                    mask=program < programs,
                    other=0.0,
                    cache_modifier=".cg",  # written by other programs: not from this one's L1
                )
            tl.store(totals + value, tl.sum(total))


@triton.jit
def _surrogate(
    logprob, old, advantage, clip_low, clip_high, dual_clip, max_log_ratio,
    KIND: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Loss of each token, its derivative by the log-prob, ratio, and 1 where it left the clip."""
    log_ratio = tl.minimum(tl.maximum(logprob - old, -max_log_ratio), max_log_ratio)
    ratio = tl.exp(log_ratio)
    near = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    clipped = tl.where(near == ratio, 0.0, 1.0)
    if KIND == 0:
        surrogate = tl.minimum(ratio * advantage, near * advantage)
        moves = (ratio * advantage <= near * advantage) & (log_ratio == logprob - old)
        if DUAL:
            bound = tl.where(advantage < 0, dual_clip * advantage, float("-inf"))
            moves = moves & (surrogate >= bound)
            surrogate = tl.maximum(surrogate, bound)
        loss = -surrogate
        slope = tl.where(moves, -ratio * advantage, 0.0)
    elif KIND == 1:
        loss = -near * advantage * logprob
        slope = -near * advantage
    else:
        loss = -advantage * logprob
        slope = -advantage
    return loss, slope, ratio, clipped


@triton.jit
def _divergence(logprob, reference, kl_coef, max_log_ratio, KL: tl.constexpr):
    """Estimate of the KL to the reference, and its derivative by the log-prob times ``kl_coef``."""
    distance = reference - logprob
    difference = tl.minimum(tl.maximum(distance, -max_log_ratio), max_log_ratio)
    if KL == 1:
        kl = -difference
        push = tl.where(difference == distance, kl_coef, 0.0)
    elif KL == 2:
        kl = 0.5 * difference * difference
        push = tl.where(difference == distance, -kl_coef * difference, 0.0)
    else:
        growth = tl.exp(difference)
        kl = growth - difference - 1.0
        push = tl.where(difference == distance, kl_coef * (1.0 - growth), 0.0)
    return kl, push


@triton.jit
def policy_kernel(
    logprobs,
    entropies,
    advantages,
    old_logprobs,
    rollout_logprobs,
    ref_logprobs,
    weights,
    logprob_gradients,  # [R] out, of the weighted sum
    entropy_gradients,  # [R] out
    partial,  # [5, programs]
    counter,  # [1] int32, 0
    totals,  # [5] out: weighted loss, then the sums of loss, ratio, clipped, kl
    tokens,
    programs,
    weight,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    kl_coef,
    entropy_coef,
    max_log_ratio,
    KIND: tl.constexpr,  # 0 ppo, 1 cispo, 2 reinforce
    HAS_OLD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    DUAL: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    KL: tl.constexpr,  # 0 none, 1 to 3 the estimator
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every array is [R] fp32, one number a token."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = token < tokens
    logprob = tl.load(logprobs + token, mask=here, other=0.0)
    advantage = tl.load(advantages + token, mask=here, other=0.0)
    old = logprob
    if HAS_OLD:
        old = tl.load(old_logprobs + token, mask=here, other=0.0)
    loss, slope, ratio, clipped = _surrogate(
        logprob, old, advantage, clip_low, clip_high, dual_clip, max_log_ratio, KIND, DUAL
    )
    if IMPORTANCE:
        sampled = tl.load(rollout_logprobs + token, mask=here, other=0.0)
        off = tl.minimum(tl.maximum(old - sampled, -max_log_ratio), max_log_ratio)
        factor = tl.minimum(tl.exp(off), importance_cap)
        loss *= factor
        slope *= factor
    kl = tl.zeros([BLOCK], tl.float32)
    if KL:
        reference = tl.load(ref_logprobs + token, mask=here, other=0.0)
        kl, push = _divergence(logprob, reference, kl_coef, max_log_ratio, KL)
        loss += kl_coef * kl
        slope += push
    if ENTROPY:
        loss -= entropy_coef * tl.load(entropies + token, mask=here, other=0.0)
    share = tl.zeros([BLOCK], tl.float32) + weight
    if HAS_WEIGHTS:
        share = tl.load(weights + token, mask=here, other=0.0)
    counts = here & (share != 0.0)
    if ENTROPY:
        tl.store(entropy_gradients + token, tl.where(counts, -entropy_coef * share, 0.0), mask=here)
    tl.store(logprob_gradients + token, tl.where(counts, slope * share, 0.0), mask=here)
    loss = tl.where(counts, loss, 0.0)
    ratio = tl.where(counts, ratio, 0.0)
    clipped = tl.where(counts, clipped, 0.0)
    kl = tl.where(counts, kl, 0.0)
    own = partial + tl.program_id(0)
    tl.store(own, tl.sum(tl.where(counts, loss * share, 0.0)))
    tl.store(own + programs, tl.sum(loss))
    tl.store(own + 2 * programs, tl.sum(ratio))
    tl.store(own + 3 * programs, tl.sum(clipped))
    tl.store(own + 4 * programs, tl.sum(kl))
    tl.debug_barrier()
    _sum_in_order(partial, counter, totals, 5, programs, BLOCK)


@triton.jit
def value_kernel(
    values,
    returns,
    old_values,
    gradients,  # [R] out
    partial,  # [1, programs]
    counter,
    totals,  # [1] out
    tokens,
    programs,
    clip_eps,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Half the squared error per token; with CLIP the larger of unclipped and clipped."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = token < tokens
    value = tl.load(values + token, mask=here, other=0.0)
    wanted = tl.load(returns + token, mask=here, other=0.0)
    error = value - wanted
    loss, slope = 0.5 * error * error, error
    if CLIP:
        old = tl.load(old_values + token, mask=here, other=0.0)
        moved = tl.minimum(tl.maximum(value - old, -clip_eps), clip_eps)
        near = old + moved - wanted
        near_loss = 0.5 * near * near
        inside = moved == value - old
        slope = tl.where(near_loss > loss, tl.where(inside, near, 0.0), slope)
        loss = tl.maximum(loss, near_loss)
    tl.store(gradients + token, slope, mask=here)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(here, loss, 0.0)))
    tl.debug_barrier()
    _sum_in_order(partial, counter, totals, 1, programs, BLOCK)


def policy_gradients(
    logprobs: Tensor,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    entropies: Tensor | None,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor | None, PolicyStatistics]:
    """Weighted loss, its gradients by log-prob and entropy, and the statistics; no autograd."""
    check_policy_inputs(
        logprobs, advantages, objective, entropies, old_logprobs, rollout_logprobs, ref_logprobs
    )
    weights = checks.weights_of("policy_loss", weights, logprobs)
    tokens, device = logprobs.numel(), logprobs.device
    programs = max(1, triton.cdiv(tokens, BLOCK))
    logprob_gradients = torch.empty(tokens, dtype=torch.float32, device=device)
    bonus = objective.entropy_coef != 0
    entropy_gradients = torch.empty_like(logprob_gradients) if bonus else None
    totals = torch.empty(5, dtype=torch.float32, device=device)
    weighed = isinstance(weights, Tensor)
    nothing = logprobs

    def array(tensor: Tensor | None) -> Tensor:
        return nothing if tensor is None else tensor.detach().float().contiguous()

    policy_kernel[(programs,)](
        array(logprobs),
        array(entropies),
        array(advantages),
        array(old_logprobs),
        array(rollout_logprobs),
        array(ref_logprobs),
        array(weights if isinstance(weights, Tensor) else None),
        logprob_gradients,
        logprob_gradients if entropy_gradients is None else entropy_gradients,
        torch.empty(5, programs, dtype=torch.float32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        totals,
        tokens,
        programs,
        0.0 if isinstance(weights, Tensor) else float(weights),
        objective.clip_low,
        objective.clip_high,
        objective.dual_clip,
        objective.importance_cap,
        objective.kl_coef,
        objective.entropy_coef,
        MAX_LOG_RATIO,
        KIND=KINDS.index(objective.kind),
        HAS_OLD=old_logprobs is not None,
        HAS_WEIGHTS=weighed,
        DUAL=objective.dual_clip > 0,
        IMPORTANCE=objective.importance_cap > 0,
        KL=1 + KL_ESTIMATORS.index(objective.kl_estimator) if objective.kl_coef else 0,
        ENTROPY=bonus,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    statistics = PolicyStatistics(totals=totals[1:])
    return totals[0], logprob_gradients, entropy_gradients, statistics


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropies, advantages, objective, options, box):
        loss, by_logprob, by_entropy, statistics = policy_gradients(
            logprobs, advantages, objective, entropies=entropies, **options
        )
        ctx.save_for_backward(by_logprob, by_entropy)
        ctx.dtypes = logprobs.dtype, None if entropies is None else entropies.dtype
        box.append(statistics)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        by_logprob, by_entropy = ctx.saved_tensors
        return (
            (upstream * by_logprob).to(ctx.dtypes[0]),
            None if by_entropy is None else (upstream * by_entropy).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


@plain_while_compiling(reference.policy_loss)
def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    entropies: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | float = 1.0,
) -> tuple[Tensor, PolicyStatistics]:
    """See ``reference.policy_loss``."""
    if logprobs.dim() != 1:
        checks.fail("policy_loss", f"logprobs {checks.shape_of(logprobs)} must be [R]")
    box: list[PolicyStatistics] = []
    options = dict(
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
        weights=weights,
    )
    loss = _PolicyLoss.apply(logprobs, entropies, advantages, objective, options, box)
    return loss, box[0]


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, returns, old_values, clip_eps):
        tokens, device = values.numel(), values.device
        programs = max(1, triton.cdiv(tokens, BLOCK))
        gradients = torch.empty(tokens, dtype=torch.float32, device=device)
        total = torch.empty(1, dtype=torch.float32, device=device)
        value_kernel[(programs,)](
            wide := values.detach().float().contiguous(),
            returns.detach().float().contiguous(),
            wide if old_values is None else old_values.detach().float().contiguous(),
            gradients,
            torch.empty(1, programs, dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            total,
            tokens,
            programs,
            clip_eps or 0.0,
            CLIP=bool(clip_eps),
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
        ctx.save_for_backward(gradients)
        ctx.values = values.shape, values.dtype
        return total[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradients,) = ctx.saved_tensors
        shape, dtype = ctx.values
        return (upstream * gradients).view(shape).to(dtype), None, None, None


@plain_while_compiling(reference.value_loss)
def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip_eps: float | None = None,
) -> Tensor:
    """See ``reference.value_loss``."""
    checks.check_value_loss(values, returns, old_values, clip_eps)
    return _ValueLoss.apply(values, returns, old_values, clip_eps)
