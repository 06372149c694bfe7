"""A trace of ``--profile`` in words: how long the card works in each phase, why it waits, and what
it spends its time on.

    python benchmarks/read_trace.py runs/NAME/trace/rank-00000.json.gz

The card *waits for the host* where its next kernel was launched after the one before it had ended,
and otherwise for another stream, or for the launch itself to arrive. Pauses over 20 ms are left
out: past a pass's first microbatches nothing is collected (``ovr_fast.observe.ranges``).
"""

from __future__ import annotations

import argparse
import bisect
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
PAUSE_US = 20_000.0
LONGEST_NAME = 60


@dataclass(slots=True, kw_only=True)
class Phase:
    """What the card did for one phase of the step; microseconds."""

    busy: float = 0.0
    for_host: float = 0.0  # the card idle until the host launched something
    otherwise_idle: float = 0.0
    kernels: int = 0
    waits: Counter[str] = field(default_factory=Counter)  # by what the host was at
    work: Counter[str] = field(default_factory=Counter)  # by kernel

    @property
    def span(self) -> float:
        """Time, pauses left out."""
        return self.busy + self.for_host + self.otherwise_idle


class Ranges:
    """Named intervals of one thread, in which a time is looked up.

    Args:
        events: (begin, end, name); two of them are apart, or one lies in the other.
    """

    def __init__(self, events: Sequence[tuple[float, float, str]]) -> None:
        self._events = sorted(events, key=lambda event: (event[0], -event[1]))
        self._begins = [begin for begin, _, _ in self._events]
        self._parents: list[int] = []
        open_events: list[int] = []
        for index, (begin, _, _) in enumerate(self._events):
            while open_events and self._events[open_events[-1]][1] <= begin:
                open_events.pop()
            self._parents.append(open_events[-1] if open_events else -1)
            open_events.append(index)

    def around(self, when: float) -> list[str]:
        """Names of those that hold a time, the innermost first."""
        index, names = bisect.bisect_right(self._begins, when) - 1, []
        while index >= 0:
            _, end, name = self._events[index]
            if when < end:
                names.append(name)
            index = self._parents[index]
        return names


def read(path: Path) -> list[dict]:
    """The trace's events that last."""
    written = path.read_bytes()
    trace = json.loads(gzip.decompress(written) if path.suffix == ".gz" else written)
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def phases_of(events: Sequence[dict]) -> dict[str, Phase]:
    """By name, in the order of their first kernel; "" is what no phase holds."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    named = [event for event in events if event.get("cat") == "user_annotation"]
    main = max(named, key=lambda event: event["dur"])["tid"] if named else None
    outermost = Ranges(
        [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in named if e["tid"] == main]
    )
    threads: dict[object, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            interval = (event["ts"], event["ts"] + event["dur"], event["name"])
            threads.setdefault(event["tid"], []).append(interval)
    at_work = {thread: Ranges(intervals) for thread, intervals in threads.items()}

    found: dict[str, Phase] = {}
    ended: float | None = None
    for event in sorted(_launched(events), key=lambda event: event["ts"]):
        launch = launches.get(event["args"].get("correlation"))
        launched = launch["ts"] if launch else event["ts"]
        around = outermost.around(launched)
        phase = found.setdefault(around[-1] if around else "", Phase())
        begin, end = event["ts"], event["ts"] + event["dur"]
        if ended is not None and ended < begin <= ended + PAUSE_US:
            late = min(max(launched - ended, 0.0), begin - ended)
            phase.for_host += late
            phase.otherwise_idle += begin - ended - late
            if late and launch:
                names = at_work[launch["tid"]].around(launched) if launch["tid"] in at_work else []
                phase.waits[names[0] if names else launch["name"]] += late  # type: ignore[assignment]
        worked = max(0.0, end - (begin if ended is None else max(begin, ended)))
        phase.busy += worked
        phase.work[event["name"]] += worked  # type: ignore[assignment]
        phase.kernels += 1
        ended = end if ended is None else max(ended, end)
    return found


def _launched(events: Sequence[dict]) -> Iterator[dict]:
    return (event for event in events if event.get("cat") in ON_CARD)


def host_time(events: Sequence[dict]) -> Counter[str]:
    """Microseconds of the host by operator or call, without what it called."""
    threads: dict[object, list[dict]] = {}
    for event in events:
        if event.get("cat") in ON_HOST:
            threads.setdefault(event["tid"], []).append(event)
    found: Counter[str] = Counter()
    for calls in threads.values():
        open_calls: list[dict] = []
        for call in sorted(calls, key=lambda call: (call["ts"], -call["dur"])):
            while open_calls and open_calls[-1]["ts"] + open_calls[-1]["dur"] <= call["ts"]:
                open_calls.pop()
            found[call["name"]] += call["dur"]
            if open_calls:
                found[open_calls[-1]["name"]] -= call["dur"]
            open_calls.append(call)
    return found


def _largest(counted: Counter[str], whole: float, count: int = 8) -> Iterator[str]:
    for name, micros in counted.most_common(count):
        yield f"  {micros / whole:6.1%}  {micros / 1e3:9.2f} ms  {name[:LONGEST_NAME]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    events = read(parser.parse_args().trace)
    phases = phases_of(events)
    print("| phase | span, ms | busy | waits for the host | other gaps | kernels |")
    print("|---" * 6 + "|")
    for name, phase in phases.items():
        span = phase.span or 1.0
        print(
            f"| {name or '(none)'} | {phase.span / 1e3:.1f} | {phase.busy / span:.1%} | "
            f"{phase.for_host / span:.1%} | {phase.otherwise_idle / span:.1%} | {phase.kernels} |"
        )
    for name, phase in phases.items():
        if phase.span > 0.02 * sum(each.span for each in phases.values()):
            print(f"\n{name or '(none)'}: the card's work")
            print("\n".join(_largest(phase.work, phase.span)))
            print(f"{name or '(none)'}: what the host was at while the card waited")
            print("\n".join(_largest(phase.waits, phase.span)))
    host = host_time(events)
    print("\nthe host, all phases")
    print("\n".join(_largest(host, sum(host.values()) or 1.0, 15)))


if __name__ == "__main__":
    main()
