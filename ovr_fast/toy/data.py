"""Writes the toy world as data files, in the formats that the trainer reads.

    python -m ovr_fast.toy.data --output runs/toy_data [--difficulty 1] [--slips 0.5] [--seed 0]

``cold_start.jsonl``      scenes in words or symbols with reasoning, for stage 1
``rl_images.parquet``   images (bytes in the file) with questions and answers, for stage 2
``rl_text.jsonl``         text twins with questions and answers, for stage 2
``heldout_images.jsonl``, ``heldout_text.jsonl``   the same held-out questions both ways; the
                          images are PNG files beside them

A scene, and a digit scan, is in training or held out by its own content, so the two never overlap.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
from functools import partial
from pathlib import Path

from ovr_fast.toy import world

DEFAULT_FAMILIES = ("count", "locate", "digit_sum", "digit_compare")
"""Of the toy run. "compare" needs two counts and two sums, too long a chain for 20 minutes."""

SLIP_SHARE = 0.5
"""The toy's teacher is wrong in half of its texts, so imitation cannot go beyond 50 %. Without
slips, what a cold start leaves wrong is what the model cannot do yet, and PPO has to teach it
skills: 12,800 rollouts were too few. With them PPO can do at toy scale what it is there for."""


def image_bytes(question: world.Question, rng: random.Random) -> bytes:
    """The question's image as a PNG file."""
    buffer = io.BytesIO()
    world.render(question.scene, rng).save(buffer, format="PNG")
    return buffer.getvalue()


def questions(
    count: int,
    *,
    difficulty: int,
    held_out: bool,
    families: tuple[str, ...],
    seed: int,
    slip_share: float = 0.0,
) -> list[world.Question]:
    """``count`` distinct questions, the families in turn."""
    rng = random.Random(seed)
    made: list[world.Question] = []
    seen: set[tuple[str, str]] = set()
    while len(made) < count:
        family = families[len(made) % len(families)]
        question = world.make_question(
            rng, family=family, difficulty=difficulty, held_out=held_out, slip_share=slip_share
        )
        key = (question.scene.transcript, question.text)
        if key not in seen:
            seen.add(key)
            made.append(question)
    return made


def cold_start_prompt(question: world.Question, rng: random.Random) -> str:
    """Half in words, half in symbols, with the question.

    With words alone a model learns to look its answers up in the twin, where "red" stands, and not
    in its own transcript, where "r" does; an image has no such words to look at.
    """
    if rng.random() < 0.5:
        return f"{question.scene.transcript} .\n{question.text}"
    return text_prompt(question, rng)


def text_prompt(question: world.Question, rng: random.Random) -> str:
    """The text twin and the question."""
    twin = world.describe(question.scene, rng.randrange(world.TWIN_STYLES))
    return f"{twin}\n{question.text}"


def write_toy_data(
    output: Path,
    *,
    difficulty: int = 1,
    families: tuple[str, ...] = DEFAULT_FAMILIES,
    slip_share: float = SLIP_SHARE,
    cold_start: int = 8000,
    rl: int = 2000,
    held_out: int = 400,
    seed: int = 0,
) -> None:
    """Write all files; the folder appears under its name only when it is complete.

    Args:
        output: folder.
        difficulty: 1..3.
        families: of ``world.FAMILIES``.
        slip_share: share of the cold start's reasoning texts in which the teacher slips.
        cold_start, rl, held_out: how many questions of each kind.
        seed: of everything.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    unfinished = output.with_name(output.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "images").mkdir(parents=True)
    make = partial(questions, difficulty=difficulty, families=families)
    rng = random.Random(seed + 1)

    def lines(name: str, rows: list[dict]) -> None:
        (unfinished / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines(
        "cold_start.jsonl",
        [
            {
                "id": f"cold-{i}",
                "family": q.family,
                "prompt": cold_start_prompt(q, rng),
                "response": q.reasoning,
                "answer": q.answer,
            }
            for i, q in enumerate(
                make(cold_start, held_out=False, seed=seed, slip_share=slip_share)
            )
        ],
    )
    train = make(rl, held_out=False, seed=seed + 2)
    table = {
        "id": [f"image-{i}" for i in range(rl)],
        "family": [q.family for q in train],
        "prompt": [q.text for q in train],
        "images": [[{"bytes": image_bytes(q, rng), "path": None}] for q in train],
        "answer": [q.answer for q in train],
    }
    parquet.write_table(pa.table(table), unfinished / "rl_images.parquet")
    text = make(rl, held_out=False, seed=seed + 3)
    lines("rl_text.jsonl", [_row(f"text-{i}", q, text_prompt(q, rng)) for i, q in enumerate(text)])

    test = make(held_out, held_out=True, seed=seed + 4)
    image_rows = []
    for i, q in enumerate(test):
        name = f"images/{i:04d}.png"
        (unfinished / name).write_bytes(image_bytes(q, rng))
        image_rows.append({**_row(f"held-{i}", q, q.text), "images": [name]})
    lines("heldout_images.jsonl", image_rows)
    lines(
        "heldout_text.jsonl",
        [_row(f"held-{i}", q, text_prompt(q, rng)) for i, q in enumerate(test)],
    )
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(output)


def _row(name: str, question: world.Question, prompt: str) -> dict:
    return {"id": name, "family": question.family, "prompt": prompt, "answer": question.answer}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.toy.data", description="Write the toy world as data files."
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--difficulty", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument(
        "--families", nargs="+", default=list(DEFAULT_FAMILIES), choices=world.FAMILIES
    )
    parser.add_argument(
        "--slips", type=float, default=SLIP_SHARE, help="share of reasoning texts with a slip, 0..1"
    )
    parser.add_argument("--cold-start", type=int, default=8000, help="text examples")
    parser.add_argument("--rl", type=int, default=2000, help="prompts of each kind")
    parser.add_argument("--held-out", type=int, default=400, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_toy_data(
        arguments.output,
        difficulty=arguments.difficulty,
        families=tuple(arguments.families),
        slip_share=arguments.slips,
        cold_start=arguments.cold_start,
        rl=arguments.rl,
        held_out=arguments.held_out,
        seed=arguments.seed,
    )
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
