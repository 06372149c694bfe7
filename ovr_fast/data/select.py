"""Chooses rows as the recipe's data were chosen, and says what went and why.

    python -m ovr_fast.data.select FILE... --output NEW.parquet \\
        [--pass-rate runs/NAME/rollouts --keep 0.1:0.9 geo=0.2:0.8] [--tokens 1:4096 --model DIR] \\
        [--loss SCORED.jsonl --keep-loss 0:3] [--against BENCHMARK...] [--method math_verify]

* by pass rate in recorded rollouts, within bounds of all sources or of one: the trivial and the
  infeasible teach nothing (Open-Reasoner-Zero drops pass rates of 0 and the highest; MM-Eureka
  keeps 0.1 to 0.9); rows never sampled stay;
* by length, and by the mean loss of each conversation as ``ovr_fast.score`` wrote it, row by row;
* repeats: images alike (64-bit difference hashes that differ in at most 4 bits) and, within the
  files, four fifths of all 13-grams of words in common; against others (benchmarks) one 13-gram,
  but for those that stand in several of their rows (instructions);
* by verifiability: answers that ``--method`` cannot match but by the same text.

Writes the rows as ``data.convert`` does, and NEW.report.json: what went, by reason, with its id.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ovr_fast.config import REWARD_METHODS, DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.check import NEEDS, add_source_arguments, answer_parses, sources_of
from ovr_fast.data.convert import prompts_of, write_prompts
from ovr_fast.data.errors import DataError
from ovr_fast.data.index import prompt_tokens
from ovr_fast.data.messages import question_of
from ovr_fast.data.prompts import Reading
from ovr_fast.data.rollouts import list_recorded, read_rollouts
from ovr_fast.errors import OVRFastError
from ovr_fast.records import ImageFile, Prompt
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import read_shape

GRAM = 13
"""Words in a row that make two texts the same (GPT-3, arXiv 2005.14165, appendix C)."""
HASH_BITS_APART = 4
REPEATED = 0.8
"""Share of two texts' 13-grams in common (Jaccard), from which they are the same."""
BOILERPLATE = 0.01
"""Share of a benchmark's rows (and three of them) that have a 13-gram which says nothing."""
MOST_POSTINGS = 200
"""Rows that a 13-gram is looked up in; one that more have is boilerplate."""
_WORD = re.compile(r"\w+|[^\w\s]")

Judge = Callable[[int, Prompt], str]
"""From a row's number and prompt to why it goes; "" where it stays."""


@dataclass(slots=True)
class Report:
    """What went, and why."""

    rows: int = 0
    kept: int = 0
    gone: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_source: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def choose(self, prompts: Iterator[Prompt], judges: list[Judge]) -> Iterator[Prompt]:
        """The prompts that every judge keeps; the first that does not is the reason."""
        for number, prompt in enumerate(prompts):
            self.rows += 1
            reason = next(filter(None, (judge(number, prompt) for judge in judges)), "")
            kind = reason.partition(":")[0]
            self.by_source[prompt.data_source][kind or "kept"] += 1
            if reason:
                self.gone[kind].append(f"{prompt.id}{reason[len(kind) :]}")
                continue
            self.kept += 1
            yield prompt


def bounds(text: str) -> tuple[float, float]:
    """``LOW:HIGH``; either may be left out."""
    low, _, high = text.partition(":")
    return float(low or "-inf"), float(high or "inf")


def by_pass_rate(folder: Path, keep: list[str]) -> Judge:
    """Keeps prompts whose share of correct samples lies between two bounds, and those that were
    never sampled.

    Args:
        keep: ``LOW:HIGH`` of all sources, or ``SOURCE=LOW:HIGH`` of one.

    Raises:
        DataError: no recorded rollouts are there.
    """
    limits = {"": (0.1, 0.9)}
    for text in keep:
        name, _, span = text.rpartition("=")
        try:
            limits[name] = bounds(span)
        except ValueError as error:
            raise DataError(f"--keep {text}: not [SOURCE=]LOW:HIGH") from error
    right: Counter[tuple[str, str]] = Counter()
    samples: Counter[tuple[str, str]] = Counter()
    for file in list_recorded(folder):
        batch = read_rollouts(file)
        for rollout in batch.rollouts:
            prompt = batch.prompt_of(rollout)
            key = (prompt.data_source, prompt.id)
            samples[key] += 1
            right[key] += rollout.outcome == "correct"

    if unknown := set(limits) - {""} - {source for source, _ in samples}:
        raise DataError(f"--keep names {sorted(unknown)[0]!r}, which no recorded rollout is of")

    def judge(number: int, prompt: Prompt) -> str:
        key = (prompt.data_source, prompt.id)
        if not samples[key]:
            judge.never_sampled += 1  # type: ignore[attr-defined]
            return ""
        rate, (low, high) = right[key] / samples[key], limits.get(key[0], limits[""])
        if low <= rate <= high:
            return ""
        return f"{'too easy' if rate > high else 'too hard'}: {right[key]} of {samples[key]}"

    judge.never_sampled = 0  # type: ignore[attr-defined]
    return judge


def by_tokens(model: Path, keep: tuple[float, float]) -> Judge:
    """Keeps prompts of so many tokens."""
    folder = find_model(str(model))
    chat = ChatTemplate(folder, image_token_id=read_shape(folder).image_token_id)
    measure = prompt_tokens(chat)

    def judge(number: int, prompt: Prompt) -> str:
        tokens, _ = measure(prompt)
        return "" if keep[0] <= tokens <= keep[1] else f"length: {tokens} tokens"

    return judge


def by_loss(scored: Path, keep: tuple[float, float]) -> Judge:
    """Keeps rows whose mean loss under a model lies between two bounds.

    Raises:
        DataError: the file is not one that ``ovr_fast.score`` wrote.
    """
    losses = []
    try:
        with open(scored, encoding="utf-8") as file:
            for line in file:
                losses.append(-float(np.mean(json.loads(line)["logprobs"][1:])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{scored}: not what ovr_fast.score writes ({error})") from error

    def judge(number: int, prompt: Prompt) -> str:
        if number >= len(losses):
            raise DataError(f"{scored} has {len(losses)} rows, the data more: score those rows")
        loss = losses[number]
        return "" if keep[0] <= loss <= keep[1] else f"loss: {loss:.3f}"

    return judge


class Seen:
    """Texts and images that have come before.

    Args:
        share: of two texts' grams that must be common; 0: one gram.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._rows: list[tuple[str, set[int], tuple[int, ...]]] = []
        self._grams: dict[int, list[int]] = defaultdict(list)

    def add(self, prompt: Prompt, grams: set[int], hashes: tuple[int, ...]) -> None:
        """Remember a prompt."""
        for gram in grams:
            if len(postings := self._grams[gram]) <= MOST_POSTINGS:
                postings.append(len(self._rows))
        self._rows.append((prompt.id, grams, hashes))

    def forget_boilerplate(self) -> None:
        """Leave out what stands in many rows."""
        most = max(2, int(BOILERPLATE * len(self._rows)))
        self._grams = defaultdict(list, {
            gram: rows for gram, rows in self._grams.items() if len(rows) <= most
        })  # fmt: skip

    def find(self, grams: set[int], hashes: tuple[int, ...]) -> str:
        """The id of one that is the same; "" where there is none."""
        tried: set[int] = set()
        for gram in grams:
            postings = self._grams.get(gram, ())
            for row in postings if len(postings) <= MOST_POSTINGS else ():
                if row in tried:
                    continue
                tried.add(row)
                identity, theirs, others = self._rows[row]
                enough = len(grams & theirs) >= max(1, self.share * len(grams | theirs))
                if enough and _alike(hashes, others):
                    return identity
        return ""


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(
        (a ^ b).bit_count() <= HASH_BITS_APART for a, b in zip(one, other, strict=True)
    )


def grams_of(text: str) -> set[int]:
    """Hashes of all runs of ``GRAM`` words; of a shorter text, of all of it."""
    words = _WORD.findall(text.lower())
    runs = [words[i : i + GRAM] for i in range(max(1, len(words) - GRAM + 1))]
    return {hash(" ".join(run)) for run in runs}


def difference_hash(image: ImageFile) -> int:
    """64 bits: whether each of 8 x 8 cells is brighter than the one to its left."""
    with Image.open(io.BytesIO(image.data)) as opened:
        small = np.asarray(opened.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return int("".join("1" if bit else "0" for bit in bits), 2)


def without_repeats(against: list[Reading]) -> Judge:
    """Keeps the first of prompts that are the same, and none that stands in another file."""
    others, own = Seen(0.0), Seen(REPEATED)
    for prompt in prompts_of(against, "prompt"):
        others.add(prompt, *_marks(prompt))
    others.forget_boilerplate()

    def judge(number: int, prompt: Prompt) -> str:
        grams, hashes = _marks(prompt)
        if found := others.find(grams, hashes):
            return f"in another file: {found}"
        if found := own.find(grams, hashes):
            return f"repeated: {found}"
        own.add(prompt, grams, hashes)
        return ""

    return judge


def _marks(prompt: Prompt) -> tuple[set[int], tuple[int, ...]]:
    return grams_of(question_of(prompt.messages)), tuple(map(difference_hash, prompt.images))


def verifiable(method: str) -> Judge:
    """Keeps rows whose answer the method can match otherwise than by the same text."""

    def judge(number: int, prompt: Prompt) -> str:
        if prompt.answer is None:
            return "no answer"
        if method == "math_verify" and not answer_parses(prompt.answer):
            return f"not verifiable: {prompt.answer!r}"
        return ""

    return judge


def judges_of(arguments: argparse.Namespace) -> list[Judge]:
    """What the command asks for, the cheapest first."""
    judges = []
    if arguments.method:
        judges.append(verifiable(arguments.method))
    if arguments.pass_rate:
        judges.append(by_pass_rate(arguments.pass_rate, arguments.keep))
    if arguments.loss:
        judges.append(by_loss(arguments.loss, arguments.keep_loss))
    if arguments.tokens:
        if arguments.model is None:
            raise DataError("--tokens needs --model, whose tokens they are")
        judges.append(by_tokens(arguments.model, arguments.tokens))
    against = [
        Reading(DataSource(path=path, on_bad_row="drop", max_bad_share=1.0))
        for path in arguments.against
    ]
    if arguments.against or not arguments.keep_repeats:
        judges.append(without_repeats(against))
    return judges


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.data.select",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--pass-rate", type=Path, metavar="ROLLOUTS", help="recorded rollouts")
    parser.add_argument("--keep", nargs="*", default=[], metavar="[SOURCE=]LOW:HIGH")
    parser.add_argument("--tokens", type=bounds, metavar="LOW:HIGH", help="of the prompt")
    parser.add_argument("--model", type=Path, help="folder of the tokenizer")
    parser.add_argument("--loss", type=Path, help="what ovr_fast.score wrote of the same rows")
    parser.add_argument("--keep-loss", type=bounds, default=(0.0, np.inf), metavar="LOW:HIGH")
    parser.add_argument("--against", nargs="*", default=[], help="files that no row may stand in")
    parser.add_argument("--keep-repeats", action="store_true")
    parser.add_argument("--method", choices=REWARD_METHODS, help="answers that it can verify")
    parser.add_argument("--name", default="", help="the source's, as in the run that was recorded")
    parser.add_argument(
        "--for", dest="stage", choices=NEEDS, default="any", help="what every row must be good for"
    )
    parser.add_argument("--drop", action="store_true", help="leave out rows that cannot be used")
    arguments = parser.parse_args()
    report, output = Report(), arguments.output
    sources = [replace(source, name=arguments.name) for source in sources_of(arguments)]
    if arguments.drop:
        sources = [replace(source, on_bad_row="drop", max_bad_share=1.0) for source in sources]
    readings, need = [Reading(source) for source in sources], NEEDS[arguments.stage]
    try:
        if output.exists():
            raise DataError(f"{output} exists; remove it or choose another --output")
        judges = judges_of(arguments)
        write_prompts(report.choose(prompts_of(readings, need), judges), output)
    except (OVRFastError, OSError) as error:
        sys.exit(f"select: {error}")
    about = {"rows": report.rows, "kept": report.kept, "gone": report.gone,
             "by_source": report.by_source}  # fmt: skip
    output.with_suffix(".report.json").write_text(json.dumps(about, indent=1) + "\n")
    for reading in readings:
        print(reading.describe())
    print(f"{output}: kept {report.kept:,} of {report.rows:,} rows")
    for judge in judges:
        if never := getattr(judge, "never_sampled", 0):
            print(f"  {never:,} rows are in no recorded rollout (by source and id) and stayed")
    for kind, gone in sorted(report.gone.items(), key=lambda item: -len(item[1])):
        print(f"  {len(gone):,} x {kind}, the first: {gone[0]}")


if __name__ == "__main__":
    main()
