"""Passes without gradients, and which of them are made of a finished response while others are
still being sampled: the values that a critic of the step before gives it, and old and reference
log-probs where a step needs them (``RLConfig.early_passes``)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as List
from contextlib import ExitStack

import numpy as np
from torch import Tensor

from ovr_fast import stopping
from ovr_fast.config import Config
from ovr_fast.data.packing import pack
from ovr_fast.learner.learner import Learner
from ovr_fast.learner.passes import FrozenModel
from ovr_fast.recipe.build import Models
from ovr_fast.records import Microbatch, Sequence
from ovr_fast.rollout.protocol import Sample

LONG = 1 / 8
"""Of a microbatch's cap: a response of as many tokens or more is a microbatch of its own."""

TURN_FROM, TURN_TO = 0.5, 2.0
"""Microbatches a replica that a turn begins with at the least, and takes at the most: a signal to
stop waits for its end."""

LOOK = 1 / 64
"""Of a step's responses: when as many more have ended, it is seen whether a turn is worth it."""

Place = tuple[int, int, int]
"""``Sample.place``."""

Unit = list[Sample]
"""What is packed together, and with nothing else."""

Work = tuple[list[Place], list[Sequence]]
"""A unit, as it goes to a replica."""


def owner(name: str, models: Models) -> Learner | FrozenModel:
    """The model that makes a pass."""
    model = {
        "values": models.critic,
        "old log-probs": models.actor,
        "reference log-probs": models.reference,
    }[name]
    assert model is not None, f"no model for {name}"
    return model


def score(
    name: str, microbatches: List[Microbatch], models: Models, *, temperature: float
) -> list[Tensor]:
    """A pass without gradients, one of ``RLConfig.passes``: [R] fp32 for each microbatch, values or
    nats. A collective of the replica."""
    model = owner(name, models)
    if name == "values":
        assert isinstance(model, Learner)
        return model.values(microbatches)
    return model.logprobs(microbatches, temperature=temperature)


class EarlyScores:
    """``rollout.sources.Scoring`` by the step's models.

    The results do not depend, bit for bit, on the order in which responses end: a prompt has one
    replica; a long response is a microbatch of its own as soon as it is there, and the short ones
    of a prompt are packed together when all of its responses are; an image goes through the tower
    by itself.

    Args:
        models: of the step; their weights stay as they are until ``finish``.
        config: all settings.
    """

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config, self.mesh = models, config, models.mesh
        self.passes, self.cap = config.rl.early_passes, config.rl.max_tokens_per_microbatch
        self._begun: set[Place] = set()  # places of samples, on rank 0
        self._looked = 0  # samples that were finished when they were looked at
        self._known: dict[Place, dict[str, np.ndarray]] = {}  # this replica's
        self._resident: ExitStack | None = None  # models on the device, from first turn to finish
        self._hidden_s = 0.0

    @classmethod
    def of(cls, models: Models, config: Config) -> EarlyScores | None:
        """None where the settings ask for none."""
        return cls(models, config) if config.rl.early_passes else None

    def wants(self, samples: List[Sample]) -> bool:
        """See ``Scoring``."""
        finished = sum(sample.done for sample in samples)
        if finished < self._looked + max(1, int(len(samples) * LOOK)):
            return False
        self._looked = finished
        tokens = sum(_tokens(sample) for unit in self._ready(samples) for sample in unit)
        return tokens >= TURN_FROM * self.cap * self.mesh.dp

    def turn(self, samples: List[Sample]) -> None:
        """See ``Scoring``."""
        began = time.perf_counter()
        self._looked = 0  # more may be ready than a turn takes
        with stopping.not_inside():  # the ranks stop together where they wait for samples
            self._score(samples, most=TURN_TO)
        self._hidden_s += time.perf_counter() - began

    def finish(self, samples: List[Sample]) -> list[dict[str, np.ndarray]]:
        """See ``Scoring``."""
        self._score(samples)
        if self._resident is not None:
            self._resident.close()
            self._resident = None
        if self.models.vision.trained:
            for name in self.passes:
                owner(name, self.models).vision.forget_early()
        gathered = self.mesh.gather_from_replicas(self._known)
        known = {place: found for replica in gathered for place, found in replica.items()}
        self._begun, self._known, self._looked = set(), {}, 0
        return [known[sample.place] for sample in samples]

    def hidden_s(self) -> float:
        """See ``Scoring``."""
        seconds, self._hidden_s = self._hidden_s, 0.0
        return seconds

    def _ready(self, samples: List[Sample]) -> list[Unit]:
        """Whose responses are finished and have not been scored."""
        by_prompt: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            by_prompt.setdefault(sample.place[:2], []).append(sample)
        units: list[Unit] = []
        for group in by_prompt.values():
            finished = [s for s in group if s.done]
            short = [s for s in finished if _tokens(s) < LONG * self.cap]
            units += [[s] for s in finished if _tokens(s) >= LONG * self.cap]
            if short and len(finished) == len(group):
                units.append(short)
        return [unit for unit in units if unit[0].place not in self._begun]

    def _shares(self, samples: List[Sample], most: float) -> list[list[Work]]:
        """What is ready, by replica: microbatches of each until they are ``most``. On rank 0."""
        shares: list[list[Work]] = [[] for _ in range(self.mesh.dp)]
        tokens = [0] * self.mesh.dp
        for unit in self._ready(samples):
            places = [sample.place for sample in unit]
            replica = unit[0].asked.index % self.mesh.dp
            if tokens[replica] < most * self.cap:
                shares[replica].append((places, [_sequence(sample) for sample in unit]))
                tokens[replica] += sum(map(_tokens, unit))
                self._begun.update(places)
        return shares

    def _score(self, samples: List[Sample], *, most: float = math.inf) -> None:
        """Score what is ready. A collective."""
        nothing: list[list[Work]] = []
        shares = self.mesh.on_first_rank(lambda: self._shares(samples, most), otherwise=nothing)
        own: list[Work] = self.mesh.scatter_to_replicas(shares)
        if self._resident is None:
            self._resident = ExitStack()
            for name in self.passes:
                model = owner(name, self.models)
                self._resident.enter_context(model.on_device(weights_only=True))
        positions = self.models.chat.mrope_cache()
        places, microbatches = [], []
        for names, sequences in own:
            packed = pack(
                sequences,
                positions=positions,
                max_tokens=self.cap,
                multiple=self.mesh.tp,
                share_prefixes=self.config.rl.share_prefixes,
            )
            microbatches += packed
            places += [names[i] for microbatch in packed for i in microbatch.sequence_ids]
        if not microbatches:
            return
        lengths = [n for microbatch in microbatches for n in microbatch.responses.lengths]
        for name in self.passes:
            found = self._pass(name, microbatches)
            pieces = np.split(found, np.cumsum(lengths)[:-1])
            for place, piece in zip(places, pieces, strict=True):
                self._known.setdefault(place, {})[name] = piece

    def _pass(self, name: str, microbatches: list[Microbatch]) -> np.ndarray:
        """[R] float32 of all of them, end to end."""
        owner(name, self.models).vision.encode_early(microbatches)
        temperature = self.config.rollout.temperature
        results = score(name, microbatches, self.models, temperature=temperature)
        return np.concatenate([result.cpu().numpy() for result in results])


def _tokens(sample: Sample) -> int:
    return len(sample.asked.expanded) + sample.tokens_so_far


def _sequence(sample: Sample) -> Sequence:
    prompt = sample.asked.expanded
    return Sequence.unsampled(
        np.concatenate([prompt, *(piece.tokens for piece in sample.pieces)]).astype(np.int64),
        response_start=len(prompt),
        images=sample.asked.prompt.images,
        name=sample.asked.prompt.id,
    )
