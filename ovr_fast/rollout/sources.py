"""Where a step's rollouts come from: ``VLLMRollouts``, or one of ``rollout.given``.

All have one interface, ``RolloutSource``, so that a recipe does not know which it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ovr_fast import stopping
from ovr_fast.config import Config, RLConfig
from ovr_fast.data.prompts import Mixture
from ovr_fast.errors import OVRFastError
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Prompt, Rollout, RolloutBatch
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.pool import Asked, Pool
from ovr_fast.rollout.protocol import Piece, Sample
from ovr_fast.rollout.rewarded import reward
from ovr_fast.stopping import Stopped


class Scoring(Protocol):
    """What a trainer computes of finished responses while others are being sampled."""

    def wants(self, samples: List[Sample]) -> bool:
        """Whether enough of a step's samples are finished for a turn. On rank 0, on the client's
        loop."""

    def turn(self, samples: List[Sample]) -> None:
        """Score what is finished of a step's samples; rank 0 has them. A collective."""

    def finish(self, samples: List[Sample]) -> list[dict[str, np.ndarray]]:
        """Score the rest; what is known of each sample (``Sequence.known``), on rank 0. A
        collective."""

    def hidden_s(self) -> float:
        """Seconds of ``turn`` since the last call."""


class RolloutSource(Protocol):
    """Gives each step its rewarded rollouts."""

    def last_step(self, planned: int) -> int:
        """The last step that there are rollouts for, of ``planned`` ones."""

    def next(self, step: int, *, max_tokens: int, scoring: Scoring | None = None) -> RolloutBatch:
        """The rollouts of ``step`` (1 is the first), on rank 0; empty on other ranks. New responses
        are truncated at ``max_tokens``, and scored while others are sampled; recorded ones keep
        their lengths, and wait. A collective."""

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from here; rank 0's counts."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""


class NothingToLearn(OVRFastError, RuntimeError):
    """Hardly a prompt has responses that differ in reward."""


@dataclass(slots=True)
class Mixed:
    """The prompts of a step whose responses differ in reward, and what was sampled for them."""

    asked: int = 0  # prompts
    found: int = 0  # of them, that differ
    rewards: float = 0.0  # sum over all responses
    responses: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)  # of the rollouts

    def add(
        self, samples: List[Sample], prompts: tuple[Prompt, ...], rollouts: List[Rollout]
    ) -> None:
        """Keep those that differ."""
        by_prompt: dict[int, list[tuple[Sample, Rollout]]] = {}
        for sample, rollout in zip(samples, rollouts, strict=True):
            by_prompt.setdefault(rollout.prompt_index, []).append((sample, rollout))
            self.rewards += rollout.reward
            self.responses += 1
        for index, pairs in by_prompt.items():
            if len({rollout.reward for _, rollout in pairs}) > 1:
                self.found += 1
                for sample, rollout in pairs:
                    self.samples.append(sample)
                    self.rollouts.append(replace(rollout, prompt_index=len(self.prompts)))
                self.prompts.append(prompts[index])

    def missing(self, rl: RLConfig) -> int:
        """How many more prompts to sample; the surplus is dropped.

        Raises:
            NothingToLearn: ``rl.refill_most`` steps' worth were sampled already.
        """
        short = rl.prompts_per_step - len(self.prompts)
        if short <= 0:
            self.prompts = self.prompts[: rl.prompts_per_step]
            count = rl.prompts_per_step * rl.samples_per_prompt
            self.rollouts, self.samples = self.rollouts[:count], self.samples[:count]
            return 0
        room = rl.refill_most * rl.prompts_per_step - self.asked
        if room <= 0:
            raise NothingToLearn(
                f"of {self.asked:,} prompts {self.found:,} have responses that differ in reward, "
                f"and a step wants {rl.prompts_per_step:,}: the policy solves all or nothing. Take "
                "other data, raise rl.refill_most, or set rl.refill=false"
            )
        share = max(self.found, 1) / self.asked
        return min(math.ceil(short / share), rl.prompts_per_step, room)

    def counters(self) -> dict[str, float]:
        """Metrics."""
        return {
            "rollout/refill_prompts": float(self.asked),
            "rollout/refill_mixed": self.found / self.asked,
            "rollout/refill_reward": self.rewards / self.responses,
        }


@dataclass(slots=True)
class TokenCounts:
    """What became of the response tokens that servers have given in a run; the rest waits."""

    sampled: int = 0  # all of them
    trained: int = 0
    dropped_refill: int = 0  # of prompts that ``rl.refill`` left out
    dropped_stop: int = 0  # of responses that a stop broke off

    def end_of_filling(self) -> None:
        """A stop breaks off a step that was being filled: all of it that was sampled."""
        self.dropped_stop = self.sampled - self.trained - self.dropped_refill

    def counters(self) -> dict[str, float]:
        """Metrics."""
        return {f"rollout/{name}_tokens": float(count) for name, count in asdict(self).items()}


class VLLMRollouts:
    """Sampled by the fleet, rewarded by the verifier; servers on the trainer's own GPUs then sleep.

    With ``rollout.max_staleness`` k the prompts of the next k steps are sampled meanwhile. With
    ``rollout.partial`` those of the next step are, and a step takes the responses that are
    finished, whatever step asked for them; it waits for those alone that would become more than k
    steps old before later steps have room for them. Nothing is dropped.

    Args:
        config: all settings.
        stream: the prompts.
        fleet: vLLM servers.
        verifier: of the answers.
        mesh: this rank's position and groups.
        clock: gets the phases "generate" and "reward".
    """

    def __init__(
        self,
        config: Config,
        *,
        stream: Mixture,
        fleet: Fleet,
        verifier: Verifier,
        mesh: Mesh,
        clock: Clock,
    ) -> None:
        self.config, self.stream, self.fleet = config, stream, fleet
        self.verifier, self.mesh, self.clock = verifier, mesh, clock
        rl, rollout = config.rl, config.rollout
        self.pool = Pool(
            wanted=rl.prompts_per_step * rl.samples_per_prompt,
            max_staleness=rollout.max_staleness,
            partial=rollout.partial,
        )  # rank 0's
        self.asked_for = 0  # the last step that was asked for
        self.refilling: dict[str, Any] | None = None  # where the stream was before that step
        self.unsent: list[Sample] = []  # rank 0's
        self.counts = TokenCounts()  # rank 0's

    def last_step(self, planned: int) -> int:
        """See ``RolloutSource``."""
        return planned

    def next(self, step: int, *, max_tokens: int, scoring: Scoring | None = None) -> RolloutBatch:
        """See ``RolloutSource``.

        Raises:
            ServerFailed: a request was refused, or no server was left for ``patience_s``.
            TooManyFailures: too many answer checks failed to trust the rewards.
            NothingToLearn: with ``rl.refill``, too few prompts have responses that differ.
        """
        with self._asleep_after():
            taken, prompts, rollouts, more = self._sampled(step, max_tokens, scoring)
        if self.mesh.rank:
            return RolloutBatch(step=step)
        self.pool.take(taken)
        counters = self._counters(taken) | self.fleet.counters() | more
        if scoring is not None:
            counters["time/hidden_s"] = scoring.hidden_s()
        return RolloutBatch(step=step, prompts=prompts, rollouts=tuple(rollouts), counters=counters)

    @contextmanager
    def _asleep_after(self) -> Iterator[None]:
        """Colocated servers sleep after it, in a run that is asked to end too: its checkpoint needs
        their memory, and keeps nothing from weights that the canary has not proven."""
        try:
            try:
                yield
                self.fleet.sleep()
            except Stopped as stopped:
                if stopped.together and self.fleet.ready:
                    with stopping.not_inside():
                        self.fleet.sleep()
                raise
        except Stopped:
            raise
        except OVRFastError as error:
            if self.fleet.placement.sleeps:  # servers may be awake, and have sampled from anything
                error.together = False
            raise

    def _sampled(
        self, step: int, max_tokens: int, scoring: Scoring | None
    ) -> tuple[list[Sample], tuple[Prompt, ...], list[Rollout], dict[str, float]]:
        """What a step takes, rewarded and scored, with metrics; on rank 0. A collective."""
        if self.config.rl.refill:
            return self._until_full(step, max_tokens, scoring)
        rollout = self.config.rollout
        ahead = min(1, rollout.max_staleness) if rollout.partial else rollout.max_staleness
        last = max(step, min(step + ahead, self.config.rl.steps))

        def ask() -> None:
            self.fleet.wake()
            for number in range(max(step, self.asked_for + 1), last + 1):
                self._ask(number, max_tokens)

        return *self._finished(ask, scoring), {}

    def _finished(
        self, ask: Callable[[], None], scoring: Scoring | None
    ) -> tuple[list[Sample], tuple[Prompt, ...], list[Rollout]]:
        """``ask``, and sample what was asked for until the step has enough; what it takes,
        rewarded and scored. On rank 0; nothing elsewhere. A collective."""
        with self.clock("generate"):
            ask()
            self.fleet.submit(self.unsent)
            self.unsent = []
            version, nothing = self.fleet.policy_version, list[Sample]()
            self._wait(lambda: self.pool.enough(version=version), scoring)
            taken = self.mesh.on_first_rank(
                lambda: sorted(self.pool.choose(version=version), key=lambda s: s.place),
                otherwise=nothing,
            )
            prompts, responses = self.fleet.responses(taken)
        with self.clock("reward"):
            rollouts = reward(responses, prompts, self.verifier, self.mesh)
        if scoring is not None:
            with self.clock("targets"):
                known = scoring.finish(taken)
            rollouts = [replace(r, known=k) for r, k in zip(rollouts, known, strict=True)]
        return taken, prompts, rollouts

    def _wait(self, enough: Callable[[], bool], scoring: Scoring | None) -> None:
        """Until the step has ``enough``; what is finished is scored meanwhile. A collective."""

        def own() -> list[Sample]:
            return self.pool.asked[0].waiting if self.mesh.rank == 0 else []

        def stop() -> bool:
            return enough() or (scoring is not None and scoring.wants(own()))

        while True:
            self.fleet.wait(stop, self.pool.waiting, "rollout")
            if scoring is None or self.mesh.from_first_rank(enough):
                return
            scoring.turn(own())

    def _until_full(
        self, step: int, max_tokens: int, scoring: Scoring | None
    ) -> tuple[list[Sample], tuple[Prompt, ...], list[Rollout], dict[str, float]]:
        """A step of prompts whose responses differ in reward: what is missing is sampled again and
        again, a little more than it by the share that differed so far; the first ones count. With
        metrics of what was sampled. On rank 0; nothing elsewhere. A collective."""
        rl, kept = self.config.rl, Mixed()
        count, self.refilling, sampled = rl.prompts_per_step, self.stream.state(), 0

        def ask() -> None:
            if not kept.asked:
                self.fleet.wake()
            self._ask(step, max_tokens, count=count, first=kept.asked)

        while count:
            taken, prompts, rollouts = self._finished(ask, scoring)
            self.pool.take(taken)
            sampled += _tokens(taken)
            kept.asked += count
            kept.add(taken, prompts, rollouts)
            count = self.mesh.from_first_rank(lambda: kept.missing(rl))
        self.refilling = None
        self.counts.dropped_refill += sampled - _tokens(kept.samples)
        more = {} if self.mesh.rank else kept.counters()
        return kept.samples, tuple(kept.prompts), kept.rollouts, more

    def _ask(
        self, step: int, max_tokens: int, saved: dict[str, Any] | None = None, *, count: int = 0,
        first: int = 0,
    ) -> None:  # fmt: skip
        """Take prompts from the stream, on every rank, and make their samples.

        Args:
            saved: of a checkpoint.
            count: of prompts; 0: a step's.
            first: the number of the first of them in its step.
        """
        rl, before = self.config.rl, self.stream.state()
        count = count or rl.prompts_per_step
        prompts = tuple(self.stream.take(count))
        self.asked_for = step
        if self.mesh.rank:
            return
        samples = self.fleet.samples_of(
            prompts, step=step, samples=rl.samples_per_prompt, max_tokens=max_tokens, first=first
        )
        self.pool.wanted = count * rl.samples_per_prompt
        waiting = list(samples)
        if saved is not None:
            for sample, pieces in zip(samples, saved["pieces"], strict=True):
                sample.pieces = [Piece.restored(piece) for piece in pieces]
                sample.begun = sample.spans()[0].version if pieces else None
            waiting = [samples[place] for place in saved["waiting"]]
        self.pool.asked.append(
            Asked(step=step, max_tokens=max_tokens, before=before, all=samples, waiting=waiting)
        )
        self.unsent += [sample for sample in waiting if not sample.done]

    def _counters(self, taken: List[Sample]) -> dict[str, float]:
        """Ages of what was taken, and where all sampled tokens are."""
        version = self.fleet.policy_version
        counts = [item for sample in taken for item in sample.tokens_by_version()]
        tokens = sum(count for _, count in counts)
        sampled, kept = self.fleet.tokens(self.pool.waiting)
        self.counts.sampled += sampled
        self.counts.trained += tokens
        return {
            "rollout/staleness": sum((version - v) * count for v, count in counts) / tokens,
            "rollout/staleness_max": float(version - min(v for v, _ in counts)),
            "rollout/kept_tokens": float(kept),
            **self.counts.counters(),
        }

    def state(self) -> dict[str, Any]:
        """See ``RolloutSource``. What is being sampled ahead stops for it, and goes on.

        Strictly on-policy only finished responses are kept: one that goes on draws other random
        numbers than one that was never interrupted. A step that was being filled begins anew: which
        prompts it samples follows from those before them."""
        if self.refilling is not None:
            if self.mesh.rank == 0:
                self.counts.sampled += self.fleet.tokens([])[0]
                self.counts.end_of_filling()
            return self.refilling | {"asked": []} | self._history()
        ahead = self.config.rollout.max_staleness > 0
        with self.fleet.at_rest():
            if self.mesh.rank == 0:
                self.counts.sampled += self.fleet.tokens([])[0]
                if not ahead:
                    broken = [sample for sample in self.pool.waiting if not sample.done]
                    self.counts.dropped_stop += _tokens(broken)
            asked = self.pool.asked
            stream = asked[0].before if asked else self.stream.state()
            saved = [each.saved(unfinished=ahead) for each in asked]
            return stream | {"asked": saved} | self._history()

    def _history(self) -> dict[str, Any]:
        """Of the run, not of its next step."""
        return {"tokens": asdict(self.counts), "canary": self.fleet.canary.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See ``RolloutSource``. Another kind of source leaves nothing to go on from."""
        if "position" not in state:
            return
        self.stream.restore(state)
        self.counts = TokenCounts(**state.get("tokens", {}))
        self.fleet.canary.restore(state.get("canary", {}))
        for saved in state.get("asked", ()):
            self._ask(saved["step"], saved["max_tokens"], saved)


def _tokens(samples: Iterable[Sample]) -> int:
    return sum(sample.tokens_so_far for sample in samples)
