"""Right or wrong by rule, as far as rules reach; the rest is undecided, for a judge."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence as List
from dataclasses import dataclass
from fractions import Fraction

from ovr_fast.config import RewardConfig
from ovr_fast.evaluation.extraction import extract, unwrapped
from ovr_fast.evaluation.question import LETTERS, Question, letters_of
from ovr_fast.evaluation.records import ResponseRecord, ScoreRecord
from ovr_fast.grading.equivalence import number
from ovr_fast.grading.exact import is_same, split_unit
from ovr_fast.grading.gold import unmatchable
from ovr_fast.rl.rewards import Verifier

_LEADING = re.compile(
    r"(?:option|choice|answer)?\s*\(?([A-Z])\)?\s*(?:[.:)\]]|$|\s-)", re.IGNORECASE
)
_LATEX_LETTER = re.compile(r"[\s$\\{}()]*([A-Z])[\s$\\{}().]*")
_EXPRESSION = re.compile(
    r"(?:\\(?:d?frac|sqrt|pi|cdot|left|right|times)\b|\d|\b[a-z]\b|(?<=\d)[a-z]\b|[\s.+\-*/^(){}$])+"
)
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?%?")
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule's: correct, wrong or undecided; or "math", for a checker."""

    outcome: str


def said_letters(said: str, options: List[str]) -> str:
    """The options that an extracted answer names: by letters, by one option's text, or by a value
    that one option alone has; "" where it names none."""
    text = unwrapped(said).strip()
    known = LETTERS[: len(options)] if options else LETTERS
    same = [place for place, option in enumerate(options) if is_same(text, option)]
    if len(same) == 1 and len(options[same[0]].strip()) > 1:
        return LETTERS[same[0]]
    letters = letters_of(text)
    if not letters and (match := _LATEX_LETTER.fullmatch(text)):
        letters = match[1]
    if not letters and (match := _LEADING.match(text)) and match[1].isupper():
        letters = match[1]
    if letters and set(letters) <= set(known):
        return letters
    if len(same) == 1:
        return LETTERS[same[0]]
    value = plain_number(text)
    if value is not None:
        unit = split_unit(text)[1]
        equal = [
            place
            for place, option in enumerate(options)
            if plain_number(option) == value and split_unit(option)[1] in ("", unit or "")
        ] or [p for p, option in enumerate(options) if not unit and plain_number(option) == value]
        if len(equal) == 1:
            return LETTERS[equal[0]]
    return ""


def plain_number(text: str) -> Fraction | None:
    """A number, with a unit or a thousands' comma or without; None for anything else."""
    bare = unwrapped(text).strip().strip("$ ").replace("\\%", "%").replace("\\,", "")
    bare = bare.replace("\u2212", "-").removeprefix("\\").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", bare):
        bare = bare.replace(",", "")
    value = number(bare)
    if value is None:
        stem, unit = split_unit(bare)
        value = number(stem) if unit else None
    return value


def is_number(said: str, question: Question) -> bool:
    """Whether a number is the gold one: within the tolerance, equal when both are rounded to the
    question's decimals, or equal."""
    mine, gold = plain_number(said), plain_number(question.answer)
    if mine is None or gold is None:
        return False
    if question.tolerance:
        return abs(mine - gold) <= Fraction(str(question.tolerance))
    if question.decimals >= 0:
        step = Fraction(1, 10**question.decimals)
        return round(mine / step) == round(gold / step)
    return mine == gold


def rule(said: str, question: Question) -> Verdict:
    """What a rule says of an extracted answer."""
    kind, gold = question.kind, question.answer
    if kind == "choice":
        letters = said_letters(said, question.options)
        if not letters or not letters_of(gold):
            same = is_same(said, gold) if not letters_of(gold) else False
            return Verdict("correct" if same else "undecided")
        return Verdict("correct" if letters == letters_of(gold) else "wrong")
    if kind == "yes_no":
        mine, theirs = yes_or_no(said), yes_or_no(gold)
        return Verdict("undecided" if not mine else "correct" if mine == theirs else "wrong")
    if kind == "number":
        if plain_number(said) is None:
            return Verdict("correct" if is_same(said, gold) else "undecided")
        return Verdict("correct" if is_number(said, question) else "wrong")
    if kind == "list":
        return Verdict("correct" if same_list(said, question) else "wrong")
    if kind == "exact":
        same = is_same(said, gold) or is_number(said, question)
        return Verdict("correct" if same else "wrong")
    if kind == "text":
        return Verdict("correct" if is_same(said, gold) else "undecided")
    if kind in ("judged", "graded"):
        return Verdict("undecided")
    if question.decimals >= 0 and is_number(said, question):
        return Verdict("correct")
    return Verdict("math")


def yes_or_no(text: str) -> str:
    """The first yes or no of a text; true and false count as them; "" where there is none."""
    found = _YES_NO.search(text)
    return {"true": "yes", "false": "no"}.get(found[1].lower(), found[1].lower()) if found else ""


def same_list(said: str, question: Question) -> bool:
    """Element by element, numbers as numbers."""
    mine, gold = _items(said), _items(question.answer)
    if not mine or len(mine) != len(gold):
        return False
    pairs = zip(mine, gold, strict=True)
    return all(
        plain_number(a) == plain_number(b) if plain_number(b) is not None else is_same(a, b)
        for a, b in pairs
    )


def _items(text: str) -> list[str]:
    """Elements of a list, however it is written; never evaluated."""
    bare = unwrapped(text).strip().replace("\\left", "").replace("\\right", "")
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(bare)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | tuple):
            return [str(item) for item in found]
    inner = bare.strip("[](){}\\ ")
    return [part.strip(" '\"") for part in inner.split(",")] if inner else []


def score_responses(
    questions: dict[str, Question], responses: List[ResponseRecord], *, workers: int = 2
) -> list[ScoreRecord]:
    """A score for each response, by rules; a truncated response is wrong, as in training.

    Args:
        questions: by name; of every response.
        responses: in any order.
        workers: processes that compare mathematics; each check is killed after 5 s.
    """
    scores: dict[int, ScoreRecord] = {}
    checks: list[tuple[int, str, Question]] = []
    for place, record in enumerate(responses):
        question = questions[record.question]
        found = extract(record.response)
        said = found.text
        if question.kind == "yes_no" and found.by == "none":
            said = yes_or_no(record.response.rpartition("</think>")[2])
        if record.finish_reason == "length":
            outcome = "truncated"
        elif not said:
            judged = question.kind in ("judged", "graded")
            outcome = "undecided" if judged and record.response.strip() else "no_answer"
        else:
            outcome = rule(said, question).outcome
        if outcome == "math":
            checks.append((place, said, question))
        scores[place] = ScoreRecord(
            question=record.question,
            sample=record.sample,
            outcome=outcome,
            extracted=said,
            extracted_by=found.by,
            rule=question.kind,
        )
    for place, outcome in _mathematics(checks, workers):
        old = scores[place]
        scores[place] = ScoreRecord(
            question=old.question,
            sample=old.sample,
            outcome=outcome,
            extracted=old.extracted,
            extracted_by=old.extracted_by,
            rule=old.rule,
        )
    return [scores[place] for place in range(len(responses))]


def _mathematics(checks: List[tuple[int, str, Question]], workers: int) -> list[tuple[int, str]]:
    """Outcomes of answers that are compared as mathematics. A gold answer that no rule can match,
    and a check that does not end, leave it undecided."""
    if not checks:
        return []
    verifier = Verifier(RewardConfig(method="math_verify", workers=workers))
    try:
        found = verifier.check(
            [(said, question.answer) for _, said, question in checks],
            [question.text for _, _, question in checks],
        )
    finally:
        verifier.close()
    outcomes = []
    for (place, said, question), outcome in zip(checks, found, strict=True):
        decided = outcome == "correct" or (
            outcome == "wrong" and not unmatchable(question.answer) and _is_plain(said, question)
        )
        outcomes.append((place, outcome if decided else "undecided"))
    return outcomes


def _is_plain(said: str, question: Question) -> bool:
    """Whether "wrong" is sure: both are numbers, or expressions of digits, letters, fractions and
    roots that the checker reads. Words, units, equations and lists may say the same otherwise."""
    sides = unwrapped(said), unwrapped(question.answer)
    return all(_EXPRESSION.fullmatch(side) or _GROUPED.fullmatch(side) for side in sides)
