"""The vLLM servers of a run: started or given by URL, kept in step with the actor's weights.

Rank 0 alone speaks to them. ``Fleet`` and ``NoServers`` have one interface, ``Servers``.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import httpx
from tqdm import tqdm

from ovr_fast.config import FROZEN_PARTS, Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.parallel.offload import release_memory
from ovr_fast.records import ImageLimits, Prompt, Response
from ovr_fast.rollout.client import check_health, post_completion, post_control_all
from ovr_fast.rollout.placement import Placement, server_devices
from ovr_fast.rollout.protocol import parse_responses, request_body, request_seed
from ovr_fast.rollout.server import Server, ServerOptions
from ovr_fast.shape.model_shape import ModelShape

if TYPE_CHECKING:
    from ovr_fast.rollout.weight_sync import WeightSync

CONTROL_TIMEOUT_S = 300.0
"""Of one control call, such as putting a server to sleep."""


class SyncableModel(Protocol):
    """A model whose weights servers can be given: a learner, or a reference."""

    @property
    def model(self) -> Qwen25VLStage:
        """This rank's pipeline stage."""

    def on_device(self, *, weights_only: bool) -> AbstractContextManager[None]:
        """Inside, the weights are on the device."""


class Servers(Protocol):
    """What a recipe asks of its servers. Every method is a collective of all ranks."""

    def wait_until_ready(self) -> None:
        """Block until the servers answer."""

    def sync(self, learner: SyncableModel, *, version: int) -> None:
        """Give the servers the learner's weights; rollouts carry ``version`` from here on."""

    def sleep(self) -> None:
        """Give the trainer the GPU memory, where it is shared."""


class NoServers:
    """For a run whose rollouts need none."""

    def wait_until_ready(self) -> None:
        """Nothing to wait for."""

    def sync(self, learner: SyncableModel, *, version: int) -> None:
        """Nothing to sync."""

    def sleep(self) -> None:
        """Nothing sleeps."""

    def close(self) -> None:
        """Nothing to stop."""


class Fleet:
    """vLLM servers, started here or given by URL.

    Args:
        config: all settings.
        shape: of the model.
        chat: the model's chat template, to check what the servers saw and to decode.
        mesh: this rank's position and groups; only rank 0 starts and calls servers.
        weights: Hugging Face folder the servers start from.
        images: the most and largest images of a prompt.
        log_folder: where the servers' output goes.

    Raises:
        ConfigError: this node has too few GPUs for the servers.
    """

    def __init__(
        self,
        config: Config,
        *,
        shape: ModelShape,
        chat: ChatTemplate,
        mesh: Mesh,
        weights: Path,
        images: ImageLimits,
        log_folder: Path,
    ) -> None:
        self.config, self.shape, self.chat, self.mesh = config, shape, chat, mesh
        self.placement = Placement.of(config.rollout, on_gpu=mesh.device.type == "cuda")
        self.policy_version = 0
        self.started: list[Server] = []
        self.urls: tuple[str, ...] = ()
        self._sync: WeightSync | None = None
        self._asleep: set[str] = set()  # of "weights" and "kv_cache"
        self._ready = False
        if mesh.rank == 0:
            self.urls = config.rollout.urls or self._start(weights, images, log_folder)

    def _start(self, weights: Path, images: ImageLimits, log_folder: Path) -> tuple[str, ...]:
        rollout = self.config.rollout
        for number in range(rollout.servers):
            devices = None
            if self.mesh.device.type == "cuda":
                devices = server_devices(
                    number, tensor=rollout.tensor, colocated=self.placement.sleeps
                )
            options = ServerOptions.of(self.config, self.placement, model=weights, images=images)
            log = log_folder / f"vllm-{number}.log"
            self.started.append(Server(options, log=log, devices=devices))
        return tuple(server.url for server in self.started)

    def describe(self) -> str:
        """Placement, transport and sleeping, as a line of a log."""
        sleeps = (
            "give their memory back while the trainer works" if self.placement.sleeps else "stay"
        )
        return (
            f"rollout: {self.config.rollout.placement}, weights by "
            f"{self.placement.transfer_backend}, the servers {sleeps}"
        )

    def wait_until_ready(self) -> None:
        """Block until the servers answer. Called when they are first needed, so that a server
        starts beside the loading of the models. A collective.

        Raises:
            ServerFailed: a server stopped, or stopped making progress.
        """
        if self._ready:
            return

        def wait() -> None:
            for server in self.started:
                server.wait_until_ready(self.config.rollout.startup_timeout_s)
            for url in self.config.rollout.urls:
                check_health(url)

        self.mesh.on_first_rank(wait, otherwise=None)
        self._ready = True

    def generate(
        self,
        prompts: tuple[Prompt, ...],
        *,
        step: int,
        samples: int,
        max_tokens: int,
        describe: str = "rollout",
    ) -> list[Response]:
        """Sample responses. A collective of all ranks.

        Args:
            prompts: of this step; rank 0's are asked.
            step: seeds the requests, with the run's seed, the prompt and the sample.
            samples: responses to each prompt.
            max_tokens: a response is truncated here.
            describe: name on the progress bar.

        Returns:
            on rank 0 ``len(prompts) * samples`` responses, ordered by prompt, then sample; on the
            other ranks none.

        Raises:
            ServerFailed: a server stopped, refused a request, or did not answer in time.
        """
        self.wait_until_ready()
        self._wake({"weights", "kv_cache"})
        return self.mesh.on_first_rank(
            lambda: asyncio.run(self._generate(prompts, step, samples, max_tokens, describe)),
            otherwise=[],
        )

    async def _generate(
        self,
        prompts: tuple[Prompt, ...],
        step: int,
        samples: int,
        max_tokens: int,
        describe: str,
    ) -> list[Response]:
        rollout = self.config.rollout
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(rollout.request_timeout_s, connect=30.0)
        gates = [asyncio.Semaphore(rollout.max_in_flight) for _ in self.urls]
        versions = (self.policy_version, self.policy_version)
        bar = tqdm(total=len(prompts) * samples, desc=describe, leave=False, disable=None)
        watch: asyncio.Future = asyncio.create_task(self._watch())
        async with httpx.AsyncClient(limits=limits, timeout=timeout) as client:

            async def group(index: int, prompt: Prompt) -> list[Response]:
                number = index % len(self.urls)
                body = request_body(
                    prompt,
                    rollout,
                    self.shape,
                    seed=request_seed(self.config.run.seed, step, index),
                    samples=samples,
                    max_tokens=max_tokens,
                )
                async with gates[number]:
                    answer = await post_completion(client, self.urls[number], body)
                bar.update(samples)
                return parse_responses(
                    answer, prompt, index, chat=self.chat, shape=self.shape, versions=versions
                )

            work: asyncio.Future = asyncio.gather(
                *(group(index, prompt) for index, prompt in enumerate(prompts))
            )
            try:
                # The watcher ends only by an error: a server's process is gone.
                await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
                for server in self.started:
                    server.check_alive()
                return [response for responses in await work for response in responses]
            finally:
                watch.cancel()
                work.cancel()
                bar.close()

    async def _watch(self) -> None:
        """Ends, by an error, when a server's process does."""
        while True:
            for server in self.started:
                server.check_alive()
            await asyncio.sleep(0.5)

    def sync(self, learner: SyncableModel, *, version: int) -> None:
        """Load the learner's weights into all servers. A collective of all ranks.

        Parts that the model freezes are left out: the servers have them.

        Args:
            learner: actor, cold-start model or, for servers on other nodes, the base.
            version: stamped on every response from here on.

        Raises:
            ServerFailed: a server refused or did not answer.
        """
        from ovr_fast.rollout.weight_sync import WeightSync

        self.wait_until_ready()
        if self._sync is None:
            self._sync = WeightSync(
                self.mesh,
                urls=self.urls,
                workers=self.config.rollout.tensor,
                address=self.config.rollout.transfer_address,
                backend=self.placement.transfer_backend,
                timeout_s=CONTROL_TIMEOUT_S,
            )
        for server in self.started:
            server.check_alive()
        self._wake({"weights"})  # keys and values wait until the trainer's weights have gone
        with learner.on_device(weights_only=True):
            self._sync.sync(
                learner.model,
                policy_version=version,
                skip_parts=FROZEN_PARTS[learner.model.train_vision],
            )
        self.policy_version = version

    def sleep(self) -> None:
        """Give the trainer the GPU memory, where it is shared: keys and values are dropped, weights
        wait on the host (level 1; at level 2 a sleeping server forgets them). A collective."""
        if self.placement.sleeps and self._asleep != {"weights", "kv_cache"}:
            self.wait_until_ready()  # it measures the free memory while it starts
            self._control("sleep?level=1")
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, parts: set[str]) -> None:
        """Bring back what of ``parts`` sleeps. A collective."""
        if wanted := sorted(parts & self._asleep):
            # What the trainer has freed is its allocator's until it is returned to the driver.
            release_memory()
            self.mesh.barrier()  # every rank has, before a server looks for room
            self._control(f"wake_up?{'&'.join(f'tags={part}' for part in wanted)}")
            self._asleep -= parts

    def _control(self, path: str) -> None:
        def call() -> None:
            nothing: list[dict | None] = [None] * len(self.urls)
            post_control_all(self.urls, path, nothing, timeout_s=CONTROL_TIMEOUT_S)

        self.mesh.on_first_rank(call, otherwise=None)

    def close(self) -> None:
        """Stop the servers that were started here."""
        for server in self.started:
            server.stop()
