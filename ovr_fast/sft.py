"""Stage 1, linguistic cold start: next-token loss on response tokens, text only, packed rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ovr_fast.batch import PackedBatch, Prompt, Sequence
from ovr_fast.config import Config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.packing import PositionTable, pack
from ovr_fast.data.prompts import DataError, Mixture
from ovr_fast.learner import Learner, cross_entropy_head
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.rl.losses import cold_start_loss


@dataclass(slots=True, kw_only=True)
class SFT:
    """The parts of a cold start. ``step`` is the recipe."""

    config: Config
    mesh: Mesh
    learner: Learner
    stream: Mixture
    encoder: ChatEncoder
    clock: Clock
    dropped: int = 0  # examples longer than a row, so far
    _encoded: dict[int, Sequence] = field(default_factory=dict)

    def step(self) -> dict[str, float]:
        """One optimizer step. Returns its metrics."""
        with self.clock("pack"):
            rows = self._next_rows()
            batches = self._pack(rows)
        with self.clock("update"):
            report = self._update(batches, sum(s.response_length for row in rows for s in row))
        tokens = sum(len(s.tokens) for row in rows for s in row)
        room = len(rows) * self.config.cold_start.row_tokens
        return {
            "cold_start/loss": report["loss"] / report["tokens"],
            "cold_start/grad_norm": report["grad_norm"],
            "cold_start/lr": report["lr"],
            "cold_start/tokens": float(tokens),
            "cold_start/response_tokens": report["tokens"],
            "cold_start/examples": float(sum(len(row) for row in rows)),
            "cold_start/empty_share": 1.0 - tokens / room,
            "cold_start/dropped": float(self.dropped),
        }

    def _next_rows(self) -> list[list[Sequence]]:
        """Draw from the stream into the first row with room, until an example fits nowhere."""
        settings = self.config.cold_start
        rows: list[list[Sequence]] = [[] for _ in range(settings.rows_per_step)]
        room = [settings.row_tokens] * settings.rows_per_step
        dropped = in_a_row = 0
        while True:
            before = self.stream.state()
            (prompt,) = self.stream.take(1)
            sequence = self._encode(prompt)
            length = len(sequence.tokens)
            if length > settings.row_tokens:
                dropped += 1
                in_a_row += 1
                if in_a_row > 1000:
                    raise DataError(
                        f"1000 examples in a row are longer than cold_start.row_tokens="
                        f"{settings.row_tokens}; raise it"
                    )
                continue
            in_a_row = 0
            row = next((i for i, free in enumerate(room) if free >= length), None)
            if row is None:
                self.stream.restore(before)  # it opens the next step's rows
                self.dropped += dropped
                return rows
            rows[row].append(sequence)
            room[row] -= length

    def _encode(self, prompt: Prompt) -> Sequence:
        key = id(prompt)  # the stream keeps its prompts; ids in a file may repeat
        if key not in self._encoded:
            if len(self._encoded) > 100_000:
                self._encoded.clear()
            if prompt.pictures:
                raise DataError(
                    f"{prompt.id} ({prompt.source}): the cold start is text only, and this "
                    "example has a picture"
                )
            start = self.encoder.encode(prompt.messages, (), generation_prompt=True)
            response = {"role": "assistant", "content": prompt.response}
            whole = self.encoder.encode([*prompt.messages, response], (), generation_prompt=False)
            if whole[: len(start)].tolist() != start.tolist():
                raise DataError(
                    f"{prompt.id} ({prompt.source}): the chat template renders the prompt "
                    "differently with and without a response"
                )
            end = len(whole)
            while end > len(start) and whole[end - 1] != self.encoder.end_token_id:
                end -= 1  # the template's newline after the end token is not the model's to say
            self._encoded[key] = Sequence(
                tokens=whole[:end], response_start=len(start), pictures=(), name=prompt.id
            )
        return self._encoded[key]

    def _pack(self, rows: list[list[Sequence]]) -> list[PackedBatch]:
        """This rank's rows, one microbatch each."""
        positions = PositionTable(self.encoder.pictures, self.encoder.image_token_id)
        return [
            batch
            for row in rows[self.mesh.dp_rank :: self.mesh.dp]
            if row
            for batch in pack(
                row,
                list(range(len(row))),
                positions=positions,
                max_tokens=self.config.cold_start.row_tokens,
                multiple=self.mesh.tp,
            )
        ]

    def _update(self, batches: list[PackedBatch], global_tokens: int) -> dict[str, float]:
        def loss(rows_RH: Tensor, batch: PackedBatch):
            head = cross_entropy_head(self.learner.stage, rows_RH, batch)
            return cold_start_loss(head, batch, global_tokens=global_tokens)

        return self.learner.update(batches, loss)
