"""A run that is asked to end: in order, and within seconds.

SIGTERM, SIGINT and a hang-up end it at the next microbatch; SIGUSR1 at the end of its step, with a
checkpoint. A second signal, or no end within ``GRACE_S``, ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ovr_fast.errors import OVRFastError

GRACE_S = 25.0
"""torchrun kills its processes 30 s after it has passed a signal on."""

SECOND_S = 1.0
"""A signal sooner after the first is the same one: a shell that ends and the kernel both send a
hang-up, and the kernel one for each thread of a parent that dies."""

LAST_WORDS: list[Callable[[], object]] = []
"""Called where the process ends at once: what would outlive it ends here."""


class Stopped(OVRFastError):
    """The run was asked to end.

    Args:
        name: of the signal.
        together: every rank has this error at the same place, so a checkpoint can be written.
    """

    def __init__(self, name: str, together: bool = False) -> None:
        super().__init__(name)
        self.name, self.together = name, together

    def __reduce__(self) -> tuple:
        return Stopped, (self.name, self.together)


class _Request:
    now: str = ""  # signal that asks for an end at the next microbatch
    since = 0.0
    after_step: str = ""  # signal that asks for an end after the step
    deferred = False  # by ``not_inside``


def install() -> None:
    """Answer the signals. In the main thread."""

    def end_now(number: int, frame: FrameType | None) -> None:
        if _Request.now:
            again = time.monotonic() - _Request.since > SECOND_S
            if again and number != signal.SIGHUP:
                _end(number)
            return
        _Request.since = time.monotonic()
        _Request.now = signal.Signals(number).name
        timer = threading.Timer(GRACE_S, _end, [number])
        timer.daemon = True
        timer.start()

    def end_after_step(number: int, frame: FrameType | None) -> None:
        _Request.after_step = signal.Signals(number).name

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_now)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, end_now)
    signal.signal(signal.SIGUSR1, end_after_step)


def say_last_words() -> None:
    """What must happen before a process ends without unwinding."""
    for last in LAST_WORDS:
        with contextlib.suppress(Exception):
            last()


def _end(number: int) -> None:
    say_last_words()
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print("ovr_fast: ended at once; nothing of the running step is kept", file=sys.stderr)
        sys.stderr.flush()
    os._exit(128 + number)


def asked() -> str:
    """Signal that asks for an end after the step at the latest; "" if none."""
    return _Request.now or _Request.after_step


def asked_now() -> str:
    """Signal that asks for an end at the next microbatch; "" if none."""
    return _Request.now


@contextlib.contextmanager
def not_inside() -> Iterator[None]:
    """Inside, ``check`` waits: for work that is short, and after which the ranks stop together."""
    before, _Request.deferred = _Request.deferred, True
    try:
        yield
    finally:
        _Request.deferred = before


def check(*, together: bool = False) -> None:
    """Raises Stopped if the run is to end now.

    Args:
        together: the caller is rank 0, whose errors reach every rank at the same place.
    """
    if _Request.now and not _Request.deferred:
        raise Stopped(_Request.now, together)
