"""The toy world: answers are right, splits do not overlap, both sides of a scene say the same."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from ovr_fast.grading.boxes import last_boxed
from ovr_fast.toy import world


def recompute(question: world.Question) -> str:
    """The answer from the scene and the question's text alone, written a second time."""
    cells = [cell for row in question.scene.rows for cell in row]
    digits = [world.DIGIT_WORDS.index(c) for c in cells if c in world.DIGIT_WORDS]

    def count(colour: str) -> int:
        return sum(cell.lower() == colour[0] for cell in cells if len(cell) == 1)

    words = re.findall(r"[a-z]+", question.text)
    colours = [word for word in words if word in world.COLOURS]
    if question.family == "count":
        return str(count(colours[0]))
    if question.family == "compare":
        a, b = (count(colour) for colour in colours)
        return "equal" if a == b else colours[0] if a > b else colours[1]
    if question.family == "locate":
        shape = next(word for word in words if word in world.SHAPES)
        letter = colours[0][0] if shape == "circle" else colours[0][0].upper()
        rows = [i for i, row in enumerate(question.scene.rows) if letter in row]
        assert len(rows) == 1
        return question.scene.row_names[rows[0]]
    if question.family == "digit_sum":
        return str(sum(digits))
    return str(max(digits) if "largest" in question.text else min(digits))


@pytest.mark.parametrize("family", world.FAMILIES)
@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_answers_are_right_and_reasoning_ends_in_them(family: str, difficulty: int) -> None:
    rng = random.Random(1)
    for _ in range(60):
        question = world.make_question(rng, family=family, difficulty=difficulty, held_out=False)
        assert question.answer == recompute(question)
        assert last_boxed(question.reasoning) == question.answer
        assert question.reasoning.startswith(f"I see: {question.scene.transcript} .")


@pytest.mark.parametrize("family", world.FAMILIES)
def test_a_teacher_slips_as_often_as_asked_and_goes_on_from_its_slip(family: str) -> None:
    rng = random.Random(2)
    wrong = 0
    for _ in range(300):
        question = world.make_question(
            rng, family=family, difficulty=1, held_out=False, slip_share=0.5
        )
        assert question.answer == recompute(question)
        said = last_boxed(question.reasoning)
        assert said is not None
        wrong += said != question.answer
        for a, b, total in re.findall(r"(\d+) \+ (\d+) = (\d+)", question.reasoning):
            assert abs(int(a) + int(b) - int(total)) <= 1
    assert (0.2 if family == "compare" else 0.4) < wrong / 300 < 0.6


def test_training_and_held_out_never_share_a_scene_or_a_scan() -> None:
    rng = random.Random(0)
    scenes: dict[bool, set[str]] = {False: set(), True: set()}
    scans: dict[bool, set[int]] = {False: set(), True: set()}
    for held_out in (False, True):
        for i in range(400):
            kind = ("shapes", "digits", "mixed")[i % 3]
            scene = world.make_scene(rng, kind=kind, difficulty=1, held_out=held_out)
            scenes[held_out].add(scene.transcript)
            scans[held_out].update(scene.scans)
    assert not scenes[False] & scenes[True]
    assert not scans[False] & scans[True]
    assert len(scans[True]) > 50


def test_a_scan_shows_the_digit_it_stands_for() -> None:
    _, labels = world.digit_scans()
    scene = world.make_scene(random.Random(3), kind="digits", difficulty=1, held_out=True)
    words = [c for row in scene.rows for c in row if c in world.DIGIT_WORDS]
    assert [world.DIGIT_WORDS[labels[i]] for i in scene.scans] == words


def test_a_text_twin_names_every_cell_in_order() -> None:
    rng = random.Random(5)
    for style in range(world.TWIN_STYLES):
        scene = world.make_scene(rng, kind="mixed", difficulty=2, held_out=False)
        text = world.describe(scene, style)
        at = 0
        for row in scene.rows:
            for cell in row:
                if cell == world.EMPTY:
                    continue
                words = [cell] if cell in world.DIGIT_WORDS else world.OBJECT_SYMBOLS[cell]
                for word in sorted(words, key=lambda w: text.index(w, at)):
                    at = text.index(word, at)


def test_the_image_changes_where_the_scene_does() -> None:
    empty = world.Scene(rows=(("-",) * 3,) * 3, scans=())
    one = world.Scene(rows=(("-", "r", "-"), ("-",) * 3, ("-",) * 3), scans=())
    a = np.asarray(world.render(empty, random.Random(0)), dtype=int)
    b = np.asarray(world.render(one, random.Random(0)), dtype=int)
    assert a.shape == (84, 84, 3)
    changed = np.abs(a - b).sum(-1) > 0
    assert changed[:28, 28:56].mean() > 0.2
    assert changed.sum() == changed[:28, 28:56].sum()


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match="family 'counting' is not one of count"):
        world.make_question(random.Random(0), family="counting", difficulty=1, held_out=False)
    with pytest.raises(ValueError, match="difficulty=9"):
        world.grid_shape(9)
