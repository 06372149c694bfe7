r"""The recipe's check: the same answer, written the same way but for what does not matter.

What is treated as the same, and what never is, is the table of tests/unit/answer_cases.py; in
words:

* case (not of LaTeX commands: ``\phi`` is not ``\Phi``), spaces (not between two digits), LaTeX's
  spacing, sizes, text and font wrappers, math delimiters, escapes, a full stop at the end,
  Unicode's forms of a character;
* ``\dfrac``, ``\frac12`` and ``1/2``; ``.5`` and ``0.50``; ``7.0``, ``+7`` and ``07``; separators
  of thousands (``1,234``, ``1{,}234``, ``1\,234``, ``1 234``, ``1'234``, ``1_234``);
* a unit, degree, per cent or currency sign that only one side has, or both have alike;
* a variable that only one side names (``x = 5``);
* a choice's letter in parentheses, with a full stop, or with its option's text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from ovr_fast.grading.boxes import depth, without_boxes

LONGEST = 1000
"""Characters of an answer; a longer one equals nothing but itself."""
DEEPEST = 40
"""Nested braces of an answer."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WRAPPERS = _words(
    """text textbf textit textrm textnormal textsf texttt textup mathrm mathbf mathit mathsf mathtt
    mathnormal operatorname mbox hbox boldsymbol bm pmb emph underline bf rm it tt boxed fbox"""
)
_DROPPED = _words(
    """displaystyle textstyle scriptstyle limits nolimits big Big bigg Bigg bigl bigr Bigl Bigr
    biggl biggr Biggl Biggr bf rm it tt sf"""
)
_FRACTIONS = _words("frac dfrac tfrac cfrac")
_SPACES = _words("quad qquad enspace thinspace medspace thickspace space hspace")
_SAME = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "times": "*", "cdot": "*", "ast": "*",
    "div": "/", "leq": r"\le", "geq": r"\ge", "neq": r"\ne", "leqslant": r"\le",
    "geqslant": r"\ge", "rightarrow": r"\to", "gets": r"\leftarrow", "lvert": "|", "rvert": "|",
    "vert": "|", "mid": "|", "dots": "...", "ldots": "...", "cdots": "...",
    "varnothing": r"\emptyset", "lbrace": r"\{", "rbrace": r"\}", "degree": "°", "percent": "%",
    "colon": ":", "land": r"\wedge", "lor": r"\vee", "euro": "€", "pounds": "£",
    "dollar": "$", "textdegree": "°", "textdollar": "$", "infinity": r"\infty",
}  # fmt: skip
_GREEK = re.split(
    " ",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi  pi rho  sigma tau "
    "upsilon phi chi psi omega",
)
_UNICODE = str.maketrans({
    "−": "-", "‐": "-", "‑": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*",
    "÷": "/", "⁄": "/", "∕": "/", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "→": r"\to ", "←": r"\leftarrow ", "°": "°", "º": "°", "˚": "°",
    "“": '"', "”": '"', "‘": "'", "’": "'", "∅": r"\emptyset ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "…": "...",
    **{chr(0x391 + i): f"\\{name.capitalize()} " for i, name in enumerate(_GREEK) if name},
    **{chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(_GREEK) if name},
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "",
})  # fmt: skip
_RAISED = {ord(raised): plain for raised, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True)}
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?|\\(.)", re.DOTALL)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:([,'_ ])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_NUMBER = re.compile(r"([+-]*)(\d*)(?:\.(\d*))?")
_NAMED = re.compile(
    r"((?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?|[a-z]\([a-z]\))\s*(?:=|\\in(?![a-z]))([^=]+)"
)
_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[(\[]?\s*([A-Ja-j])\s*[)\]]?\s*[.:]?", re.IGNORECASE
)
_OPTION = re.compile(
    r"(?:\(\s*([A-Fa-f])\s*\)\s*[.:]?|([A-Fa-f])\s*(?:\)|[.:](?=[\s\d])))\s*(\S.*)",
    re.DOTALL,
)
_ANOTHER = re.compile(r"\b[A-J]\b|\b[b-j]\b|\b(?:or|not|both|neither)\b")
_UNIT = re.compile(
    r"(.*[\d}).])(\s*)((?:[A-Za-zµμΩ°%]+(?:\s*\^\s*\{?-?\d\}?)?)(?:[\s/*]+[A-Za-z°]+(?:\s*\^\s*\{?-?\d\}?)?)*)",
    re.DOTALL,
)  # fmt: skip
_TIME = re.compile(r"\b([ap])\.\s?m\.", re.IGNORECASE)
_MONEY = re.compile(r"(-?)\s*([$€£¥₹])\s*(-?\d.*)", re.DOTALL)
_SHORT_UNITS = _words(
    """mm cm dm km in ft yd mi kg mg lb lbs oz ml cl dl hr hrs min mins sec secs ms hz khz mhz kw mw
    kj kv ma kpa pa atm mol ev kev mph kph rad deg usd eur gbp cc sq cu am pm m g s °c °f ° %"""
)
_WITHOUT_SPACE = _words(
    "mm cm dm km kg ml hr hrs min mins sec secs kpa mph kph usd eur am pm °c °f ° %"
)
_NEVER_UNITS = _words(
    """and or not nor but if then else for to of by is are the mod plus minus times sin cos tan cot
    csc log ln exp lim max sqrt pi frac infty choose true false none all hundred thousand million
    billion trillion dozen half halves third thirds quarter quarters fourth fourths fifth fifths
    squared cubed factorial over divided multiplied more less fewer negative positive percent_of
    root power cross dot mid both neither either from until through versus"""
)
_SYNONYMS = {
    "percent": "%", "percentage": "%", "degree": "°", "deg": "°", "dollar": "$", "usd": "$",
    "buck": "$", "euro": "€", "eur": "€", "gbp": "£", "hr": "hour", "hrs": "hour", "h": "hour",
    "min": "minute", "mins": "minute", "sec": "second", "secs": "second", "s": "second",
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "kilometer": "km",
    "kilometre": "km", "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg",
    "liter": "l", "litre": "l", "milliliter": "ml", "inch": "in", "inche": "in", "foot": "ft",
    "feet": "ft", "mile": "mi", "yard": "yd", "lb": "pound", "lbs": "pound", "celsius": "c",
    "fahrenheit": "f",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """An answer in the form in which it is compared."""

    value: str
    unit: str = ""  # "" where it has none
    name: str = ""  # of the variable it is said to be, or ""


def is_same(said: str, gold: str) -> bool:
    """Whether the two are the same answer; see the module. Symmetric; an empty one equals none."""
    if len(said) > LONGEST or len(gold) > LONGEST:
        return bool(said.strip()) and said.strip() == gold.strip()
    one, other = form(said), form(gold)
    if not one.value or not other.value:
        return False
    if one.value == other.value and _agree(one.unit, other.unit) and _agree(one.name, other.name):
        return True
    return _same_choice(said, gold) or _same_choice(gold, said)


def _agree(one: str, other: str) -> bool:
    """Equal, or one of them left out."""
    return not one or not other or one == other


def _same_choice(letter: str, choice: str) -> bool:
    """Whether ``choice`` is the option of that letter, with its text, and only that one."""
    letter_ = _LETTER.fullmatch(plain(letter))
    text = plain(choice)
    option = _OPTION.fullmatch(text)
    if letter_ is None:
        return False
    if option is None:
        same = _LETTER.fullmatch(text)
        return same is not None and same[1].lower() == letter_[1].lower()
    found, rest = option[1] or option[2], option[3]
    return found.lower() == letter_[1].lower() and _ANOTHER.search(rest) is None


@lru_cache(maxsize=4096)
def form(answer: str) -> Form:
    """The answer's value, unit and variable, each in one form."""
    text = plain(answer)
    name = ""
    if named := _NAMED.fullmatch(text):
        name, text = _compact(named[1]), named[2].strip()
    value, unit = split_unit(text)
    compact = _compact(value)
    if re.search(r",\s", value) and _THOUSANDS.fullmatch(compact):
        return Form(compact, unit, name)  # a list, by the space after its comma
    return Form(_number(compact), unit, name)


@lru_cache(maxsize=4096)
def plain(answer: str, *, latex: bool = False) -> str:
    """The answer without wrappers, delimiters and LaTeX's spacing, one way for each character and
    fraction; its spaces and case are left.

    Args:
        latex: leave fractions and the rows of matrices to LaTeX, for a parser.
    """
    text = _plain_characters(answer).strip()
    text = _TIME.sub(lambda found: f"{found[1]}m", text)
    if depth(text) > DEEPEST:
        return text
    table = r"\begin{" in text  # where a double backslash ends a row
    text = without_boxes(text)
    for _ in range(4):
        stripped = _without_delimiters(text.strip())
        if stripped == text:
            break
        text = stripped
    text = _plain_commands(text.replace(r"\\", r"\newline ") if table else text, latex)
    text = text.replace(r"\newline", r"\\") if latex else text
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;").removeprefix("=").strip()


_ROOT = re.compile(r"√\s*(?:\{([^{}]+)\}|\(([^()]+)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
"""A root's sign and what stands under it, where that is one group, number or letter."""


def _plain_characters(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda found: "^{" + found.group().translate(_RAISED) + "}", text)
    if not text.isascii():
        pieces = []
        for letter in text:
            if "<fraction>" in unicodedata.decomposition(letter):
                pieces.append(" " + unicodedata.normalize("NFKC", letter))
            else:
                pieces.append(letter.translate(_UNICODE))
        text = unicodedata.normalize("NFKC", "".join(pieces)).translate(_UNICODE)
        text = _ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2] or found[3]}}}", text)
    return text.replace("{,}", ",")


def _without_delimiters(text: str) -> str:
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'),
                        ("``", "''"), ("**", "**"), ("{", "}")):  # fmt: skip
        if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if left == "{" and not _balanced(inner):
                continue
            if left in ("$", "{") and inner.endswith("\\"):
                continue  # an escaped one
            return inner.strip()
    return text


def _balanced(text: str) -> bool:
    """Whether no brace of the text closes one before it."""
    open_braces = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if token.group() in "{}":
            open_braces += 1 if token.group() == "{" else -1
            if open_braces < 0:
                return False
    return open_braces == 0


def _plain_commands(text: str, latex: bool = False) -> str:
    """LaTeX rewritten: see the tables above. Linear but for nested fractions, which are few."""
    pieces: list[str] = []
    place = 0
    while place < len(text):
        letter = text[place]
        if letter == "~":
            pieces.append(" ")
            place += 1
            continue
        if letter == "^":
            argument, place = _argument(text, place + 1)
            inner = _plain_commands(argument, latex).strip()
            pieces.append("°" if inner in (r"\circ", "°", "o") else f"^{_grouped(inner)}")
            continue
        if letter == "_":
            argument, place = _argument(text, place + 1)
            pieces.append(f"_{_grouped(_plain_commands(argument, latex).strip())}")
            continue
        found = _COMMAND.match(text, place) if letter == "\\" else None
        if found is None:
            pieces.append(letter)
            place += 1
            continue
        place = found.end()
        name = found[1]
        if name is None:
            escaped = found[2]
            if escaped in "{}":
                pieces.append("\\" + escaped)
            elif escaped in ",;:! \\>":
                pieces.append(_space(pieces, text, place, escaped))
            else:  # \% \$ \_ \# \&
                pieces.append(escaped)
        elif name in ("left", "right"):
            if text[place : place + 1] == ".":
                place += 1
        elif name in _WRAPPERS:
            argument, end = _argument(text, place)
            if text[place:].lstrip()[:1] == "{":
                pieces.append(f" {_plain_commands(argument, latex)} ")
                place = end
        elif name in _DROPPED:
            pass
        elif name in _SPACES:
            pieces.append(" ")
        elif name in _FRACTIONS:
            above, place = _argument(text, place)
            below, place = _argument(text, place)
            parts = _plain_commands(above, latex).strip(), _plain_commands(below, latex).strip()
            if latex:
                pieces.append(rf"\frac{{{parts[0]}}}{{{parts[1]}}}")
            else:
                pieces.append(_fraction(*parts, "".join(pieces[-3:]), text[place:]))
        elif name == "sqrt":
            root = ""
            if text[place : place + 1] == "[" and (end := text.find("]", place)) > 0:
                root, place = text[place : end + 1], end + 1
            if text[place : place + 1] == "(" and (end := text.find(")", place)) > 0:
                argument, place = text[place + 1 : end], end + 1
            else:
                argument, place = _argument(text, place)
            pieces.append(rf"\sqrt{root}{{{_plain_commands(argument, latex).strip()}}}")
        else:
            same = _SAME.get(name, f"\\{name}")
            after = text[place : place + 1]
            pieces.append(same + (" " if same[:1] == "\\" and after.isalpha() else ""))
    return "".join(pieces)


def _space(pieces: list[str], text: str, place: int, escaped: str) -> str:
    r"""What ``\,`` and its like stand for: between digits they separate thousands."""
    before = pieces[-1][-1:] if pieces else ""
    if escaped in ",!" and before.isdigit() and re.match(r"\d{3}(?!\d)", text[place:]):
        return ""
    return "" if escaped == "!" else " "


def argument_after(text: str, place: int) -> str:
    """What stands there as the argument of a command or of ``^``."""
    return _argument(text, place)[0]


def _argument(text: str, place: int) -> tuple[str, int]:
    """A command's next argument, as TeX takes it, and where it ends."""
    while place < len(text) and text[place].isspace():
        place += 1
    if place >= len(text):
        return "", place
    if text[place] == "{":
        open_braces = 0
        for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, place):
            if token.group() in "{}":
                open_braces += 1 if token.group() == "{" else -1
                if open_braces == 0:
                    return text[place + 1 : token.start()], token.end()
        return text[place + 1 :], len(text)
    if text[place] == "\\" and (found := _COMMAND.match(text, place)):
        end = found.end()
        for _ in range({"sqrt": 1}.get(found[1], 2 * (found[1] in _FRACTIONS))):
            _, end = _argument(text, end)
        return text[place:end], end
    return text[place], place + 1


def _grouped(text: str) -> str:
    return text if len(text) == 1 else f"{{{text}}}"


_PRODUCT = re.compile(r"(?:[\w.!*()]|\\[A-Za-z]+ ?|\\sqrt\{\w+\})+")
_FACTOR = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+|\\sqrt\{\w+\}")
_OPERAND_BEFORE = re.compile(r"[\w)}\]!]\s*$|\\[A-Za-z]+ ?$")
_OPERAND_AFTER = re.compile(
    r"\s*(?:[\d({\[^_]|[A-Za-z](?![A-Za-z])|(?<!\s)[A-Za-z]|"
    r"\\(?:frac|dfrac|tfrac|sqrt|pi|theta|alpha|beta|gamma|lambda|mu|left|sin|cos|tan|log|ln|e\b))"
)


def _fraction(above: str, below: str, before: str, after: str) -> str:
    """``a/b``, with as many parentheses as the value needs beside what stands before and after."""
    sign = ""
    if above.startswith("-") and _PRODUCT.fullmatch(above[1:].strip()):
        sign, above = "-", above[1:].strip()
    above = above if _PRODUCT.fullmatch(above) else f"({above})"
    below = below if _FACTOR.fullmatch(below) else f"({below})"
    text = f"{sign}{above}/{below}"
    digits = above.isdigit() and below.isdigit() and not sign
    if digits and before[-1:].isdigit() and not _OPERAND_AFTER.match(after):
        return f" {text}"  # a mixed fraction
    beside = _OPERAND_BEFORE.search(before) or _OPERAND_AFTER.match(after)
    return f"({text})" if beside else text


def _compact(text: str) -> str:
    """Without spaces, but for those between two digits; words in lower case, formulas as they
    are."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\0", text.strip())
    text = re.sub(r"\s+", "", text).replace("\0", " ")
    if re.search(r"[\^_+*/=<>|]", text):
        return text
    pieces = re.split(r"(\\[A-Za-z]+)", text)
    return "".join(piece if i % 2 else piece.lower() for i, piece in enumerate(pieces))


def _number(text: str) -> str:
    """A number without separators of thousands, superfluous zeros and a leading plus."""
    if _THOUSANDS.fullmatch(text):
        text = re.sub("[,'_ ]", "", text)
    found = _NUMBER.fullmatch(text)
    if found is None or not (found[2] or found[3]):
        return text.removeprefix("+")
    sign = "-" if found[1].count("-") % 2 else ""
    whole, part = found[2].lstrip("0") or "0", (found[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return value if value == "0" else sign + value


def split_unit(text: str) -> tuple[str, str]:
    """A value and the unit, sign of degree, per cent or currency after or before it; ``""`` where
    it has none. Takes what ``plain`` returns."""
    if money := _MONEY.fullmatch(text):
        return money[1] + money[3], money[2]
    if len(text) > 200 or (found := _UNIT.fullmatch(text)) is None:
        return text, ""
    value, space, unit = found.groups()
    words = re.findall(r"[A-Za-zµμΩ°%]+", unit)
    lowered = [word.lower() for word in words]
    if any(word in _NEVER_UNITS for word in lowered):
        return text, ""
    for place, word in enumerate(lowered):
        known = word in (_SHORT_UNITS if space else _WITHOUT_SPACE) or (place and word in "hlmsg")
        if not known and (len(word) < 3 or not space):
            return text, ""
    return value.strip(), _unit(unit)


def _unit(unit: str) -> str:
    """One spelling of a unit."""
    unit = re.sub(r"\bM(?=(?:Hz|W|V|Pa|J|A|B)\b)", "mega", unit.strip())
    unit = re.sub(r"\s*\^\s*\{?(-?\d)\}?", r"^\1", unit.lower())
    unit = re.sub(r"\b(?:square|sq) ([a-z]+)", r"\1^2", unit)
    unit = re.sub(r"\b(?:cubic|cu) ([a-z]+)", r"\1^3", unit).replace(" per ", "/")
    words = re.split(r"(\^-?\d|[\s/*]+)", unit)
    plain_words = []
    for word in words:
        singular = word[:-1] if len(word) > 3 and word.endswith("s") else word
        plain_words.append(_SYNONYMS.get(word, _SYNONYMS.get(singular, singular)))
    return "".join(plain_words).replace(" ", "")
