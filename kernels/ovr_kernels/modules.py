"""The cross-entropy as a module, and as the loss of a model of transformers."""

from __future__ import annotations

import types
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

    For models whose forward ends in ``lm_head`` and transformers' ``ForCausalLMLoss`` (Llama,
    Qwen2, Qwen2.5-VL and most others). With ``labels`` its loss and gradients are those of
    transformers (but 0, not NaN, where no label counts), and its output has no ``logits``; without
    labels nothing changes. A deep copy is fused too; a pickled one is not; ``torch.compile`` leaves
    the forward as it is. Call it before a model is wrapped (LoRA, a device map).

    Args:
        model: changed in place.
        operators: as for ``operators_for``.

    Returns:
        the model.

    Raises:
        ValueError: it has no linear ``lm_head`` of its own, another loss, or a forward that was
            replaced; or, at a call, something between head and loss changes the logits (a softcap).
    """
    name = type(model).__name__
    if getattr(model, "_fused_loss", None) is not None and "forward" in model.__dict__:
        return model
    head = getattr(model, "_modules", {}).get("lm_head")
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{name} has no linear lm_head of its own to be fused with its loss")
    loss = getattr(model, "loss_function", None)
    whose = getattr(loss, "__module__", ""), getattr(loss, "__name__", "")
    if whose != ("transformers.loss.loss_utils", "ForCausalLMLoss"):
        raise ValueError(f"the loss of {name} is not transformers' ForCausalLMLoss")
    if "forward" in model.__dict__ or "forward" in head.__dict__:
        raise ValueError(
            f"the forward of {name} or its head was replaced; fuse its loss before that"
        )
    model._fused_loss = operators
    # Here, not above: it imports the compiler, and with it Triton.
    model.forward = types.MethodType(torch.compiler.disable(forward), model)
    return model


def forward(self: Any, *arguments: Any, labels: Tensor | None = None, **options: Any) -> Any:
    """A fused model's: its class's, where the head passes hidden states on to the loss."""
    plain = type(self).forward
    if labels is None:
        return plain(self, *arguments, **options)
    head, before, passed = self.lm_head, self.loss_function, list[Tensor]()
    wanted = options.pop("return_dict", None)

    def keep(hidden: Tensor) -> Tensor:
        passed.append(hidden)
        return hidden

    def loss_of(logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
        if not passed or logits is not passed[-1]:
            raise ValueError(
                f"{type(self).__name__} changes its logits between lm_head and loss_function (a "
                "softcap, a scale), so its loss cannot be made from hidden states"
            )
        return _causal_loss(head, logits, labels, self._fused_loss, **given)

    try:
        head.forward = keep
        self.loss_function = loss_of
        out = plain(self, *arguments, labels=labels, return_dict=True, **options)
    finally:
        head.__dict__.pop("forward", None)
        self.loss_function = before
    out = type(out)(**{key: value for key, value in out.items() if key != "logits"})
    as_tuple = wanted is False or (wanted is None and not self.config.return_dict)
    return out.to_tuple() if as_tuple else out


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
