"""Where a response shows a behaviour: by cues, without a model."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec

from ovr_fast.errors import OVRFastError

COUNTERPARTS = {
    "visual_reflection": "backtracking",
    "visual_verification": "verification",
    "visual_divide_and_conquer": "subgoal_setting",
    "goal_driven_visual_tracing": "backward_chaining",
}
"""Visual behaviours and their linguistic counterparts (OVR table 1)."""
BEHAVIOURS = (*COUNTERPARTS.values(), *COUNTERPARTS)

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"'\\$])|\n+")


class BehaviourError(OVRFastError, ValueError):
    """Cues, excerpts or responses cannot be read, or a judge does not answer."""


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One place of a response that shows a behaviour."""

    start: int  # characters
    end: int
    quote: str
    why: str = ""  # in the judge's words


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One behaviour in one response."""

    question: str
    sample: int
    behaviour: str
    instances: list[Instance]
    unfounded: int = 0  # quotes that the response does not hold
    missing: bool = False  # the judge gave no answer that can be read


@dataclass(frozen=True, slots=True)
class Cues:
    """Compiled cues of each behaviour, and words for a picture."""

    picture: re.Pattern[str]
    by_behaviour: dict[str, list[re.Pattern[str]]]


def read_cues(path: Path | None = None) -> Cues:
    """The shipped cues, or those of a file.

    Raises:
        BehaviourError: the file is no TOML, names another behaviour or holds a wrong expression.
    """
    source = path or files("ovr_fast.behaviours").joinpath("cues.toml")
    try:
        table = tomllib.loads(source.read_text())
        cues = table["cues"]
        if unknown := set(cues) - set(BEHAVIOURS):
            raise BehaviourError(
                f"{source}: no behaviours: {', '.join(sorted(unknown))}; there are "
                f"{', '.join(BEHAVIOURS)}"
            )
        if texts := [name for name, each in cues.items() if not isinstance(each, list)]:
            raise BehaviourError(f"{source}: the cues of {texts[0]} must be a list of expressions")
        compiled = {
            name: [re.compile(cue, re.IGNORECASE) for cue in cues.get(name, [])]
            for name in BEHAVIOURS
        }
        return Cues(re.compile(table["picture"], re.IGNORECASE), compiled)
    except (OSError, UnicodeError, tomllib.TOMLDecodeError, re.error, KeyError, TypeError,
            AttributeError) as error:  # fmt: skip
        raise BehaviourError(f"{source}: {error!r}; see ovr_fast/behaviours/cues.toml") from error


@cache
def definitions() -> dict[str, dict[str, str]]:
    """Of each behaviour: what counts, what does not, an example of each."""
    return tomllib.loads(files("ovr_fast.behaviours").joinpath("definitions.toml").read_text())


def sentences(text: str) -> list[tuple[int, int]]:
    """Where each begins and ends."""
    ends = [match.span() for match in _SENTENCE.finditer(text)]
    starts = [0, *(end for _, end in ends)]
    stops = [*(start for start, _ in ends), len(text)]
    return [(a, b) for a, b in zip(starts, stops, strict=True) if text[a:b].strip()]


def by_rules(text: str, behaviour: str, cues: Cues) -> list[Instance]:
    """The sentences that hold a cue of the behaviour, each once."""
    found = []
    before = ""
    for start, end in sentences(text):
        sentence = text[start:end]
        seen = behaviour not in COUNTERPARTS or cues.picture.search(f"{before} {sentence}")
        if seen and any(cue.search(sentence) for cue in cues.by_behaviour[behaviour]):
            found.append(Instance(start=start, end=end, quote=sentence))
        before = sentence
    return found
