r"""The data set's answer, from whatever a column holds."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from ovr_fast.errors import OVRFastError
from ovr_fast.grading.boxes import last_boxed
from ovr_fast.grading.exact import form

LONGEST = 200
"""Characters of an answer that a box could hold."""


_PYTHON_LIST = re.compile(r"\[\s*(['\"]).*\1\s*\]", re.DOTALL)


class AnswerError(OVRFastError, ValueError):
    """No response could ever match this answer."""


def text_of(value: Any, column: str) -> str | None:
    """What a cell says, as text; None for an empty one.

    Text, whole numbers, finite floats (at most as many digits as tell them apart), booleans, and
    lists of one of these. ``str()`` of anything else would be Python's text, which nobody answers.

    Raises:
        AnswerError: anything else; names the column, and a record's own columns.
    """
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise AnswerError(
                f"column {column!r} holds a list of {len(value)}, which is no single answer: "
                "join or choose them"
            )
        return text_of(value[0], column) if value else None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise AnswerError(f"column {column!r} holds {value}")
        return format(value.normalize(), "f")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise AnswerError(f"column {column!r} holds {value}")
        return format(Decimal(repr(value)), "f")
    if isinstance(value, dict):
        keys = ", ".join(f"{column}.{key}" for key in value)
        raise AnswerError(f"column {column!r} holds a record; name one of its columns: {keys}")
    raise AnswerError(f"column {column!r} holds a {type(value).__name__}, neither text nor number")


def clean_gold(text: str) -> str:
    r"""The answer itself: what stands in its last ``\boxed{}`` or ``<answer>`` tag, or after
    ``####``; else all of it.

    Raises:
        AnswerError: nothing is left, or what is left fits no box: several lines, more than
            ``LONGEST`` characters, braces that do not close.
    """
    answer = text.strip()
    end = answer.rfind("</answer>")
    if end > 0 and (begin := answer.rfind("<answer>", 0, end)) >= 0:
        answer = answer[begin + len("<answer>") : end].strip()
    if (mark := answer.rfind("####")) >= 0:
        answer = answer[mark + 4 :].strip()
    boxed = last_boxed(answer)
    if boxed is not None:
        answer = boxed
    if problem := unmatchable(answer):
        raise AnswerError(f"the answer {shortened(text)} can never be matched: {problem}")
    return answer


def is_marked(text: str) -> bool:
    """Whether a longer text says which part of it is the answer."""
    return last_boxed(text) is not None or "####" in text or "</answer>" in text


def unmatchable(answer: str) -> str:
    """Why no boxed answer could equal this one; ``""`` where one can."""
    if not answer.strip():
        return "it is empty"
    if len(answer) > LONGEST:
        return f"{len(answer)} characters, over the {LONGEST} of an answer in a box"
    if "\n" in answer.strip() and r"\begin{" not in answer:
        return "it has several lines; give its last step alone"
    open_braces = 0
    for token in re.finditer(r"\\.|[{}]", answer, re.DOTALL):
        if token.group() in "{}":
            open_braces += 1 if token.group() == "{" else -1
            if open_braces < 0:
                break
    if open_braces:
        return "its braces do not close"
    if _PYTHON_LIST.fullmatch(answer.strip()):
        return "it is Python's text of a list; write its one item"
    if not form(answer).value:
        return "nothing is left without punctuation"
    return ""


def shortened(text: str) -> str:
    """For a message: quoted, at most 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
