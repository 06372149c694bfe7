"""The cold start's data: demonstrations, rendered and packed into rows of a fixed length."""

from __future__ import annotations

from typing import Any

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
    """

    def __init__(self, stream: Mixture, chat: ChatTemplate, *, row_tokens: int, rows: int) -> None:
        self.stream, self.chat, self.row_tokens, self.rows = stream, chat, row_tokens, rows
        self.dropped = 0
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
            self._rendered[key] = render(prompt, self.chat)
        return self._rendered[key]

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from here."""
        return {"stream": self.stream.state(), "dropped": self.dropped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.stream.restore(state["stream"])
        self.dropped = state["dropped"]


def render(prompt: Prompt, chat: ChatTemplate) -> Sequence:
    """Prompt and demonstrated response as one row of tokens, up to the end token.

    Raises:
        DataError: the example has an image, or the template renders the prompt differently with
            and without a response.
    """
    if prompt.images:
        raise DataError(
            f"{prompt.id} ({prompt.data_source}): the cold start is text only, and this example "
            "has an image"
        )
    start = chat.encode(prompt.messages, (), generation_prompt=True)
    response = {"role": "assistant", "content": prompt.response}
    whole = chat.encode([*prompt.messages, response], (), generation_prompt=False)
    if whole[: len(start)].tolist() != start.tolist():
        raise DataError(
            f"{prompt.id} ({prompt.data_source}): the chat template renders the prompt differently "
            "with and without a response"
        )
    end = len(whole)
    while end > len(start) and whole[end - 1] != chat.end_token_id:
        end -= 1  # the template's newline after the end token is not the model's to say
    return Sequence.unsampled(whole[:end], response_start=len(start), images=(), name=prompt.id)
