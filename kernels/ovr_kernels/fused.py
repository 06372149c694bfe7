"""The operators as Triton kernels, under the names and signatures of ``ovr_kernels.reference``."""

from ovr_kernels.linear_logprob import linear_logprob
from ovr_kernels.linear_policy_loss import (
    linear_cross_entropy,
    linear_gspo_loss,
    linear_policy_loss,
)
from ovr_kernels.mrope import rotate
from ovr_kernels.packed_gae import packed_gae
from ovr_kernels.policy_loss import policy_loss, value_loss
from ovr_kernels.rms_norm import add_rms_norm, rms_norm
from ovr_kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "linear_cross_entropy",
    "linear_gspo_loss",
    "linear_logprob",
    "linear_policy_loss",
    "packed_gae",
    "policy_loss",
    "rms_norm",
    "rotate",
    "swiglu",
    "value_loss",
]
