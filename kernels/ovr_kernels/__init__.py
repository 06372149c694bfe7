"""Operators of a long-context policy-gradient step, in Triton and in plain PyTorch.

    operators = operators_for(hidden.device)
    loss, _ = operators.linear_policy_loss(hidden, weight, targets, PolicyObjective(), ...)

``ovr_kernels.reference`` is the plain form, ``ovr_kernels.fused`` the Triton one; both have the
same functions. Importing this package imports no Triton.
"""

from ovr_kernels.modules import LinearCrossEntropyLoss, fuse_loss
from ovr_kernels.objective import PolicyObjective, token_weights
from ovr_kernels.selection import operators_for

__all__ = [
    "LinearCrossEntropyLoss",
    "PolicyObjective",
    "fuse_loss",
    "operators_for",
    "token_weights",
]
__version__ = "0.1.0"
