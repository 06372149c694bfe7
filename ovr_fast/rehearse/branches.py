"""Which statements only a GPU runs, and which of them rehearsals have run.

    python -m ovr_fast.rehearse ... --lines LINES.json   # as often as you like: it adds to the file
    python -m ovr_fast.rehearse.branches LINES.json

A statement counts as a GPU's where it is in the branch of an ``if`` that asks for "cuda" (or not
for "cpu"), or after one that leaves a function on a CPU. What a kernel does is not seen here, nor a
condition inside one statement.
"""

from __future__ import annotations

import ast
import fcntl
import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PLACES = ("ovr_fast", "kernels/ovr_kernels")
APART = ("ovr_fast/rehearse/", "ovr_fast/toy/", "ovr_fast/parallel/cpu.py")
"""Not the trainer's own, or what stands in for a GPU on a CPU."""


def asks_for_a_gpu(test: ast.expr) -> bool | None:
    """Whether a condition is true on a GPU; None where it does not ask."""
    text = ast.unparse(test)
    if "cuda" not in text and "'cpu'" not in text:
        return None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = asks_for_a_gpu(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        asked = [asks_for_a_gpu(value) for value in test.values]
        known = {answer for answer in asked if answer is not None}
        return known.pop() if len(known) == 1 else None
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        names_cuda = "cuda" in ast.unparse(test.comparators[0])
        equal = isinstance(test.ops[0], ast.Eq)
        if isinstance(test.ops[0], ast.Eq | ast.NotEq) and isinstance(
            test.comparators[0], ast.Constant
        ):
            return names_cuda == equal
        return True  # a property of a GPU, compared
    return True  # is_cuda, torch.cuda.is_available()


def gpu_statements(source: str) -> set[int]:
    """First lines of the statements that only a GPU runs."""
    found: set[int] = set()

    def take(body: list[ast.stmt]) -> None:
        for statement in body:
            for node in ast.walk(statement):
                if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef):
                    found.add(node.lineno)

    def leaves(body: list[ast.stmt]) -> bool:
        return bool(body) and isinstance(body[-1], ast.Return | ast.Continue)

    def visit(body: list[ast.stmt]) -> None:
        for index, statement in enumerate(body):
            if isinstance(statement, ast.If):
                asked = asks_for_a_gpu(statement.test)
                if asked:
                    take(statement.body)
                elif asked is False:
                    take(statement.orelse)
                    if leaves(statement.body):
                        take(body[index + 1 :])
            for name in ("body", "orelse", "finalbody"):
                visit([s for s in getattr(statement, name, []) if isinstance(s, ast.stmt)])

    visit(ast.parse(source).body)
    return found


def all_gpu_statements() -> dict[str, set[int]]:
    """By file, relative to the project."""
    files = [path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))]
    names = {str(path.relative_to(ROOT)): path for path in files}
    found = {
        name: gpu_statements(path.read_text())
        for name, path in names.items()
        if not name.startswith(APART)
    }
    return {name: lines for name, lines in found.items() if lines}


class Recorder:
    """Which of those statements this process runs, in threads that Python started."""

    def __init__(self) -> None:
        self.wanted = {str(ROOT / name): name for name in all_gpu_statements()}
        self.seen: dict[str, set[int]] = {name: set() for name in self.wanted.values()}

    def start(self) -> None:
        """From now on."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = self.wanted.get(frame.f_code.co_filename)
        if name is None:
            return None
        seen = self.seen[name]

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            seen.add(frame.f_lineno)
            return line

        return line

    def write(self, path: Path) -> None:
        """Add what was seen to the file; ranks do so one after another."""
        sys.settrace(None)
        with open(path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            before = json.loads(text) if text else {}
            merged = {
                name: sorted({*before.get(name, []), *self.seen.get(name, set())})
                for name in {*before, *self.seen}
            }
            file.truncate(0)
            file.write(json.dumps(merged))


def report(seen: dict[str, list[int]]) -> str:
    """What has run and what is left, with its source."""
    total = run = 0
    left = []
    for name, lines in all_gpu_statements().items():
        text = (ROOT / name).read_text().splitlines()
        total += len(lines)
        run += len(lines & set(seen.get(name, [])))
        for line in sorted(lines - set(seen.get(name, []))):
            left.append(f"  {name}:{line}: {text[line - 1].strip()}")
    return "\n".join([f"{run} of {total} statements of GPU branches were run; left:", *left])


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
