r"""Mathematical equivalence by math-verify, behind guards.

math-verify reads words as products of letters (ABC equals BAC), drops units, rounds small numbers
to the same, and computes ``9^{9^{9^{9}}}`` if it is asked. Each guard below has rows in the table
of tests/unit/answer_cases.py. Deadlines and memory limits are the caller's (``rl.rewards``).
"""

from __future__ import annotations

import re
from fractions import Fraction

from ovr_fast.grading.boxes import depth
from ovr_fast.grading.exact import Form, form, is_same, plain, split_unit

LONGEST = 300
"""Characters of an expression that is parsed."""
DEEPEST = 12
LARGEST_EXPONENT = 1000
LARGEST_FACTORIAL = 170
TOLERANCE = 1e-6
"""Relative, between numbers of which one at least is written as a decimal."""

_LETTERS = re.compile(r"[A-Za-z\s.,;:'\"()?!-]+")
_TOWER = re.compile(r"\^\s*(?:\{[^{}]*\^|\(?[\d.]+\)?\s*\^)|\*\*[^*]*\*\*")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*\{?\(?\s*-?(\d{4,})")
_FACTORIAL = re.compile(r"(\d{3,})\s*\)?!|!\s*!|\)\s*!")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>\d+) )?"
    r"(?P<above>\d+(?:\.\d*)?|\.\d+)(?:/(?P<below>\d+(?:\.\d*)?))?"
    r"(?:\*10\^\{?(?P<power>[+-]?\d{1,3})\}?|e(?P<e>[+-]?\d{1,3}))?"
)
_OPERATOR = re.compile(r"[\w)}]\s*(?:[+*/^-]|\\(?:frac|sqrt|cdot|times|div))|\\(?:frac|sqrt)")
_PAIR = re.compile(r"[()\[\]{}\\]")
_OR = re.compile(r"\b(?:or|and)\b|\\(?:text\{\s*)?(?:or|and|lor|land)\b")


def is_equivalent(said: str, gold: str, *, question: str = "") -> bool:
    """Whether a response's answer is the data set's, or equal to it as mathematics.

    Args:
        said: from the response's box.
        gold: the data set's answer, cleaned.
        question: its text; an expression copied from it is no answer to it.
    """
    if is_same(said, gold):
        return True
    if not said.strip() or not gold.strip():
        return False
    one, other = form(said), form(gold)
    if one.unit and other.unit and one.unit != other.unit:
        return False
    if one.name and other.name and one.name != other.name:
        return False
    said_, gold_ = _bare(said, one), _bare(gold, other)
    if any(_LETTERS.fullmatch(text) for text in (said_, gold_)):
        return False  # words, not products of their letters
    if _commands_differ_in_case(one.value, other.value):
        return False  # math-verify takes \\Phi for \\phi
    first, second = number(one.value), number(other.value)
    if first is not None and second is not None:
        exact = "." not in one.value and "." not in other.value
        if "%" in (one.unit, other.unit) and one.unit != other.unit:  # 50 % and 0.5
            share = first / (100 if one.unit else 1), second / (100 if other.unit else 1)
            return _near(first, second, exact=exact) or _near(*share, exact=exact)
        return _near(first, second, exact=exact)
    if not (may_parse(said_) and may_parse(gold_)):
        return False
    mine, theirs = _members(said_), _members(gold_)
    if len(mine) != len(theirs):
        return False  # one answer in place of several, or several in place of one
    if len(mine) > 1:
        return all(map(is_equivalent, mine, theirs))
    return not is_echo(said, question) and _verify(said_, gold_)


def _bare(answer: str, of: Form) -> str:
    """The answer without unit and variable; a number without separators of thousands."""
    if number(of.value) is not None:
        return of.value
    text = plain(answer)
    if of.name:
        text = re.split(r"=|\\in(?![a-z])", text, maxsplit=1)[1].strip()
    return split_unit(text)[0] if of.unit else text


def _commands_differ_in_case(one: str, other: str) -> bool:
    found = [set(re.findall(r"\\([A-Za-z]+)", text)) for text in (one, other)]
    return any(
        name.swapcase() != name
        and name.capitalize() != name.lower()
        and {name.capitalize(), name.lower()} & b == {name.lower(), name.capitalize()} - {name}
        for a, b in (found, found[::-1])
        for name in a
    )


def may_parse(text: str) -> bool:
    """Whether a parser may be given this: bounded in length, nesting, exponents and factorials."""
    if len(text) > LONGEST or depth(text) > DEEPEST or _TOWER.search(text):
        return False
    if _OR.search(text):
        return False
    exponents = [int(digits[:9]) for digits in _EXPONENT.findall(text)]
    factorials = [int(digits[:9] or 999) for digits in _FACTORIAL.findall(text)]
    return max(exponents, default=0) <= LARGEST_EXPONENT and (
        max(factorials, default=0) <= LARGEST_FACTORIAL
    )


def number(value: str) -> Fraction | None:
    """A number of a form: whole, decimal, fraction, mixed fraction, or times a power of ten."""
    found = _NUMBER.fullmatch(value)
    if found is None:
        return None
    below = Fraction(found["below"]) if found["below"] else Fraction(1)
    if not below or (found["whole"] and not found["below"]):
        return None
    size = Fraction(found["whole"] or 0) + Fraction(found["above"]) / below
    size *= Fraction(10) ** int(found["power"] or found["e"] or 0)
    return -size if found["sign"] == "-" else size


def _near(one: Fraction, other: Fraction, *, exact: bool) -> bool:
    """Equal, or as good as equal where one is a decimal that stands for something longer."""
    if exact or (one.denominator == 1 and other.denominator == 1):
        return one == other
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


def _members(text: str) -> list[str]:
    """The parts of a list or of a tuple, in order. A set (``\\{...\\}``), which has no order, and
    anything else are one part."""
    inner = text.strip()
    if inner[:1] in "([" and inner[-1:] in ")]" and _closes_at_its_end(inner):
        kind, inner = inner[0] + inner[-1], inner[1:-1]
    else:
        kind = ""
    parts, begin, open_brackets = [], 0, 0
    for place, letter in enumerate(inner):
        if letter in "([{":
            open_brackets += 1
        elif letter in ")]}":
            open_brackets -= 1
        elif letter == "," and open_brackets == 0:
            parts.append(inner[begin:place].strip())
            begin = place + 1
    parts.append(inner[begin:].strip())
    if len(parts) == 1:
        return [text]
    # The brackets are compared too: [0, 1) is not (0, 1].
    return [f"\\text{{{kind}}}", *parts] if kind else parts


def _closes_at_its_end(text: str) -> bool:
    open_brackets = 0
    for place, letter in enumerate(text):
        open_brackets += (letter in "([") - (letter in ")]")
        if open_brackets == 0:
            return place == len(text) - 1
    return False


def is_echo(said: str, question: str) -> bool:
    """Whether an expression with something left to work out stands in the question."""
    if not question or not _OPERATOR.search(said):
        return False
    return _squeezed(said) in _squeezed(question)


def _squeezed(text: str) -> str:
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:| )", "", text.replace("dfrac", "frac"))
    return re.sub(r"[\s$]+", "", text)


def _verify(said: str, gold: str) -> bool:
    from math_verify import parse, verify

    # Deadlines are the caller's: math-verify's own use signals, which only work in a main thread.
    sides = []
    for text in (gold, said):
        found = parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)
        if not found:
            return False
        sides.append(found)
    return bool(verify(*sides, timeout_seconds=None))
