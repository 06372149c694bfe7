"""What each rank of a rehearsal runs: the trainer's own command, watched.

    python -m ovr_fast.rehearse.rank REPORT.json together|alone save|no-save TRAIN_ARGUMENTS...

The card computes nothing, so what judges numbers is switched off (``stand_ins``), and a size that
depends on numbers is its largest. The trainer knows nothing of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import ovr_fast.recipe.build as build_module
from ovr_fast.learner.learner import Learner
from ovr_fast.observe.clock import Clock
from ovr_fast.rehearse.branches import Recorder
from ovr_fast.rehearse.stand_ins import (
    be_alone,
    keep_off_the_disk,
    put,
    say_nothing_of_numbers,
    switch_off_numbers,
)

GIB = 2**30
ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "ovr_fast"), str(ROOT / "kernels"))


KINDS = ("all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "send_or_receive")
"""``enum pretend_kind`` of card/card.h."""


class Counts(ctypes.Structure):
    """``struct pretend_counts`` of card/card.h."""

    _fields_ = [
        ("launches", ctypes.c_long),
        ("synchronizations", ctypes.c_long),
        ("copies_to_host", ctypes.c_long),
        ("bytes_to_host", ctypes.c_long),
        ("bytes_to_device", ctypes.c_long),
        ("matrix_products", ctypes.c_long),
        ("collectives", ctypes.c_long),
        ("collective_bytes", ctypes.c_long),
        ("of_kind", ctypes.c_long * len(KINDS)),
        ("bytes_of_kind", ctypes.c_long * len(KINDS)),
        ("peak_bytes", ctypes.c_size_t),
    ]

    def as_dict(self) -> dict[str, int]:
        plain = {name: getattr(self, name) for name, *_ in self._fields_ if "of_kind" not in name}
        for kind, count, size in zip(KINDS, self.of_kind, self.bytes_of_kind, strict=True):
            plain |= {kind: count, f"{kind}_bytes": size}
        return plain


class Watch:
    """Counts and peak memory of each phase, and the places where the host waits for the card."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(None)
        self.phases: dict[str, defaultdict[str, float]] = {}
        self.resident: dict[str, dict[str, float]] = {}  # by learner and class, GiB
        self.waits: Counter[str] = Counter()
        self.depth, self.failed_in, self.began = 0, "", time.perf_counter()
        self._phase = "start"
        self._seen = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._count_wait)
        self.library.pretend_watch(self._seen)

    def read(self) -> dict[str, int]:
        """The card's counts so far."""
        counts = Counts()
        size = self.library.pretend_read_counts(ctypes.byref(counts))
        assert size == ctypes.sizeof(counts), "card.h and this file disagree"
        return counts.as_dict()

    def _count_wait(self, what: bytes) -> None:
        frame: FrameType | None = sys._getframe().f_back  # None in a backward thread of C++
        ours: list[str] = []
        while frame is not None and len(ours) < 3:
            name = frame.f_code.co_filename
            if name.startswith(OURS) and not name.startswith(str(Path(__file__).parent)):
                ours.append(f"{os.path.relpath(name, ROOT)}:{frame.f_lineno}")
            frame = frame.f_back
        if ours and "observe/clock.py" in ours[0]:
            return  # the clock's own wait at a phase's end
        self.waits[f"{self._phase}: {' < '.join(ours) or 'none of our frames'}"] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around an outermost phase of the clock."""
        self.depth += 1
        outermost = self.depth == 1
        if outermost:
            self._phase = name
            before, began, waited = self.read(), time.perf_counter(), sum(self.waits.values())
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.failed_in = self.failed_in or f"{name}: {str(error).splitlines()[0][:200]}"
            raise
        finally:
            self.depth -= 1
            if outermost:
                row = self.phases.setdefault(name, defaultdict(float))
                for key, value in self.read().items():
                    row[key] += value - before[key]
                row["times"] += 1
                row["waits"] += sum(self.waits.values()) - waited
                row["host_s"] += time.perf_counter() - began
                for key, peak in (
                    ("allocated_gib", torch.cuda.max_memory_allocated() / GIB),
                    ("reserved_gib", torch.cuda.max_memory_reserved() / GIB),
                ):
                    row[key] = max(row[key], peak)

    def write(self) -> None:
        """The report of this rank."""
        self.library.pretend_watch(None)
        report = {
            "rank": int(os.environ.get("RANK", "0")),
            "phases": self.phases,
            "card_gib": self.read()["peak_bytes"] / GIB,
            "allocated_gib": max((r["allocated_gib"] for r in self.phases.values()), default=0.0),
            "reserved_gib": max((r["reserved_gib"] for r in self.phases.values()), default=0.0),
            "resident": self.resident,
            "out_of_memory": self.failed_in,
            "waits": dict(self.waits.most_common(20)),
            "seconds": time.perf_counter() - self.began,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=1))


def _resident_gib(tensors: Iterable[torch.Tensor]) -> float:
    """On the card, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.is_cuda}
    return sum(storage.nbytes() for storage in storages.values()) / GIB


def watch_classes(watch: Watch) -> None:
    """What an update finds on the card, by the classes of the memory plan."""
    models: list[torch.nn.Module] = []
    learners: list[Learner] = []
    init, build, update = Learner.__init__, build_module.build_model, Learner._forward_backward

    def noted(self: Learner, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        learners.append(self)

    def built(*arguments: Any, **options: Any) -> torch.nn.Module:
        models.append(build(*arguments, **options))
        return models[-1]

    def watched(self: Learner, *arguments: Any, **options: Any) -> Any:
        weights = {tensor for model in models for tensor in model.parameters()}
        buffers = [buffer for learner in learners for buffer in learner.optimizer.ddp.buffers]
        held = {tensor.untyped_storage()._cdata for tensor in weights}
        inner = [learner.optimizer.inner for learner in learners]
        states = [row for optimizer in inner for row in optimizer.state.values()]
        state = [tensor for row in states for tensor in row.values()]
        state += [
            p for optimizer in inner for group in optimizer.param_groups for p in group["params"]
        ]
        classes = {
            "weights": _resident_gib(weights),
            "gradients": _resident_gib(buffer.grad_data for buffer in buffers),
            "optimizer": _resident_gib(t for t in state if t.untyped_storage()._cdata not in held),
        }
        watch.resident[self.name] = classes  # the last update's: moments come with the first
        return update(self, *arguments, **options)

    put(Learner, __init__=noted, _forward_backward=watched)
    put(build_module, build_model=built)


def watch_phases(watch: Watch) -> None:
    """Every phase of the trainer's clock is a phase of the report."""
    time_phase = Clock.__call__

    @contextmanager
    def watched(self: Clock, name: str) -> Iterator[None]:
        with watch.phase(name), time_phase(self, name):
            yield

    put(Clock, __call__=watched)


def main() -> None:
    report, alone, save = Path(sys.argv[1]), sys.argv[2] == "alone", sys.argv[3] == "save"
    sys.argv = ["ovr_fast.train", *sys.argv[4:]]
    torch.cuda.init()
    watch = Watch(report.with_name(f"{report.stem}-{int(os.environ.get('RANK', '0')):05d}.json"))
    switch_off_numbers()
    say_nothing_of_numbers()
    watch_phases(watch)
    watch_classes(watch)
    if not save:
        keep_off_the_disk()
    if alone:
        be_alone()
    recorder = Recorder() if "PRETEND_LINES" in os.environ else None
    if recorder:
        recorder.start()
    from ovr_fast import train

    try:
        train.main()
    finally:
        if recorder:
            recorder.write(Path(os.environ["PRETEND_LINES"]))
        watch.write()


if __name__ == "__main__":
    main()
