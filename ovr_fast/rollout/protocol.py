"""Samples as requests to vLLM's tokens-in, tokens-out route, and its answers as arrays.

The prompt is rendered here, once; a request carries its token ids with one placeholder an image.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from ovr_fast.config import RolloutConfig
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.records import Prompt, Response, VersionSpan
from ovr_fast.rollout.client import ServerFailed
from ovr_fast.shape.model_shape import ModelShape

GENERATE = "inference/v1/generate"

MEDIA_TOKEN_BIAS = -100.0
"""Added to the logits of image and video placeholders: sampled, they would stand for no image."""


class PromptMismatch(ServerFailed):
    """The server sees another prompt than the trainer."""


def request_seed(run_seed: int, step: int, prompt: int) -> int:
    """Seed of a prompt's first sample, a function of what it is and of nothing else (no order, no
    server); the sample's number is added to it for the others.

    Args:
        run_seed: ``run.seed``.
        step: 1 is the first.
        prompt: position in the step's prompts.
    """
    return zlib.crc32(f"{run_seed}/{step - 1}/{prompt}".encode()) << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """A prompt as token ids."""

    prompt: Prompt
    index: int  # its position in the step's prompts
    placed: list[int]  # token ids, one placeholder an image: what a request carries
    expanded: np.ndarray  # int64, as many placeholders as visual tokens: what both models see

    @classmethod
    def of(cls, prompt: Prompt, index: int, chat: ChatTemplate) -> RenderedPrompt:
        """The prompt, rendered by the chat template."""
        placed = chat.render(prompt.messages, generation_prompt=True)
        expanded = chat.expand(placed, prompt.images)
        return cls(prompt=prompt, index=index, placed=placed, expanded=expanded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one request sampled: a response, or as much of it as there was time for."""

    tokens: np.ndarray  # int32
    logprobs: np.ndarray  # float32 nats
    versions: tuple[VersionSpan, ...]  # of the weights that sampled the tokens
    finish_reason: str  # "stop", "length", or "abort" where the response is not at its end
    text: str | None = None  # of the tokens, without special ones; None from a checkpoint
    prompt_tokens: np.ndarray | None = None  # int32, as the server saw it; None from a checkpoint

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Piece:
        """What ``saved`` returned."""
        return cls(
            tokens=saved["tokens"].numpy(),
            logprobs=saved["logprobs"].numpy(),
            versions=tuple(VersionSpan(*span) for span in saved["versions"]),
            finish_reason=saved["finish_reason"],
        )

    def saved(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers and lists."""
        return {
            "tokens": torch.from_numpy(self.tokens.copy()),
            "logprobs": torch.from_numpy(self.logprobs.copy()),
            "versions": [list(span) for span in self.versions],
            "finish_reason": self.finish_reason,
        }


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One response that is being sampled, over however many requests. Compared by identity."""

    asked: RenderedPrompt
    step: int  # whose prompt it is
    number: int  # among the prompt's samples
    seed: int
    max_tokens: int
    pieces: list[Piece] = field(default_factory=list)
    attempts: int = 0  # requests under which a server failed
    begun: int | None = None  # version of the weights when its first token was asked for
    request_id: str = ""  # of the request that runs

    @property
    def name(self) -> str:
        """Which sample it is, for request ids."""
        return f"{self.step}-{self.asked.index}-{self.number}"

    @property
    def tokens_so_far(self) -> int:
        """Response tokens that were sampled by earlier requests."""
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def place(self) -> tuple[int, int, int]:
        """Its step, its prompt in the step, its number: the order of samples."""
        return self.step, self.asked.index, self.number

    @property
    def done(self) -> bool:
        """Whether the response is at its end."""
        return bool(self.pieces) and self.pieces[-1].finish_reason != "abort"

    def spans(self) -> list[VersionSpan]:
        """From which response token on which weights sampled."""
        spans: list[VersionSpan] = []
        start = 0
        for piece in self.pieces:
            for span in piece.versions:
                if not spans or spans[-1].version != span.version:
                    spans.append(VersionSpan(version=span.version, start=start + span.start))
            start += len(piece.tokens)
        return spans

    def tokens_by_version(self) -> list[tuple[int, int]]:
        """Weights' versions and how many response tokens each has sampled."""
        spans = self.spans()
        ends = [*(span.start for span in spans[1:]), self.tokens_so_far]
        return [(s.version, end - s.start) for s, end in zip(spans, ends, strict=True)]

    def response(self, decode: Decoder, *, prompt_index: int) -> Response:
        """The whole response.

        Args:
            decode: gives the text of one that took several requests.
            prompt_index: position of its prompt in the batch.
        """
        tokens = np.concatenate([piece.tokens for piece in self.pieces])
        one = len(self.pieces) == 1 and self.pieces[0].text is not None
        return Response(
            prompt_index=prompt_index,
            sample_index=self.number,
            prompt_tokens=self.asked.expanded,
            response_tokens=tokens.astype(np.int64),
            rollout_logprobs=np.concatenate([piece.logprobs for piece in self.pieces]),
            text=self.pieces[0].text or "" if one else decode.text(tokens.tolist()),
            finish_reason=self.pieces[-1].finish_reason,
            versions=tuple(self.spans()),
        )


def request_body(sample: Sample, rollout: RolloutConfig, shape: ModelShape) -> dict:
    """The request for a sample, from where it is: what it has already goes with its prompt."""
    done = sample.tokens_so_far
    # A seed begins a sequence of random numbers, so a response that goes on needs another.
    seed = sample.seed if not done else zlib.crc32(f"{sample.seed}+{done}".encode()) << 16
    sampling = {
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "logprobs": 0,
        "logit_bias": {
            str(shape.image_token_id): MEDIA_TOKEN_BIAS,
            str(shape.video_token_id): MEDIA_TOKEN_BIAS,
        },
        "seed": seed,
        "max_tokens": sample.max_tokens - done,
        "detokenize": bool(rollout.stop),
    }
    if rollout.stop:
        sampling["stop"] = list(rollout.stop)
    body = {
        "request_id": sample.request_id,
        "token_ids": sample.asked.placed + [int(t) for p in sample.pieces for t in p.tokens],
        "sampling_params": sampling,
        "return_token_ids": True,
    }
    if images := sample.asked.prompt.images:
        body["content_parts"] = [
            {"type": "image_url", "url": _data_url(image.data), "uuid": image.digest}
            for image in images
        ]
    return body


def _data_url(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class _Logprob(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Logprob]


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int


class _Choice(msgspec.Struct, gc=False):
    token_ids: list[int]
    finish_reason: str
    logprobs: _Logprobs | None = None
    weight_versions: list[_Span] | None = None


class _Answer(msgspec.Struct, gc=False):
    choices: list[_Choice]
    prompt_token_ids: list[int] | None = None


class Decoder:
    """Answers to arrays: 0.3 us a token for a typed parser that skips all but ids and log-probs
    (``json.loads`` takes 3.6), 0.2 us for the text (``benchmarks/rollout_client.py``).

    Args:
        tokenizer: the model's tokenizer.json.
    """

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._parser = msgspec.json.Decoder(_Answer)

    def text(self, tokens: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def piece(self, content: bytes) -> Piece:
        """One answer.

        Raises:
            ValueError: it is not one of the generate route, or its log-probs are not one a token.
        """
        answer = self._parser.decode(content)
        (choice,) = answer.choices
        logprobs = choice.logprobs.content if choice.logprobs else []
        count = len(choice.token_ids)
        if len(logprobs) != count:
            raise ValueError(f"{count} response tokens, {len(logprobs)} log-probs")
        return Piece(
            tokens=np.array(choice.token_ids, dtype=np.int32),
            logprobs=np.fromiter((entry.logprob for entry in logprobs), np.float32, count),
            versions=tuple(
                # A server that was never given weights calls its own "default".
                VersionSpan(version=int(s.version) if s.version.isdigit() else 0, start=s.start)
                for s in choice.weight_versions or ()
            ),
            finish_reason=choice.finish_reason,
            text=self.text(choice.token_ids),
            prompt_tokens=np.array(answer.prompt_token_ids or (), dtype=np.int32),
        )


def check_piece(sample: Sample, piece: Piece, shape: ModelShape) -> None:
    """What must be true of an answer.

    Raises:
        PromptMismatch: the server saw other prompt tokens than the trainer.
        ServerFailed: the response is empty, or holds an image placeholder.
    """
    ours, name = sample.asked.expanded, sample.asked.prompt.id
    assert piece.prompt_tokens is not None
    seen = piece.prompt_tokens[: len(piece.prompt_tokens) - sample.tokens_so_far]
    if not np.array_equal(seen, ours):
        image = shape.image_token_id
        raise PromptMismatch(
            f"prompt {name}: the server saw {len(seen)} tokens with {int((seen == image).sum())} "
            f"visual ones, the trainer has {len(ours)} with {int((ours == image).sum())}; the "
            "model folder's processor settings must be the same on both sides"
        )
    if len(piece.tokens) == 0 and piece.finish_reason != "abort":
        raise ServerFailed(f"prompt {name}: an empty response")
    if np.isin(piece.tokens, (shape.image_token_id, shape.video_token_id)).any():
        raise ServerFailed(
            f"prompt {name}: a media placeholder was sampled, which the request forbids"
        )
