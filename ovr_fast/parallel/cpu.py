"""Everything that makes Megatron-core run on a machine without a GPU. Never active on a GPU.

Megatron-core 0.16 names CUDA in the pipeline schedules, the point-to-point buffers, the gradient
buffers and the optimizer. All of it is about where a tensor lives, so two things are enough: a
function mode that turns ``device="cuda"`` into the CPU and lets a float32 CPU tensor answer
``tensor.type()`` as Megatron's optimizer expects, and stand-ins for the few ``torch.cuda``
functions it calls.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Sends ``device="cuda"`` to the CPU in every factory function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream where there is none: everything has already happened."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass

    def synchronize(self) -> None:
        pass


_mode: _CudaMeansCpu | None = None


def enable() -> None:
    """Switch the stand-ins on for this process.

    Raises:
        RuntimeError: there is a GPU; nothing may be redirected away from it.
    """
    global _mode
    if torch.cuda.is_available():
        raise RuntimeError("the CPU stand-ins for Megatron-core must not run beside a GPU")
    if _mode is not None:
        return
    stand_ins: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "synchronize": lambda device=None: None,
        "Stream": _Stream,
        "default_stream": lambda device=None: _Stream(),
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    _mode = _CudaMeansCpu()
    _mode.__enter__()
