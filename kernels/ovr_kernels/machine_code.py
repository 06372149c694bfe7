"""What a program of machine code executes, by unit, and how long one takes that runs alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ovr_kernels.artefacts import Loop, loops
from ovr_kernels.machines import LANES, LATENCY

_UNITS = (
    ("special", r"MUFU|F2I|I2F(?!P)|F2F\b|POPC|FLO"),
    ("memory", r"LD|ST|SHFL|ATOM|RED|MATCH|VOTE\.ANY"),
    ("fma", r"FADD|FMUL|FFMA|FSWZADD|H(ADD|MUL|FMA)2"),
    ("multiply", r"IMAD"),
    (
        "alu",
        r"FMNMX|FSEL|FSET|FCHK|LOP|IADD|ISETP|SEL|SHF|PRMT|LEA|F2FP|I2FP|I?MNMX|VI|PLOP|MOV"
        r"|P2R",
    ),
)
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?(?P<guard>U?P\w+)\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*)"
)
_REGISTER = re.compile(r"\b(U?[RP])(\d+)(?:\.reuse)?(\.64)?")

_WAITS = (
    (LATENCY, r"LDG|LD\b|ATOMG?\b|MEMBAR"),
    (30.0, r"LD|SHFL|ATOMS|S2U?R|CS2R|R2UR|BAR|MATCH|VOTE"),
    (20.0, r"MUFU|F2I|I2F(?!P)|F2F\b|POPC|FLO"),
    (10.0, r"U"),
)
"""Cycles from an instruction to its result, by name, the first that fits; else ``_ARITHMETIC``.
Rounded from published microbenchmarks of sm_80 and sm_90, but ``LATENCY``."""
_ARITHMETIC = 5.0
_NO_RESULT = re.compile(
    r"ST|REDG?\b|BRA|EXIT|BAR|BSSY|BSYNC|WARPSYNC|MEMBAR|CCTL|NOP|DEPBAR|LDGSTS"
)
_MEETS = re.compile(r"BAR\.|MEMBAR")
_CARRIES = re.compile(r"U?(IADD|LEA|IMAD)")


def unit_of(name: str) -> str:
    """Which unit executes an instruction; uniform ones and control flow: "other"."""
    for unit, pattern in _UNITS:
        if re.match(pattern, name):
            return unit
    return "other"


def units(lines: Iterable[str]) -> Counter[str]:
    """Instructions of some lines, by unit."""
    found = (m["name"] for line in lines if (m := _INSTRUCTION.search(line)))
    return Counter(unit_of(name) for name in found)


def cycles(instructions: Mapping[str, float], capability: int) -> dict[str, float]:
    """That a multiprocessor takes for one warp's instructions, by unit, and to issue them all."""
    lanes = LANES[capability]
    found = {unit: instructions.get(unit, 0.0) * 32 / lanes[unit] for unit in lanes}
    return found | {"issue": sum(instructions.values()) / 4}


@dataclass(frozen=True, slots=True)
class _Instruction:
    """With the registers that it writes and reads."""

    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def wait(self) -> float:
        """Cycles to its result."""
        fits = (each for each, pattern in _WAITS if re.match(pattern, self.name))
        return next(fits, _ARITHMETIC)


def _registers(text: str, width: int = 1) -> Iterator[str]:
    for kind, number, wide in _REGISTER.findall(text):
        several = max(width, 2 if wide else 1) if kind.endswith("R") else 1
        yield from (f"{kind}{int(number) + place}" for place in range(several))


def _results(name: str, given: Sequence[str]) -> int:
    """How many of the first operands an instruction writes."""
    if _NO_RESULT.match(name):
        return 0
    if re.match(r"U?P(T|\d)", given[0]):  # a comparison's two, or what stands beside a register
        return 2
    count = 1
    while _CARRIES.match(name) and re.fullmatch(r"U?P(T|\d)", "".join(given[count : count + 1])):
        count += 1
    return count


def _instruction(line: str) -> _Instruction | None:
    found = _INSTRUCTION.search(line)
    if found is None:
        return None
    name, guard = found["name"], found["guard"]
    given = [each.strip() for each in found["operands"].split(",")]
    width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    written = _results(name, given)
    results = tuple(r for each in given[:written] for r in _registers(each, width))
    read = [r for each in given[written:] for r in _registers(each)]
    if name.startswith("ST") or "WIDE" in name:  # the number that is stored, or added
        read += _registers(given[-1], width)
    if guard is not None:  # what it writes keeps its value where the guard is false
        read += [guard, *results]
    return _Instruction(name=name, results=results, operands=tuple(read))


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel without branches but its loops: both sides of a condition are executed."""

    lines: tuple[str, ...]
    loops: tuple[Loop, ...]  # in the order of the code, none within another

    @classmethod
    def of(cls, code: str) -> Program:
        """Of nvdisasm's text.

        Raises:
            ValueError: loops within each other.
        """
        lines = code.splitlines()
        found = sorted(loops(lines))
        if found and found[-1][1] == found[-1][0] + 1:  # the jump to itself behind the program
            lines = lines[: found.pop()[0]]
        if any(second[0] < first[1] for first, second in zip(found, found[1:], strict=False)):
            raise ValueError(f"loops within loops: {found}")
        return cls(tuple(lines), tuple(found))

    def parts(self, trips: Sequence[float]) -> Iterator[tuple[tuple[str, ...], float]]:
        """Runs of lines and how often each is executed.

        Raises:
            ValueError: ``trips`` is not one number a loop.
        """
        if len(trips) != len(self.loops):
            raise ValueError(f"{len(self.loops)} loops, and {len(trips)} were described")
        place = 0
        for (first, last), turns in zip(self.loops, trips, strict=True):
            yield self.lines[place:first], 1.0
            yield self.lines[first : last + 1], turns
            place = last + 1
        yield self.lines[place:], 1.0

    def instructions(self, trips: Sequence[float]) -> dict[str, float]:
        """A warp's, by unit."""
        total: defaultdict[str, float] = defaultdict(float)
        for lines, turns in self.parts(trips):
            for unit, number in units(lines).items():
                total[unit] += number * turns
        return dict(total)

    def alone(self, trips: Sequence[float], turn: float) -> float:
        """Cycles of a warp that issues at most one instruction in ``turn``, in order, each when its
        operands are there. After three rounds of a loop the others are taken to be like the
        third."""
        now, ready = 0.0, dict[str, float]()
        for lines, turns in self.parts(trips):
            listed = [each for line in lines if (each := _instruction(line)) is not None]
            began = now
            for _ in range(min(3, round(turns))):
                began = now
                for each in listed:
                    now = max([now + turn, *(ready.get(name, 0.0) for name in each.operands)])
                    now += each.wait if _MEETS.match(each.name) else 0.0
                    ready |= dict.fromkeys(each.results, now + each.wait)
            more = max(0.0, turns - 3) * (now - began)
            now += more
            ready = {name: at + more for name, at in ready.items()}
        return now

    def until_an_exit(self) -> tuple[Program, Program]:
        """What stands before the first exit, and behind it.

        Raises:
            ValueError: there is none, or nothing behind it.
        """
        exits = [i for i, line in enumerate(self.lines) if re.search(r"\bEXIT\b", line)]
        end = exits[0] + 1 if exits else len(self.lines)
        before = tuple(loop for loop in self.loops if loop[1] < end)
        behind = tuple((a - end, b - end) for a, b in self.loops if a >= end)
        if not units(self.lines[end:]):
            raise ValueError("nothing stands behind the first exit")
        return Program(self.lines[:end], before), Program(self.lines[end:], behind)
