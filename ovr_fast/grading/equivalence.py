r"""Mathematical equivalence by math-verify, behind guards.

math-verify finds a number in whatever it is given: it reads words as products of letters (ABC
equals BAC), drops units, takes the last of several numbers, rounds small ones to the same, and
computes ``9^{9^{9^{9}}}`` if it is asked. So it is asked only about what is one expression, made of
letters, numbers and the commands named here; everything else is right only where ``exact`` says so.
Each guard has rows in the table of tests/unit/answer_cases.py. Deadlines and memory limits are the
caller's (``rl.rewards``).
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from ovr_fast.grading.boxes import depth
from ovr_fast.grading.exact import Form, argument_after, form, is_same, plain, split_unit

LONGEST = 300
"""Characters of an answer that is compared as mathematics."""
DEEPEST = 12
LARGEST_FACTORIAL = 170
TOLERANCE = 1e-6
"""Relative, between a decimal and a fraction that no decimal ends."""

_COMMANDS = frozenset(
    re.findall(
        r"\w+",
        """frac sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp infty
        binom alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma
        tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
        emptyset cup cap pm mp le ge ne lt gt in mathbb begin end lfloor rfloor lceil rceil
        setminus""",
    )
)
_COUNTED = re.compile(r"[=<>|]|\\(?:le|ge|ne|lt|gt|in|cup|cap|pm|mp|setminus)(?![A-Za-z])")
"""What both sides must have alike: relations, bars, unions."""
_CHARACTERS = re.compile(r"[A-Za-z0-9\s.,+\-*/^_(){}\[\]!:=<>|\\&]*")
_LETTERS = re.compile(r"[A-Za-z\s.,;:'\"()?!-]+")
_NAMES = re.compile(
    r"[A-Z]{2,}|[A-Z]_?\{?\d|\d[A-Z]\d|\\(?:angle|triangle|overline|vec|overrightarrow|widehat|arc)"
)
"""Points, segments, compounds: their letters are no factors."""
_NO_NUMBER = re.compile(
    r"\d+\s*-\s*\d+(?:\s*-\s*\d+)*|\d+\s*/\s*\d+\s*/\s*\d+|\d+(?:\s*\*\s*\d+)+|\d+\s*(?:to|x)\s*\d+|"
    r"\d+(?:\.\d+){2,}"
)
"""Ranges, scores, dates, sizes, addresses: they are not worked out."""
_BROKEN = re.compile(
    r"\d\s*_|\^\s*(?:$|[^\w\s({\\-])|[+\-*/^_]\s*$|\{\s*\}|\\\{\s*\\\}|\[\s*\]|\(\s*\)|"
    r"[+*/^=]\s*[*/^]|\.\s*\."
)
"""Operators and brackets with nothing in them: a list, or a fragment."""
_JOINED = re.compile(r"\d\s+\d")
_RAISED_AGAIN = re.compile(
    r"\([^()]*\^[^()]*\)\s*\^|\{[^{}]*\^[^{}]*\}\s*\^|\^\s*\{[^{}]*\^|\^\s*(?:\w+|\{[^{}]*\})\s*\^"
)
_FACTORIAL = re.compile(r"(\d+)\s*!")
_ANY_FACTORIAL = re.compile(r"[^\s\dA-Za-z]\s*!|!\s*!")
_BINOMIAL = re.compile(r"\\binom.{0,12}\d{4,}", re.DOTALL)
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+")
_OR = re.compile(r"\b(?:or|and|not|to)\b")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>\d+) )?"
    r"(?P<above>\d+(?:\.\d*)?|\.\d+)(?:/(?P<below>\d+(?:\.\d*)?))?"
    r"(?:\*10\^\{?(?P<power>[+-]?\d{1,3})\}?|[eE](?P<e>[+-]?\d{1,3}))?"
)


def is_equivalent(said: str, gold: str, *, question: str = "") -> bool:
    """Whether a response's answer is the data set's, or equal to it as mathematics.

    Args:
        said: from the response's box.
        gold: the data set's answer, cleaned.
        question: its text; what is copied from it is no answer to it.
    """
    if is_same(said, gold):
        return True
    if not said.strip() or not gold.strip() or max(len(said), len(gold)) > LONGEST:
        return False
    one, other = form(said), form(gold)
    if one.unit and other.unit and one.unit != other.unit:
        return False
    if one.name and other.name and one.name != other.name:
        return False
    said_, gold_ = _bare(said, one), _bare(gold, other)
    if any(_LETTERS.fullmatch(text) or _NAMES.search(text) for text in (said_, gold_)):
        return False  # words, not products of their letters
    if _NO_NUMBER.fullmatch(other.value) or is_echo(one, other, question):
        return False
    mine, theirs = _members(said_), _members(gold_)
    if len(mine) != len(theirs):
        return False  # one answer in place of several, or several in place of one
    if len(mine) > 1:
        return _same_members(mine, theirs, question)
    first, second = number(one.value), number(other.value)
    if first is not None and second is not None:
        if "%" in (one.unit, other.unit) and one.unit != other.unit:  # 50 % and 0.5
            share = first / (100 if one.unit else 1), second / (100 if other.unit else 1)
            return _near(first, second) or _near(*share)
        return _near(first, second)
    return may_parse(said_) and may_parse(gold_) and _alike(said_, gold_) and _verify(said_, gold_)


def _bare(answer: str, of: Form) -> str:
    """The answer without unit and variable, in LaTeX; a number without separators of thousands."""
    if number(of.value) is not None:
        return of.value
    text = plain(answer, latex=True)
    if of.name:
        text = re.split(r"=|\\in(?![a-z])", text, maxsplit=1)[1].strip()
    return split_unit(text)[0] if of.unit else text


def may_parse(text: str) -> bool:
    """Whether a parser may be given this: one expression, bounded in what it would compute."""
    if len(text) > LONGEST or depth(text) > DEEPEST or not _CHARACTERS.fullmatch(text):
        return False
    if not _COMMANDS.issuperset(re.findall(r"\\([A-Za-z]+)", text)) or _OR.search(text):
        return False
    if _BROKEN.search(text) or (_JOINED.search(text) and not _NUMBER.fullmatch(text)):
        return False
    if _RAISED_AGAIN.search(text) or _BINOMIAL.search(text) or text.count("|") % 2:
        return False
    exponents = (argument_after(text, found.end()) for found in re.finditer(r"\^", text))
    if any(re.search(r"\d{4,}", exponent) for exponent in exponents):
        return False
    if re.search(r"[A-Za-z]{3,}", _COMMAND.sub(" ", text)):
        return False  # words
    if "&" in text and r"\begin" not in text:
        return False
    factorials = [int(digits) for digits in _FACTORIAL.findall(text)]
    return not _ANY_FACTORIAL.search(text) and max(factorials, default=0) <= LARGEST_FACTORIAL


def _alike(one: str, other: str) -> bool:
    """Whether both have as many of each relation, bar and union (math-verify would take a side of
    an equation, or the last of a chain), the same variables (it would drop one as a unit), and no
    command that the other has in another case."""
    if Counter(_COUNTED.findall(one)) != Counter(_COUNTED.findall(other)):
        return False
    letters = [set(re.findall(r"[A-Za-z]", _COMMAND.sub(" ", text))) for text in (one, other)]
    if letters[0] != letters[1]:
        return False
    mine, theirs = (set(re.findall(r"\\([A-Za-z]+)", text)) for text in (one, other))
    return not any(
        name.swapcase()[0] + name[1:] in b and name not in b
        for a, b in ((mine, theirs), (theirs, mine))
        for name in a
    )


def number(value: str) -> Fraction | None:
    """A number of a form: whole, decimal, fraction, mixed fraction, or times a power of ten."""
    found = _NUMBER.fullmatch(value)
    if found is None or len(value) > LONGEST:
        return None
    below = Fraction(found["below"]) if found["below"] else Fraction(1)
    if not below or (found["whole"] and not found["below"]):
        return None
    size = Fraction(found["whole"] or 0) + Fraction(found["above"]) / below
    size *= Fraction(10) ** int(found["power"] or found["e"] or 0)
    return -size if found["sign"] == "-" else size


def _near(one: Fraction, other: Fraction) -> bool:
    """Equal; or as good as equal, where a decimal stands for a fraction that no decimal ends."""
    if _ends(one) and _ends(other):
        return one == other
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


def _ends(value: Fraction) -> bool:
    """Whether a decimal can write it: its denominator has no prime but 2 and 5."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _members(text: str) -> list[str]:
    """The parts of a list, tuple or set, after its brackets; anything else is one part."""
    inner, kind = text.strip(), ""
    if inner.startswith(r"\{") and inner.endswith(r"\}"):
        kind, inner = "set", inner[2:-2]
    elif inner[:1] in "([" and inner[-1:] in ")]" and _closes_at_its_end(inner):
        kind, inner = inner[0] + inner[-1], inner[1:-1]
    parts, begin, open_brackets = [], 0, 0
    for token in re.finditer(r"\\.|[()\[\]{},]", inner, re.DOTALL):
        letter = token.group()
        if letter in ("(", "[", "{", r"\{"):
            open_brackets += 1
        elif letter in (")", "]", "}", r"\}"):
            open_brackets -= 1
        elif letter == "," and open_brackets == 0:
            parts.append(inner[begin : token.start()].strip())
            begin = token.end()
    parts.append(inner[begin:].strip())
    if len(parts) == 1 and kind != "set":
        return [text]
    return [kind, *parts]  # the brackets are compared too: [0, 1) is not (0, 1]


def _same_members(mine: list[str], theirs: list[str], question: str) -> bool:
    """Part by part, in order; those of a set in any."""
    if mine[0] != theirs[0]:
        return False
    if mine[0] != "set":
        pairs = zip(mine[1:], theirs[1:], strict=True)
        return all(is_equivalent(a, b, question=question) for a, b in pairs)
    left = theirs[1:]
    for part in mine[1:]:
        found = next(
            (i for i, other in enumerate(left) if is_equivalent(part, other, question=question)),
            None,
        )
        if found is None:
            return False
        left.pop(found)
    return True


def _closes_at_its_end(text: str) -> bool:
    open_brackets = 0
    for place, letter in enumerate(text):
        open_brackets += (letter in "([") - (letter in ")]")
        if open_brackets == 0:
            return place == len(text) - 1
    return False


def is_echo(said: Form, gold: Form, question: str) -> bool:
    """Whether an answer that leaves something to work out was taken from the question: it stands
    there, or is a sum, product or function of numbers that all do, where a number is asked for."""
    if not question:
        return False
    value = said.value.strip("(){}[]")
    found = number(value)
    if found is not None and ("/" not in value or not _reducible(value)):
        return False
    asked = plain(question[: 20 * LONGEST], latex=False)
    squeezed = re.sub(r"[\s${}]+", "", asked)
    work = re.search(r"[\w)}]\s*[+*/^!-]|\\[A-Za-z]+|^\|", value)
    if work and re.sub(r"[\s{}]+", "", value) in squeezed:
        return True
    numbers = Counter(re.findall(r"\d+(?:\.\d+)?", value))
    if number(gold.value) is None or sum(numbers.values()) < (2 if found is None else 3):
        return False
    return bool(work) and not numbers - Counter(re.findall(r"\d+(?:\.\d+)?", asked))


def _reducible(value: str) -> bool:
    """Whether a fraction is not in lowest terms."""
    above, _, below = value.rpartition("/")
    above = above.rpartition(" ")[2].lstrip("+-")
    if not (above.isdigit() and below.isdigit() and int(below)):
        return False
    return Fraction(int(above), int(below)).denominator != int(below)


def _verify(said: str, gold: str) -> bool:
    from math_verify import parse, verify

    # Deadlines are the caller's: math-verify's own use signals, which only work in a main thread.
    sides = [parse(f"${text}$", parsing_timeout=None) for text in (gold, said)]
    return all(sides) and bool(verify(*sides, timeout_seconds=None))
