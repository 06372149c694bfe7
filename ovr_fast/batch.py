"""The records that flow through a step, one per stage. All frozen; each stage makes a new one.

Prompt -> Rollout -> Rollout with a reward -> Sequence -> PackedBatch

Axes: T packed tokens · S sequences · R response tokens (the rows the head runs on) · P patches ·
D pixels of a patch · I pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture as the data set gives it: an encoded file, identified by its content."""

    digest: str  # sha256 of the file, hexadecimal
    stored: bytes | Path = field(repr=False)  # PNG, JPEG, WebP or BMP, upright and opaque
    origin: str  # file or row it came from, for messages

    @property
    def data(self) -> bytes:
        """The encoded file. One on disk is read anew, so that memory holds none of them and the
        ranks of a node share the system's cache.

        Raises:
            ValueError: the file is gone or has changed; names it.
        """
        if isinstance(self.stored, bytes):
            return self.stored
        try:
            data = self.stored.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.origin}: {error.strerror} since the run began") from error
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ValueError(f"{self.origin}: the picture has changed since the run began")
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task of a data set."""

    id: str
    source: str  # name of the data source, and what results are grouped by
    messages: tuple[dict, ...]  # chat messages; picture parts are {"type": "image"}
    pictures: tuple[Picture, ...]  # in the order of the picture parts; () for text only
    answer: str | None  # None where the data set has no verifiable answer (cold start)
    response: str | None  # None where the data set has no response (reinforcement learning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response. Token ids and log-probs are the engine's own."""

    prompt_index: int  # position in the step's list of prompts
    sample_index: int  # 0 .. samples_per_prompt - 1
    prompt_tokens: np.ndarray  # int64, placeholders of pictures expanded
    response_tokens: np.ndarray  # int64, with the end token where the engine stopped on one
    rollout_logprobs: np.ndarray  # float32 nats, one per response token
    text: str  # decoded response, without special tokens
    finish_reason: str  # "stop", or "length" for a truncated response
    policy_version: int  # weight syncs before this response was sampled
    reward: float | None = None  # None until scored
    outcome: str | None = None  # one of rewards.OUTCOMES; None until scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Prompt and response as one row of tokens, ready to be packed."""

    tokens: np.ndarray  # int64 [n]
    response_start: int  # index of the first response token, 1 .. n - 1
    pictures: tuple[Picture, ...]
    name: str = ""  # prompt it belongs to, for messages

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.response_start


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One microbatch: sequences end to end, no padding.

    A response token at t is predicted, and its value estimated, at position t - 1. Those
    positions are ``rows_R``; everything with suffix R has one entry per response token.
    """

    tokens_T: Tensor  # int64
    positions_3T: Tensor  # int64, M-RoPE positions (time, height, width)
    cu_seqlens_S1: Tensor  # int32 on the CPU, starts at 0 and ends at T
    rows_R: Tensor  # int64, packed position that predicts each response token
    targets_R: Tensor  # int64, the response tokens
    response_index_R: Tensor  # int64, place in the caller's sequences' responses laid end to end
    sequence_indices_S: tuple[int, ...]  # places of the packed sequences in the caller's list
    pictures: tuple[Picture, ...]  # in the order of their placeholders, one entry a use
    picture_rows: Tensor  # int64 [G], packed positions of the visual tokens
    visual_tokens: tuple[Tensor, ...] = ()  # [g, out_hidden] a picture, [G] in all, once encoded

    def __post_init__(self) -> None:
        ends = self.cu_seqlens_S1
        if int(ends[0]) != 0 or int(ends[-1]) != self.tokens_T.numel():
            raise ValueError(
                f"cu_seqlens covers {int(ends[0])}..{int(ends[-1])}, "
                f"but the batch has {self.tokens_T.numel()} tokens"
            )

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on ``device`` (boundaries stay on the CPU, visual tokens
        where they are)."""

        return replace(
            self,
            tokens_T=self.tokens_T.to(device),
            positions_3T=self.positions_3T.to(device),
            rows_R=self.rows_R.to(device),
            targets_R=self.targets_R.to(device),
            response_index_R=self.response_index_R.to(device),
            picture_rows=self.picture_rows.to(device),
        )
