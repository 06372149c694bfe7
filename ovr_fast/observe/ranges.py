"""Named ranges: the words of the metrics, in Nsight (NVTX) and in torch's profiler alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import nvtx
import torch
from torch import nn

EVERY_LAYER = 4
"""Layers that have a range: the first, and every so many after it."""


def named_range(name: str) -> AbstractContextManager:
    """A range of this name around what follows."""
    if torch.autograd.profiler._is_profiler_enabled:
        return _both(name)
    return nvtx.annotate(name)  # 1.4 us; torch's, which nobody would see, another 20


@contextmanager
def _both(name: str) -> Iterator[None]:
    with nvtx.annotate(name), torch.profiler.record_function(name):
        yield


def with_ranges(operators: ModuleType) -> Any:
    """The operators of a module, each under a range of its own name."""

    def ranged(name: str, operator: Callable) -> Callable:
        @functools.wraps(operator)
        def call(*arguments: Any, **options: Any) -> Any:
            with named_range(name):
                return operator(*arguments, **options)

        return call

    functions = inspect.getmembers(operators, inspect.isfunction)
    return SimpleNamespace(
        **{name: ranged(name, f) for name, f in functions if not name.startswith("_")}
    )


def name_layers(layers: nn.ModuleDict) -> None:
    """Give every few layers' forward, also when it is computed again, a range ``layer NUMBER``."""

    def named(number: str, layer: nn.Module) -> None:
        open_ranges: list[Any] = []

        def begin(*arguments: Any) -> None:
            opened = named_range(f"layer {number}")
            opened.__enter__()
            open_ranges.append(opened)

        def end(*arguments: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end, always_call=True)

    for number, layer in layers.items():
        if int(number) % EVERY_LAYER == 0:
            named(number, layer)


class MicrobatchGate:
    """What a profiler sees of a pass: its first microbatches. A step of the recipe has a million
    kernels, whose trace no viewer opens; each phase's microbatches are alike.

    ``on_change`` is called with whether to collect; it is a profiler's while one runs.
    """

    def __init__(self) -> None:
        self.on_change: Callable[[bool], None] | None = None

    def begin(self, number: int, *, kept: int) -> None:
        """Before microbatch ``number`` (from 0) of a pass, of which ``kept`` are collected."""
        if self.on_change is not None and number == kept:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what is kept and still queued there
            self.on_change(False)

    def end(self) -> None:
        """After a pass, and before its gradients are summed over ranks."""
        if self.on_change is not None:
            self.on_change(True)


MICROBATCHES = MicrobatchGate()
"""Of this process: Megatron's schedule calls it, wherever it runs."""
