"""Reads data sets without training: counts, lengths, and everything that would stop a run.

    python -m ovr_fast.data.check FILE... [--for rl|cold_start] [--model DIR] [--method exact]
    python -m ovr_fast.data.check FILE... --reward mine.py:score

Unlike training it does not stop at the first bad row: it reads all, counts each kind of problem,
names the first few of each, and exits with 1 if there was any. What it accepts with ``--model`` and
``--for``, training accepts: they read rows with the same code.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ovr_fast.config import REWARD_METHODS, SOURCE_FORMATS, DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.check_reward import check_reward
from ovr_fast.data.errors import AnswerColumnError, DataError, ImageError
from ovr_fast.data.formats import FORMATS
from ovr_fast.data.index import demonstration_tokens, prompt_tokens
from ovr_fast.data.prompts import Reading, check_columns, iterate
from ovr_fast.errors import OVRFastError
from ovr_fast.grading.boxes import last_boxed
from ovr_fast.grading.exact import is_same
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import read_shape

NAMED = 3
"""Rows named for each kind of problem."""
NEEDS = {"rl": "answer", "cold_start": "response", "any": None}
KINDS: dict[type[DataError], str] = {
    ImageError: "broken or missing image",
    AnswerColumnError: "unverifiable answer",
    DataError: "malformed row",
}


def check(
    source: DataSource, *, chat: ChatTemplate | None, method: str, need: str | None = None
) -> bool:
    """Print what a source holds and what is wrong with it. Returns whether it is fine."""
    problems: dict[str, list[str]] = defaultdict(list)
    seen: dict[tuple, str] = {}
    lengths: dict[str, list[int]] = defaultdict(list)
    counts: Counter[str] = Counter()
    reading, measure = Reading(source), None
    if chat is not None:
        cold = need == "response"
        measure = demonstration_tokens(chat, "all") if cold else prompt_tokens(chat)
    try:
        for row in iterate(source, need=need, measure=measure, reading=reading):
            if row.error is not None:
                problems[KINDS[type(row.error)]].append(str(row.error))
                continue
            prompt = row.prompt
            assert prompt is not None
            counts["with images" if prompt.images else "text only"] += 1
            counts["images"] += len(prompt.images)
            key = (repr(prompt.messages), tuple(image.digest for image in prompt.images))
            if key in seen:
                problems["duplicate prompt"].append(f"{row.where}: the same as {seen[key]}")
            seen.setdefault(key, row.where)
            if prompt.answer is not None:
                counts["with an answer"] += 1
                if method == "math_verify" and not answer_parses(prompt.answer):
                    problems["answers that only the same text can match"].append(
                        f"{row.where}: {prompt.answer!r}: math-verify cannot parse it"
                    )
            if prompt.response is not None:
                counts["with a response"] += 1
            if prompt.response is not None and need != "answer":
                said = last_boxed(prompt.response)
                if prompt.answer is not None and not (said and is_same(said, prompt.answer)):
                    problems["response without the answer"].append(
                        f"{row.where}: boxed {said!r}, answer {prompt.answer!r}"
                    )
            if prompt.answer is None and prompt.response is None:
                problems["neither answer nor response"].append(row.where)
            if chat is not None:
                lengths["tokens" if need == "response" else "prompt tokens"].append(row.tokens)
                if prompt.images:
                    grid = chat.image_processor.visual_tokens
                    lengths["visual tokens"].append(sum(map(grid, prompt.images)))
                if prompt.response is not None:
                    lengths["response tokens"].append(len(chat.encode_text(prompt.response)))
        check_columns(reading)
    except DataError as error:  # the file itself: nothing after it can be read
        problems["unreadable"].append(str(error))
    if not reading.rows and not problems:
        problems["unreadable"].append(f"{source.path} holds no rows")
    _report(reading, counts, lengths, problems)
    return not problems


def answer_parses(answer: str) -> bool:
    from math_verify import parse

    return bool(parse(f"${answer}$", parsing_timeout=None) or parse(answer, parsing_timeout=None))


def _report(reading: Reading, counts: Counter, lengths: dict, problems: dict) -> None:
    print(reading.describe())
    print("  " + (", ".join(f"{count:,} {name}" for name, count in counts.items()) or "nothing"))
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


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, and the settings of a source that say how they are read."""
    parser.add_argument(
        "files", nargs="+", help="JSON Lines, JSON, CSV, Parquet, a folder, a pattern or a dataset"
    )
    parser.add_argument("--format", choices=SOURCE_FORMATS, default="auto")
    shown = [f"  {name:<12} {known.described}" for name, known in FORMATS.items()]
    parser.epilog = "\n".join(["formats:", *shown])
    parser.add_argument("--split", default="train", help="of a dataset or folder")
    parser.add_argument("--image-folder", default="", help="that images' paths start from")
    for column in ("prompt", "images", "answer", "response"):
        parser.add_argument(f"--{column}", default=column, help=f"column of the {column}")


def sources_of(arguments: argparse.Namespace) -> list[DataSource]:
    """A source for each file of a command."""
    names = ("format", "split", "image_folder", "prompt", "images", "answer", "response")
    settings = {name: getattr(arguments, name) for name in names}
    return [DataSource(path=file, **settings) for file in arguments.files]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--for", dest="stage", choices=NEEDS, default="any", help="what every row must be good for"
    )
    parser.add_argument("--model", type=Path, help="model folder: also count tokens")
    parser.add_argument("--method", choices=REWARD_METHODS, default="exact")
    parser.add_argument("--reward", default="", help="a reward.function: what it gives these rows")
    arguments = parser.parse_args()
    try:
        chat = None
        if arguments.model:
            folder = find_model(str(arguments.model))
            chat = ChatTemplate(folder, image_token_id=read_shape(folder).image_token_id)
        fine = [
            check(source, chat=chat, method=arguments.method, need=NEEDS[arguments.stage])
            for source in sources_of(arguments)
        ]
        if arguments.reward:
            fine += [check_reward(source, arguments.reward) for source in sources_of(arguments)]
    except OVRFastError as error:
        sys.exit(f"check: {error}")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
