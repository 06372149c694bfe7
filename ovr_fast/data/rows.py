"""The cold start's data: demonstrations, rendered and packed into rows of a fixed length."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ovr_fast.data.balance import greedy_partition
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.prompts import Mixture
from ovr_fast.records import Prompt, Sequence

KEPT_TOKENS = 2**24
"""Tokens of rendered demonstrations kept in memory (8 bytes each), for the next pass over a small
file."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A demonstration that has a place in a row: where it is, and its lengths, which are known
    from when the data were read."""

    pool: int
    place: int
    tokens: int
    trained: int


@dataclass(frozen=True, slots=True)
class RowBatch:
    """The rows of a step: what every replica knows of all, and this one's own, rendered."""

    rows: list[list[Demonstration]]
    own: list[list[Sequence]]
    state: dict[str, Any]  # of the stream behind it


class DemonstrationRows:
    """An endless stream of rows, the same for every layout. A step's are rendered by the replicas
    that train them, while the step before is trained.

    Args:
        stream: the demonstrations, none longer than a row, whose pools know their ``size``.
        chat: the model's chat template.
        row_tokens: of a row.
        rows: of a step.
        turns: of a conversation that are trained: see ``render``.
        cost: of a demonstration of so many tokens, so many trained; replicas get rows of the same.
        replica: this one's number.
        replicas: how many there are.
        dropped: demonstrations that were longer than a row, for the metrics.
    """

    def __init__(
        self,
        stream: Mixture,
        chat: ChatTemplate,
        *,
        row_tokens: int,
        rows: int,
        turns: str,
        cost: Callable[[int, int], float],
        replica: int,
        replicas: int,
        dropped: int = 0,
    ) -> None:
        self.stream, self.chat, self.row_tokens, self.rows = stream, chat, row_tokens, rows
        self.turns, self.cost, self.replica, self.replicas = turns, cost, replica, replicas
        self.dropped = dropped
        self._rendered: dict[Demonstration, Sequence] = {}
        self._kept_tokens = 0
        self._behind = stream.state()  # of the last batch that was given out
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._ahead: Future[RowBatch] | None = None

    def next(self) -> RowBatch:
        """The rows of a step, and begin with those of the next.

        Raises:
            DataError: one cannot be rendered.
        """
        batch = self._ahead.result() if self._ahead is not None else self._prepare()
        self._behind = batch.state
        self._ahead = self._thread.submit(self._prepare)
        return batch

    def _prepare(self) -> RowBatch:
        rows = self._draw()
        costs = [sum(self.cost(d.tokens, d.trained) for d in row) for row in rows]
        mine = [rows[i] for i in greedy_partition(costs, self.replicas)[self.replica]]
        own = [[self._render(demonstration) for demonstration in row] for row in mine]
        return RowBatch(rows, own, self.stream.state())

    def _render(self, demonstration: Demonstration) -> Sequence:
        found = self._rendered.get(demonstration)
        if found is None:
            if self._kept_tokens > KEPT_TOKENS:
                self._rendered.clear()
                self._kept_tokens = 0
            prompt = self.stream.pools[demonstration.pool][demonstration.place]
            found = self._rendered[demonstration] = render(prompt, self.chat, turns=self.turns)
            self._kept_tokens += demonstration.tokens
        return found

    def _draw(self) -> list[list[Demonstration]]:
        """Each demonstration goes into the first row with room, until one fits nowhere; it opens
        the next step's rows."""
        rows: list[list[Demonstration]] = [[] for _ in range(self.rows)]
        room = [self.row_tokens] * self.rows
        while True:
            before = self.stream.state()
            ((pool, place),) = self.stream.places(1)
            tokens, trained = self.stream.pools[pool].size(place)
            row = next((i for i, free in enumerate(room) if free >= tokens), None)
            if row is None:
                self.stream.restore(before)
                return rows
            rows[row].append(Demonstration(pool, place, tokens, trained))
            room[row] -= tokens

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from the last batch that was given out."""
        return {"stream": self._behind}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        if self._ahead is not None:
            self._ahead.exception()  # wait for it
            self._ahead = None
        self.stream.restore(state["stream"])
        self._behind = state["stream"]


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
    sequence = Sequence.unsampled(whole[:end], response_start=start, images=(), name=prompt.id)
    between = ~learned[start:end]
    if not between.any():
        return sequence
    return replace(sequence, between=between, rollout_logprobs=sequence.rollout_logprobs[~between])
