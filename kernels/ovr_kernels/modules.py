"""The cross-entropy as a module, and as the loss of a model of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ovr_kernels.selection import operators_for


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of ``hidden @ weight.T + bias``, never holding the logits.

    Args:
        ignore_index: targets that count nothing; negative ones never do.
        reduction: "mean" over the rows that count, "sum", or "none".
        label_smoothing: 0..1.
        z_loss: coefficient of the squared log-sum-exp.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        operators: "auto" (Triton on a GPU, PyTorch on a CPU), "reference" or "triton".
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        operators: str = "auto",
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "ignore_index": ignore_index, "reduction": reduction,
            "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap,
        }  # fmt: skip
        self.operators = operators

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Hidden [..., H], weight [V, H], targets [...] int64, bias [V]: fp32, a number or, with
        reduction "none", in the targets' shape."""
        operators = operators_for(hidden.device, self.operators)
        loss, _ = operators.linear_cross_entropy(
            hidden, weight, targets, bias=bias, **self.settings
        )
        return loss


def fuse_loss(model: Any, *, operators: str = "auto") -> Any:
    """Let a causal language model of transformers make its loss without logits.

    For models whose forward ends in ``lm_head`` and ``loss_function`` (Llama, Qwen2, Qwen2.5-VL and
    most others). With ``labels`` its loss and gradients are those of transformers, and its output
    has no ``logits``; without labels nothing changes.

    Args:
        model: changed in place.
        operators: as for ``operators_for``.

    Returns:
        the model.

    Raises:
        ValueError: it has no ``lm_head`` that is a linear layer, or no ``loss_function``.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or not hasattr(model, "loss_function"):
        raise ValueError(
            f"{type(model).__name__} has no linear lm_head and loss_function to be fused"
        )
    plain: Callable[..., Any] = model.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, labels: Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return plain(*arguments, **options)

        def loss_of(logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
            return _causal_loss(head, logits, labels, operators, **given)

        before = model.loss_function
        head.forward = _as_it_is  # type: ignore[method-assign]
        model.loss_function = loss_of
        try:
            out = plain(*arguments, labels=labels, **options)
        finally:
            del head.forward
            model.loss_function = before
        if isinstance(out, tuple):
            return (out[0], *out[2:])  # (loss, logits, ...)
        out.logits = None
        return out

    model.forward = forward
    return model


def _as_it_is(input: Tensor) -> Tensor:
    return input


def _causal_loss(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    operators: str,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """As transformers' ``ForCausalLMLoss``: each position predicts the next label; the mean, or the
    sum over ``num_items_in_batch``."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss, _statistics = operators_for(hidden.device, operators).linear_cross_entropy(
        hidden, head.weight, shift_labels.to(hidden.device), bias=head.bias,
        ignore_index=ignore_index, reduction="mean" if num_items_in_batch is None else "sum",
    )  # fmt: skip
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
