"""Samples to servers: fed, watched, and moved to other servers when one fails.

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
from ovr_fast.rollout.members import Counters, Member, State
from ovr_fast.rollout.protocol import (
    GENERATE,
    Piece,
    PromptMismatch,
    Sample,
    check_piece,
    request_body,
)
from ovr_fast.shape.model_shape import ModelShape

WATCH_EVERY_S = 0.5
"""Between two looks at a server's process."""

PROBE_EVERY_S = 2.0
"""Between two questions to a server for its counters."""

ATTEMPTS = 6
"""Times that a request may fail before it counts as the cause."""

DOUBTS = 3
"""Requests in a row that may fail before their server has, though it answers."""

FULLER = 1.25
"""More responses are sent than fit into a server's keys and values on average, so that its own
queue is never empty; what does not fit waits there."""


class Sampler:
    """Gives samples to the members of a fleet.

    Args:
        client: HTTP to them.
        members: all, whatever their state.
        decoding: of their answers.
        rollout: settings of sampling, limits and patience.
        shape: of the model.
        sleeps: the servers share the trainer's GPUs.
        say: prints a line.
    """

    def __init__(
        self,
        client: Client,
        members: List[Member],
        *,
        decoding: Decoding,
        rollout: RolloutConfig,
        shape: ModelShape,
        sleeps: bool,
        say: Callable[[str], None],
    ) -> None:
        self.client, self.members, self.decoding = client, members, decoding
        self.rollout, self.shape, self.sleeps, self.say = rollout, shape, sleeps, say
        self.groups: deque[list[Sample]] = deque()  # of prompts that no server has yet
        self.on_done: Callable[[Sample], None] = lambda sample: None
        self.failure: Exception | None = None  # ends the run
        self.held = False  # nothing new is sent: the servers sleep, or their weights change
        self.version = 0  # of the weights that the members serve
        self._tokens = 0  # of responses, but those of evaluations, since they were asked for
        self._restarts, self._retries, self._lost_s = 0, 0, 0.0
        self._counted = time.monotonic()
        self._mean_tokens: float | None = None  # of a finished sample, prompt included
        self._requests: dict[Sample, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._none_since: float | None = None

    async def watch_all(self) -> None:
        """Begin to watch the members."""
        for member in self.members:
            self._spawn(self._watch(member))

    async def submit(self, samples: List[Sample], *, first: bool) -> None:
        """Sample these: ``first``, or after those that wait already."""
        by_prompt: dict[int, list[Sample]] = {}
        for sample in samples:
            by_prompt.setdefault(id(sample.asked), []).append(sample)
        groups = by_prompt.values()
        self.groups = deque([*groups, *self.groups] if first else [*self.groups, *groups])
        self._feed()

    async def until(self, done: Callable[[], bool], *, can_give: bool) -> list[Member]:
        """Wait until ``done``, or until a member answers that lacks the weights.

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
            if self.failure is not None:
                raise self.failure
            if done():
                return []
            if can_give and (behind := [m for m in self.members if m.state is State.READY]):
                return behind
            self._check_patience()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_EVERY_S)

    async def present(self) -> list[Member]:
        """The members that answer; waits for one, with patience.

        Raises:
            ServerFailed: none was left for ``patience_s``.
        """
        while not (found := [m for m in self.members if m.state in (State.READY, State.SERVING)]):
            if self.failure is not None:
                raise self.failure
            self._check_patience()
            await asyncio.sleep(WATCH_EVERY_S)
        return found

    async def serve(self, members: List[Member]) -> None:
        """These have the fleet's weights now."""
        for member in members:
            if member.state is State.READY:
                member.state = State.SERVING
            member.moved = time.monotonic()
        self._feed()

    async def find_lost(self, members: List[Member]) -> bool:
        """Whether one of these has failed, now or since it was looked at last."""
        for member in members:
            if member.state is State.FAILED:
                continue
            try:
                if member.server is not None:
                    member.server.check_alive()
                await self.client.fetch(member.address, "GET", "health", timeout_s=15.0)
            except ServerFailed as error:
                self.lost(member, str(error))
        return any(m.state not in (State.READY, State.SERVING) for m in members)

    async def ask_all(self, sample: Sample, members: List[Member]) -> list[Piece]:
        """The same sample from each of these, whatever else they do, with no probability left out:
        the trainer's log-probs have none.

        Raises:
            ServerFailed: one did not answer.
        """
        sample.request_id = f"{sample.name}-{uuid.uuid4().hex}"
        rollout = replace(self.rollout, top_p=1.0, stop=())

        async def one(member: Member) -> Piece:
            try:
                return await self._ask(sample, member, rollout, self.rollout.sync_timeout_s)
            except (RequestRefused, PromptMismatch):
                raise
            except ServerFailed as error:
                self.lost(member, str(error))
                raise

        return await asyncio.gather(*(one(member) for member in members))

    async def release(self) -> None:
        """Send again."""
        self.held = False
        for member in self.members:
            member.moved = time.monotonic()
        self._feed()

    async def suspend(self) -> None:
        """Break off what is being sampled; each sample keeps its tokens and waits at the front."""
        self.held, deadline = True, time.monotonic() + self.rollout.probe_timeout_s
        while self._requests:
            stopping.check(together=True)
            for member in self.members:
                if member.live and time.monotonic() > deadline:
                    self.lost(member, "its responses could not be broken off")
                elif member.state is State.SERVING and member.live:
                    names = [f"generate-tokens-{s.request_id}" for s in member.live]
                    try:
                        await self.client.ask(
                            member.address, "POST", "abort_requests", {"request_ids": names},
                            timeout_s=self.rollout.probe_timeout_s,
                        )  # fmt: skip
                    except ServerFailed as error:
                        self.lost(member, str(error))
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
        counters = {
            "servers/idle": 1.0 - busy / max(1e-9, (now - self._counted) * len(self.members)),
            "servers/restarts": float(self._restarts),
            "servers/retries": float(self._retries),
            "servers/lost_s": self._lost_s,
        }
        self._restarts, self._retries, self._lost_s, self._counted = 0, 0, 0.0, now
        return counters

    def _check_patience(self) -> None:
        stopping.check(together=True)
        now = time.monotonic()
        if any(m.state is State.SERVING for m in self.members):
            self._none_since = None
            return
        if self._none_since is None:
            self._none_since = now
        if now - self._none_since > self.rollout.patience_s:
            last = max(self.members, key=lambda m: m.failed_at)
            raise ServerFailed(
                f"no server was left for rollout.patience_s={self.rollout.patience_s:g} s; the "
                f"last was {last.name}: {last.why or 'it is starting'}"
            )

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
        if self.held or self.failure is not None:
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
        self._requests[sample] = self._spawn(self._request(sample, member))

    async def _request(self, sample: Sample, member: Member) -> None:
        try:
            piece = await self._ask(sample, member, self.rollout, None)
        except (RequestRefused, PromptMismatch) as error:
            self._fail(error)
        except ServerFailed as error:
            await self._doubt(sample, member, str(error))
        except Exception as error:
            self._fail(error)
        else:
            if piece.finish_reason == "abort" and not self.held:
                await self._doubt(sample, member, "it broke off a response")
                return
            member.doubts = 0
            self._leave(sample, member)
            if len(piece.tokens):
                sample.pieces.append(piece)
                self._tokens += len(piece.tokens) if sample.step else 0
            if sample.done:
                tokens = len(sample.asked.expanded) + sample.tokens_so_far
                mean = self._mean_tokens
                self._mean_tokens = tokens if mean is None else mean + (tokens - mean) / 64
                self.on_done(sample)
            else:
                self.groups.appendleft([sample])
            self._changed.set()
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
                self._again([sample], member, why)
                self._feed()
                return
        self.lost(member, why)

    async def _ask(
        self, sample: Sample, member: Member, rollout: RolloutConfig, timeout_s: float | None
    ) -> Piece:
        body = request_body(sample, rollout, self.shape)
        content = await self.client.fetch(
            member.address, "POST", GENERATE, body, timeout_s=timeout_s
        )
        try:
            piece = await self.decoding.piece(content)
        except ValueError as error:
            raise RequestRefused(
                f"{member.name}: the answer for prompt {sample.asked.prompt.id} is not one of "
                f"vLLM's generate route ({error}): {content[:200]!r}"
            ) from error
        check_piece(sample, piece, self.shape)
        return piece

    def _leave(self, sample: Sample, member: Member) -> None:
        member.live.discard(sample)
        if not member.live:
            member.rest(time.monotonic())
        self._requests.pop(sample, None)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._changed.set()

    def _again(self, samples: List[Sample], member: Member, why: str) -> None:
        """Requests that failed wait before the others, unless they are the cause."""
        for sample in samples:
            sample.attempts += 1
            self._retries += 1
            if sample.attempts >= ATTEMPTS:
                self._fail(
                    ServerFailed(
                        f"the request for prompt {sample.asked.prompt.id} has failed {ATTEMPTS} "
                        f"times, the last time by {member.name}: {why}"
                    )
                )
        self._put_first(samples)

    def _put_first(self, samples: Iterable[Sample]) -> None:
        by_prompt: dict[int, list[Sample]] = {}
        for sample in sorted(samples, key=lambda sample: sample.place):
            by_prompt.setdefault(id(sample.asked), []).append(sample)
        self.groups.extendleft(reversed(by_prompt.values()))

    def lost(self, member: Member, why: str) -> None:
        """A member has failed: its samples go to others, and it is started anew or waited for."""
        if member.state is State.FAILED:
            return
        member.state, member.why, member.failed_at = State.FAILED, why, time.monotonic()
        moved = [*member.live]
        for sample in moved:
            task = self._requests.get(sample)
            self._leave(sample, member)
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        again = moved + [*member.pending]
        self._again(moved, member, why)
        self._put_first(member.pending)
        member.pending.clear()
        others = sum(m.state is State.SERVING for m in self.members)
        self.say(
            f"{member.name} failed ({why}); its {len(again)} responses go to "
            + (f"{others} others" if others else "the next server that is there")
        )
        if self.sleeps:
            self._fail(
                ServerFailed(
                    f"{member.name} failed ({why}); a colocated server cannot start again while "
                    "the trainer holds its GPU: go on with --resume"
                )
            )
        elif member.launch is not None:
            self._spawn(self._restart(member))
        self._changed.set()
        self._feed()

    async def _restart(self, member: Member) -> None:
        """Start a server of ours anew until it answers; the patience is the waiter's."""
        assert member.launch is not None
        while True:
            if member.server is not None:
                await asyncio.to_thread(member.server.kill)
            member.life += 1
            self._restarts += 1
            member.server = member.launch(member.life)
            member.address, member.state = member.server.address, State.STARTING
            try:
                await member.server.ready(self.client, self.rollout.startup_timeout_s)
                break
            except ServerFailed as error:
                member.state, member.why, member.failed_at = (
                    State.FAILED,
                    str(error),
                    time.monotonic(),
                )
                self.say(f"{member.name} did not start again ({error})")
                await asyncio.sleep(min(60.0, 2.0**member.life))
        self._back(member)

    def _back(self, member: Member) -> None:
        member.state, member.moved = State.READY, time.monotonic()
        if member.launch is None:
            member.life += 1
        away = time.monotonic() - member.failed_at
        self._lost_s += away
        self.say(f"{member.name} is back after {away:.0f} s and waits for weights")
        self._changed.set()

    async def _watch(self, member: Member) -> None:
        probed = 0.0
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            now = time.monotonic()
            if member.server is not None and member.state in (State.READY, State.SERVING):
                try:
                    member.server.check_alive()
                except ServerFailed as error:
                    self.lost(member, str(error))
                    continue
            if now - probed < PROBE_EVERY_S:
                continue
            probed = now
            if member.state is State.SERVING:
                await self._probe(member)
            elif member.state is State.FAILED and member.launch is None:
                with contextlib.suppress(ServerFailed):
                    await self.client.fetch(member.address, "GET", "health", timeout_s=5.0)
                    self._back(member)

    async def _probe(self, member: Member) -> None:
        """Ask a server for its counters: whether it answers, and whether they grow."""
        limit = self.rollout.probe_timeout_s
        try:
            content = await self.client.fetch(member.address, "GET", "metrics", timeout_s=limit)
        except ServerFailed as error:
            self.lost(member, f"{error}")
            return
        counters, now = Counters.parse(content.decode(errors="replace")), time.monotonic()
        if counters.kv_tokens is not None and member.kv_tokens is None:
            member.kv_tokens = counters.kv_tokens
        if counters.tokens != member.tokens or not member.live or self.held:
            member.tokens, member.moved = counters.tokens, now
        elif now - member.moved > self.rollout.stall_timeout_s:
            self.lost(
                member,
                f"no token for {now - member.moved:.0f} s, "
                f"rollout.stall_timeout_s={self.rollout.stall_timeout_s:g}",
            )

    def _spawn(self, work) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def stop(self) -> None:
        """End watching and what is being sampled."""
        self.held = True
        for task in [*self._background]:
            task.cancel()
        await self.decoding.close()
