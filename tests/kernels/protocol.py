"""Every interleaving of a program's partitions, from what each does to shared memory (the events
that ``gluon_emulator`` records): whether they can all wait for ever, whether a product can read a
slot that does not hold its operands yet, whether a slot can be loaded while one reads it, and
whether the second partition can begin a tile before the first has its lead.

A copy lands at any time after it was begun, in any order. A product reads its slots until its own
partition has waited for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gluon_emulator import Emulator, Event

SYNCHRONISING = ("wait", "expect", "arrive", "copy in", "product", "products wait")


class Hazard(AssertionError):
    """An interleaving that goes wrong."""


@dataclass(frozen=True, slots=True)
class State:
    """Between two events."""

    at: tuple[int, ...]  # the next event of each partition
    barriers: tuple[tuple[int, int, int], ...]  # phases over, arrivals missing, bytes missing
    flying: frozenset[int]  # copies that were begun: the loader's events
    landed: frozenset[tuple[tuple, int]]  # the copy that each slot holds, where it holds one


class Protocol:
    """Of one program that was emulated; its last partition is the loader.

    Args:
        steps: of a tile.
        lead: steps of a tile that the first partition has multiplied when the second begins it.
    """

    def __init__(self, program: Emulator, *, steps: int, lead: int) -> None:
        self.steps, self.lead = steps, min(lead, steps)
        events = program.events
        barriers = {place: barrier.count for place, barrier in program.barriers.items()}
        self.events = [[e for e in events[n] if e.kind in SYNCHRONISING] for n in sorted(events)]
        self.loader = len(self.events) - 1
        self.names = {place: number for number, place in enumerate(barriers)}
        self.counts = tuple(barriers.values())
        self.reads = [self._reads(n) for n in range(self.loader)]
        self.operands = self._operands()

    def _operands(self) -> list[tuple[int, int]]:
        """Of each step, what its product reads: the loader's copies, two a step, in order."""
        copies = [n for n, e in enumerate(self.events[self.loader]) if e.kind == "copy in"]
        return [(left, right) for left, right in zip(copies[::2], copies[1::2], strict=True)]

    def _reads(self, partition: int) -> list[frozenset[tuple]]:
        """The slots that a partition's products read while it is before each of its events."""
        open_: list[tuple] = []
        found = []
        for event in [*self.events[partition], None]:
            found.append(frozenset(place for places in open_ for place in places))
            if event is not None and event.kind == "product":
                open_.append(event.place)
            elif event is not None and event.kind == "products wait":
                open_ = open_[len(open_) - event.value :] if event.value else []
        return found

    def check(self) -> int:
        """How many states there are.

        Raises:
            Hazard: one of them is wrong.
        """
        start = State(
            at=(0,) * len(self.events),
            barriers=tuple((0, count, 0) for count in self.counts),
            flying=frozenset(),
            landed=frozenset(),
        )
        seen, left = {start}, [start]
        end = tuple(len(events) for events in self.events)
        while left:
            state = left.pop()
            following = self._following(state)
            if not following and (state.at != end or state.flying):
                raise Hazard(f"all wait for ever: {self._where(state)}")
            for new in following:
                if new not in seen:
                    seen.add(new)
                    left.append(new)
        return len(seen)

    def _following(self, state: State) -> list[State]:
        found = [self._land(state, copy) for copy in state.flying]
        for partition, place in enumerate(state.at):
            if place < len(self.events[partition]):
                new = self._step(state, partition, self.events[partition][place])
                if new is not None:
                    found.append(new)
        return found

    def _step(self, state: State, partition: int, event: Event) -> State | None:
        """A partition's next event; None where it waits."""
        barriers, flying, landed = state.barriers, state.flying, state.landed
        match event.kind:
            case "wait":
                if barriers[self.names[event.place]][0] % 2 == event.value:
                    return None
            case "expect":
                barriers = self._changed(barriers, event.place, arrivals=1, more=event.value)
            case "arrive":
                barriers = self._changed(barriers, event.place, arrivals=event.value)
            case "copy in":
                readers = [n for n in range(self.loader) if self._still_reads(state, n, event)]
                events = self.events[self.loader]
                if any(events[copy].place == event.place for copy in flying):
                    raise Hazard(f"{event.place} is loaded twice at once: {self._where(state)}")
                if readers:
                    raise Hazard(
                        f"{event.place} is loaded again, and partition {readers[0]} has yet to "
                        f"read it: {self._where(state)}"
                    )
                flying |= {state.at[partition]}
                landed = frozenset(item for item in landed if item[0] != event.place)
            case "product":
                events = self.events[partition][: state.at[partition]]
                number = sum(e.kind == "product" for e in events)
                if self.lead and partition == 1 and number % self.steps == 0:
                    first = self.events[0][: state.at[0]]
                    multiplied = sum(e.kind == "arrive" for e in first)
                    if multiplied < number + self.lead:
                        raise Hazard(f"a tile is begun without a lead: {self._where(state)}")
                for place, copy in zip(event.place, self.operands[number], strict=True):
                    if (place, copy) not in landed:
                        raise Hazard(
                            f"partition {partition} multiplies {place} before it holds step "
                            f"{number}: {self._where(state)}"
                        )
        at = tuple(n + (p == partition) for p, n in enumerate(state.at))
        return State(at, barriers, flying, landed)

    def _still_reads(self, state: State, partition: int, copy: Event) -> bool:
        """Whether a product that is open, or one to come, needs what a copy's slot holds."""
        at = state.at[partition]
        if copy.place in self.reads[partition][at]:
            return True
        held = dict(state.landed).get(copy.place)
        done = sum(e.kind == "product" for e in self.events[partition][:at])
        return any(held in operands for operands in self.operands[done:])

    def _land(self, state: State, copy: int) -> State:
        barrier, count = self.events[self.loader][copy].value
        place = self.events[self.loader][copy].place
        return State(
            state.at,
            self._changed(state.barriers, barrier, more=-count),
            state.flying - {copy},
            state.landed | {(place, copy)},
        )

    def _changed(
        self, barriers: tuple, place: tuple, *, arrivals: int = 0, more: int = 0
    ) -> tuple[tuple[int, int, int], ...]:
        number = self.names[place]
        phase, pending, missing = barriers[number]
        pending, missing = pending - arrivals, missing + more
        if pending == 0 and missing == 0:
            phase, pending = phase + 1, self.counts[number]
        if pending < 0:
            raise Hazard(f"more arrive at barrier {place} than it waits for")
        return (*barriers[:number], (phase, pending, missing), *barriers[number + 1 :])

    def _where(self, state: State) -> str:
        """The next event of each partition."""
        words = []
        for number, (place, events) in enumerate(zip(state.at, self.events, strict=True)):
            what = events[place] if place < len(events) else None
            words.append(f"{number} at {what.kind} {what.place}" if what else f"{number} has ended")
        return ", ".join(words)


def check_buffers(events: list[Event]) -> set[tuple]:
    """What a partition writes is whole and shown to the copy engine before it is stored, and not
    written again before it has been read; which buffers those are.

    Raises:
        Hazard: else.
    """
    stored, waited = False, False  # a store was begun; this thread has waited for it
    written = ""  # what has happened since the buffer was written
    places: set[tuple] = set()
    for event in events:
        match event.kind:
            case "copy out":
                if written != "write, fence, meet":
                    raise Hazard(f"a buffer is stored after {written or 'nothing'}")
                stored, waited, written = True, False, ""
            case "copies wait":
                waited = event.value == 0
            case "meet":
                stored = stored and not waited
                written = f"{written}, meet" if written == "write, fence" else written
            case "fence":
                written = "write, fence" if written == "write" else written
            case "write":
                if stored:
                    raise Hazard("a buffer is written while it is being stored")
                written = "write"
                places.add(event.place)
    if stored and not waited:
        raise Hazard("the program ends before its last store has read its buffer")
    if places != {event.place for event in events if event.kind == "copy out"}:
        raise Hazard("what is stored is not what was written")
    return places
