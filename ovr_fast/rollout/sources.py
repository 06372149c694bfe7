"""Where a step's rollouts come from: ``VLLMRollouts``, or one of ``rollout.given``.

All have one interface, ``RolloutSource``, so that a recipe does not know which it has.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from contextlib import nullcontext
from typing import Any, Protocol

from ovr_fast.config import Config
from ovr_fast.data.prompts import Mixture
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import RolloutBatch
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.pool import Asked, Pool
from ovr_fast.rollout.protocol import Piece, Sample
from ovr_fast.rollout.rewarded import reward


class RolloutSource(Protocol):
    """Gives each step its rewarded rollouts."""

    def last_step(self, planned: int) -> int:
        """The last step that there are rollouts for, of ``planned`` ones."""

    def next(self, step: int, *, max_tokens: int) -> RolloutBatch:
        """The rollouts of ``step`` (1 is the first), on rank 0; empty on other ranks. New responses
        are truncated at ``max_tokens``; recorded ones keep their lengths. A collective."""

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from here; rank 0's counts."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""


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
        self.unsent: list[Sample] = []  # rank 0's
        self.sampled_tokens, self.trained_tokens = 0, 0  # of the run

    def last_step(self, planned: int) -> int:
        """See ``RolloutSource``."""
        return planned

    def next(self, step: int, *, max_tokens: int) -> RolloutBatch:
        """See ``RolloutSource``.

        Raises:
            ServerFailed: a request was refused, or no server was left for ``patience_s``.
            TooManyFailures: too many answer checks failed to trust the rewards.
        """
        rollout = self.config.rollout
        ahead = min(1, rollout.max_staleness) if rollout.partial else rollout.max_staleness
        last = max(step, min(step + ahead, self.config.rl.steps))
        with self.clock("generate"):
            self.fleet.wake()
            for number in range(max(step, self.asked_for + 1), last + 1):
                self._ask(number, max_tokens)
            self.fleet.submit(self.unsent)
            self.unsent = []
            version, nothing = self.fleet.policy_version, list[Sample]()
            self.fleet.wait(lambda: self.pool.enough(version=version), self.pool.waiting, "rollout")
            taken = self.mesh.on_first_rank(
                lambda: sorted(self.pool.choose(version=version), key=lambda s: s.place),
                otherwise=nothing,
            )
            prompts, responses = self.fleet.responses(taken)
        with self.clock("reward"):
            rollouts = reward(responses, prompts, self.verifier, self.mesh)
        self.fleet.sleep()
        if self.mesh.rank:
            return RolloutBatch(step=step)
        self.pool.take(taken)
        counters = self._counters(taken) | self.fleet.counters()
        return RolloutBatch(step=step, prompts=prompts, rollouts=tuple(rollouts), counters=counters)

    def _ask(self, step: int, max_tokens: int, saved: dict[str, Any] | None = None) -> None:
        """Take the prompts of a step from the stream, on every rank, and make their samples."""
        rl, before = self.config.rl, self.stream.state()
        prompts = tuple(self.stream.take(rl.prompts_per_step))
        self.asked_for = step
        if self.mesh.rank:
            return
        samples = self.fleet.samples_of(
            prompts, step=step, samples=rl.samples_per_prompt, max_tokens=max_tokens
        )
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
        self.sampled_tokens += sampled
        self.trained_tokens += tokens
        return {
            "rollout/staleness": sum((version - v) * count for v, count in counts) / tokens,
            "rollout/staleness_max": float(version - min(v for v, _ in counts)),
            "rollout/sampled_tokens": float(self.sampled_tokens),
            "rollout/trained_tokens": float(self.trained_tokens),
            "rollout/kept_tokens": float(kept),
        }

    def state(self) -> dict[str, Any]:
        """See ``RolloutSource``. What is being sampled ahead stops for it, and goes on.

        Strictly on-policy only finished responses are kept: one that goes on draws other random
        numbers than one that was never interrupted."""
        ahead = self.config.rollout.max_staleness > 0
        with self.fleet.at_rest() if ahead else nullcontext():
            if self.mesh.rank == 0:
                self.sampled_tokens += self.fleet.tokens([])[0]
            asked = self.pool.asked
            stream = asked[0].before if asked else self.stream.state()
            return stream | {
                "asked": [each.saved(unfinished=ahead) for each in asked],
                "tokens": [self.sampled_tokens, self.trained_tokens],
            }

    def restore(self, state: dict[str, Any]) -> None:
        """See ``RolloutSource``. Another kind of source leaves nothing to go on from."""
        if "position" not in state:
            return
        self.stream.restore(state)
        self.sampled_tokens, self.trained_tokens = state.get("tokens", (0, 0))
        for saved in state.get("asked", ()):
            self._ask(saved["step"], saved["max_tokens"], saved)
