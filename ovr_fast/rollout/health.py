"""Which servers of a fleet work: watched, given up on, started anew or waited for.

Everything here runs on the client's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as List
from typing import Any

from ovr_fast import stopping
from ovr_fast.config import RolloutConfig
from ovr_fast.rollout.client import Client, ServerFailed, ServerSilent
from ovr_fast.rollout.members import Counters, Member, State

WATCH_EVERY_S = 0.5
"""Between two looks at a server's process."""

PROBE_EVERY_S = 2.0
"""Between two questions to a server for its counters."""

TRIES = 3
"""Starts of a colocated server without a finished response, after which it is left out."""


class Health:
    """Watches the members of a fleet and knows what ends a run.

    Args:
        client: HTTP to them.
        members: all, whatever their state.
        rollout: settings of limits and patience.
        sleeps: the servers share the trainer's GPUs: they start anew by ``mend`` alone.
        say: prints a line.
    """

    def __init__(
        self,
        client: Client,
        members: List[Member],
        *,
        rollout: RolloutConfig,
        sleeps: bool,
        say: Callable[[str], None],
    ) -> None:
        self.client, self.members, self.rollout = client, members, rollout
        self.sleeps, self.say = sleeps, say
        self.failure: Exception | None = None  # ends the run
        self.changed = asyncio.Event()  # something that a waiter looks at
        self.paused = False  # nothing is sent: no token is no fault
        self.on_lost: Callable[[Member], int] = lambda member: 0  # moves its samples, says how many
        self._background: set[asyncio.Task[None]] = set()
        self._kills: set[asyncio.Task[None]] = set()
        self._none_since: float | None = None
        self._restarts, self._lost_s = 0, 0.0

    async def watch_all(self) -> None:
        """Begin to watch the members."""
        for member in self.members:
            if member.state in (State.READY, State.SERVING):
                await self._probe(member)  # what fits into its keys and values
            self.spawn(self._watch(member))

    async def present(self) -> list[Member]:
        """The members that answer; waits for one, with patience.

        Raises:
            ServerFailed: none was left for ``patience_s``.
        """
        while not (found := [m for m in self.members if m.state in (State.READY, State.SERVING)]):
            if self.failure is not None:
                raise self.failure
            self.check_patience()
            await asyncio.sleep(WATCH_EVERY_S)
        return found

    def behind(self) -> list[Member]:
        """The members that wait for the weights, or, where they share the trainer's GPUs, all that
        have failed once none is left that samples."""
        if not self.sleeps:
            return [m for m in self.members if m.state is State.READY]
        left = any(m.state is State.SERVING for m in self.members)
        return [] if left else [*self.members]

    async def mend(self) -> None:
        """Start the servers of ours that have failed anew, now that the trainer has left their
        GPUs. One that has failed ``TRIES`` times without finishing a response is left out.

        Raises:
            ServerFailed: none is left.
        """
        await self.killed()
        tried: set[Member] = set()
        while True:
            there = [m for m in self.members if m.state in (State.READY, State.SERVING)]
            failed = [
                m
                for m in self.members
                if m.state is State.FAILED
                and m.launch is not None
                and m.starts_without_response < TRIES
                and not (there and m in tried)
            ]  # fmt: skip
            if not failed:
                break
            tried |= {*failed}
            starts = [self._start_again(member) for member in failed]
            for error in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(error, BaseException):
                    raise error
        if not there:
            last = max(self.members, key=lambda m: m.failed_at)
            raise ServerFailed(
                f"no server is left: each has failed {TRIES} times without finishing a response; "
                f"the last was {last.name}: {last.why}"
            )

    async def killed(self) -> None:
        """Wait until nothing is left of the processes of colocated servers that have failed.

        Raises:
            Exception: whatever has ended the run; that some do not end, say, and their memory is
                not free.
        """
        if self._kills:
            await asyncio.wait([*self._kills])
        if self.failure is not None:
            raise self.failure

    async def find_lost(self, members: List[Member], *, hear: bool = True) -> bool:
        """Whether one of these has failed, now or since it was looked at last.

        Args:
            hear: ask their workers too.
        """

        async def look(member: Member) -> None:
            try:
                if member.server is not None:
                    member.server.check_alive()
                await self.client.fetch(member.address, "GET", "health", timeout_s=15.0)
                if hear:
                    await self._hear(member)
            except ServerFailed as error:
                self.lost(member, str(error))

        there = (State.READY, State.SERVING)
        await asyncio.gather(*(look(m) for m in members if m.state in there))
        return any(m.state not in there for m in members)

    def check_patience(self) -> None:
        """Raises ServerFailed if no server was left for ``patience_s``."""
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

    def read_counters(self) -> tuple[int, float]:
        """Servers started anew, and seconds without one, since the last call."""
        counters = self._restarts, self._lost_s
        self._restarts, self._lost_s = 0, 0.0
        return counters

    def fail(self, error: Exception) -> None:
        """The run ends by this, unless something has ended it already."""
        self.failure = self.failure or error
        self.changed.set()

    def lost(self, member: Member, why: str) -> None:
        """A member has failed: its samples go to others, and it is started anew or waited for."""
        if member.state not in (State.READY, State.SERVING):  # known, or being started anew
            return
        member.state, member.why, member.failed_at = State.FAILED, why, time.monotonic()
        moved = self.on_lost(member)
        others = sum(m.state is State.SERVING for m in self.members)
        when = "; it starts again before the next weights" if self.sleeps and others else ""
        self.say(
            f"{member.name} failed ({why}); its {moved} responses go to "
            + (f"{others} others" if others else "the next server that is there")
            + when
        )
        if self.sleeps and member.server is not None:  # the trainer needs its memory
            kill = self.spawn(asyncio.to_thread(member.server.kill))
            self._kills.add(kill)
            kill.add_done_callback(self._kills.discard)
        elif member.launch is not None:
            self.spawn(self._restart(member))
        self.changed.set()

    async def _restart(self, member: Member) -> None:
        """Start a server of ours anew until it answers; the patience is the waiter's."""
        while not await self._start_again(member):
            await asyncio.sleep(min(60.0, 2.0 ** min(member.life, 6)))

    async def _start_again(self, member: Member) -> bool:
        """Start a server of ours anew; False where it did not get there."""
        assert member.launch is not None
        if not await self._ended(member):
            return False
        member.life += 1
        member.starts_without_response += 1
        self._restarts += 1
        member.server = member.launch(member.life)
        member.address, member.state = member.server.address, State.STARTING
        try:
            await member.server.ready(self.client, self.rollout.startup_timeout_s)
        except Exception as error:
            member.state, member.why = State.FAILED, str(error)
            await self._ended(member)
            if not isinstance(error, ServerFailed):  # the run is asked to end
                raise
            self.say(f"{member.name} did not start again ({error})")
            return False
        self._back(member)
        return True

    async def _ended(self, member: Member) -> bool:
        """Kill a server of ours; False where processes of it are left. Colocated that ends the run,
        whose trainer needs their memory."""
        if member.server is None:
            return True
        try:
            await asyncio.to_thread(member.server.kill)
        except ServerFailed as error:
            if self.sleeps:
                raise
            self.say(f"{member.name} is not started again yet: {error}")
            return False
        return True

    def _back(self, member: Member) -> None:
        member.state, member.moved, member.doubts = State.READY, time.monotonic(), 0
        if member.launch is None:
            member.life += 1
        away = time.monotonic() - member.failed_at
        self._lost_s += away
        self.say(f"{member.name} is back after {away:.0f} s and waits for weights")
        self.changed.set()

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
            if member.state in (State.READY, State.SERVING):
                await self._probe(member)
            elif member.state is State.FAILED and member.launch is None:
                with contextlib.suppress(ServerFailed):
                    await self.client.fetch(member.address, "GET", "health", timeout_s=5.0)
                    await self._hear(member)
                    self._back(member)

    async def _hear(self, member: Member) -> None:
        """Whatever a server's workers say, in the middle of an update too: its front answers also
        for an engine that hangs.

        Raises:
            ServerSilent: nothing.
        """
        asked, limit = {"method": "weight_manifest"}, self.rollout.probe_timeout_s
        try:
            await self.client.fetch(
                member.address, "POST", "collective_rpc", asked, timeout_s=limit
            )
        except ServerSilent:
            raise
        except ServerFailed:  # it lists none, which the next sync says
            pass

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
        if counters.tokens != member.tokens or not member.live or self.paused:
            member.tokens, member.moved = counters.tokens, now
        elif now - member.moved > self.rollout.stall_timeout_s:
            self.lost(
                member,
                f"no token for {now - member.moved:.0f} s, "
                f"rollout.stall_timeout_s={self.rollout.stall_timeout_s:g}",
            )

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work beside the waiting; its error ends the run."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def stop(self) -> None:
        """End watching, and all that was begun by ``spawn``."""
        for task in [*self._background]:
            task.cancel()
