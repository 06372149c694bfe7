"""Named ranges: the words of the metrics, in Nsight (NVTX) and in torch's profiler alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import nvtx
import torch


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range of this name around what follows."""
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
