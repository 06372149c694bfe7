"""How long vLLM takes for a step's responses: the roofline of decoding, replayed on their lengths.

A decode step makes one token of every live response. It reads the weights once and every live
response's keys and values once, so on GPUs of b bytes a second, of which decoding reaches a share,

    seconds = latency + max((weights + live keys and values) / (b x share), live x 2 P / rate)

for P parameters. Live responses are as many as keys and values fit into what memory the weights
leave; where they outgrow it the youngest waits again. At the end of a step few are live, each
decode step is almost as long as before, and the longest response decides: the tail. More servers do
not shorten it, servers of more GPUs do a little, and the next responses fill it where they are
sampled ahead (``rollout.max_staleness``, ``rollout.partial``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHUNK = 32
"""Decode steps that are replayed as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a vLLM server of some GPUs holds and reads."""

    weight_bytes: float
    bytes_a_token: float  # keys and values
    capacity_tokens: float  # of keys and values
    flops_a_token: float
    bytes_a_second: float  # of all its GPUs, at the share that decoding reaches
    flops_a_second: float
    latency_s: float

    def step_seconds(self, live: int, tokens: float) -> float:
        """Of a decode step of ``live`` responses that have ``tokens`` keys and values."""
        reads = (self.weight_bytes + tokens * self.bytes_a_token) / self.bytes_a_second
        return self.latency_s + max(reads, live * self.flops_a_token / self.flops_a_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A step's responses on one server."""

    seconds: float
    tail_seconds: (
        float  # after the last response has started, while under half of the most are live
    )
    full_seconds: float  # if the next responses had filled the tail: all at the rate before it
    most_live: int
    most_tokens: float  # of keys and values held at once


def draw_lengths(count: int, *, mean: float, limit: int, spread: float, seed: int) -> np.ndarray:
    """Response lengths, log-normal and cut at ``limit``, whose mean after the cut is ``mean``.

    Args:
        spread: standard deviation of the logarithm.
    """
    normal = np.random.default_rng(seed).standard_normal(count)
    low, high = 0.0, 60.0  # logarithm of the median
    for _ in range(60):
        middle = (low + high) / 2
        found = np.minimum(np.exp(np.minimum(middle + spread * normal, 60.0)), limit).mean()
        low, high = (middle, high) if found < mean else (low, middle)
    return np.clip(np.exp(np.minimum(low + spread * normal, 60.0)), 1, limit).astype(int)


def decode(server: Server, lengths: np.ndarray, *, prompt_tokens: float) -> Decoded:
    """Replay a server's responses in the order given."""
    waiting = [(int(length), float(prompt_tokens)) for length in lengths[::-1]]
    left = np.zeros(0, dtype=np.int64)  # tokens to go, of each live response
    have = np.zeros(0)  # keys and values of each
    clock, most, fullest = 0.0, 0, 0.0
    last_start = 0.0
    history: list[tuple[float, int, int]] = []  # clock, live, tokens made
    made = 0
    while waiting or len(left):
        while waiting:
            _, tokens = waiting[-1]
            if len(left) and have.sum() + tokens + CHUNK * (len(left) + 1) > server.capacity_tokens:
                break
            left, have = (np.append(left, waiting[-1][0]), np.append(have, tokens))
            waiting.pop()
            last_start = clock
        while len(left) > 1 and have.sum() + len(left) > server.capacity_tokens:
            # The youngest makes room and starts again when there is some, as vLLM preempts; what it
            # has already made is not made again here.
            waiting.append((int(left[-1]), float(have[-1])))
            left, have = left[:-1], have[:-1]
        most = max(most, len(left))
        history.append((clock, len(left), made))
        room = max(1.0, (server.capacity_tokens - have.sum()) // len(left))
        steps = int(min(CHUNK, left.min(), room))
        made += steps * len(left)
        clock += steps * server.step_seconds(len(left), float(have.sum()))
        left, have = left - steps, have + steps
        fullest = max(fullest, float(have.sum()))
        left, have = left[left > 0], have[left > 0]
    thin = ((at, by) for at, live, by in history if at >= last_start and live < most / 2)
    tail, before = next(thin, (clock, made))
    return Decoded(
        seconds=clock,
        tail_seconds=clock - tail,
        full_seconds=min(clock, made * tail / before) if before else clock,
        most_live=most,
        most_tokens=fullest,
    )
