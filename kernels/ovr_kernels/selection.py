"""Kernel dispatch: Triton on a GPU, the PyTorch reference on a CPU; logged at the start."""

from __future__ import annotations

from types import ModuleType

import torch

from ovr_kernels import reference

CHOICES = ("auto", "reference", "triton")


def operators_for(device: torch.device, choice: str = "auto") -> ModuleType:
    """``ovr_kernels.fused`` or ``ovr_kernels.reference``.

    Args:
        device: that the operators will run on.
        choice: "auto" (Triton on a GPU, the reference on a CPU), "reference" or "triton".

    Raises:
        ValueError: the choice is unknown or cannot run on the device; nothing is chosen instead.
    """
    if choice not in CHOICES:
        raise ValueError(f"kernels={choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "reference" or (choice == "auto" and device.type == "cpu"):
        return reference
    if device.type != "cuda":
        raise ValueError(f"the Triton kernels need a GPU, not {device}; choose reference")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} is older than the Triton kernels support "
            "(compute capability 8.0); choose reference"
        )
    from ovr_kernels import fused

    return fused


def describe(operators: ModuleType, device: torch.device) -> str:
    """The choice as a line of a log."""
    if operators is reference:
        return "reference (plain PyTorch)"
    major, minor = torch.cuda.get_device_capability(device)
    return f"triton (sm_{major}{minor})"
