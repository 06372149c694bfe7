"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not in a child: loading locks


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Called in a child: the kernel sends it ``by`` when its parent ends, however that ends. Only
    Linux can."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, by)
