"""What ``benchmarks/read_trace.py`` says of a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import read_trace


def event(cat: str, name: str, begin: float, dur: float, **more: object) -> dict:
    row = {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": dur, "tid": 1, "args": {}}
    return row | more


def launched(name: str, launch: float, begin: float, dur: float, number: int) -> list[dict]:
    """A kernel and the call that launched it."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", launch, 2.0, args={"correlation": number}),
        event("kernel", name, begin, dur, tid=7, args={"correlation": number}),
    ]


EVENTS = [
    event("user_annotation", "critic", 0.0, 200.0),
    event("user_annotation", "actor", 200.0, 60_000.0),
    event("user_annotation", "layer 0", 205.0, 90.0),
    event("cpu_op", "aten::mm", 100.0, 20.0),
    event("cpu_op", "aten::slow", 245.0, 30.0),
    *launched("product", 10.0, 20.0, 50.0, 1),  # 20 to 70
    *launched("product", 30.0, 75.0, 25.0, 2),  # launched in time: 5 of another gap
    *launched("norm", 110.0, 130.0, 70.0, 3),  # 100 to 110 waits for the host, then 20
    *launched("norm", 120.0, 150.0, 60.0, 4),  # beside the one before: 10 more of it
    *launched("small", 250.0, 255.0, 5.0, 5),  # 210 to 250 in aten::slow
    *launched("small", 50_000.0, 50_010.0, 5.0, 6),  # after a pause in which nothing was collected
]


def test_time_of_a_phase_is_work_or_a_gap() -> None:
    found = read_trace.phases_of(EVENTS)
    assert list(found) == ["critic", "actor"]
    critic, actor = found["critic"], found["actor"]
    assert (critic.busy, critic.for_host, critic.otherwise_idle) == (155.0, 10.0, 25.0)
    assert dict(critic.work) == {"product": 75.0, "norm": 80.0}
    assert critic.kernels == 4
    assert dict(critic.waits) == {"aten::mm": 10.0}
    assert (actor.busy, actor.for_host, actor.otherwise_idle) == (10.0, 40.0, 5.0)
    assert dict(actor.waits) == {"aten::slow": 40.0}, "the innermost range of the host"


def test_time_of_the_host_is_counted_once() -> None:
    host = read_trace.host_time(EVENTS)
    assert host["aten::mm"] == 18.0, "less the launch in it"
    assert host["cudaLaunchKernel"] == 12.0


def test_a_trace_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": EVENTS}))
    monkeypatch.setattr("sys.argv", ["read_trace.py", str(path)])
    read_trace.main()
    said = capsys.readouterr().out
    assert "| critic | 0.2 | 81.6% | 5.3% | 13.2% | 4 |" in said
    assert "aten::slow" in said
    assert "norm" in said
