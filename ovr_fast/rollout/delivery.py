"""Weights to some members of a fleet: the transfer group, the canary, and who has failed meanwhile.

Every method is a collective of all ranks; rank 0 alone speaks to servers.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ovr_fast.config import FROZEN_PARTS, RolloutConfig
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Microbatch
from ovr_fast.rollout.canary import Canary, gap
from ovr_fast.rollout.client import Client, ServerFailed, ServerSilent
from ovr_fast.rollout.members import Member, State
from ovr_fast.rollout.placement import Placement
from ovr_fast.rollout.protocol import Piece
from ovr_fast.rollout.sampler import Sampler

if TYPE_CHECKING:
    from ovr_fast.rollout.weight_sync import WeightSync

Keys = tuple[tuple[int, int], ...]
"""Of some members: number and life of each (``Member.key``)."""


class SyncableModel(Protocol):
    """A model whose weights servers can be given: a learner, or a reference."""

    @property
    def model(self) -> Qwen25VLStage:
        """This rank's pipeline stage."""

    @property
    def vision(self) -> VisionEncoder:
        """Of its images."""

    def on_device(self, *, weights_only: bool) -> AbstractContextManager[None]:
        """Inside, the weights are on the device."""

    def logprobs(self, microbatches: List[Microbatch], *, temperature: float) -> list[Tensor]:
        """Log-probs [R] fp32 nats of the response tokens of each microbatch."""


def keys_of(members: List[Member]) -> Keys:
    """Of the processes that these are now."""
    return tuple(member.key for member in members)


class Delivery:
    """Gives members weights and knows that they have them.

    Args:
        rollout: settings.
        mesh: this rank's position and groups.
        placement: of trainer and servers.
        canary: that is sampled after each delivery.
        client: HTTP to the servers; rank 0's, as the next two.
        sampler: that members serve.
        members: of the fleet.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        *,
        mesh: Mesh,
        placement: Placement,
        canary: Canary,
        client: Client | None,
        sampler: Sampler | None,
        members: List[Member],
    ) -> None:
        self.rollout, self.mesh, self.placement = rollout, mesh, placement
        self.canary, self.members = canary, members
        self._client, self._sampler = client, sampler
        self.version = 0  # of the last weights: RL steps
        self._sync: WeightSync | None = None
        self._group: Keys = ()  # the members of its transfer group
        self._unchecked: Keys = ()  # sleepers that have weights, and no canary yet
        self._canary_answers: list[tuple[str, Piece]] = []  # who has sampled the canary, and what

    @property
    def client(self) -> Client:
        """Rank 0's."""
        assert self._client is not None
        return self._client

    @property
    def sampler(self) -> Sampler:
        """Rank 0's."""
        assert self._sampler is not None
        return self._sampler

    def forget_group(self) -> None:
        """The next delivery makes a new transfer group."""
        self._sync, self._group = None, ()

    def give(self, learner: SyncableModel, keys: Keys) -> bool:
        """Load weights into some members; False where one failed, which is then left out. A
        collective.

        Raises:
            ServerFailed: a server that works refused them.
        """
        every, fresh = self.rollout.verify_weights_every, self._group != keys
        failure = self._meet(keys) if fresh else None
        if self._group == keys and self._sync is not None:
            with learner.on_device(weights_only=True):
                failure = self._sync.sync(
                    learner.model,
                    version=self.version,
                    skip_parts=FROZEN_PARTS[learner.model.train_vision],
                    verify=every > 0 and (fresh or self.version % every == 0),
                )
                if self.mesh.broadcast_object(failure is None):
                    failure = self._check_weights(learner, keys)
        served = False
        try:
            served = self.mesh.from_first_rank(lambda: self.settle(keys, failure))
        finally:
            if not served:
                self.forget_group()  # it has a hole
        return served

    def _check_weights(self, learner: SyncableModel, keys: Keys) -> ServerFailed | None:
        """The canary of some members; on rank 0 which of them failed. A collective.

        Servers that sleep while the trainer works have room for keys and values when it has gone,
        and then it cannot score: ``sample_canary`` has them sample it when they wake, before
        anything else, and ``score_canary`` scores it before anything that they sampled is learned
        from.

        Raises:
            StaleWeights: a member does not sample from the weights.
        """
        if self.placement.sleeps:
            self._unchecked = keys
            return None
        failure = self._ask(keys)
        if failure is None:
            self.score_canary(learner)
        return failure

    def sample_canary(self) -> None:
        """Members that have been asleep since they got their weights sample the canary. A
        collective.

        Raises:
            ServerFailed: one refused, and works.
        """
        keys, self._unchecked = self._unchecked, ()

        def serving() -> Keys:
            return keys_of([m for m in self.members if m.state is State.SERVING and m.key in keys])

        while keys and (failure := self._ask(keys)) is not None:
            left = self.mesh.from_first_rank(serving)
            if left == keys:
                raise failure
            keys = left

    def _ask(self, keys: Keys) -> ServerFailed | None:
        """Have members sample the canary; on every rank why one did not. A collective."""

        def ask() -> list[tuple[str, Piece]] | ServerFailed:
            members = [self.members[n] for n, _ in keys]
            try:
                asked = self.sampler.ask_all(self.canary.sample(), members, self.version)
                pieces = self.client.run(asked)
            except ServerFailed as error:
                return error
            return [(m.name, piece) for m, piece in zip(members, pieces, strict=True)]

        found = self.mesh.from_first_rank(ask)
        if isinstance(found, ServerFailed):
            return found
        self._canary_answers += found  # after those of servers that have died since
        return None

    def score_canary(self, learner: SyncableModel) -> None:
        """Score the canaries that were sampled. A collective.

        Raises:
            StaleWeights: a member does not sample from the weights.
        """
        answers, self._canary_answers = self._canary_answers, []
        if not answers:
            return
        batches = self.canary.pack([piece for _, piece in answers], self.mesh)
        with learner.vision.uncounted():
            logprobs = learner.logprobs(batches, temperature=self.rollout.temperature)

        def judge() -> None:
            gaps = [gap(batch, found) for batch, found in zip(batches, logprobs, strict=True)]
            named = [(name, value) for (name, _), value in zip(answers, gaps, strict=True)]
            self.canary.judge(named, version=self.version)

        self.mesh.on_first_rank(judge, otherwise=None)

    def _meet(self, keys: Keys) -> ServerFailed | None:
        """Make the transfer group of the trainer and these members; on rank 0 why not. A
        collective."""
        from ovr_fast.rollout.weight_sync import WeightSync

        self.forget_group()  # first: a server is in one group at a time
        first, rollout, failure = self.mesh.rank == 0, self.rollout, None
        try:
            self._sync = WeightSync(
                self.mesh,
                client=self.client if first else None,
                addresses=tuple(self.members[n].address for n, _ in keys) if first else (),
                workers=rollout.tensor,
                address=rollout.transfer_address,
                port=rollout.transfer_port,
                backend=self.placement.transfer_backend,
                timeout_s=rollout.sync_timeout_s,
                lost=lambda: self._lost(keys),
            )
        except RuntimeError as error:
            if not first:
                raise
            where = (
                ""
                if self.placement.transfer_backend == "ipc"
                else f" at {rollout.transfer_address} (rollout.transfer_address, "
                "rollout.transfer_port)"
            )
            failure = ServerFailed(f"the servers did not join the trainer{where}: {error}")
        if self.mesh.broadcast_object(failure is None):
            self._group = keys
        return failure

    def _lost(self, keys: Keys) -> str:
        """Which of some members has failed, and why; "" where none has."""
        for member, key in ((self.members[key[0]], key) for key in keys):
            if member.state is State.FAILED or member.key != key:  # it is being started anew
                return f"{member.name} failed: {member.why}"
        return ""

    def settle(self, keys: Keys, failure: ServerFailed | None) -> bool:
        """After a sync, on rank 0: these members serve, or one of them has failed.

        Raises:
            ServerFailed: ``failure``, where every member still answers.
        """
        members = [self.members[number] for number, _ in keys]
        if failure is not None and self._sync is not None:
            self._sync.close()
        lost, health = False, self.sampler.health
        if failure is not None:
            # Under NCCL those that work may sit in a broadcast that nobody ends. A server that was
            # silent to the end of the time was not in one: ``_deadline`` ends the process there.
            hear = self.placement.transfer_backend != "nccl" or isinstance(failure, ServerSilent)
            lost = self.client.run(health.find_lost(members, hear=hear))
        if lost or keys_of(members) != keys:
            if failure is not None:
                health.say(f"a weight sync failed ({failure}); it is made again with the others")
            return False
        if failure is not None:
            raise failure
        self.client.run(self.sampler.serve(members))
        return True
