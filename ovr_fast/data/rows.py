"""The cold start's data: demonstrations, rendered and packed into rows of a fixed length."""

from __future__ import annotations

from typing import Any

import numpy as np

from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.prompts import Mixture
from ovr_fast.records import Prompt, Sequence

KEPT = 100_000
"""Rendered demonstrations kept in memory."""

ALL_TOO_LONG = 1000
"""So many demonstrations in a row over the limit, and the limit is wrong."""


class DemonstrationRows:
    """An endless stream of rows, the same for every layout.

    Args:
        stream: the demonstrations.
        chat: the model's chat template.
        row_tokens: of a row; longer demonstrations are dropped and counted.
        rows: of a step.
        turns: of a conversation that are trained: see ``render``.
    """

    def __init__(
        self,
        stream: Mixture,
        chat: ChatTemplate,
        *,
        row_tokens: int,
        rows: int,
        turns: str = "all",
    ) -> None:
        self.stream, self.chat, self.row_tokens, self.rows = stream, chat, row_tokens, rows
        self.turns, self.dropped = turns, 0
        self._rendered: dict[int, Sequence] = {}

    def next(self) -> list[list[Sequence]]:
        """The rows of a step: each demonstration goes into the first row with room, until one fits
        nowhere; it opens the next step's rows.

        Raises:
            DataError: demonstrations are all too long, or one cannot be rendered.
        """
        rows: list[list[Sequence]] = [[] for _ in range(self.rows)]
        room = [self.row_tokens] * self.rows
        dropped = in_a_row = 0
        while True:
            before = self.stream.state()
            (prompt,) = self.stream.take(1)
            sequence = self._render(prompt)
            length = len(sequence.tokens)
            if length > self.row_tokens:
                dropped += 1
                in_a_row += 1
                if in_a_row > ALL_TOO_LONG:
                    raise DataError(
                        f"{ALL_TOO_LONG} examples in a row are longer than "
                        f"cold_start.row_tokens={self.row_tokens}; raise it"
                    )
                continue
            in_a_row = 0
            row = next((i for i, free in enumerate(room) if free >= length), None)
            if row is None:
                self.stream.restore(before)
                self.dropped += dropped
                return rows
            rows[row].append(sequence)
            room[row] -= length

    def _render(self, prompt: Prompt) -> Sequence:
        key = id(prompt)  # the stream keeps its prompts; ids in a file may repeat
        if key not in self._rendered:
            if len(self._rendered) > KEPT:
                self._rendered.clear()
            self._rendered[key] = render(prompt, self.chat, turns=self.turns)
        return self._rendered[key]

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from here."""
        return {"stream": self.stream.state(), "dropped": self.dropped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.stream.restore(state["stream"])
        self.dropped = state["dropped"]


def render(prompt: Prompt, chat: ChatTemplate, *, turns: str = "all") -> Sequence:
    """A conversation as one row of tokens, up to the last response's end token.

    Trained are the assistant's turns ("all", or the "last"), each with its end token: what stands
    between is read, and not learned.

    Raises:
        DataError: the example has an image, or the template renders a turn differently when others
            follow it.
    """
    where = f"{prompt.id} ({prompt.data_source})"
    if prompt.images:
        raise DataError(f"{where}: the cold start is text only, and this example has an image")
    messages = [*prompt.messages, {"role": "assistant", "content": prompt.response}]
    said = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    whole = chat.encode(messages, (), generation_prompt=False)
    learned = np.zeros(len(whole), dtype=bool)
    for place in said if turns == "all" else said[-1:]:
        before = chat.encode(messages[:place], (), generation_prompt=True)
        last = place + 1 == len(messages)
        after = whole if last else chat.encode(messages[: place + 1], (), generation_prompt=False)
        if (
            whole[: len(before)].tolist() != before.tolist()
            or whole[: len(after)].tolist() != after.tolist()
        ):
            raise DataError(
                f"{where}: the chat template renders turn {place + 1} differently with and without "
                "what follows it"
            )
        end = len(after)
        while end > len(before) and after[end - 1] != chat.end_token_id:
            end -= 1  # the template's newline after the end token is not the model's to say
        learned[len(before) : end] = True
    places = np.flatnonzero(learned)
    start, end = int(places[0]), int(places[-1]) + 1
    between = ~learned[start:end]
    return Sequence.unsampled(
        whole[:end],
        response_start=start,
        images=(),
        name=prompt.id,
        between=between if between.any() else None,
    )
