"""A fixed prompt with an image, sampled by every server after every sync, before anything else, and
scored by the trainer before it learns from what that server samples: whatever goes wrong with
weights, the two differ here."""

from __future__ import annotations

import hashlib
import io
import statistics
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.packing import pack
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import ImageFile, ImageLimits, Microbatch, Prompt, Sequence
from ovr_fast.rollout.client import ServerFailed
from ovr_fast.rollout.protocol import Piece, RenderedPrompt, Sample

TOKENS = 16
"""That a server samples. One wrong tensor moves most of them."""

SEED = 1
PIXELS = 56
"""Side of the image: four visual tokens of 28 x 28 pixels."""

EXACT = 1e-3
"""Nats, mean over tokens: float32 on both sides is under 1e-5."""

LEARNED = 3
"""In another dtype the first syncs say what is usual."""

JUMP = 4.0
"""Times the median of the usual gaps are a fault."""

LEAST, MOST = 0.02, 0.3
"""Nats: in another dtype than float32 gaps under the first are never a fault, those over the second
always: the probability of a token is off by a third."""


class StaleWeights(ServerFailed):
    """A server does not sample from the weights that it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """What is asked.

    Args:
        asked: the prompt.
        chat: the model's chat template.
        exact: both sides compute in float32.
        engine: what decides which gaps are usual.
    """

    asked: RenderedPrompt
    chat: ChatTemplate
    exact: bool
    engine: str
    usual: list[float]  # gaps of the syncs so far; grows

    @classmethod
    def of(
        cls, chat: ChatTemplate, images: ImageLimits, *, exact: bool, engine: str = ""
    ) -> Canary:
        """The canary of a run; with an image where the servers take one."""
        parts: list[dict] = [{"type": "text", "text": "What is this?"}]
        files: tuple[ImageFile, ...] = ()
        if images.count:
            files = (_picture(),)
            parts.insert(0, {"type": "image"})
        messages = ({"role": "user", "content": parts if files else "What is this?"},)
        prompt = Prompt(
            id="the canary", data_source="", messages=messages, images=files, answer=None,
            response=None,
        )  # fmt: skip
        asked = RenderedPrompt.of(prompt, 0, chat)
        return cls(asked=asked, chat=chat, exact=exact, engine=engine, usual=[])

    def state(self) -> dict[str, object]:
        """For a checkpoint: what it has learned."""
        return {"engine": self.engine, "usual": [*self.usual]}

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint. Another engine's gaps say nothing: they are learned anew."""
        if state.get("engine") == self.engine:
            self.usual[:0] = state["usual"]

    def sample(self) -> Sample:
        """To be sampled by one server."""
        return Sample(asked=self.asked, step=0, number=0, seed=SEED, max_tokens=TOKENS)

    def pack(self, pieces: List[Piece], mesh: Mesh) -> list[Microbatch]:
        """What the servers sampled, for the trainer to score; one sequence each."""
        sequences = [
            Sequence(
                tokens=np.concatenate([self.asked.expanded, piece.tokens.astype(np.int64)]),
                response_start=len(self.asked.expanded),
                images=self.asked.prompt.images,
                rollout_logprobs=piece.logprobs,
                reward=0.0,
                name=self.asked.prompt.id,
            )
            for piece in pieces
        ]
        longest = max(len(sequence.tokens) for sequence in sequences)
        positions = self.chat.mrope_cache()
        batches = pack(sequences, positions=positions, max_tokens=longest, multiple=mesh.tp)
        return sorted(batches, key=lambda batch: batch.sequence_ids)

    def judge(self, gaps: List[tuple[str, float]], *, version: int) -> None:
        """Compare with what is usual.

        Args:
            gaps: a server's name and its mean absolute difference of log-probs, nats.

        Raises:
            StaleWeights: a gap is too large; names the server.
        """
        limit = EXACT
        if not self.exact:
            limit = MOST
            if len(self.usual) >= LEARNED:
                limit = min(MOST, max(LEAST, JUMP * statistics.median(self.usual)))
        for name, gap in gaps:
            if not gap <= limit:  # NaN too
                before = f"; the syncs before had up to {max(self.usual):.1e}" if self.usual else ""
                raise StaleWeights(
                    f"{name} does not sample from the weights of step {version}: its log-probs of "
                    f"a fixed prompt are {gap:.1e} nats from the trainer's (at most {limit:.1e})"
                    f"{before}. Nothing was learned from it. Start the servers anew, and --resume"
                )
        self.usual.append(max(gap for _, gap in gaps))


def gap(batch: Microbatch, logprobs_R: torch.Tensor) -> float:
    """Mean absolute difference of two log-probs of each response token, nats."""
    return float((logprobs_R.cpu() - batch.rollout_logprobs_R.cpu()).abs().mean())


def _picture() -> ImageFile:
    ramp = np.linspace(0, 255, PIXELS).astype(np.uint8)
    channels = [np.tile(ramp, (PIXELS, 1)), np.tile(ramp[:, None], (1, PIXELS))]
    channels.append(np.minimum(*channels))
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=-1)).save(file, format="PNG")
    data = file.getvalue()
    return ImageFile(digest=hashlib.sha256(data).hexdigest(), stored=data, origin="the canary")
