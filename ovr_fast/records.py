"""The records of a training step, in the order in which they are made. All are frozen.

    record           made by                         what it is
    ImageFile        data.images                     one image of the data set
    Prompt           data.prompts                    one task of the data set
    ImageLimits      data.streams                    the most and largest images of a prompt
    Response         rollout.protocol                one sampled response
    Rollout          rl.rewards                      a response with its reward
    RolloutBatch     rollout.sources, .given         all rollouts of a step, on rank 0
    Sequence         recipe.shards, data.rows        prompt and response as one row of tokens
    Shard            recipe.shards                   a data-parallel replica's sequences of a step
    Segments         data.packing, model.vision      where packed sequences begin and end
    Branches         Segments                        which of them go on from another
    Rows             Branches                        rows of a tensor in a new order
    Microbatch       data.packing                    sequences packed for one forward pass
    PackedShard      recipe.shards                   a shard's microbatches, by minibatch
    Targets          recipe.ppo                      what a microbatch is trained towards
    Minibatch        PackedShard, recipe.sft         what one optimizer step trains on

Axes: T packed tokens · S sequences · R response tokens (the rows that the output head sees) ·
G visual tokens · I images · N and M new and old rows. A suffix is a shape; S1 has S + 1 entries.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovr_fast.errors import OVRFastError


class ImageChanged(OVRFastError, ValueError):
    """An image file is gone or has changed since the run began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """One image as the data set gives it: an encoded file, identified by its content."""

    digest: str  # sha256 of the file, hexadecimal
    stored: bytes | Path = field(repr=False)  # PNG, JPEG, WebP or BMP, upright and opaque
    origin: str  # file or row it came from, for messages
    read_from: Path | None = field(default=None, compare=False)  # its file, also where written anew

    @property
    def data(self) -> bytes:
        """The encoded file. One on disk is read at each use, so that no rank's memory holds it and
        the ranks of a node share the system's cache.

        Raises:
            ImageChanged: the file is gone or has changed.
        """
        if isinstance(self.stored, bytes):
            return self.stored
        try:
            data = self.stored.read_bytes()
        except OSError as error:
            raise ImageChanged(f"{self.origin}: {error.strerror} since the run began") from error
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ImageChanged(f"{self.origin}: the image has changed since the run began")
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task of a data set."""

    id: str
    data_source: str  # name of the data source, for messages and recorded rollouts
    messages: tuple[dict, ...]  # chat messages; image parts are {"type": "image"}
    images: tuple[ImageFile, ...]  # in the order of the image parts; () for text only
    answer: str | None  # None where the data set has no verifiable answer (cold start)
    response: str | None  # None where the data set has no response (reinforcement learning)
    columns: dict[str, Any] = field(default_factory=dict)  # ``DataSource.columns``, as in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """The most and the largest images of a prompt: what a vLLM server plans its memory for."""

    count: int  # images of one prompt
    width: int  # pixels
    height: int  # pixels


class VersionSpan(NamedTuple):
    """From which response token on which weights sampled."""

    version: int  # RL steps in the weights
    start: int  # index of the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled response. Token ids and log-probs are vLLM's own."""

    prompt_index: int  # position in the batch's prompts
    sample_index: int  # 0 .. samples_per_prompt - 1
    prompt_tokens: np.ndarray  # int64, image placeholders expanded; shared by a prompt's samples
    response_tokens: np.ndarray  # int64, with the end token where generation stopped on one
    rollout_logprobs: np.ndarray  # float32 nats, one per response token
    text: str  # decoded response, without special tokens
    finish_reason: str  # "stop", or "length" for a truncated response
    versions: tuple[VersionSpan, ...]  # of the weights that sampled its tokens; one if no sync

    @property
    def first_policy_version(self) -> int:
        """RL steps in the weights that sampled its first token."""
        return self.versions[0].version

    @property
    def last_policy_version(self) -> int:
        """RL steps in the weights that sampled its last token."""
        return self.versions[-1].version


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Response):
    """A response with what the verifier gave it."""

    reward: float
    outcome: str  # one of rewards.OUTCOMES
    scores: tuple[tuple[str, float], ...] = ()  # what a reward function named beside its reward
    known: dict[str, np.ndarray] = field(default_factory=dict)  # see ``Sequence.known``

    @classmethod
    def of(
        cls,
        response: Response,
        *,
        reward: float,
        outcome: str,
        scores: tuple[tuple[str, float], ...] = (),
    ) -> Rollout:
        """``response``, rewarded."""
        fields = {name: getattr(response, name) for name in Response.__slots__}
        return cls(**fields, reward=reward, outcome=outcome, scores=scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The prompts and rollouts of one step. Rank 0 has them; on other ranks it is empty."""

    step: int  # 1 is the first
    prompts: tuple[Prompt, ...] = ()
    rollouts: tuple[Rollout, ...] = ()  # ordered by prompt, then sample
    counters: dict[str, float] = field(default_factory=dict)  # metrics of where they come from

    def prompt_of(self, rollout: Response) -> Prompt:
        """The prompt that a rollout of this batch answers."""
        return self.prompts[rollout.prompt_index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Prompt and response as one sequence of tokens, ready to be packed."""

    tokens: np.ndarray  # int64 [n]
    response_start: int  # index of the first response token, 1 .. n - 1
    images: tuple[ImageFile, ...]
    rollout_logprobs: np.ndarray  # float32 nats, one a response token; NaN where none was sampled
    reward: float  # NaN where nothing was rewarded: a loss that reads it stops the run
    name: str  # the prompt's id, for messages
    advantage: float = math.nan  # against its group's rewards; NaN where a critic says
    between: np.ndarray | None = None  # bool [n - response_start], True: not the model's to say
    # float32, one a response token: results of passes of the step (``RLConfig.early_passes``) that
    # were made while others were being sampled, by name
    known: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def unsampled(
        cls, tokens: np.ndarray, *, response_start: int, images: tuple[ImageFile, ...], name: str
    ) -> Sequence:
        """A row of text that no policy sampled: a demonstration, or a conversation to score."""
        return cls(
            tokens=tokens,
            response_start=response_start,
            images=images,
            rollout_logprobs=np.full(len(tokens) - response_start, np.nan, dtype=np.float32),
            reward=math.nan,
            name=name,
        )

    @property
    def response_places(self) -> np.ndarray:
        """Indices [r] of the response tokens; the turns between an assistant's are left out."""
        places = np.arange(self.response_start, len(self.tokens))
        return places if self.between is None else places[~self.between]

    @property
    def response_length(self) -> int:
        """Response tokens."""
        return len(self.rollout_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One data-parallel replica's sequences of a step, and what every rank knows of all of it."""

    minibatches: tuple[tuple[Sequence, ...], ...]  # see ``RLConfig.minibatches``
    costs: tuple[tuple[float, ...], ...]  # FLOPs of each of those sequences, in all passes
    global_tokens: tuple[int, ...]  # response tokens of each minibatch on all replicas
    global_responses: tuple[int, ...]  # responses of each
    summary: dict[str, float]  # metrics of the whole rollout batch, the same on every rank


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; to a GPU from page-locked memory: the host does not wait for it."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Where packed sequences begin and end, in the forms that attention and GAE read."""

    cu_seqlens_S1: Tensor  # int32, starts at 0, ascending; on the device of the packed tokens
    lengths: tuple[int, ...]  # [S] tokens of each, on the host
    max_seqlen: int  # the largest length; 0 where there is none
    branches: Branches | None = None  # None: no segment goes on from another

    @classmethod
    def of(cls, lengths: List[int], prefixes: List[int] = ()) -> Segments:
        """Segments of these lengths, on the CPU.

        Args:
            prefixes: [S] the segment before it that each goes on from, -1 where it begins anew;
                (): all begin anew.
        """
        branches = None
        if any(prefix >= 0 for prefix in prefixes):
            branches = Branches.of(tuple(lengths), tuple(prefixes))
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(
            cu_seqlens_S1=torch.from_numpy(ends),
            lengths=tuple(lengths),
            max_seqlen=max(lengths, default=0),
            branches=branches,
        )

    @property
    def total(self) -> int:
        """Tokens of all segments."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> Segments:
        """The same segments with their boundaries on ``device``."""
        branches = None if self.branches is None else self.branches.to(device)
        ends = to_device(self.cu_seqlens_S1, device)
        return replace(self, cu_seqlens_S1=ends, branches=branches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a tensor in a new order: some more than once, some not at all."""

    index_N: Tensor  # int64, the old row of each new one
    places_N: Tensor  # int64, new rows in the order of their old ones
    starts_M1: Tensor  # int64, where each old row's begin in ``places_N``

    @classmethod
    def of(cls, index_N: np.ndarray, count: int) -> Rows:
        """These of ``count`` old rows, on the CPU."""
        times = np.bincount(index_N, minlength=count)
        return cls(
            index_N=torch.from_numpy(index_N),
            places_N=torch.from_numpy(np.argsort(index_N, kind="stable")),
            starts_M1=torch.from_numpy(np.concatenate([[0], np.cumsum(times)])),
        )

    def to(self, device: torch.device) -> Rows:
        """The same with its tensors on ``device``."""
        return Rows(
            index_N=to_device(self.index_N, device),
            places_N=to_device(self.places_N, device),
            starts_M1=to_device(self.starts_M1, device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """Segments that go on from another one: the responses to a prompt that stands once. A branch's
    token attends to its whole prefix and to what is before it in its own segment."""

    shared: tuple[tuple[int, int], ...]  # (tokens, branches) of each segment that has branches
    whole: Segments  # each branch behind its prefix, and the segments that have no branches
    expand: Rows  # from packed tokens to those of ``whole``
    collapse: Rows  # and back: a prefix's from before its first branch

    @classmethod
    def of(cls, lengths: tuple[int, ...], prefix_S: tuple[int, ...]) -> Branches:
        """Of segments of these lengths, on the CPU.

        Args:
            prefix_S: the segment that each goes on from; -1: it begins anew.

        Raises:
            ValueError: a branch goes on from what does not begin anew before it.
        """
        for segment, prefix in enumerate(prefix_S):
            if not -1 <= prefix < segment or (prefix >= 0 and prefix_S[prefix] >= 0):
                raise ValueError(
                    f"segment {segment} goes on from {prefix}, which does not begin anew before it"
                )
        branches = Counter(prefix for prefix in prefix_S if prefix >= 0)
        ends = np.cumsum(lengths)
        tokens = [np.arange(end - size, end) for end, size in zip(ends, lengths, strict=True)]
        whole = [
            tokens[segment] if prefix < 0 else np.concatenate([tokens[prefix], tokens[segment]])
            for segment, prefix in enumerate(prefix_S)
            if segment not in branches
        ]
        places = np.concatenate(whole)
        _, first = np.unique(places, return_index=True)
        return cls(
            shared=tuple((lengths[prefix], count) for prefix, count in branches.items()),
            whole=Segments.of([len(part) for part in whole]),
            expand=Rows.of(places, len(first)),
            collapse=Rows.of(first, len(places)),
        )

    @property
    def shared_tokens(self) -> int:
        """Tokens that would stand here too if every branch had its prefix to itself."""
        return sum((count - 1) * length for length, count in self.shared)

    def to(self, device: torch.device) -> Branches:
        """The same branches with their tensors on ``device``."""
        return replace(
            self,
            whole=self.whole.to(device),
            expand=self.expand.to(device),
            collapse=self.collapse.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Sequences packed end to end, without padding, for one forward pass.

    The response token at packed position t is predicted, and its value estimated, at t - 1. Those
    positions are ``predictor_index_R``; everything with suffix R has one entry per response token.
    """

    tokens_T: Tensor  # int64
    positions_3T: Tensor  # int64, M-RoPE positions (time, height, width)
    segments: Segments  # of the tokens: each sequence, or a shared prompt and each response to it;
    # up to tp - 1 dummy tokens at the end are one more segment
    predictor_index_R: Tensor  # int64, packed position that predicts each response token
    labels_R: Tensor  # int64, the response tokens
    responses: Segments  # of the response tokens; S segments, no dummy; stays on the CPU
    rollout_logprobs_R: Tensor  # float32 nats; NaN where nothing was sampled
    rewards_S: tuple[float, ...]  # one a response; NaN where nothing was rewarded
    advantages_S: tuple[float, ...]  # against a response's group; NaN where a critic says
    sequence_ids: tuple[int, ...]  # [S] places of the sequences in the list that was packed
    cost: float  # of its sequences: estimated FLOPs, or tokens
    images: tuple[ImageFile, ...]  # in the order of their placeholders, one entry a use
    visual_index_G: Tensor  # int64, packed positions of the visual tokens
    visual_tokens: tuple[Tensor, ...] = ()  # [g, out_hidden] an image, [G] in all, once encoded
    known_R: dict[str, Tensor] = field(default_factory=dict)  # fp32, on the CPU: ``Sequence.known``

    def __post_init__(self) -> None:
        if self.segments.total != self.tokens_T.numel():
            raise ValueError(
                f"segments cover {self.segments.total} tokens, but the microbatch has "
                f"{self.tokens_T.numel()}"
            )
        if self.responses.total != self.labels_R.numel():
            raise ValueError(
                f"responses cover {self.responses.total} tokens, but there are "
                f"{self.labels_R.numel()} labels"
            )

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch with its tensors on ``device``; ``responses`` stays on the CPU,
        visual tokens where they are."""
        return replace(
            self,
            tokens_T=to_device(self.tokens_T, device),
            positions_3T=to_device(self.positions_3T, device),
            segments=self.segments.to(device),
            predictor_index_R=to_device(self.predictor_index_R, device),
            labels_R=to_device(self.labels_R, device),
            rollout_logprobs_R=to_device(self.rollout_logprobs_R, device),
            visual_index_G=to_device(self.visual_index_G, device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a microbatch is trained towards, by the weights before the first update of a step."""

    advantages_R: Tensor | None = None  # fp32; None until the critic is through
    old_values_R: Tensor | None = None  # fp32, reward units; None until its update gives them
    returns_R: Tensor | None = None  # fp32, reward units; None without a critic
    old_logprobs_R: Tensor | None = None  # fp32 nats; None when strictly on-policy: the ratio is 1
    ref_logprobs_R: Tensor | None = None  # fp32 nats; None when no KL term is in the loss
    kl_R: Tensor | None = None  # fp32 nats, estimated; None when no KL term is in the reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one optimizer step trains on: this rank's microbatches of it."""

    microbatches: tuple[Microbatch, ...]
    targets: tuple[Targets | None, ...]  # one a microbatch; None in the cold start, which has none
    global_tokens: int  # response tokens of the minibatch on all data-parallel replicas
    global_responses: int = 0  # responses of it; 0 where no loss asks


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedShard:
    """A shard's microbatches, packed once for all passes of a step."""

    minibatches: tuple[tuple[Microbatch, ...], ...]  # see ``RLConfig.minibatches``
    global_tokens: tuple[int, ...]  # response tokens of each minibatch on all replicas
    global_responses: tuple[int, ...]  # responses of each
    summary: dict[str, float]  # metrics of the whole rollout batch

    @property
    def microbatches(self) -> list[Microbatch]:
        """All of them, minibatch after minibatch."""
        return [microbatch for minibatch in self.minibatches for microbatch in minibatch]

    def split(self, targets: List[Targets], *, count: int) -> list[Minibatch]:
        """The step's optimizer steps: neighbouring minibatches joined until ``count`` are left.

        Args:
            targets: one for each of ``microbatches``, in their order.
            count: a divisor of the number of minibatches.
        """
        size = len(self.minibatches) // count
        waiting = iter(targets)
        steps = []
        for start in range(0, len(self.minibatches), size):
            chosen = [m for part in self.minibatches[start : start + size] for m in part]
            steps.append(
                Minibatch(
                    microbatches=tuple(chosen),
                    targets=tuple(next(waiting) for _ in chosen),
                    global_tokens=sum(self.global_tokens[start : start + size]),
                    global_responses=sum(self.global_responses[start : start + size]),
                )
            )
        return steps
