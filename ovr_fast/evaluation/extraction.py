r"""What a response says its answer is.

After ``</think>``, where it has one: the last ``\boxed{}``; else what follows the last "answer is"
or "answer:"; else a last line that is a letter or a number and nothing else; else nothing. Lone
capital letters elsewhere are not looked for: "A circle ..." is not a choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ovr_fast.grading.boxes import last_boxed

_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*([^\n]+)", re.IGNORECASE)
_BARE = re.compile(r"\(?([A-Z](?:\s*,\s*[A-Z])*)\)?\.?|[-+]?[\d.,/]*\d%?")
_WRAPPED = re.compile(r"\\text(?:bf|rm|it)?\{([^{}]*)\}|\\mathrm\{([^{}]*)\}|\*\*([^*]*)\*\*")


@dataclass(frozen=True, slots=True)
class Extraction:
    """An answer and where it stood."""

    text: str
    by: str  # box, phrase, last line, none


def extract(response: str) -> Extraction:
    """The answer of a response; "" by "none" where it gives none."""
    _, mark, after = response.rpartition("</think>")
    text = after if mark else response
    if (box := last_boxed(text)) is not None:
        return Extraction(box, "box") if box else Extraction("", "none")
    phrases = _PHRASE.findall(text)
    if phrases and (found := unwrapped(phrases[-1].split(". ")[0]).strip(" .$*`")):
        return Extraction(found, "phrase")
    lines = [line.strip(" *$`") for line in text.splitlines() if line.strip()]
    if lines and _BARE.fullmatch(lines[-1]):
        return Extraction(lines[-1].rstrip("."), "last line")
    return Extraction("", "none")


def unwrapped(text: str) -> str:
    r"""Without ``\text{}``, ``\mathrm{}`` and asterisks around parts."""
    before = ""
    while before != text:
        before = text
        text = _WRAPPED.sub(lambda match: next(g for g in match.groups() if g is not None), text)
    return text
