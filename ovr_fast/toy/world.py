"""The toy world: images with questions whose answers can be verified, and their text twins.

A scene is a small grid. Each cell is empty, a coloured shape, or a handwritten digit (the real
scans that scikit-learn ships). Every scene can be shown three ways that say the same thing:

* an image (28 x 28 pixels a cell, the size of one visual token of Qwen2.5-VL),
* a text twin (the scene in words, in several formats),
* a transcript (one symbol a cell), which reasoning starts with.

Reasoning learned from text carries over to images because both begin with the same transcript
and reason over the transcript alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

CELL_PIXELS = 28
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 70), "blue": (45, 85, 210)}
SHAPES = ("circle", "square")
EMPTY = "-"
FAMILIES = ("count", "compare", "locate", "digit_sum", "digit_compare")
DIGIT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROW_NAMES = {3: ("top", "middle", "bottom"), 4: ("top", "upper", "lower", "bottom")}
HELD_OUT_SHARE = 8
"""One scene in this many, and one digit scan in this many, is kept for the held-out split."""


def symbol(colour: str, shape: str) -> str:
    """One letter a shape: the colour's initial, lower case for a circle, upper for a square."""
    return colour[0] if shape == "circle" else colour[0].upper()


OBJECT_SYMBOLS = {symbol(c, s): (c, s) for c in COLOURS for s in SHAPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A grid of symbols and, for its digit cells, which scan to draw."""

    rows: tuple[tuple[str, ...], ...]  # EMPTY, a key of OBJECT_SYMBOLS, or a digit word
    scans: tuple[int, ...]  # index into the digit scans, one per digit cell in reading order

    @property
    def row_names(self) -> tuple[str, ...]:
        return ROW_NAMES[len(self.rows)]

    @property
    def transcript(self) -> str:
        """The scene in symbols, one token a cell, each row after its name."""
        return " ".join(
            f"{name} {' '.join(row)}" for name, row in zip(self.row_names, self.rows, strict=True)
        )

    @property
    def held_out(self) -> bool:
        """Decided by the scene's content, so a scene can never be in both splits."""
        return hashlib.sha256(self.transcript.encode()).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A scene, one question about it, the answer, and reasoning that leads to the answer."""

    family: str
    scene: Scene
    text: str
    answer: str
    reasoning: str  # begins with the transcript and ends with what the teacher boxed


@cache
def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 scans of scikit-learn: ``images [N, 8, 8]`` in 0..16, ``labels [N]``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


@cache
def _scans_of(digit: int, held_out: bool) -> tuple[int, ...]:
    _, labels = digit_scans()
    indices = np.flatnonzero(labels == digit)
    return tuple(int(i) for i in indices if (i % HELD_OUT_SHARE == 0) == held_out)


def grid_shape(difficulty: int) -> tuple[int, int]:
    """Rows and columns for difficulty 1, 2, 3."""
    shapes = {1: (3, 3), 2: (3, 4), 3: (4, 4)}
    if difficulty not in shapes:
        raise ValueError(f"difficulty={difficulty} is not one of {sorted(shapes)}")
    return shapes[difficulty]


def make_scene(rng: random.Random, *, kind: str, difficulty: int, held_out: bool) -> Scene:
    """A random scene of one split.

    Args:
        kind: "shapes"; "digits" for two or three digit scans on an empty grid; "mixed" for both
            in one grid.
        difficulty: 1..3, the size of the grid.
        held_out: which split; drawn again until the scene's hash falls into it.
    """
    row_count, column_count = grid_shape(difficulty)
    while True:
        cells = [EMPTY] * (row_count * column_count)
        scans = []
        if kind == "digits":
            for position in sorted(rng.sample(range(len(cells)), rng.randint(2, 3))):
                digit = rng.randrange(10)
                cells[position] = DIGIT_WORDS[digit]
                scans.append(rng.choice(_scans_of(digit, held_out)))
        else:
            fill = rng.uniform(0.35, 0.75)
            for position in range(len(cells)):
                if rng.random() >= fill:
                    continue
                if kind == "mixed" and rng.random() < 0.5:
                    digit = rng.randrange(10)
                    cells[position] = DIGIT_WORDS[digit]
                    scans.append(rng.choice(_scans_of(digit, held_out)))
                else:
                    cells[position] = rng.choice(list(OBJECT_SYMBOLS))
        rows = tuple(
            tuple(cells[r * column_count : (r + 1) * column_count]) for r in range(row_count)
        )
        scene = Scene(rows=rows, scans=tuple(scans))
        if scene.held_out == held_out:
            return scene


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The image, RGB, ``28 * columns`` x ``28 * rows`` pixels, with jittered colour and place."""
    row_count, column_count = len(scene.rows), len(scene.rows[0])
    tint = tuple(rng.randint(228, 250) for _ in range(3))
    image = Image.new("RGB", (column_count * CELL_PIXELS, row_count * CELL_PIXELS), tint)
    draw = ImageDraw.Draw(image)
    scans = iter(scene.scans)
    for r, row in enumerate(scene.rows):
        for c, cell in enumerate(row):
            left, top = c * CELL_PIXELS, r * CELL_PIXELS
            if cell in DIGIT_WORDS:
                image.paste(_scan_tile(next(scans), tint), (left + 2, top + 2))
            elif cell != EMPTY:
                colour, shape = OBJECT_SYMBOLS[cell]
                fill = tuple(max(0, min(255, v + rng.randint(-25, 25))) for v in COLOURS[colour])
                size = rng.randint(16, 22)
                x = left + rng.randint(2, CELL_PIXELS - size - 2)
                y = top + rng.randint(2, CELL_PIXELS - size - 2)
                box = (x, y, x + size, y + size)
                (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=fill)
    return image


def _scan_tile(index: int, background: tuple[int, ...]) -> Image.Image:
    images, _ = digit_scans()
    ink = Image.fromarray((images[index] / 16 * 255).astype(np.uint8)).resize(
        (24, 24), Image.Resampling.BILINEAR
    )
    tile = Image.new("RGB", (24, 24), background)
    tile.paste((30, 30, 40), mask=ink)
    return tile


def describe(scene: Scene, style: int) -> str:
    """The text twin: the scene in words, row by row. Styles 0, 1, 2 differ in wording."""

    def cell(value: str) -> str:
        if value == EMPTY:
            return ("nothing here", "empty cell", "blank space")[style]
        if value in DIGIT_WORDS:
            return ("digit {}", "number {}", "{} written")[style].format(value)
        colour, shape = OBJECT_SYMBOLS[value]
        return f"{shape} {colour}" if style == 1 else f"{colour} {shape}"

    comma = (", ", " and ", "; ")[style]
    rows = [comma.join(cell(value) for value in row) for row in scene.rows]
    frames = ("In the {} row: {}.", "The {} row has {}.", "{} = ( {} )")
    return " ".join(
        frames[style].format(name, row) for name, row in zip(scene.row_names, rows, strict=True)
    )


TWIN_STYLES = 3


class Teacher:
    """Says the result of every step of a reasoning text; at most one of them is a slip.

    Text distilled from a teacher holds the teacher's slips, imitation learns them with the rest,
    and only a verifiable reward can go beyond the teacher.

    Args:
        rng: chooses among wrong results.
        slip_at: the step to get wrong; None for none. What follows goes on from the slip.
    """

    def __init__(self, rng: random.Random, slip_at: int | None = None) -> None:
        self.rng, self.slip_at = rng, slip_at
        self.steps = 0

    def says(self, right: int, wrong: list[int]) -> int:
        """The next step's result."""
        slips = self.steps == self.slip_at
        self.steps += 1
        return self.rng.choice(wrong) if slips else right


Reasoning = Callable[[Teacher], str]


def make_question(
    rng: random.Random, *, family: str, difficulty: int, held_out: bool, slip_share: float = 0.0
) -> Question:
    """A question of one family with its verifiable answer.

    Args:
        family: one of ``FAMILIES``.
        difficulty: 1..3.
        held_out: which split the scene comes from.
        slip_share: how often the reasoning holds a slip, and so (nearly always) a wrong result.
            The answer is right all the same.

    Raises:
        ValueError: an unknown family.
    """
    makers = {
        "count": _count,
        "compare": _compare,
        "locate": _locate,
        "digit_sum": _digit_sum,
        "digit_compare": _digit_compare,
    }
    if family not in makers:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    kind = "digits" if family.startswith("digit") else "shapes"
    while True:
        scene = make_scene(rng, kind=kind, difficulty=difficulty, held_out=held_out)
        made = makers[family](rng, scene)
        if made is None:  # the scene has no such question (for instance nothing to locate)
            continue
        text, answer, reason = made
        teacher = Teacher(rng)
        steps = reason(teacher)
        if slip_share and rng.random() < slip_share:
            steps = reason(Teacher(rng, slip_at=rng.randrange(teacher.steps)))
        reasoning = f"I see: {scene.transcript} . {steps}"
        return Question(family=family, scene=scene, text=text, answer=answer, reasoning=reasoning)


def _near(number: int) -> list[int]:
    return [number - 1, number + 1] if number else [1]


def running_sum(numbers: list[int], teacher: Teacher) -> tuple[str, int]:
    """Two or more numbers added one by one, and the total: ``5 + 2 = 7 , 7 + 3 = 10``.

    With one step for three digits a small model has a thousand sums to know, not two hundred.
    """
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        result = teacher.says(total + number, _near(total + number))
        steps.append(f"{total} + {number} = {result}")
        total = result
    return " , ".join(steps), total


def extreme(numbers: list[int], which: str, teacher: Teacher) -> tuple[str, int]:
    """The largest or smallest of the numbers: ``The largest of 5 , 2 = 5``."""
    right = max(numbers) if which == "largest" else min(numbers)
    others = [number for number in numbers if number != right]
    answer = teacher.says(right, others or _near(right))
    return f"The {which} of {' , '.join(map(str, numbers))} = {answer}", answer


def _by_row(scene: Scene, values: list[str]) -> str:
    """Each row again and what it comes to.

    Writing the row out once more is what lets a small model work on it: its name finds it in the
    transcript, and the count is then of what stands right before.
    """
    return " , ".join(
        f"{name} {' '.join(row)} . {value}"
        for name, row, value in zip(scene.row_names, scene.rows, values, strict=True)
    )


def _tally(scene: Scene, colour: str) -> list[int]:
    wanted = {symbol(colour, shape) for shape in SHAPES}
    return [sum(cell in wanted for cell in row) for row in scene.rows]


def _count_text(scene: Scene, colour: str, teacher: Teacher) -> tuple[str, int]:
    counts = [teacher.says(n, _near(n)) for n in _tally(scene, colour)]
    added, total = running_sum(counts, teacher)
    return f"Count {colour}: {_by_row(scene, [str(n) for n in counts])} . Add: {added} .", total


def _count(rng: random.Random, scene: Scene) -> tuple[str, str, Reasoning]:
    colour = rng.choice(list(COLOURS))

    def reason(teacher: Teacher) -> str:
        steps, total = _count_text(scene, colour, teacher)
        return f"{steps} \\boxed{{{total}}}"

    return f"How many {colour} shapes are there?", str(sum(_tally(scene, colour))), reason


def _compare(rng: random.Random, scene: Scene) -> tuple[str, str, Reasoning]:
    first, second = rng.sample(list(COLOURS), 2)

    def verdict(a: int, b: int) -> str:
        return "equal" if a == b else first if a > b else second

    def reason(teacher: Teacher) -> str:
        steps_a, a = _count_text(scene, first, teacher)
        steps_b, b = _count_text(scene, second, teacher)
        return f"{steps_a} {steps_b} \\boxed{{{verdict(a, b)}}}"

    return (
        f"Are there more {first} or more {second} shapes, or equal?",
        verdict(sum(_tally(scene, first)), sum(_tally(scene, second))),
        reason,
    )


def _locate(rng: random.Random, scene: Scene) -> tuple[str, str, Reasoning] | None:
    flat = [cell for row in scene.rows for cell in row]
    unique = [cell for cell in OBJECT_SYMBOLS if flat.count(cell) == 1]
    if not unique:
        return None
    target = rng.choice(unique)
    colour, shape = OBJECT_SYMBOLS[target]
    right = [target in row for row in scene.rows].index(True)

    def reason(teacher: Teacher) -> str:
        found = teacher.says(right, [i for i in range(len(scene.rows)) if i != right])
        flags = [str(int(i == found)) for i in range(len(scene.rows))]
        return f"Find {target} : {_by_row(scene, flags)} . \\boxed{{{scene.row_names[found]}}}"

    return f"Which row has the {colour} {shape}?", scene.row_names[right], reason


def _list_digits(scene: Scene) -> tuple[list[int], str]:
    rows = [[cell for cell in row if cell in DIGIT_WORDS] for row in scene.rows]
    listed = _by_row(
        scene, [" ".join(str(DIGIT_WORDS.index(w)) for w in row) or EMPTY for row in rows]
    )
    return [DIGIT_WORDS.index(word) for row in rows for word in row], f"Digits: {listed} ."


def _digit_sum(rng: random.Random, scene: Scene) -> tuple[str, str, Reasoning]:
    digits, listed = _list_digits(scene)

    def reason(teacher: Teacher) -> str:
        added, total = running_sum(digits, teacher)
        return f"{listed} Add: {added} . \\boxed{{{total}}}"

    return "What is the sum of the digits?", str(sum(digits)), reason


def _digit_compare(rng: random.Random, scene: Scene) -> tuple[str, str, Reasoning]:
    digits, listed = _list_digits(scene)
    which = rng.choice(("largest", "smallest"))

    def reason(teacher: Teacher) -> str:
        text, answer = extreme(digits, which, teacher)
        return f"{listed} {text} . \\boxed{{{answer}}}"

    answer = max(digits) if which == "largest" else min(digits)
    return f"What is the {which} digit?", str(answer), reason
