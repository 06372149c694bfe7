"""What two numbers must share to be compared: prompt, sampling, limit, scoring."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from ovr_fast.evaluation.adapter import Adapter, EvaluationError
from ovr_fast.evaluation.question import LETTERS, Question

INSTRUCTIONS = {
    "choice": "Put the letter of your choice into \\boxed{}.",
    "yes_no": "Put yes or no into \\boxed{}.",
}
INSTRUCTION = "Put your final answer into \\boxed{}."

PRESETS = {
    "trained": {"temperature": 1.0, "top_p": 1.0},
    "r1": {"temperature": 0.6, "top_p": 0.95},
    "greedy": {"temperature": 0.0, "top_p": 1.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How a benchmark's responses were made."""

    style: str = "ours"  # "ours", or "official" for the file's own prompt
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 0  # a question; 0: as the adapter says
    max_tokens: int = 0  # a response is truncated here; 0: as the adapter says
    seed: int = 0

    def of(self, adapter: Adapter) -> Protocol:
        """With the adapter's numbers where this has none."""
        return replace(
            self,
            samples=self.samples or adapter.samples,
            max_tokens=self.max_tokens or adapter.max_tokens,
        )

    def as_dict(self, adapter: Adapter) -> dict[str, Any]:
        """Everything that a score follows from, but model and files."""
        return {
            "protocol": asdict(self.of(adapter)),
            "adapter": msgspec.to_builtins(adapter),
            "instructions": [INSTRUCTION, INSTRUCTIONS],
        }

    def digest(self, adapter: Adapter) -> str:
        """Twelve hexadecimal digits."""
        text = json.dumps(self.as_dict(adapter), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def prompt_text(question: Question, adapter: Adapter, style: str) -> str:
    """What a question says to the model.

    Raises:
        EvaluationError: style "official" of a benchmark whose files hold no official prompt.
    """
    if style == "official":
        if not question.official:
            raise EvaluationError(
                f"{adapter.name}: its files hold no official prompt; use --style ours"
            )
        return question.official
    text = question.text
    if question.options and adapter.show_options:
        shown = zip(LETTERS, question.options, strict=False)
        text = "\n".join([text, *(f"{letter}. {option}" for letter, option in shown)]).strip()
    instruction = adapter.instruction
    if instruction is None:
        instruction = INSTRUCTIONS.get(question.kind, INSTRUCTION)
    return f"{text}\n{instruction}".strip() if instruction else text


def prompt_parts(question: Question, adapter: Adapter, style: str) -> list[str | int]:
    """The prompt as texts and places of the question's images, in the order in which they stand:
    where a bound mark names one, and before the text else."""
    text = prompt_text(question, adapter, style)
    parts: list[str | int] = []
    begin, named = 0, set()
    marks = re.finditer(adapter.bound_marks, text) if adapter.bound_marks else ()
    for mark in marks:
        number = int(mark.group(1))
        if number not in question.numbers:
            continue
        place = question.numbers.index(number)
        named.add(place)
        parts += [text[begin : mark.start()], place]
        begin = mark.end()
    parts.append(text[begin:])
    first: list[str | int] = [p for p in range(len(question.images)) if p not in named]
    return first + [part for part in parts if part != ""]


def sample_seed(adapter: Adapter, question: Question, sample: int, *, seed: int) -> int:
    """Of a request: a function of what it asks, and of nothing else."""
    name = f"{seed}/{adapter.name}/{question.id}".encode()
    return (zlib.crc32(name) << 16) + sample
