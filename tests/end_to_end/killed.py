"""The trainer, which kills itself inside its n-th phase of a name: SIGNAL PHASE N TRAIN_ARGUMENTS.

PHASE is a name of the clock, or "index": between the data and the index of a checkpoint, or
"transfer": when a weight sync has taken two tensors to send. SIGKILL comes at a random moment
inside a phase, or at its end; other signals at its beginning, and it is printed when.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager

from torch.distributed.checkpoint import FileSystemWriter

from ovr_fast import train
from ovr_fast.observe.clock import Clock
from ovr_fast.torchvision_ops import declare_if_broken

declare_if_broken()  # before vLLM

from ovr_fast.rollout.weight_sync import MegatronWeights


def main() -> None:
    by, phase, turn = signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    del sys.argv[1:4]
    seen = 0

    def die() -> None:
        if by is not signal.SIGKILL:
            print(f"killed.py: {by.name} at {time.time():.2f}", flush=True)
        os.kill(os.getpid(), by)

    time_phase, finish = Clock.__call__, FileSystemWriter.finish
    told = MegatronWeights._told

    @contextmanager
    def killing(self, name: str):
        nonlocal seen
        seen += name == phase
        with time_phase(self, name):
            if name == phase and seen == turn and by is not signal.SIGKILL:
                die()
            elif name == phase and seen == turn:
                threading.Timer(random.uniform(0.0, 0.5), die).start()
            yield
            if name == phase and seen == turn and by is signal.SIGKILL:
                die()

    def killing_finish(self, *arguments, **options):
        nonlocal seen
        seen += phase == "index"
        if phase == "index" and seen == turn:
            die()
        return finish(self, *arguments, **options)

    def killing_told(self, stream):
        nonlocal seen
        seen += phase == "transfer"
        for number, pair in enumerate(told(self, stream)):
            if phase == "transfer" and seen == turn and number == 2:
                die()
            yield pair

    MegatronWeights._told = killing_told
    Clock.__call__ = killing
    FileSystemWriter.finish = killing_finish
    train.main()


if __name__ == "__main__":
    main()
