"""Each operator in plain PyTorch: the one statement of its mathematics.

Used by the CPU path, by tests and by benchmarks. Depends on torch alone. The operators' Triton
forms have the same names and signatures (``ovr_kernels.fused``).

Axes: T packed tokens · R rows the head runs on · H hidden · V vocabulary (this rank's shard where
a group is given) · S sequences · N attention heads · D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    entropies: Tensor | None  # nats; None where they were not asked for

    def shaped(self, shape: torch.Size) -> LinearPolicyStatistics:
        """With values per token in the shape of the call's targets."""
        entropies = None if self.entropies is None else self.entropies.view(shape)
        return LinearPolicyStatistics(
            logprobs=self.logprobs.view(shape), entropies=entropies, totals=self.totals
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowValues:
    """What a row's logits z are summed up to, each [R] fp32 and 0 where the row is ignored; z is
    ``softcap(hidden @ weight.T + bias) / temperature``."""

    logprobs: Tensor  # nats, of the targets
    entropies: Tensor  # nats
    normalizers: Tensor  # nats, log-sum-exp of z
    means: Tensor  # of z over the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitOptions:
    """How logits are made of hidden states, and where the vocabulary's shards are."""

    temperature: float = 1.0
    softcap: float | None = None  # logits become ``softcap * tanh(logits / softcap)`` (Gemma 2)
    group: dist.ProcessGroup | None = None
    chunk: int = 1024


class _LinearRows(torch.autograd.Function):
    """``RowValues``, differentiable.

    Saves only the log-sum-exp and entropy of each row and recomputes the logits of a chunk in
    the backward, ``CHUNK_LOGITS`` at a time: a chunk's rows by all of the vocabulary, or by one
    block of it after the other. In place where it can be: on a CPU the
    passes over the logits cost more than the products (with V 32,768, H 128 and 22 thousand rows on
    two cores an update took 17.6 s with 1,024 rows a chunk and new tensors).
    """

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, bias_V, targets_R, options, mean):
        group, parts = options.group, []
        weight_VH = weight_VH.detach()
        for start in range(0, max(hidden_RH.shape[0], 1), options.chunk):
            rows = slice(start, start + options.chunk)
            peak, statistics = _row_sums(
                hidden_RH[rows], weight_VH, bias_V, targets_R[rows], options, mean=mean
            )
            _reduce(statistics, dist.ReduceOp.SUM, group)
            total, weighted, target, average = statistics
            entropy = total.log() - weighted / total
            average = average / _shards(group)
            parts.append(torch.stack([target - total.log(), entropy, peak + total.log(), average]))
        values = torch.cat(parts, dim=1)
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_R, *values[:3])
        ctx.options = options
        ctx.set_materialize_grads(False)
        return tuple(value.where(targets_R >= 0, 0.0) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *by):
        hidden_RH, weight_VH, bias_V, targets_R, *known = ctx.saved_tensors
        with torch.autocast(hidden_RH.device.type, enabled=False):
            gradients = rows_backward(
                hidden_RH, weight_VH, bias_V, targets_R, known, by, ctx.options,
                wanted=tuple(ctx.needs_input_grad[:3]),
            )  # fmt: skip
        return *gradients, None, None, None


def rows_backward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    known: List[Tensor],
    by: List[Tensor | None],
    options: LogitOptions,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that are ``wanted``.

    Args:
        known: log-probs, entropies and normalizers of the forward, [R] each.
        by: the loss's gradients by ``RowValues``, in their order; None: it has none.
    """
    counted = targets_R >= 0
    entropy_R, lse_R = known[1], known[2].where(counted, 1e30)  # ignored: probabilities of 0
    alone = _shards(options.group) == 1  # else they are added in fp32
    grad_hidden = torch.empty_like(hidden_RH if alone else _wide(hidden_RH)) if wanted[0] else None
    grad_weight = torch.zeros_like(_wide(weight_VH)) if wanted[1] else None
    grad_bias = torch.zeros_like(_wide(bias_V)) if bias_V is not None and wanted[2] else None
    by_logprob, by_entropy, by_normalizer, by_mean = (
        None if each is None else each.where(counted, 0.0) / options.temperature for each in by
    )
    if by_logprob is None:
        by_logprob = torch.zeros_like(lse_R)
    by_all = by_logprob if by_normalizer is None else by_logprob - by_normalizer
    blocks = _blocks(weight_VH, options)
    for start in range(0, hidden_RH.shape[0], options.chunk):
        rows, of_rows = slice(start, start + options.chunk), None
        for block in blocks:
            logprobs = _logits(hidden_RH[rows], weight_VH, bias_V, options, block)
            damped = _softcap_slope(logprobs, options)
            logprobs -= lse_R[rows, None]
            # d logprob / d z_j = [j = target] - p_j ;  d entropy / d z_j = -p_j (log p_j + H)
            # d normalizer / d z_j = p_j ;  d mean / d z_j = 1 / V
            if by_entropy is not None:
                probs = logprobs.exp()
                scale = logprobs.add_(entropy_R[rows, None]).mul_(by_entropy[rows, None])
                grad = scale.add_(by_all[rows, None]).mul_(probs).neg_()
            else:
                grad = logprobs.exp_().mul_(-by_all[rows, None])
            local, mine = _local(targets_R[rows], weight_VH, options.group, block)
            grad.scatter_add_(1, local[:, None], (by_logprob[rows] * mine)[:, None])
            if by_mean is not None:
                grad += by_mean[rows, None] / (weight_VH.shape[0] * _shards(options.group))
            if damped is not None:
                grad *= damped
            if grad_hidden is not None:
                of_block = grad @ _wide(weight_VH[block])
                of_rows = of_block if of_rows is None else of_rows.add_(of_block)
            if grad_weight is not None:
                grad_weight[block].addmm_(grad.t(), _wide(hidden_RH[rows]))
            if grad_bias is not None:
                grad_bias[block] += grad.sum(0)
        if grad_hidden is not None and of_rows is not None:
            grad_hidden[rows] = of_rows.to(grad_hidden.dtype)
    if grad_hidden is not None:
        _reduce(grad_hidden, dist.ReduceOp.SUM, options.group)
    kind = hidden_RH.dtype
    hidden_gradient, weight_gradient, bias_gradient = (
        None if each is None else each.to(kind) for each in (grad_hidden, grad_weight, grad_bias)
    )
    return hidden_gradient, weight_gradient, bias_gradient


BANNED = -1e30
"""The logit of a word whose bias is -inf."""

CHUNK_LOGITS = 2**20
"""Logits of an array that exists at a time: 4 MiB, which stay in a CPU's cache between the passes
over them. There are two or three such arrays."""

CHUNK_ROWS = 512
"""Rows at a time where ``CHUNK_LOGITS`` are fewer rows of the whole vocabulary: each chunk reads
the weight three times and its gradient twice, and with few rows its products wait for that."""


def _blocks(weight_VH: Tensor, options: LogitOptions) -> list[slice]:
    """The vocabulary in blocks whose logits of a chunk's rows are at most ``CHUNK_LOGITS``."""
    size = len(weight_VH)
    width = max(1, CHUNK_LOGITS // options.chunk) if options.chunk * size > CHUNK_LOGITS else size
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _row_sums(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    options: LogitOptions,
    *,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's largest logit, over all shards, and [4, R] of this shard: the sum of weights w =
    exp(z - largest), that of w (z - largest), the target's z - largest, the mean of z."""
    blocks, size = _blocks(weight_VH, options), len(weight_VH)
    peak = sums = None
    for block in blocks:
        shifted = _logits(hidden_RH, weight_VH, bias_V, options, block)
        top = shifted.amax(dim=-1)
        if len(blocks) == 1:
            _reduce(top, dist.ReduceOp.MAX, options.group)
        elif peak is not None:
            top = torch.maximum(top, peak)
        average = shifted.mean(-1) if mean else torch.zeros_like(top)
        average = average * ((block.stop - block.start) / size)
        shifted -= top[:, None]
        weights = shifted.exp()
        local, mine = _local(targets_R, weight_VH, options.group, block)
        target = shifted.gather(1, local[:, None]).squeeze(1).where(mine, 0.0)
        weighted = torch.linalg.vecdot(weights, shifted)
        found = torch.stack([weights.sum(-1), weighted, target, average])
        if peak is not None and sums is not None:
            found += _moved(sums, peak - top, targets_R, weight_VH, options, slice(0, block.start))
        peak, sums = top, found
    assert peak is not None
    assert sums is not None
    if len(blocks) > 1 and _shards(options.group) > 1:
        top = peak.clone()
        _reduce(top, dist.ReduceOp.MAX, options.group)
        sums = _moved(sums, peak - top, targets_R, weight_VH, options, slice(0, size))
        peak = top
    return peak, sums


def _moved(
    sums: Tensor,
    by: Tensor,
    targets_R: Tensor,
    weight_VH: Tensor,
    options: LogitOptions,
    block: slice,
) -> Tensor:
    """``_row_sums`` of a block, relative to a logit that is larger by ``-by``."""
    total, weighted, target, average = sums
    _, mine = _local(targets_R, weight_VH, options.group, block)
    scale = by.exp()
    return torch.stack(
        [scale * total, scale * (weighted + by * total), target + by * mine, average]
    )


def linear_rows(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    options: LogitOptions,
    *,
    entropy: bool = True,
    mean: bool = False,
) -> RowValues:
    """Differentiable values of each row, of arguments that have been checked.

    Args:
        entropy: entropies are wanted; else they may be 0.
        mean: so are means.
    """
    del entropy  # costs nothing here
    if torch.compiler.is_compiling():
        from ovr_kernels import compiled

        return compiled.linear_rows(
            hidden_RH, weight_VH, bias_V, targets_R, options, entropy=True, mean=mean, fused=False
        )
    chunk = min(options.chunk, max(CHUNK_ROWS, CHUNK_LOGITS // weight_VH.shape[0]))
    chunk = min(chunk, max(1, hidden_RH.shape[0]))
    with torch.autocast(hidden_RH.device.type, enabled=False):
        logprobs, entropies, normalizers, means = _LinearRows.apply(
            hidden_RH, weight_VH, bias_V, targets_R.long(), replace(options, chunk=chunk), mean
        )
    return RowValues(logprobs=logprobs, entropies=entropies, normalizers=normalizers, means=means)


def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    chunk: int = 1024,
    check_targets: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target (and entropy of each row), never holding ``[R, V]`` logits.

    Args:
        hidden_RH: [R, H] or [..., H] states that predict the targets.
        weight_VH: [V, H] output embedding; with ``tp_group`` this rank's contiguous shard.
        targets_R: [R] or [...] int64 or int32 ids in the whole vocabulary; a negative one marks a
            row to ignore.
        bias: [V], added to the logits; sharded as the weight is. -inf bans a word (not under a
            softcap, and with label smoothing the loss is out of all bounds).
        temperature: logits are divided by it.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the temperature.
        tp_group: ranks that hold the other shards; None for a whole weight.
        return_entropy: also return the entropies.
        chunk: most rows whose logits exist at a time; fewer, or parts of them, where they would be
            more than ``CHUNK_LOGITS``.
        check_targets: look for targets outside the vocabulary, on the device: two launches.

    Under ``torch.autocast`` the operands are cast as ``torch.nn.functional.linear`` casts them.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature not over 0.
        RuntimeError: a target is outside the vocabulary; on a GPU with a later call.

    Returns:
        log-probs (and entropies) in the targets' shape, float32 nats, differentiable in hidden,
        weight and bias; 0 where the row is ignored.
    """
    rows = checks.head_rows(
        "linear_logprob", hidden_RH, weight_VH, targets_R, bias, temperature=temperature,
        softcap=softcap, group=tp_group, check_targets=check_targets,
    )  # fmt: skip
    options = LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk)
    found = linear_rows(rows.hidden, rows.weight, rows.bias, rows.targets, options)
    logprobs = found.logprobs.view(targets_R.shape)
    return (logprobs, found.entropies.view(targets_R.shape)) if return_entropy else logprobs


def _wide(tensor: Tensor) -> Tensor:
    """In fp32; fp64 stays."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _logits(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    options: LogitOptions,
    block: slice,
) -> Tensor:
    logits = _wide(hidden_RH) @ _wide(weight_VH[block]).t()
    if bias_V is not None:  # a banned word's is -inf, and -inf less -inf would be NaN
        logits += _wide(bias_V[block]).clamp(min=BANNED)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits if options.temperature == 1.0 else logits.div_(options.temperature)


def _softcap_slope(logits: Tensor, options: LogitOptions) -> Tensor | None:
    """Derivative of the capped logits by the uncapped ones: ``1 - tanh^2``."""
    if options.softcap is None:
        return None
    return 1.0 - (logits * (options.temperature / options.softcap)).square()


def _shards(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _local(
    targets: Tensor, weight_VH: Tensor, group: dist.ProcessGroup | None, block: slice
) -> tuple[Tensor, Tensor]:
    """Index of each target in a block of this shard (0 where it is elsewhere) and whether it is
    there."""
    first = block.start + (0 if group is None else dist.get_rank(group) * weight_VH.shape[0])
    local = targets - first
    mine = (local >= 0) & (local < block.stop - block.start)
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
        kl_R = kl_estimate(logprobs_R, _wide(ref_logprobs), objective.kl_estimator)
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


def kl_estimate(logprobs_R: Tensor, ref_logprobs_R: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) per token, nats, of d = reference - policy: "k1" ``-d``,
    "k2" ``d^2 / 2``, "k3" ``exp(d) - d - 1``.

    Schulman, "Approximating KL divergence" (2020). d is limited as log-ratios are, to
    ``MAX_LOG_RATIO``; a token past it has no gradient.
    """
    difference = (ref_logprobs_R - logprobs_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return difference.exp() - difference - 1.0


def gspo_loss(
    logprobs_R: Tensor,
    advantages_S: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Tensor | float | None = None,
) -> Tensor:
    """Group sequence policy optimization (Zheng et al. 2025, eq. 5 to 7): the ratio is that of
    whole responses, to the power of 1 / length.

    Args:
        logprobs_R: [R] fp32 nats of packed responses.
        advantages_S: [S] fp32, one a response.
        cu_seqlens_S1: [S + 1] integers, boundaries of the responses; an empty one counts nothing.
        old_logprobs: [R] fp32 nats; None when strictly on-policy.
        weights: [S] or one number, what each response counts; None: 1 / S, the mean.

    Raises:
        ValueError: shapes that do not fit, bounds out of range.
    """
    checks.check_gspo(
        logprobs_R, advantages_S, cu_seqlens_S1, old_logprobs, clip_low, clip_high, weights
    )
    loss, by_logprob_R = gspo_gradients(
        logprobs_R.detach(), advantages_S, cu_seqlens_S1, old_logprobs=old_logprobs,
        clip_low=clip_low, clip_high=clip_high, weights=weights,
    )  # fmt: skip
    return cast(Tensor, _KnownGradient.apply(logprobs_R, loss, by_logprob_R))


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient was made with it."""

    @staticmethod
    def forward(ctx, logprobs, loss, gradient):
        ctx.save_for_backward(gradient)
        ctx.dtype = logprobs.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(ctx.dtype), None, None


def gspo_gradients(
    logprobs_R: Tensor,
    advantages_S: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    old_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    weights: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """``gspo_loss`` and its gradient by the log-probs, [R]: each token of a response has the
    response's ratio times its advantage over its length, or 0 where that is clipped."""
    if weights is None:
        weights = 1.0 / max(1, advantages_S.numel())
    lengths_S = torch.diff(_beside(cu_seqlens_S1, logprobs_R))
    owner_R = torch.repeat_interleave(
        torch.arange(lengths_S.numel(), device=logprobs_R.device), lengths_S,
        output_size=logprobs_R.numel(),
    )  # fmt: skip
    advantages_S = _wide(advantages_S)
    moved_R = torch.zeros_like(logprobs_R) if old_logprobs is None else logprobs_R - old_logprobs
    # In a fixed order: ranks that differ in a bit would clip other responses.
    moved_R = moved_R.to(advantages_S.dtype)
    total_S = torch.segment_reduce(moved_R, "sum", lengths=lengths_S.long(), unsafe=True)
    mean_S = total_S / lengths_S.clamp(min=1)
    ratio_S = mean_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    near_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high)
    counted_S = torch.where(lengths_S > 0, 1.0, 0.0) * weights
    loss_S = -torch.minimum(ratio_S * advantages_S, near_S * advantages_S) * counted_S
    moves_S = (ratio_S * advantages_S <= near_S * advantages_S) & (mean_S.abs() <= MAX_LOG_RATIO)
    slope_S = -(ratio_S * advantages_S * counted_S / lengths_S.clamp(min=1)).where(moves_S, 0.0)
    return loss_S.sum(), slope_S[owner_R]


def _beside(tensor: Tensor, other: Tensor) -> Tensor:
    """On the other's device; to a GPU from page-locked memory, so that the host does not wait."""
    pinned = other.is_cuda and not tensor.is_cuda
    return (
        tensor.pin_memory().to(other.device, non_blocking=True)
        if pinned
        else tensor.to(other.device)
    )


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
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    return_entropy: bool = True,
    chunk: int = 1024,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """``policy_loss`` of ``linear_logprob``.

    Args:
        hidden_RH, weight_VH, targets_R, bias, temperature, softcap, tp_group, chunk: as for
            ``linear_logprob``.
        objective, advantages, old_logprobs, rollout_logprobs, ref_logprobs, weights: as for
            ``policy_loss``, in the targets' shape; an ignored row weighs nothing.
        weight_gradient: [V, H] fp32 that the weight's gradient is added to, such as Megatron's
            ``main_grad``; the weight itself then gets none. Under ``torch.no_grad`` it is left
            alone; under activation checkpointing, which runs a forward twice, it is refused.
        return_entropy: the statistics have entropies; else those are None, unless the objective
            needs them.

    Raises: see ``linear_logprob`` and ``policy_loss``.

    Returns:
        the loss, fp32, differentiable in hidden, weight and bias; and the statistics.
    """
    name = "linear_policy_loss"
    rows = checks.head_rows(
        name, hidden_RH, weight_VH, targets_R, bias, temperature=temperature, softcap=softcap,
        group=tp_group, check_targets=check_targets,
    )  # fmt: skip
    checks.check_buffer(name, weight_gradient, weight_VH, hidden_RH)
    tokens = checks.flat_tokens(
        name, targets_R, advantages=advantages, old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs,
    )  # fmt: skip
    share = checks.row_weights(name, weights, targets_R, rows)
    found = linear_rows(
        rows.hidden,
        _into_buffer(rows.weight, weight_gradient),
        rows.bias,
        rows.targets,
        LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk),
    )
    loss, statistics = policy_loss(
        found.logprobs,
        tokens.pop("advantages"),
        objective,
        entropies=found.entropies,
        weights=share,
        **tokens,
    )
    wanted = return_entropy or objective.entropy_coef != 0
    return loss, LinearPolicyStatistics(
        logprobs=found.logprobs.detach(),
        entropies=found.entropies.detach() if wanted else None,
        totals=statistics.totals,
    ).shaped(targets_R.shape)


def _into_buffer(weight_VH: Tensor, buffer: Tensor | None) -> Tensor:
    """A leaf whose gradient goes to the buffer, where there is one."""
    if buffer is None:
        return weight_VH
    leaf = weight_VH.detach().requires_grad_()

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        buffer.add_(parameter.grad)
        parameter.grad = None

    leaf.register_post_accumulate_grad_hook(add)
    return leaf


def linear_cross_entropy(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    weights: Tensor | float = 1.0,
    reduction: str = "sum",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int = 1024,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """Cross-entropy of the targets, never holding the logits.

    A row's loss is ``(1 - s) (-log p) + s mean_j(-log p_j) + z_loss * lse^2``, s the label
    smoothing (Szegedy et al. 2016, section 7), lse the log-sum-exp of its logits (z-loss: PaLM,
    Chowdhery et al. 2022, section 5).

    Args:
        hidden_RH, weight_VH, targets_R, bias, temperature, softcap, tp_group, weight_gradient,
            return_entropy, chunk, check_targets: as for ``linear_policy_loss``.
        weights: in the targets' shape or one number, what each row's loss counts.
        reduction: "sum": of the weighted losses; "mean": that sum over the sum of the weights (0
            where nothing counts; torch has NaN);
            "none": the weighted losses in the targets' shape (a fourth product, and no
            ``weight_gradient``).
        ignore_index: rows of this target, and of negative ones, count nothing.
        label_smoothing: 0..1.
        z_loss: its coefficient.

    Returns:
        the loss, fp32; and the statistics, of which "loss" is the sum before the weights.
    """
    call = checks.cross_entropy_call(
        hidden_RH, weight_VH, targets_R, bias, weights=weights, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        temperature=temperature, softcap=softcap, group=tp_group,
        weight_gradient=weight_gradient, check_targets=check_targets,
    )  # fmt: skip
    rows = call.rows
    found = linear_rows(
        rows.hidden,
        _into_buffer(rows.weight, weight_gradient),
        rows.bias,
        rows.targets,
        LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk),
        mean=label_smoothing > 0,
    )
    return cross_entropy_of(
        found, call.weights, targets_R.shape, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=z_loss, return_entropy=return_entropy,
    )  # fmt: skip


def cross_entropy_of(
    found: RowValues,
    weights_R: Tensor,
    shape: torch.Size,
    *,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    return_entropy: bool,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """The cross-entropy of rows whose values are known, and its statistics, in ``shape``."""
    loss_R = row_losses(found, label_smoothing, z_loss)
    weighted_R = (loss_R * weights_R).where(weights_R != 0, 0.0)
    statistics = LinearPolicyStatistics(
        logprobs=found.logprobs.detach(),
        entropies=found.entropies.detach() if return_entropy else None,
        totals=cross_entropy_totals(loss_R.detach(), weights_R),
    ).shaped(shape)
    return weighted_R.view(shape) if reduction == "none" else weighted_R.sum(), statistics


def row_losses(found: RowValues, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross-entropy of each row, [R] fp32."""
    loss_R = -found.logprobs
    if label_smoothing:
        even_R = found.normalizers - found.means
        loss_R = (1.0 - label_smoothing) * loss_R + label_smoothing * even_R
    if z_loss:
        loss_R = loss_R + z_loss * found.normalizers.square()
    return loss_R


def cross_entropy_totals(loss_R: Tensor, weights_R: Tensor) -> Tensor:
    """``objective.TOTALS`` of a cross-entropy: every ratio is 1."""
    counted = weights_R != 0
    zero = torch.zeros((), dtype=loss_R.dtype, device=loss_R.device)
    loss = loss_R.where(counted, 0.0).sum()
    return torch.stack([loss, counted.sum().to(loss_R.dtype), zero, zero])


def linear_gspo_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int = 1024,
    check_targets: bool = True,
) -> tuple[Tensor, LinearPolicyStatistics]:
    """``gspo_loss`` of ``linear_logprob``, the gradients made with the loss. Three products where
    all rows are one chunk, else four: a token's gradient needs all log-probs of its response.

    Args:
        advantages, cu_seqlens, old_logprobs, clip_low, clip_high, weights: as for ``gspo_loss``.
        hidden_RH, weight_VH, targets_R, bias, temperature, softcap, tp_group, weight_gradient,
            return_entropy, chunk, check_targets: as for ``linear_policy_loss``; targets are [R].
    """
    name = "linear_gspo_loss"
    rows = checks.head_rows(
        name, hidden_RH, weight_VH, targets_R, bias, temperature=temperature, softcap=softcap,
        group=tp_group, check_targets=check_targets,
    )  # fmt: skip
    checks.check_buffer(name, weight_gradient, weight_VH, hidden_RH)
    found = linear_rows(
        rows.hidden,
        _into_buffer(rows.weight, weight_gradient),
        rows.bias,
        rows.targets,
        LogitOptions(temperature=temperature, softcap=softcap, group=tp_group, chunk=chunk),
    )
    loss = gspo_loss(
        found.logprobs, advantages, cu_seqlens, old_logprobs=old_logprobs, clip_low=clip_low,
        clip_high=clip_high, weights=weights,
    )  # fmt: skip
    logprobs_R = found.logprobs.detach()
    return loss, LinearPolicyStatistics(
        logprobs=logprobs_R,
        entropies=found.entropies.detach() if return_entropy else None,
        totals=gspo_totals(
            loss.detach(), logprobs_R, cu_seqlens, old_logprobs, clip_low, clip_high
        ),
    )


def gspo_totals(
    loss: Tensor,
    logprobs_R: Tensor,
    cu_seqlens_S1: Tensor,
    old_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """``objective.TOTALS`` of GSPO: the loss, then sums of ratio and clipped over responses."""
    old_R = logprobs_R if old_logprobs is None else old_logprobs
    ends = _beside(cu_seqlens_S1, logprobs_R)
    lengths_S = ends.diff()
    running_R = torch.nn.functional.pad((logprobs_R - old_R).double().cumsum(0), (1, 0))
    ratio_S = (running_R[ends].diff() / lengths_S.clamp(min=1)).float()
    ratio_S = ratio_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside_S = (ratio_S < 1.0 - clip_low) | (ratio_S > 1.0 + clip_high)
    counted = lengths_S > 0
    return torch.stack(
        [
            loss.float(),
            ratio_S.where(counted, 0.0).sum(),
            (outside_S & counted).sum().float(),
            torch.zeros_like(loss, dtype=torch.float32),
        ]
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
