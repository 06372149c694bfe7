"""A check that hangs, dies, raises or eats memory when it is asked to."""

from __future__ import annotations

import os
import subprocess
import time


def check(said: str, gold: str, question: str) -> bool:
    if said == "hang":
        time.sleep(600)
    if said == "crash":
        os._exit(3)
    if said == "spawn":
        subprocess.run(["sleep", "4242"])
    if said == "raise":
        raise ValueError("planted")
    if said == "eat":
        _ = bytearray(2**33)
    return said == "right"
