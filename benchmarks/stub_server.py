"""A rollout server without a model: vLLM's routes, answered at any rate, with any fault.

Its tokens are random numbers of the request's seed, so that a request has the same answer from each
stub. For tests of the fleet and for ``rollout_client.py``.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

import numpy as np
from aiohttp import web

from ovr_fast.rollout.client import Address

VOCABULARY = 400


def tokens_of(seed: int, most: int, *, mean: float = 20.0) -> list[int]:
    """What a stub samples for a seed: at most ``most`` tokens, the last one ends it."""
    rng = np.random.default_rng(seed)
    length = 1 + int(rng.exponential(mean))
    return rng.integers(10, VOCABULARY, min(length, most)).tolist()


def answer_of(body: dict, tokens: list[int], *, finish: str, version: str) -> dict:
    """An answer of the generate route, with all fields that vLLM's has."""
    entries = [
        {
            "token_id": token,
            "logprob": -1.0 - token / 1024,
            "rank": 1,
            "top_logprobs": [{"token_id": token, "logprob": -1.0 - token / 1024, "rank": 1}],
        }
        for token in tokens
    ]
    choice = {
        "index": 0,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": tokens,
        "routed_experts": None,
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        "logprobs": {"content": entries},
    }
    return {
        "request_id": f"generate-tokens-{body['request_id']}",
        "prompt_token_ids": body["token_ids"],
        "choices": [choice],
    }


class StubServer:
    """A server in a thread of its own.

    Args:
        token_s: seconds a token.
        mean: tokens of a response.
        socket: path of the socket file it listens on; None: a port of the loopback.
        key: that it asks for; "": none.
    """

    def __init__(
        self,
        *,
        token_s: float = 0.0,
        mean: float = 20.0,
        socket: str | None = None,
        key: str = "",
        kv_tokens: int = 1_000_000,
    ) -> None:
        self.token_s, self.mean, self.key, self.kv_tokens = token_s, mean, key, kv_tokens
        self.version = "default"
        self.asked: list[str] = []  # paths of control calls
        self.bodies: list[dict] = []  # of generate requests
        self.now, self.most = 0, 0  # requests at a time
        self.tokens = 0
        self.fault: Callable[[dict], web.Response | None] = lambda body: None
        self.hold: Callable[[dict], int | None] = lambda body: None  # tokens, then it is aborted
        self.wait: Callable[[dict], Awaitable[None]] = lambda body: asyncio.sleep(0)  # at first
        self.held: set[str] = set()  # requests that have them
        self.served, self.longest, self.workers = "policy", 2**20, 1
        self.silent = False  # answers nothing more
        self.stalled = False  # samples nothing more
        self.mute: set[str] = set()  # control calls that get no answer
        self.broken: set[str] = set()  # that get an error
        self.answers: dict[str, dict] = {}  # of control calls, but for ``{"success": True}``
        self._abort: dict[str, asyncio.Event] = {}
        self._socket, self._ready, self._ending = socket, threading.Event(), threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/get_world_size", self._world)
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("*", "/{path:.*}", self._control)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site: web.BaseSite
        if self._socket:
            site = web.UnixSite(self._runner, self._socket)
            self.address = Address(f"unix:{self._socket}")
        else:
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        if not self._socket:
            self.address = Address(f"http://127.0.0.1:{self._runner.addresses[0][1]}")

    async def _metrics(self, request: web.Request) -> web.Response:
        await self._speak()
        return web.Response(
            text=f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}\n'
            f'vllm:cache_config_info{{kv_cache_size_tokens="{self.kv_tokens}"}} 1.0\n'
        )

    async def _world(self, request: web.Request) -> web.Response:
        return web.json_response({"world_size": self.workers})

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self.served, "max_model_len": self.longest}
        return web.json_response({"data": [model]})

    async def _control(self, request: web.Request) -> web.Response:
        await self._speak()
        self.asked.append(request.path_qs)
        while request.path[1:] in self.mute:
            await asyncio.sleep(0.05)
        if request.path[1:] in self.broken:
            return web.json_response({"error": "AttributeError"}, status=500)
        if request.path == "/abort_requests":
            for name in (await request.json())["request_ids"]:
                if event := self._abort.get(name):
                    event.set()
        if request.path == "/finish_weight_update":
            self.version = (await request.json())["weight_version"]
        return web.json_response(self.answers.get(request.path[1:], {"success": True}))

    async def _speak(self) -> None:
        while self.silent:
            await asyncio.sleep(0.05)

    async def _generate(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = json.loads(await request.read())
        self.bodies.append(body)
        if (fault := self.fault(body)) is not None:
            return fault
        self.now += 1
        self.most = max(self.now, self.most)
        name = f"generate-tokens-{body['request_id']}"
        aborted = self._abort[name] = asyncio.Event()
        try:
            await self.wait(body)
            sampling = body["sampling_params"]
            tokens = tokens_of(sampling["seed"], sampling["max_tokens"], mean=self.mean)
            made, finish = len(tokens), "stop"
            for i in range(len(tokens)) if self.token_s else ():
                await self._speak()
                if i == self.hold(body):
                    self.held.add(name)
                    await aborted.wait()
                while self.stalled and not aborted.is_set():
                    await asyncio.sleep(0.02)
                if aborted.is_set():
                    made, finish = i, "abort"
                    break
                await asyncio.sleep(self.token_s)
                self.tokens += 1
            content = answer_of(body, tokens[:made], finish=finish, version=self.version)
            return web.json_response(content)
        finally:
            self.now -= 1
            self.held.discard(name)
            self._abort.pop(name, None)

    def stop(self) -> None:
        """Close all connections and end."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await self._runner.cleanup()

        with self._ending:
            if self._loop.is_closed():
                return
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
