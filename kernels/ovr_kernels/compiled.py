"""What ``torch.compile`` sees of the operators, so that a graph does not break at them.

The head is an operator that it takes as it is, without looking inside; those per element are their
plain form, which it fuses with what stands around them. All of it only while it compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_kernels import reference
from ovr_kernels.reference import LogitOptions, RowValues

F = TypeVar("F", bound=Callable[..., Any])
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)
"""The backward asks the host which rows have a gradient."""


def plain_while_compiling(plain: Callable[..., Any]) -> Callable[[F], F]:
    """A decorator: ``plain`` stands in for the function while ``torch.compile`` traces."""

    def decorate(fused: F) -> F:
        @functools.wraps(fused)
        def choose(*arguments: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling():
                return plain(*arguments, **options)
            return fused(*arguments, **options)

        return cast(F, choose)

    return decorate


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LogitOptions,
    *,
    entropy: bool,
    mean: bool,
    fused: bool,
) -> RowValues:
    """``reference.linear_rows``, or the fused one's."""
    group = "" if options.group is None else options.group.group_name
    logprobs, entropies, normalizers, means = _rows(
        hidden, weight, bias, targets, options.temperature, options.softcap, group,
        options.chunk, entropy, mean, fused,
    )  # fmt: skip
    return RowValues(logprobs=logprobs, entropies=entropies, normalizers=normalizers, means=means)


def _options(temperature: float, softcap: float | None, group: str, chunk: int) -> LogitOptions:
    resolve: Callable = dist.distributed_c10d._resolve_process_group
    found = resolve(group) if group else None
    return LogitOptions(temperature=temperature, softcap=softcap, group=found, chunk=chunk)


@torch.library.custom_op("ovr_kernels::linear_rows", mutates_args=(), tags=UNCAPTURED)
def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    group: str,
    chunk: int,
    entropy: bool,
    mean: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _options(temperature, softcap, group, chunk)
    found = _module(fused).linear_rows(
        hidden, weight, bias, targets, options, entropy=entropy, mean=mean
    )
    return (  # an operator's results share no memory
        found.logprobs.clone(), found.entropies.clone(), found.normalizers.clone(),
        found.means.clone(),
    )  # fmt: skip


@_rows.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, group, chunk, entropy, mean, fused):
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    return tuple(torch.empty_like(targets, dtype=wide) for _ in range(4))


@torch.library.custom_op("ovr_kernels::linear_rows_backward", mutates_args=(), tags=UNCAPTURED)
def _rows_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    known: list[Tensor],
    by: list[Tensor | None],
    temperature: float,
    softcap: float | None,
    group: str,
    chunk: int,
    fused: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_weight, of_bias = _module(fused).rows_backward(
        hidden, weight, bias, targets, known, by, _options(temperature, softcap, group, chunk),
        wanted=tuple(wanted),
    )  # fmt: skip
    return (
        weight.new_empty(0) if of_hidden is None else of_hidden,
        weight.new_empty(0) if of_weight is None else of_weight,
        weight.new_empty(0) if of_bias is None else of_bias,
    )


@_rows_backward.register_fake
def _(hidden, weight, bias, targets, *rest):
    operands = zip((hidden, weight, bias), rest[-1], strict=True)
    return tuple(torch.empty_like(t) if asked else weight.new_empty(0) for t, asked in operands)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, *settings, entropy, mean, fused = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, *output[:3])
    ctx.settings, ctx.asked, ctx.fused = settings, (True, entropy, True, mean), fused
    ctx.set_materialize_grads(False)


def _backward(ctx, *by):
    hidden, weight, bias, targets, *known = ctx.saved_tensors
    given = [each if asked else None for each, asked in zip(by, ctx.asked, strict=True)]
    wanted = list(ctx.needs_input_grad[:3])
    found = _rows_backward(
        hidden, weight, bias, targets, known, given, *ctx.settings, ctx.fused, wanted
    )
    gradients = [each if asked else None for each, asked in zip(found, wanted, strict=True)]
    return *gradients, *[None] * 8


_rows.register_autograd(_backward, setup_context=_setup)


def _module(fused: bool):
    if not fused:
        return reference
    from ovr_kernels import linear_logprob

    return linear_logprob
