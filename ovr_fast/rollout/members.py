"""The servers of a fleet, one by one: which state each is in, and what its counters say."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ovr_fast.rollout.client import Address
from ovr_fast.rollout.protocol import Sample
from ovr_fast.rollout.server import Server

_TOKENS = re.compile(r"^vllm:(?:generation|prompt)_tokens_total\{[^}]*\} (\S+)", re.MULTILINE)
_KV_TOKENS = re.compile(r'kv_cache_size_tokens="(\d+)"')


class State(Enum):
    """Of a member; it goes round until the run ends."""

    STARTING = "starting"
    READY = "ready"  # answers, with weights that nobody has vouched for
    SERVING = "serving"  # has the weights of its fleet
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server says of itself at ``/metrics``."""

    tokens: float  # prefilled and sampled since it started
    kv_tokens: int | None  # how many tokens' keys and values fit; None where it does not say

    @classmethod
    def parse(cls, text: str) -> Counters:
        """From Prometheus' text format; over all engines of the server."""
        sizes = [int(size) for size in _KV_TOKENS.findall(text)]
        return cls(
            tokens=sum(float(value) for value in _TOKENS.findall(text)),
            kv_tokens=sum(sizes) if sizes else None,
        )


@dataclass(slots=True, eq=False)
class Member:
    """One server. Changed on the client's loop alone, once the fleet works."""

    number: int
    address: Address  # of the process that runs now
    launch: Callable[[int], Server] | None  # starts it anew, n-th start; None: not ours to start
    server: Server | None  # its process, where it is ours
    state: State = State.STARTING
    live: set[Sample] = field(default_factory=set)  # its requests
    pending: deque[Sample] = field(default_factory=deque)  # of prompts that it has samples of
    kv_tokens: int | None = None
    tokens: float = 0.0  # its counter at the last probe
    moved: float = field(default_factory=time.monotonic)  # when the counter last grew
    why: str = ""  # it failed
    failed_at: float = 0.0
    busy_since: float | None = None  # it has had requests from then on
    busy_s: float = 0.0  # it had requests, since that was read
    life: int = 0  # how often it has come back
    doubts: int = 0  # requests that failed since one succeeded
    starts_without_response: int = 0  # starts anew since one succeeded

    @property
    def key(self) -> tuple[int, int]:
        """Of the process that runs now: a transfer group is of processes."""
        return self.number, self.life

    def rest(self, now: float) -> None:
        """Its last request has ended."""
        if self.busy_since is not None:
            self.busy_s += now - self.busy_since
            self.busy_since = None

    def read_busy(self, now: float) -> float:
        """Seconds with requests since the last call."""
        busy_s, self.busy_s = self.busy_s, 0.0
        if self.busy_since is not None:
            busy_s += now - self.busy_since
            self.busy_since = now
        return busy_s

    @property
    def name(self) -> str:
        """For messages."""
        return f"server {self.number}" if self.server else str(self.address)
