"""What every operator, fused or plain, asks of its arguments before it reads or launches anything.

Kernels index by what they are told: a short array would be read past its end without a word.
Shapes, dtypes and devices are compared on the host, without waiting for a GPU. Errors are
ValueErrors that name the operator and the argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def fail(operator: str, problem: str) -> None:
    """Raises ValueError."""
    raise ValueError(f"{operator}: {problem}")


def shape_of(tensor: Tensor) -> str:
    """For a message."""
    return str(list(tensor.shape))


def check_floating(operator: str, **tensors: Tensor | None) -> None:
    """Whether they are floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            fail(operator, f"{name} is {tensor.dtype}, not floating point")


def check_same(operator: str, first: str, **tensors: Tensor | None) -> None:
    """Whether all are of the first one's dtype and on its device."""
    like = tensors[first]
    assert like is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != like.device:
            fail(operator, f"{name} is on {tensor.device}, {first} on {like.device}")
        if tensor.dtype is not like.dtype:
            fail(operator, f"{name} is {tensor.dtype}, {first} {like.dtype}; they must be equal")


def per_token(operator: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Whether each is one number a token of ``like``, [R], on its device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            fail(operator, f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.shape != like.shape:
            fail(operator, f"{name} is {shape_of(tensor)}, not {shape_of(like)}: one a token")
        if tensor.device != like.device:
            fail(operator, f"{name} is on {tensor.device}, the tokens on {like.device}")
        if tensor.is_complex():
            fail(operator, f"{name} is {tensor.dtype}")


def weights_of(operator: str, weights: Tensor | float, like: Tensor) -> Tensor | float:
    """Weights as one number, or one a token; a tensor without axes is every token's."""
    if not isinstance(weights, Tensor):
        if not math.isfinite(weights):
            fail(operator, f"weights={weights} is not finite")
        return weights
    if weights.dim() == 0 and weights.device == like.device:
        return weights.expand(like.shape)
    per_token(operator, like, weights=weights)
    return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """The head's operands, one row a token."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [R] int64


def head_rows(
    operator: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    check_targets: bool = True,
    ignore_index: int | None = None,
) -> HeadRows:
    """Hidden [..., H], weight [V, H], targets [...] and bias [V], checked, one row a token, in the
    dtype of ``torch.autocast`` where that is on, ignored targets as -1."""
    if torch._C._are_functorch_transforms_active():
        fail(operator, "does not go with torch.func's transforms; use torch.autograd")
    hidden, weight, bias = autocast(hidden, weight, bias)
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        fail(
            operator,
            f"hidden {shape_of(hidden)} and weight {shape_of(weight)} must be [..., H] and [V, H]",
        )
    if not weight.shape[0]:
        fail(operator, "weight has no rows")
    if bias is not None and bias.shape != weight.shape[:1]:
        fail(operator, f"bias {shape_of(bias)} must be [{weight.shape[0]}]: one a word")
    check_floating(operator, hidden=hidden)
    check_same(operator, "hidden", hidden=hidden, weight=weight, bias=bias)
    if targets.shape != hidden.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        fail(
            operator,
            f"targets {shape_of(targets)} {targets.dtype} must be {list(hidden.shape[:-1])} int64",
        )
    if targets.device != hidden.device:
        fail(operator, f"targets are on {targets.device}, hidden on {hidden.device}")
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            fail(operator, f"{name}={value} must be over 0, and finite")
    ids = targets.reshape(-1).long()
    if ignore_index is not None:
        ids = ids.where(ids != ignore_index, -1)
    if check_targets:
        check_vocabulary(operator, ids, weight, group)
    return HeadRows(
        hidden=hidden.reshape(-1, hidden.shape[-1]), weight=weight, bias=bias, targets=ids
    )


def autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that ``torch.autocast`` gives a linear layer's operands."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    kind = torch.get_autocast_dtype(device)
    return hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind)


def check_vocabulary(
    operator: str, targets: Tensor, weight: Tensor, group: dist.ProcessGroup | None
) -> None:
    """Whether every target is in the vocabulary; negative ones mark rows to ignore. Looked at on
    the device: a GPU's error comes with a later call, and names the operator."""
    parts = 1 if group is None else dist.get_world_size(group)
    size = weight.shape[0] * parts
    if targets.numel():
        torch._assert_async(
            (targets < size).all(), f"{operator}: a target is outside the vocabulary of {size}"
        )


def check_softcap(
    rows: HeadRows, softcap: float | None, smoothing: float, temperature: float
) -> None:
    """Whether the fused backward can tell a capped logit from its probability, which smoothing
    needs of every word: a probability that the operands' dtype rounds to 0 says nothing of it."""
    if softcap is None or not smoothing:
        return
    reach = 2.0 * softcap / temperature + math.log(rows.weight.shape[0])
    most = 16.0 if rows.hidden.dtype is torch.float16 else 80.0
    if reach > most:
        fail(
            "linear_cross_entropy",
            f"softcap={softcap} with label_smoothing leaves probabilities of e^-{reach:.0f}, which "
            f"{rows.hidden.dtype} cannot hold; use a smaller softcap, or the reference",
        )


def check_buffer(
    operator: str, buffer: Tensor | None, weight: Tensor, hidden: Tensor | None = None
) -> None:
    """A buffer that gradients are added to, once: activation checkpointing runs a forward twice."""
    if buffer is None:
        return
    if torch._C._current_graph_task_id() != -1:
        fail(
            operator,
            "with weight_gradient it was called inside a backward, as activation checkpointing "
            "does, and would add its gradient twice; leave it out of the checkpointed part",
        )
    if buffer.shape != weight.shape or buffer.dtype is not torch.float32:
        fail(
            operator,
            f"weight_gradient {shape_of(buffer)} {buffer.dtype} must be {shape_of(weight)} float32",
        )
    if buffer.device != weight.device:
        fail(operator, f"weight_gradient is on {buffer.device}, weight on {weight.device}")
    if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
        fail(operator, "weight_gradient needs a hidden that requires a gradient")


def no_buffer(operator: str, buffer: Tensor | None) -> None:
    """Whether there is none, where nothing may be written to."""
    if buffer is not None:
        fail(operator, "weight_gradient does not go with torch.compile: it would be written to")


def check_norm(
    operator: str, hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> None:
    """Hidden [..., H], weight [H], residual as hidden; all of one dtype."""
    if hidden.dim() == 0 or weight.shape != hidden.shape[-1:]:
        fail(operator, f"weight {shape_of(weight)} does not fit hidden {shape_of(hidden)}")
    if residual is not None and residual.shape != hidden.shape:
        fail(operator, f"residual {shape_of(residual)} must be {shape_of(hidden)}, as hidden")
    check_floating(operator, hidden=hidden)
    check_same(operator, "hidden", hidden=hidden, weight=weight, residual=residual)
    if not (eps >= 0 and math.isfinite(eps)):
        fail(operator, f"eps={eps} must be finite and not negative")


def check_rotation(
    heads: Tensor, positions: Tensor, inverse: Tensor, axes: Tensor, rotary_heads: int
) -> None:
    """Heads [T, N, D], positions [axes, T], a table of D / 2 pairs, and heads that there are."""
    operator = "rotate"
    if heads.dim() != 3 or heads.shape[2] % 2:
        fail(operator, f"heads {shape_of(heads)} must be [T, N, D] with an even D")
    check_floating(operator, heads=heads)
    if positions.dim() != 2 or positions.shape[1] != heads.shape[0]:
        fail(operator, f"positions {shape_of(positions)} must be [axes, {heads.shape[0]}]")
    if positions.is_floating_point():
        fail(operator, f"positions are {positions.dtype}, not integers")
    pairs = heads.shape[2] // 2
    if inverse.shape != (pairs,) or axes.shape != (pairs,):
        fail(
            operator,
            f"the table is of {inverse.numel()} pairs, heads of {heads.shape[2]} have {pairs}",
        )
    if not 0 <= rotary_heads <= heads.shape[1]:
        fail(operator, f"rotary_heads={rotary_heads} of {heads.shape[1]} heads")
    for name, tensor in (("positions", positions), ("the table", inverse)):
        if tensor.device != heads.device:
            fail(operator, f"{name} on {tensor.device}, heads on {heads.device}")


def check_gate_up(gate_up: Tensor) -> None:
    """[..., 2 I]."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        fail("swiglu", f"gate_up {shape_of(gate_up)} must have an even last axis: two halves")
    check_floating("swiglu", gate_up=gate_up)


def check_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, gae_lambda: float
) -> None:
    """Rewards and values [R], boundaries [S + 1] from 0 to R, discounts in 0..1."""
    operator = "packed_gae"
    if rewards.dim() != 1:
        fail(operator, f"rewards {shape_of(rewards)} must be [R]")
    per_token(operator, rewards, values=values)
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            fail(operator, f"{name}={value} must be in 0..1")
    check_boundaries(operator, cu_seqlens, rewards.numel())


def check_value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None, clip_eps: float | None
) -> None:
    """Values, returns and old values alike in shape; clipping with something to stay near to."""
    operator = "value_loss"
    per_token(operator, values, returns=returns, old_values=old_values)
    check_floating(operator, values=values)
    if clip_eps is not None and not (clip_eps >= 0 and math.isfinite(clip_eps)):
        fail(operator, f"clip_eps={clip_eps} must be finite and not negative")
    if clip_eps and old_values is None:
        fail(operator, "clip_eps needs old_values to stay near to")


def flat_tokens(operator: str, targets: Tensor, **tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that are given, one number a target and in the targets' shape, as [R]."""
    per_token(operator, targets, **tensors)
    return {name: value.reshape(-1) for name, value in tensors.items() if value is not None}


def row_weights(operator: str, weights: Tensor | float, targets: Tensor, rows: HeadRows) -> Tensor:
    """[R] in fp32 (fp64 beside fp64 rows), 0 where a row is ignored; a number is every row's."""
    given, ids = weights_of(operator, weights, targets), rows.targets
    kind = torch.float64 if rows.hidden.dtype is torch.float64 else torch.float32
    if not isinstance(given, Tensor):
        given = torch.full(ids.shape, given, dtype=kind, device=ids.device)
    return given.reshape(-1).to(kind).where(ids >= 0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropyCall:
    """Checked arguments of ``linear_cross_entropy``."""

    rows: HeadRows
    weights: Tensor  # [R] fp32, what each row's loss counts


def cross_entropy_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    weights: Tensor | float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    temperature: float,
    softcap: float | None,
    group: dist.ProcessGroup | None,
    weight_gradient: Tensor | None,
    check_targets: bool,
) -> CrossEntropyCall:
    """Settings in range, operands that fit, and what each row counts under ``reduction``."""
    operator = "linear_cross_entropy"
    if reduction not in ("sum", "mean", "none"):
        fail(operator, f"reduction={reduction!r} is not one of sum, mean, none")
    if not 0 <= label_smoothing <= 1:
        fail(operator, f"label_smoothing={label_smoothing} must be in 0..1")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        fail(operator, f"z_loss={z_loss} must be finite and not negative")
    if reduction == "none" and weight_gradient is not None:
        fail(operator, "weight_gradient needs one loss; reduction='none' has one a row")
    rows = head_rows(
        operator, hidden, weight, targets, bias, temperature=temperature, softcap=softcap,
        group=group, check_targets=check_targets, ignore_index=ignore_index,
    )  # fmt: skip
    check_buffer(operator, weight_gradient, weight, hidden)
    share = row_weights(operator, weights, targets, rows)
    if reduction == "mean":
        total = share.sum()
        share = share / total.where(total != 0, 1.0)
    return CrossEntropyCall(rows=rows, weights=share)


def check_gspo(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    weights: Tensor | float | None,
) -> None:
    """Log-probs [R], advantages and weights [S], boundaries [S + 1] from 0 to R, and bounds."""
    operator = "gspo_loss"
    if logprobs.dim() != 1:
        fail(operator, f"logprobs {shape_of(logprobs)} must be [R]")
    per_token(operator, logprobs, old_logprobs=old_logprobs)
    check_boundaries(operator, cu_seqlens, logprobs.numel())
    if advantages.shape != (cu_seqlens.numel() - 1,):
        fail(
            operator,
            f"advantages {shape_of(advantages)} must be [{cu_seqlens.numel() - 1}]: one a response",
        )
    if advantages.device != logprobs.device:
        fail(operator, f"advantages are on {advantages.device}, logprobs on {logprobs.device}")
    if weights is not None:
        weights_of(operator, weights, advantages)
    if not (0 <= clip_low <= 1 and clip_high >= 0 and math.isfinite(clip_high)):
        fail(
            operator, f"clip_low={clip_low} must be in 0..1 and clip_high={clip_high} not negative"
        )


def check_boundaries(operator: str, cu_seqlens: Tensor, tokens: int) -> None:
    """[S + 1] integers from 0 to the number of tokens."""
    kind = cu_seqlens.dtype
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel() or kind not in (torch.int32, torch.int64):
        fail(operator, f"cu_seqlens {shape_of(cu_seqlens)} {kind} must be [S + 1] integers")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        fail(operator, f"cu_seqlens covers {first}..{last}, not 0..{tokens}")
    if not cu_seqlens.is_cuda and bool((cu_seqlens.diff() < 0).any()):
        fail(operator, "cu_seqlens descends")
