"""HTTP to the rollout servers, on one event loop that lives as long as the run.

The loop has a thread of its own, so that servers are fed and watched while the trainer computes.
The environment's proxies are not used: servers are on the loopback or a private network.
"""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec

from ovr_fast.errors import OVRFastError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 30.0

KEEP_ALIVE_S = 3.0
"""A connection is used again within this: vLLM closes idle ones after 5 s, and a request that meets
a closing one fails."""

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key that servers ask for; vLLM reads the same one."""


class ServerFailed(OVRFastError, RuntimeError):
    """A vLLM server stopped, refused a request or did not answer; names its log or address."""


class ServerSilent(ServerFailed):
    """A server did not answer in time."""


class RequestRefused(ServerFailed):
    """A server that works refused a request: no other server would take it either."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: ``http://host:port``, or ``unix:/path`` for a socket file."""

    url: str

    @property
    def socket(self) -> str | None:
        """Path of the socket file; None for a TCP address."""
        return self.url.removeprefix("unix:") if self.url.startswith("unix:") else None

    @property
    def base(self) -> str:
        """What a request's path is joined to."""
        return "http://vllm" if self.socket else self.url.rstrip("/")

    def __str__(self) -> str:
        return self.url


class Client:
    """HTTP to servers, from any thread.

    ``run``, ``get`` and ``post_all`` block their caller; ``ask`` and ``fetch`` are for coroutines
    on the loop.
    """

    def __init__(self) -> None:
        # A connection a response: a login's usual limit of 1,024 files is too low.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.loop = asyncio.new_event_loop()
        self._sessions: dict[Address, aiohttp.ClientSession] = {}
        self._thread = threading.Thread(target=self._serve, name="rollout client", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work`` on the loop; the caller waits. An exception that ends the waiting
        (a signal's) cancels the work."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def get(self, address: Address, path: str, *, timeout_s: float) -> Any:
        """A server's answer, parsed.

        Raises:
            ServerFailed: see ``fetch``.
        """
        return self.run(self.ask(address, "GET", path, timeout_s=timeout_s))

    def post_all(
        self,
        addresses: List[Address],
        path: str,
        bodies: List[Any],
        *,
        timeout_s: float,
        answered: Callable[[Address, ServerFailed | None], None] = lambda address, error: None,
    ) -> list[dict[str, Any]]:
        """A control call (sleep, wake, weight transfer) to several servers at once; their answers.

        Args:
            answered: called on the loop with each server that has, with its error if it refused or
                is gone. One that is silent has not.

        Raises:
            ServerFailed: of the first that failed, once all have answered or failed.
        """

        async def one(address: Address, body: Any) -> Any:
            try:
                answer = await self.ask(address, "POST", path, body, timeout_s=timeout_s)
            except ServerFailed as error:
                if not isinstance(error, ServerSilent):
                    answered(address, error)
                raise
            answered(address, None)
            return answer

        async def every() -> list[Any]:
            calls = [one(*pair) for pair in zip(addresses, bodies, strict=True)]
            return await asyncio.gather(*calls, return_exceptions=True)

        answers = self.run(every())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def ask(
        self, address: Address, method: str, path: str, body: Any = None, *, timeout_s: float
    ) -> Any:
        """``fetch``, parsed; None where the answer is empty."""
        content = await self.fetch(address, method, path, body, timeout_s=timeout_s)
        try:
            return msgspec.json.decode(content) if content else None
        except msgspec.DecodeError as error:
            raise ServerFailed(f"{address}/{path}: not JSON: {content[:200]!r}") from error

    async def fetch(
        self,
        address: Address,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout_s: float | None,
        again: bool = True,
    ) -> bytes:
        """The content of a server's answer.

        Args:
            body: sent as JSON; None: nothing is.
            timeout_s: of the whole exchange; None: only connecting has a limit.
            again: send it again where a kept connection breaks. Not a sample's request: it may
                meet a server that was started anew, with other weights.

        Raises:
            RequestRefused: it answered with a status of 400 to 499.
            ServerFailed: it is not there, went away, answered with another error or too late.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        where = f"{address}/{path}"

        async def exchange() -> tuple[int, bytes]:
            async with self._session(address).request(
                method, f"{address.base}/{path}", data=data, headers=headers, timeout=timeout
            ) as answer:
                return answer.status, await answer.read()

        try:
            try:
                status, content = await exchange()
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if not again or isinstance(error, aiohttp.ClientConnectorError):
                    raise
                # A kept connection that the server was closing (it does after an error): a server
                # that is gone refuses the second one.
                status, content = await exchange()
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerSilent(
                f"{where} took no connection within {CONNECT_TIMEOUT_S:g} s; is the server running?"
            ) from error
        except TimeoutError as error:
            raise ServerSilent(f"{where} did not answer within {timeout_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(f"{where}: {error!r}; is the server running?") from error
        if status == 401:
            ours = os.environ.get(KEY_VARIABLE)
            wrong = "another key than the one in" if ours else "a key; put it into"
            raise RequestRefused(
                f"{where}: the server asks for {wrong} the environment variable {KEY_VARIABLE}"
            )
        if status != 200:
            kind = RequestRefused if 400 <= status < 500 else ServerFailed
            text = content[:500].decode(errors="replace")
            raise kind(f"{where} answered with status {status}: {text}")
        return content

    def _session(self, address: Address) -> aiohttp.ClientSession:
        """Of a server: connections are kept and not limited; a request waits in our own queue."""
        if address not in self._sessions:
            options: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEP_ALIVE_S}
            connector = (
                aiohttp.UnixConnector(address.socket, **options)
                if address.socket
                else aiohttp.TCPConnector(**options)
            )
            key = os.environ.get(KEY_VARIABLE)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            self._sessions[address] = aiohttp.ClientSession(
                connector=connector, headers=headers, trust_env=False
            )
        return self._sessions[address]

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self.loop.is_closed()

    def close(self) -> None:
        """End the loop and what runs on it."""
        if self.closed:
            return

        async def finish() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for session in self._sessions.values():
                await session.close()

        self.run(finish())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
