"""Writes toy benchmarks in the shapes of official ones, with their adapters.

    python -m ovr_fast.toy.benchmarks --output runs/toy_benchmarks [--questions 60] [--seed 1]

``toy_mathvision``  free answers over pictures, one Parquet file with decoded pictures
``toy_mathverse_*`` the same scenes as text ("Text Dominant") and as pictures ("Vision Only")
``toy_dynamath``    seeds of five redrawn scenes each, one file a variant; worst case counts
``toy_choice``      options that the prompt does not list, answered by an option's text

The scenes are held out from all training data. The toy model has seen no words but its own, so the
adapters add no instruction.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from ovr_fast.toy import world
from ovr_fast.toy.data import DEFAULT_FAMILIES, image_bytes, questions, text_prompt

VARIANTS = 5
MAX_TOKENS = 160

COMMON = 'instruction = ""\nmax_tokens = {tokens}\nrows = {rows}\nlicence = "CC0-1.0"\n'


def _parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def _adapter(folder: Path, name: str, rows: int, text: str) -> None:
    common = COMMON.format(tokens=MAX_TOKENS, rows=rows)
    (folder / f"{name}.toml").write_text(f'name = "{name}"\n{common}{text}')


def _picture(question: world.Question, rng: random.Random) -> dict:
    return {"bytes": image_bytes(question, rng), "path": None}


def write(output: Path, *, count: int, seed: int) -> None:
    """Files and adapters of all four."""
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    made = questions(
        count, difficulty=1, held_out=True, families=DEFAULT_FAMILIES, seed=seed
    )  # fmt: skip
    _parquet(
        output / "MathVision" / "testmini-00000-of-00001.parquet",
        [
            {"id": str(i), "question": f"<image1>{q.text}", "options": [], "answer": q.answer,
             "decoded_image": _picture(q, rng), "subject": q.family, "level": 1}
            for i, q in enumerate(made)
        ],
    )  # fmt: skip
    _adapter(output, "toy_mathvision", count, """files = ["MathVision/testmini-*.parquet"]
id = "id"
one_of = ["decoded_image"]
marks = "<image\\\\d+>"
kind = "exact"
groups = ["subject"]
""")  # fmt: skip
    rows: list[dict] = []
    for i, q in enumerate(made):
        for version in ("Text Dominant", "Vision Only"):
            text = version == "Text Dominant"
            rows.append(
                {"sample_index": str(len(rows)), "problem_index": str(i),
                 "problem_version": version, "question": text_prompt(q, rng) if text else q.text,
                 "image": None if text else _picture(q, rng), "answer": q.answer,
                 "question_type": "free-form"}
            )  # fmt: skip
    _parquet(output / "MathVerse" / "testmini.parquet", rows)
    for version in ("Text Dominant", "Vision Only"):
        name = f"toy_mathverse_{version.lower().replace(' ', '_')}"
        _adapter(output, name, count, f"""files = ["MathVerse/testmini.parquet"]
id = "sample_index"
where = {{ problem_version = "{version}" }}
pictures = ["image"]
kind = "exact"
cluster = "problem_index"
""")  # fmt: skip
    seeds = count // VARIANTS
    drawn = questions(
        seeds * VARIANTS, difficulty=1, held_out=True, families=DEFAULT_FAMILIES[:1], seed=seed + 1
    )  # fmt: skip
    for variant in range(VARIANTS):
        part = drawn[variant * seeds : (variant + 1) * seeds]
        _parquet(
            output / "DynaMath" / f"sample_variant{variant + 1}-00000-of-00001.parquet",
            [
                {"id": i, "question": q.text, "decoded_image": _picture(q, rng),
                 "ground_truth": q.answer, "answer_type": "float"}
                for i, q in enumerate(part)
            ],
        )  # fmt: skip
    patterns = json.dumps([f"DynaMath/sample_variant{{1..{VARIANTS}}}-*"])
    _adapter(output, "toy_dynamath", seeds * VARIANTS, f"""files = {patterns}
id = "id"
one_of = ["decoded_image"]
answer = "ground_truth"
kind = "number"
tolerance = 0.001
cluster = "id"
variants = "file"
aggregate = "worst_of"
""")  # fmt: skip
    lines = []
    for i, q in enumerate(made):
        wrong = sorted({other.answer for other in made if other.family == q.family} - {q.answer})
        options = [q.answer, *rng.sample(wrong, min(3, len(wrong)))]
        rng.shuffle(options)
        lines.append({"key": i, "question": text_prompt(q, rng), "options": options,
                      "answer": "ABCD"[options.index(q.answer)]})  # fmt: skip
    (output / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    _adapter(output, "toy_choice", count, """files = ["choice.jsonl"]
id = "key"
options = "options"
show_options = false
kind = "choice"
""")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.toy.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.questions < 2 * VARIANTS:
        parser.error(f"--questions must be at least {2 * VARIANTS}")
    write(arguments.output, count=arguments.questions, seed=arguments.seed)


if __name__ == "__main__":
    main()
