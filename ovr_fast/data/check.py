"""Reads data sets without training: counts, lengths, and everything that would stop a run.

    python -m ovr_fast.data.check FILE... [--model DIR] [--method exact|math_verify]

Unlike training it does not stop at the first bad row: it reads all, counts each kind of problem,
names the first few of each, and exits with 1 if there was any.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ovr_fast.config import REWARD_METHODS, DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError, ImageError
from ovr_fast.data.prompts import parse_row, read_rows
from ovr_fast.errors import OVRFastError
from ovr_fast.grading.boxes import last_boxed
from ovr_fast.grading.exact import is_same
from ovr_fast.grading.gold import unmatchable
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import read_shape

NAMED = 3
"""Rows named for each kind of problem."""


def check(source: DataSource, *, chat: ChatTemplate | None, method: str) -> bool:
    """Print what a source holds and what is wrong with it. Returns whether it is fine."""
    problems: dict[str, list[str]] = defaultdict(list)
    seen: dict[tuple, str] = {}
    lengths: dict[str, list[int]] = defaultdict(list)
    counts: Counter[str] = Counter()
    rows = read_rows(source)
    while True:
        try:
            where, row = next(rows)
        except StopIteration:
            break
        except DataError as error:  # the file itself: nothing after it can be read
            problems["unreadable"].append(str(error))
            break
        counts["rows"] += 1
        try:
            prompt = parse_row(row, source=source, where=where)
        except ImageError as error:
            problems["broken or missing image"].append(str(error))
            continue
        except DataError as error:
            problems["malformed row"].append(str(error))
            continue
        counts["with images" if prompt.images else "text only"] += 1
        counts["images"] += len(prompt.images)
        key = (repr(prompt.messages), tuple(p.digest for p in prompt.images))
        if key in seen:
            problems["duplicate prompt"].append(f"{where}: the same as {seen[key]}")
        seen.setdefault(key, where)
        if prompt.answer is not None:
            counts["with an answer"] += 1
            if problem := unverifiable(prompt.answer, method):
                problems["unverifiable answer"].append(f"{where}: {prompt.answer!r}: {problem}")
        if prompt.response is not None:
            counts["with a response"] += 1
            said = last_boxed(prompt.response)
            if prompt.answer is not None and (said is None or not is_same(said, prompt.answer)):
                problems["response without the answer"].append(
                    f"{where}: boxed {said!r}, answer {prompt.answer!r}"
                )
        if prompt.answer is None and prompt.response is None:
            problems["neither answer nor response"].append(where)
        if chat is not None:
            try:
                tokens = chat.encode(prompt.messages, prompt.images, generation_prompt=True)
            except DataError as error:
                problems["cannot be encoded"].append(f"{where}: {error}")
                continue
            lengths["prompt tokens"].append(len(tokens))
            lengths["visual tokens"].append(int((tokens == chat.image_token_id).sum()))
            if prompt.response is not None:
                lengths["response tokens"].append(len(chat.encode_text(prompt.response)))
    _report(source, counts, lengths, problems)
    return not problems


def unverifiable(answer: str, method: str) -> str | None:
    """Why no response could ever match this answer; None if one could."""
    if problem := unmatchable(answer):
        return problem
    if method == "math_verify":
        from math_verify import parse

        if not parse(f"${answer}$", parsing_timeout=None):
            return "math-verify cannot parse it"
    return None


def _report(source: DataSource, counts: Counter, lengths: dict, problems: dict) -> None:
    print(f"{source.path}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    for name, values in lengths.items():
        low, middle, high = np.percentile(values, [1, 50, 99])
        print(
            f"  {name}: median {middle:,.0f}, 1% {low:,.0f}, 99% {high:,.0f}, "
            f"largest {max(values):,}, sum {sum(values):,}"
        )
    for name, rows in problems.items():
        print(f"  {len(rows):,} x {name}")
        for row in rows[:NAMED]:
            print(f"      {row}")
        if len(rows) > NAMED:
            print(f"      and {len(rows) - NAMED:,} more")
    if not problems:
        print("  no problems")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.data.check",
        description="Read data sets without training and say what is in them and what is wrong.",
    )
    parser.add_argument("files", nargs="+", help="JSONL, Parquet, or a dataset's name or folder")
    parser.add_argument("--model", type=Path, help="model folder: also count tokens")
    parser.add_argument("--method", choices=REWARD_METHODS, default="exact")
    for column in ("prompt", "images", "answer", "response"):
        parser.add_argument(f"--{column}", default=column, help=f"column of the {column}")
    arguments = parser.parse_args()
    try:
        chat = None
        if arguments.model:
            folder = find_model(str(arguments.model))
            chat = ChatTemplate(folder, image_token_id=read_shape(folder).image_token_id)
        fine = [
            check(
                DataSource(
                    path=file,
                    prompt=arguments.prompt,
                    images=arguments.images,
                    answer=arguments.answer,
                    response=arguments.response,
                ),
                chat=chat,
                method=arguments.method,
            )
            for file in arguments.files
        ]
    except OVRFastError as error:
        sys.exit(f"check: {error}")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
