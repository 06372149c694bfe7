"""Processes that end with the one that started them, and what they leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not in a child: loading locks


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Called in a child: the kernel sends it ``by`` when its parent ends, however that ends. Only
    Linux can."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, by)


def remove_torchrun_folder() -> None:
    """torchrun makes a temporary folder for each start and never removes it. The last rank that
    ends does; a folder with files in it, a user's logs, stays."""
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent
    made = [place for place in (folder, *folder.parents) if place.name.startswith("torchelastic_")]
    if not made:
        return
    with contextlib.suppress(OSError):  # not empty: another rank's are there
        while folder != made[0].parent:
            folder.rmdir()
            folder = folder.parent
