"""Samples to servers: fed, sent again, and moved to other servers when one fails.

Everything here runs on the client's loop; ``Fleet`` calls it from the trainer's thread.

A sample's tokens follow from its seed, its prompt and the weights alone, so one that begins anew on
another server becomes what it would have been.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import replace

from ovr_fast import stopping
from ovr_fast.config import RolloutConfig
from ovr_fast.rollout.client import Client, RequestRefused, ServerFailed
from ovr_fast.rollout.decoding import Decoding
from ovr_fast.rollout.health import WATCH_EVERY_S, Health
from ovr_fast.rollout.members import Member, State
from ovr_fast.rollout.protocol import (
    GENERATE,
    Piece,
    PromptMismatch,
    Sample,
    check_piece,
    request_body,
)
from ovr_fast.shape.model_shape import ModelShape

ATTEMPTS = 6
"""Times that a request may fail before it counts as the cause."""

DOUBTS = 3
"""Requests in a row that may fail before their server has, though it answers."""

STOP_PATIENCE_S = 5.0
"""For a server to break off its responses in a run that is to end within ``stopping.GRACE_S``."""

FULLER = 1.25
"""More responses are sent than fit into a server's keys and values on average, so that its own
queue is never empty; what does not fit waits there."""


class OtherWeights(ServerFailed):
    """A server sampled from other weights than it was given."""


class Sampler:
    """Gives samples to the members of a fleet.

    Args:
        client: HTTP to them.
        health: of them.
        decoding: of their answers.
        rollout: settings of sampling.
        shape: of the model.
    """

    def __init__(
        self,
        client: Client,
        health: Health,
        *,
        decoding: Decoding,
        rollout: RolloutConfig,
        shape: ModelShape,
    ) -> None:
        self.client, self.health, self.decoding = client, health, decoding
        self.rollout, self.shape, self.members = rollout, shape, health.members
        health.on_lost = self._move
        self.groups: deque[list[Sample]] = deque()  # of prompts that no server has yet
        self.on_done: Callable[[Sample], None] = lambda sample: None
        self.version = 0  # of the weights that the members serve
        self._tokens = 0  # of responses, but those of evaluations, since they were asked for
        self._retries = 0
        self._counted = time.monotonic()
        self._mean_tokens: float | None = None  # of a finished sample, prompt included
        self._requests: dict[Sample, asyncio.Task[None]] = {}

    async def submit(self, samples: List[Sample], *, first: bool) -> None:
        """Sample these: ``first``, or after those that wait already."""
        by_prompt: dict[int, list[Sample]] = {}
        for sample in samples:
            by_prompt.setdefault(id(sample.asked), []).append(sample)
        groups = by_prompt.values()
        self.groups = deque([*groups, *self.groups] if first else [*self.groups, *groups])
        self._feed()

    async def until(self, done: Callable[[], bool], *, can_give: bool) -> list[Member]:
        """Wait until ``done``, or until members lack the weights (``Health.behind``).

        Args:
            can_give: whether the caller has weights to give.

        Returns:
            the members that need weights before it goes on; none where it is done.

        Raises:
            ServerFailed: a request was refused, or no server was left for ``patience_s``.
            Stopped: the run was asked to end.
        """
        while True:
            stopping.check(together=True)
            if self.health.failure is not None:
                raise self.health.failure
            if done():
                return []
            if can_give and (behind := self.health.behind()):
                return behind
            self.health.check_patience()
            self.health.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.health.changed.wait(), WATCH_EVERY_S)

    async def serve(self, members: List[Member]) -> None:
        """These have the fleet's weights now."""
        for member in members:
            if member.state is State.READY:
                member.state = State.SERVING
            member.moved = time.monotonic()
        self._feed()

    async def ask_all(self, sample: Sample, members: List[Member], version: int) -> list[Piece]:
        """The same sample from each of these, whatever else they do, with no probability left out:
        the trainer's log-probs have none.

        Args:
            version: of the weights that they have been given.

        Raises:
            ServerFailed: one did not answer.
        """
        sample.request_id = f"{sample.name}-{uuid.uuid4().hex}"
        rollout = replace(self.rollout, top_p=1.0, stop=())

        async def one(member: Member) -> Piece:
            try:
                limit = self.rollout.sync_timeout_s
                return await self._ask(sample, member, rollout, version, timeout_s=limit)
            except (RequestRefused, PromptMismatch):
                raise
            except ServerFailed as error:
                self.health.lost(member, str(error))
                raise

        return await asyncio.gather(*(one(member) for member in members))

    async def release(self) -> None:
        """Send again."""
        self.health.paused = False
        for member in self.members:
            member.moved = time.monotonic()
        self._feed()

    async def suspend(self) -> None:
        """Break off what is being sampled; each sample keeps its tokens and waits at the front."""
        limit = self.rollout.probe_timeout_s
        if stopping.asked_now():  # a server that hangs must not cost the checkpoint of a stop
            limit = min(limit, STOP_PATIENCE_S)
        self.health.paused, deadline = True, time.monotonic() + limit
        while self._requests:
            stopping.check(together=True)
            for member in self.members:
                if member.live and time.monotonic() > deadline:
                    self.health.lost(member, "its responses could not be broken off")
                elif member.state is State.SERVING and member.live:
                    names = [f"generate-tokens-{s.request_id}" for s in member.live]
                    try:
                        await self.client.ask(
                            member.address, "POST", "abort_requests", {"request_ids": names},
                            timeout_s=limit,
                        )  # fmt: skip
                    except ServerFailed as error:
                        self.health.lost(member, str(error))
            # A request that had not reached the engine when it aborted is there now.
            if running := [*self._requests.values()]:
                await asyncio.wait(running, timeout=WATCH_EVERY_S)

    async def tokens(self, waiting: List[Sample]) -> tuple[int, int]:
        """Response tokens, but those of evaluations, since the last call; and those that samples
        ``waiting`` have."""
        tokens, self._tokens = self._tokens, 0
        return tokens, sum(sample.tokens_so_far for sample in waiting)

    async def counters(self) -> dict[str, float]:
        """Since the last call: servers started anew, requests sent again, seconds without a server,
        and the share of time in which a server had nothing to do."""
        now = time.monotonic()
        busy = sum(member.read_busy(now) for member in self.members)
        restarts, lost_s = self.health.read_counters()
        counters = {
            "servers/idle": 1.0 - busy / max(1e-9, (now - self._counted) * len(self.members)),
            "servers/restarts": float(restarts),
            "servers/retries": float(self._retries),
            "servers/lost_s": lost_s,
        }
        self._retries, self._counted = 0, now
        return counters

    def _room(self, member: Member) -> int:
        """Requests that a member may have at a time: what fits into its keys and values, by the
        mean length of finished samples and, before there are any, by half of the longest."""
        most = self.rollout.max_in_flight
        if member.kv_tokens is None:
            return most
        tokens = self._mean_tokens
        if tokens is None:
            waiting = [s for group in self.groups for s in group[:1]] or [*member.live]
            if not waiting:
                return most
            tokens = max(len(s.asked.expanded) + s.max_tokens / 2 for s in waiting[:8])
        return max(1, min(most, int(FULLER * member.kv_tokens / tokens)))

    def _feed(self) -> None:
        """Send what fits."""
        if self.health.paused or self.health.failure is not None:
            return
        serving = [m for m in self.members if m.state is State.SERVING]
        room = {member: self._room(member) - len(member.live) for member in serving}
        while True:
            able = [m for m in serving if room[m] > 0]
            if not able:
                return
            member = min(able, key=lambda m: (len(m.live) + len(m.pending), m.number))
            if ready := [m for m in able if m.pending]:
                member = ready[0]
            elif self.groups:
                # The samples of a prompt share a server's cached prefix and image.
                member.pending.extend(self.groups.popleft())
            else:  # help a server that has more than it can take
                busy = max(serving, key=lambda m: len(m.pending))
                if not busy.pending:
                    return
                member.pending.append(busy.pending.pop())
            self._send(member.pending.popleft(), member)
            room[member] -= 1

    def _send(self, sample: Sample, member: Member) -> None:
        if not member.live:
            member.moved = member.busy_since = time.monotonic()
        member.live.add(sample)
        if not sample.pieces:
            sample.begun = self.version
        sample.request_id = f"{sample.name}-{sample.tokens_so_far}-{sample.attempts}"
        self._requests[sample] = self.health.spawn(self._request(sample, member))

    async def _request(self, sample: Sample, member: Member) -> None:
        try:
            piece = await self._ask(sample, member, self.rollout, self.version, timeout_s=None)
        except (RequestRefused, PromptMismatch) as error:
            self._leave(sample, member)
            self.health.fail(error)
        except OtherWeights as error:
            self.health.lost(member, str(error))
        except ServerFailed as error:
            await self._doubt(sample, member, str(error))
        except Exception as error:
            self._leave(sample, member)
            self.health.fail(error)
        else:
            if piece.finish_reason == "abort" and not self.health.paused:
                await self._doubt(sample, member, "it broke off a response")
                return
            member.doubts = member.starts_without_response = 0
            self._leave(sample, member)
            if len(piece.tokens):
                sample.attempts = 0  # it can be answered
                sample.pieces.append(piece)
                self._tokens += len(piece.tokens) if sample.step else 0
            if sample.done:
                tokens = len(sample.asked.expanded) + sample.tokens_so_far
                mean = self._mean_tokens
                self._mean_tokens = tokens if mean is None else mean + (tokens - mean) / 64
                self.on_done(sample)
            else:
                self.groups.appendleft([sample])
            self.health.changed.set()
            self._feed()

    async def _doubt(self, sample: Sample, member: Member, why: str) -> None:
        """A request has failed: it is sent again, and the server has failed too if it does not
        answer, or at the third such request in a row."""
        member.doubts += 1
        if member.doubts < DOUBTS:
            try:
                limit = self.rollout.probe_timeout_s
                await self.client.fetch(member.address, "GET", "health", timeout_s=limit)
            except ServerFailed as error:
                why = f"{why}; {error}"
            else:
                self._leave(sample, member)
                member.why = why
                self._again([sample], member)
                self._feed()
                return
        self.health.lost(member, why)

    async def _ask(
        self,
        sample: Sample,
        member: Member,
        rollout: RolloutConfig,
        version: int,
        *,
        timeout_s: float | None,
    ) -> Piece:
        body = request_body(sample, rollout, self.shape)
        content = await self.client.fetch(
            member.address, "POST", GENERATE, body, timeout_s=timeout_s, again=False
        )
        try:
            piece = await self.decoding.piece(content)
        except ValueError as error:
            raise RequestRefused(
                f"{member.name}: the answer for prompt {sample.asked.prompt.id} is not one of "
                f"vLLM's generate route ({error}): {content[:200]!r}"
            ) from error
        check_piece(sample, piece, self.shape)
        for span in piece.versions:
            if span.version != version:  # somebody has started it anew, or given it other weights
                raise OtherWeights(
                    f"it sampled from the weights of step {span.version}, and has been given those "
                    f"of step {version}"
                )
        return piece

    def _leave(self, sample: Sample, member: Member) -> None:
        member.live.discard(sample)
        if not member.live:
            member.rest(time.monotonic())
        self._requests.pop(sample, None)

    def _again(self, samples: List[Sample], member: Member) -> None:
        """Requests that failed wait before the others, unless they are the cause."""
        for sample in samples:
            sample.attempts += 1
            self._retries += 1
            if sample.attempts >= ATTEMPTS:
                self.health.fail(
                    ServerFailed(
                        f"the request for prompt {sample.asked.prompt.id} has failed {ATTEMPTS} "
                        f"times, the last time by {member.name}: {member.why}"
                    )
                )
        self._put_first(samples)

    def _put_first(self, samples: Iterable[Sample]) -> None:
        by_prompt: dict[int, list[Sample]] = {}
        for sample in sorted(samples, key=lambda sample: sample.place):
            by_prompt.setdefault(id(sample.asked), []).append(sample)
        self.groups.extendleft(reversed(by_prompt.values()))

    def _move(self, member: Member) -> int:
        """A member has failed: what it had goes to others; how many responses that are."""
        moved, pending = [*member.live], [*member.pending]
        for sample in moved:
            task = self._requests.get(sample)
            self._leave(sample, member)
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        member.pending.clear()
        self._again(moved, member)
        self._put_first(pending)
        self._feed()
        return len(moved) + len(pending)

    async def stop(self) -> None:
        """End watching and what is being sampled."""
        self.health.paused = True
        self.health.stop()
        await self.decoding.close()
