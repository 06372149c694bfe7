"""Which results a recomputed layer keeps."""

from __future__ import annotations

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

SAVED_OPS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
"""Operators whose results selective recomputation keeps: matrix products and attention."""


def keep_saved_ops():
    """Selective recomputation for ``checkpoint``: keep the results of ``SAVED_OPS``, recompute the
    rest (Korthikanti et al. 2022, who recompute attention too, because it then stored T x T
    scores)."""

    def policy(context, operator, *arguments, **options) -> CheckpointPolicy:
        name = operator.name().split(".")[0]
        return (
            CheckpointPolicy.MUST_SAVE if name in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return create_selective_checkpoint_contexts(policy)
