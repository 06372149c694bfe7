"""A kernel in Gluon without a GPU: its own source, run on torch tensors by one thread a partition,
with what its instructions do to shared memory; and what each partition does to it, in order.

Only what ``ovr_kernels.specialised`` uses. Triton's interpreter has no warps and no barriers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from ovr_kernels import specialised

PATIENCE_S = 60.0
"""For a partition at a barrier: an emulated run that hangs ends by this."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a partition does to shared memory."""

    kind: str  # wait, arrive, expect, copy in, product, products wait, write, fence, meet,
    # copy out, copies wait
    place: tuple = ()  # the barrier, slots or buffer
    value: Any = 0  # parity, count, bytes, operands' names, most that may be outstanding


class Tile(torch.Tensor):
    """A tensor with Gluon's methods where they are not torch's."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)

    def split(self) -> tuple[Tile, Tile]:  # type: ignore[override]
        return self[..., 0], self[..., 1]


def tile(tensor: torch.Tensor) -> Tile:
    return tensor.as_subclass(Tile)


class Pointer:
    """Into a flat tensor."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory.view(-1), offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)


class Descriptor:
    """Blocks of a matrix; zeros outside it."""

    layout = None

    def __init__(self, name: str, matrix: torch.Tensor, rows: int, columns: int) -> None:
        self.name, self.matrix, self.shape = name, matrix, (rows, columns)
        self.dtype = matrix.dtype

    def block(self, at: list[int]) -> torch.Tensor:
        """Of the matrix, what is inside it."""
        (top, left), (rows, columns) = at, self.shape
        return self.matrix[top : top + rows, left : left + columns]


class Shared:
    """Memory of a program, or a part of it. ``place`` names what barriers protect."""

    layout = None

    def __init__(self, emulator: Emulator, data: torch.Tensor, place: tuple) -> None:
        self.emulator, self.data, self.place = emulator, data, place
        self.shape, self.dtype = data.shape, data.dtype

    def index(self, number: int) -> Shared:
        return Shared(self.emulator, self.data[number], (*self.place, int(number)))

    def slice(self, start: int, length: int, axis: int) -> Shared:
        return Shared(self.emulator, self.data.narrow(axis, start, length), self.place)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.emulator, self.data.permute(order), self.place)

    def store(self, value: torch.Tensor) -> None:
        self.emulator.say("write", self.place)
        self.data.copy_(value)


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes are there."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0

    def change(self, *, arrivals: int = 0, more: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += more
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def over(self, parity: int) -> bool:
        """Whether the last phase of this parity is."""
        return self.phase % 2 != parity


class Emulator:
    """One program of a kernel.

    Args:
        source: of the module, changed where a test plants an error; None: as it is.
        blocking: partitions wait at barriers and compute; False: they only say what they do.
    """

    def __init__(self, source: str | None = None, *, blocking: bool = True) -> None:
        self.blocking = blocking
        self.changed = threading.Condition(threading.RLock())
        self.barriers: dict[tuple, Barrier] = {}
        self.events: dict[int, list[Event]] = {}
        self.own = threading.local()
        self.failures: list[BaseException] = []
        self.made = 0
        self.program = 0
        self.functions = self._functions(source or inspect.getsource(specialised))

    def _functions(self, source: str) -> dict[str, Callable]:
        """The module's kernels as plain functions of this emulator's instructions."""
        names: dict[str, Any] = {
            "gl": self._language(),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None, init=self._init, wait=self._wait,
                expect=self._expect, arrive=self._arrive,
            ),
            "tma": SimpleNamespace(store_wait=self._copies_wait),
            "meet": lambda: self.say("meet"),
            "copy_in": self._copy_in,
            "copy_out": self._copy_out,
            "fence_async_shared": lambda: self.say("fence"),
            "warpgroup_mma": self._product,
            "warpgroup_mma_init": lambda value: value,
            "warpgroup_mma_wait": self._products_wait,
        }  # fmt: skip
        for part in ast.parse(textwrap.dedent(source)).body:
            if isinstance(part, ast.FunctionDef) and part.decorator_list:
                part.decorator_list = []
                for argument in part.args.args:
                    argument.annotation = None
                code = compile(ast.Module([part], []), "specialised", "exec")
                exec(code, names)
        return {name: f for name, f in names.items() if isinstance(f, FunctionType)}

    def _language(self) -> SimpleNamespace:
        def total(x: torch.Tensor, axis: int) -> Tile:
            return tile(torch.sum(x, axis))

        def load(pointer: Pointer, mask: torch.Tensor, other: Any) -> Tile:
            place = torch.where(mask, torch.as_tensor(pointer.offset), 0)
            return tile(torch.where(mask, pointer.memory[place], other))

        def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
            pointer.memory[pointer.offset[mask]] = torch.as_tensor(value)[mask]

        def shared(kind: torch.dtype, shape: list[int], layout: Any) -> Shared:
            self.made += 1
            return Shared(self, torch.full(shape, 7, dtype=kind), (self.made,))

        return SimpleNamespace(
            NVMMADistributedLayout=lambda **about: None, SliceLayout=lambda axis, of: None,
            int32=torch.int32, int64=torch.int64, float32=torch.float32,
            arange=lambda start, end, layout: tile(torch.arange(start, end)),
            full=lambda shape, value, kind, layout: tile(torch.full(shape, value, dtype=kind)),
            zeros=lambda shape, kind, layout: tile(torch.zeros(shape, dtype=kind)),
            convert_layout=lambda x, layout, assert_trivial: x,
            where=lambda mask, a, b: tile(torch.where(mask, a, b)),
            maximum=torch.maximum, minimum=min, exp2=torch.exp2,
            reduce=lambda x, axis, combine: functools.reduce(combine, x.unbind(axis)),
            max=lambda x, axis: tile(torch.amax(x, axis)), sum=total,
            cdiv=lambda a, b: -(-a // b), static_range=range, program_id=lambda axis: self.program,
            load=load, store=store,
            allocate_shared_memory=shared, warp_specialize=self._partitions,
        )  # fmt: skip

    # What a partition does.

    def say(self, kind: str, place: tuple = (), value: Any = 0) -> None:
        self.events[self.own.number].append(Event(kind, place, value))

    def _init(self, barrier: Shared, count: int) -> None:
        self.barriers[barrier.place] = Barrier(count)

    def _wait(self, barrier: Shared, parity: int) -> None:
        self.say("wait", barrier.place, int(parity))
        if self.blocking:
            with self.changed:
                there = self.changed.wait_for(
                    lambda: self.failures or self.barriers[barrier.place].over(int(parity)),
                    PATIENCE_S,
                )
            if self.failures or not there:
                raise TimeoutError(f"partition {self.own.number} waits at {barrier.place}")

    def _expect(self, barrier: Shared, count: int) -> None:
        self.say("expect", barrier.place, count)
        with self.changed:
            self.barriers[barrier.place].change(arrivals=1, more=count)

    def _arrive(self, barrier: Shared, count: int) -> None:
        self.say("arrive", barrier.place, count)
        with self.changed:
            self.barriers[barrier.place].change(arrivals=count)
            self.changed.notify_all()

    def _copy_in(self, matrix: Descriptor, at: list[int], barrier: Shared, to: Shared) -> None:
        found, count = matrix.block(at), to.data.numel() * to.data.element_size()
        self.say("copy in", to.place, (barrier.place, count))
        to.data.zero_()
        to.data[: found.shape[0], : found.shape[1]] = found
        with self.changed:
            self.barriers[barrier.place].change(more=-count)
            self.changed.notify_all()

    def _copy_out(self, matrix: Descriptor, at: list[int], of: Shared) -> None:
        self.say("copy out", of.place)
        block = matrix.block(at)
        block.copy_(of.data[: block.shape[0], : block.shape[1]])

    def _copies_wait(self, most: int) -> None:
        self.say("copies wait", value=most)

    def _product(
        self, left: Shared, right: Shared, acc: torch.Tensor, *, use_acc: bool = True,
        is_async: bool,
    ) -> torch.Tensor:  # fmt: skip
        self.say("product", (left.place, right.place))
        if not self.blocking:
            return acc
        found = left.data.float() @ right.data.float()
        return tile(acc + found if use_acc else found)

    def _products_wait(self, most: int, deps: tuple) -> torch.Tensor:
        self.say("products wait", value=most)
        return deps[0]

    def _partitions(self, parts: list[tuple], warps: list[int], registers: list[int]) -> None:
        def run(number: int, function: Callable, arguments: tuple) -> None:
            self.own.number = number
            try:
                function(*arguments)
            except BaseException as error:
                with self.changed:
                    self.failures.append(error)
                    self.changed.notify_all()

        self.events = {number: [] for number in range(len(parts))}
        threads = [
            threading.Thread(target=run, args=(number, *part)) for number, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
            if not self.blocking:
                thread.join()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def run(
    source: str | None, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *,
    scale: float, store: bool, entropy: bool, columns: int, depth: int, slots: int, lead: int,
    split_tiles: int, first_id: int = 0, blocking: bool = True, programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Emulator]]:  # fmt: skip
    """The kernel on all its programs (or some): partial statistics, exponentials and what they are
    relative to, and each program as it has ended."""
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tiles = -(-vocabulary // columns)
    splits = -(-tiles // split_tiles)
    partial = torch.full((splits, 4, rows), torch.nan)
    wide = torch.zeros(rows, vocabulary, dtype=hidden.dtype)
    reference = torch.full((tiles, rows), torch.nan)
    ended = []
    every = -(-rows // 128) * splits
    for program in range(every if programs is None else programs):
        emulator = Emulator(source, blocking=blocking)
        emulator.program = program
        emulator.functions["specialised_kernel"](
            Descriptor("hidden", hidden, 128, depth), Descriptor("weight", weight, columns, depth),
            Pointer(targets), Pointer(partial), Descriptor("scaled", wide, 64, columns),
            Pointer(reference), rows, vocabulary, width, first_id, scale, store, entropy, columns,
            depth, slots, lead, split_tiles, 16, 4, specialised.FOLDER_REGISTERS,
            specialised.LOADER_REGISTERS,
        )  # fmt: skip
        ended.append(emulator)
    return partial, wide, reference, ended
