"""Labelled excerpts in the toy's idiom, by which a judge of its responses is calibrated:
``python -m ovr_fast.behaviours find --excerpts FILE``. The label is the question's family: its
teacher always reasons in one way."""

from __future__ import annotations

import json
from pathlib import Path

from ovr_fast.toy.data import DEFAULT_FAMILIES, questions

SHOWS = {
    "subgoal_setting": ("count", "digit_sum"),  # announces a sum and takes it step by step
    "visual_divide_and_conquer": DEFAULT_FAMILIES,  # goes through the picture row by row
    "goal_driven_visual_tracing": ("locate",),  # looks for one thing
}
EACH = 100
"""Excerpts that show a behaviour, and as many near misses: errors to within 4 points."""


def write_excerpts(path: Path) -> None:
    """A TOML file like ``behaviours/excerpts.toml``, of the behaviours that the toy's texts show.
    Near misses are texts of other families, and, where all show it, transcripts with an answer."""
    lines = []
    for behaviour, families in SHOWS.items():
        others = tuple(family for family in DEFAULT_FAMILIES if family not in families)
        shows = [q.reasoning for q in _questions(families)]
        if others:
            near = [q.reasoning for q in _questions(others)]
        else:
            near = [
                f"I see: {q.scene.transcript} . \\boxed{{{q.answer}}}" for q in _questions(families)
            ]
        lines += [f"[{behaviour}]", f"shows = {json.dumps(shows)}", f"near = {json.dumps(near)}"]
    path.write_text("\n".join(lines) + "\n")


def _questions(families: tuple[str, ...]) -> list:
    return questions(EACH, difficulty=1, held_out=False, families=families, seed=7)
