"""The only door to vLLM: prompts in, rollouts out, and new weights in between.

Rank 0 speaks to the servers; every rank gets the rollouts.
"""

from __future__ import annotations

import asyncio
import base64
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from tqdm import tqdm

from ovr_fast.batch import Prompt, Rollout
from ovr_fast.config import Config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.shape import ModelShape
from ovr_fast.observe.clock import release_memory
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.rollout.server import EngineDied, Server

if TYPE_CHECKING:
    from ovr_fast.rollout.weight_sync import WeightSync

MEDIA_TOKEN_BIAS = -100.0
"""Added to the logits of image and video placeholders: sampled, they would stand for no picture."""


def request_seed(run_seed: int, step: int, prompt: int) -> int:
    """Seed of a prompt's first sample, a function of what it is and of nothing else (no order, no
    server). vLLM adds the sample's number to it for the others."""
    return zlib.crc32(f"{run_seed}/{step}/{prompt}".encode()) << 16


class RolloutEngine:
    """vLLM servers, started here or given by URL.

    Args:
        config: all settings.
        shape, encoder: of the model.
        mesh: this rank's place; only rank 0 starts and calls servers.
        model_folder: weights the servers start from.
        log_folder: where the servers' output goes.

    Raises:
        EngineDied: a server did not start.
    """

    def __init__(
        self,
        config: Config,
        *,
        shape: ModelShape,
        encoder: ChatEncoder,
        mesh: Mesh,
        model_folder: Path,
        log_folder: Path,
    ) -> None:
        self.config, self.shape, self.encoder, self.mesh = config, shape, encoder, mesh
        self.policy_version = 0
        self.servers: list[Server] = []
        self.urls: tuple[str, ...] = ()
        self._sync: WeightSync | None = None
        on_gpu, shared = mesh.device.type == "cuda", config.rollout.placement == "colocated"
        self.backend = ("ipc" if shared else "nccl") if on_gpu else "gloo"
        self.sleeps = on_gpu and shared
        self._asleep: set[str] = set()  # of "weights" and "kv_cache"
        if mesh.rank == 0:
            self.urls = config.rollout.urls or self._start(model_folder, log_folder)

    def _start(self, model_folder: Path, log_folder: Path) -> tuple[str, ...]:
        rollout, rl = self.config.rollout, self.config.rl
        for number in range(rollout.servers):
            self.servers.append(
                Server(
                    model=model_folder,
                    log=log_folder / f"vllm-{number}.log",
                    dtype=self.config.model.dtype,
                    max_model_len=rl.max_prompt_tokens + rl.max_response_tokens,
                    max_pictures=16,
                    transfer_backend=self.backend,
                    compiled=rollout.compile,
                    sleeps=self.sleeps,
                    seed=self.config.run.seed,
                    kv_cache_gib=rollout.kv_cache_gib,
                    gpu_memory_utilization=rollout.gpu_memory_utilization,
                    tensor_parallel=rollout.tensor,
                    devices=self._devices(number),
                )
            )
        return tuple(server.url for server in self.servers)

    def _devices(self, number: int) -> str | None:
        """GPUs of a server on this node: the trainer's own, or those after them."""
        if self.mesh.device.type == "cpu":
            return None
        first = number * self.config.rollout.tensor
        if not self.sleeps:
            first += int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        wanted = range(first, first + self.config.rollout.tensor)
        if not (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
            return ",".join(map(str, wanted))
        known = visible.split(",")
        if wanted[-1] >= len(known):
            raise ValueError(
                f"server {number} needs GPU number {wanted[-1]} of CUDA_VISIBLE_DEVICES={visible}"
            )
        return ",".join(known[i] for i in wanted)

    def wait_until_ready(self) -> None:
        """Block until the servers answer. Called when their weights are first needed, so that a
        server starts beside the loading of the models. A collective of all ranks."""

        def wait() -> None:
            for server in self.servers:
                server.wait_until_ready(self.config.rollout.startup_timeout_s)

        self._on_first_rank(wait)

    def generate(
        self,
        prompts: list[Prompt],
        *,
        step: int,
        samples: int,
        max_tokens: int,
        describe: str = "generate",
    ) -> list[Rollout]:
        """Sample responses. A collective of all ranks; every rank gets all rollouts.

        Args:
            prompts: of this step.
            step: seeds the requests, with the run's seed, the prompt and the sample.
            samples: responses to each prompt.
            max_tokens: a response is truncated here.
            describe: name on the progress bar.

        Returns:
            ``len(prompts) * samples`` rollouts, ordered by prompt, then sample.

        Raises:
            EngineDied: a server stopped, refused a request, or did not answer in time.
            ValueError: the engine's prompt tokens differ from the trainer's.
        """
        self._wake({"weights", "kv_cache"})
        return self._on_first_rank(
            lambda: asyncio.run(self._generate_all(prompts, step, samples, max_tokens, describe))
        )

    def sleep(self) -> None:
        """Give the trainer the GPU memory, where it is shared: keys and values are dropped, weights
        wait on the host (level 1; at level 2 a sleeping engine forgets them). A collective."""
        if self.sleeps and self._asleep != {"weights", "kv_cache"}:
            self._on_first_rank(lambda: self._control("sleep?level=1"))
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, parts: set[str]) -> None:
        """Bring back what of ``parts`` sleeps. A collective."""
        if wanted := sorted(parts & self._asleep):
            # What the trainer has freed is its allocator's until it is returned to the driver.
            release_memory()
            tags = "&".join(f"tags={part}" for part in wanted)
            self._on_first_rank(lambda: self._control(f"wake_up?{tags}"))
            self._asleep -= parts

    def _control(self, path: str) -> None:
        for url in self.urls:
            try:
                httpx.post(f"{url}/{path}", timeout=300).raise_for_status()
            except httpx.HTTPError as error:
                raise EngineDied(f"{url}/{path}: {error!r}") from error

    def _on_first_rank(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on rank 0, on every rank; or the error that it raised there."""
        result: Any = None
        if self.mesh.rank == 0:
            try:
                result = work()
            except Exception as error:  # every rank has to leave the collective, then fail alike
                result = error
        result = self.mesh.from_first(result)
        if isinstance(result, Exception):
            raise result
        return result

    async def _generate_all(
        self, prompts: list[Prompt], step: int, samples: int, max_tokens: int, describe: str
    ) -> list[Rollout]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.config.rollout.request_timeout_s, connect=30.0)
        gates = [asyncio.Semaphore(self.config.rollout.max_in_flight) for _ in self.urls]
        bar = tqdm(total=len(prompts) * samples, desc=describe, leave=False, disable=None)
        watch: asyncio.Future = asyncio.create_task(self._watch())
        async with httpx.AsyncClient(limits=limits, timeout=timeout) as client:

            async def group(index: int, prompt: Prompt) -> list[Rollout]:
                """All samples of a prompt: one request, so its pictures are sent once."""
                server = index % len(self.urls)
                seed = request_seed(self.config.run.seed, step, index)
                async with gates[server]:
                    body = self._body(prompt)
                    body |= {"seed": seed, "n": samples, "max_completion_tokens": max_tokens}
                    answer = await self._post(client, server, body)
                bar.update(samples)
                return self._rollouts(prompt, index, answer)

            work: asyncio.Future = asyncio.gather(
                *(group(index, prompt) for index, prompt in enumerate(prompts))
            )
            try:
                # The watcher ends only by an error: a server's process is gone.
                await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    watch.result()
                return [rollout for rollouts in await work for rollout in rollouts]
            finally:
                watch.cancel()
                work.cancel()
                bar.close()

    async def _watch(self) -> None:
        """Ends, by an error, when a server's process does."""
        while True:
            for server in self.servers:
                server.check_alive()
            await asyncio.sleep(0.5)

    async def _post(self, client: httpx.AsyncClient, server: int, body: dict) -> dict:
        url = f"{self.urls[server]}/v1/chat/completions"
        try:
            answer = await client.post(url, json=body)
        except httpx.TimeoutException as error:
            raise EngineDied(
                f"{url} did not answer within rollout.request_timeout_s="
                f"{self.config.rollout.request_timeout_s:.0f} s"
            ) from error
        except httpx.HTTPError as error:
            for started in self.servers:
                started.check_alive()
            raise EngineDied(f"{url}: {error!r}; is the server running?") from error
        if answer.status_code != 200:
            raise EngineDied(f"{url} refused a request: {answer.text[:500]}")
        return answer.json()

    def _body(self, prompt: Prompt) -> dict:
        rollout = self.config.rollout
        pictures = iter(prompt.pictures)
        messages = []
        for message in prompt.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    _image_part(next(pictures).data) if part["type"] == "image" else part
                    for part in content
                ]
            messages.append({"role": message["role"], "content": content})
        body = {
            "model": "policy",
            "messages": messages,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "logit_bias": {
                str(self.shape.image_token_id): MEDIA_TOKEN_BIAS,
                str(self.shape.video_token_id): MEDIA_TOKEN_BIAS,
            },
        }
        if rollout.stop:
            body["stop"] = list(rollout.stop)
        return body

    def _rollouts(self, prompt: Prompt, index: int, answer: dict) -> list[Rollout]:
        """The samples of one prompt, after checking that both sides saw the same prompt."""
        engine_tokens = answer["prompt_token_ids"]
        ours = self.encoder.encode(prompt.messages, prompt.pictures, generation_prompt=True)
        if engine_tokens != ours.tolist():
            image = self.shape.image_token_id
            raise ValueError(
                f"prompt {prompt.id}: the engine saw {len(engine_tokens)} tokens with "
                f"{engine_tokens.count(image)} visual ones, the trainer has {len(ours)} with "
                f"{int((ours == image).sum())}; the model folder's processor settings and chat "
                "template must be the same on both sides"
            )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [self._rollout(prompt, index, ours, choice) for choice in choices]

    def _rollout(self, prompt: Prompt, index: int, ours: np.ndarray, choice: dict) -> Rollout:
        response = np.asarray(choice["token_ids"], dtype=np.int64)
        logprobs = np.asarray(
            [entry["logprob"] for entry in choice["logprobs"]["content"]], dtype=np.float32
        )
        if len(response) != len(logprobs) or len(response) == 0:
            raise EngineDied(
                f"prompt {prompt.id}: {len(response)} response tokens, {len(logprobs)} log-probs"
            )
        media = np.isin(response, (self.shape.image_token_id, self.shape.video_token_id))
        if media.any():
            raise ValueError(f"prompt {prompt.id}: a media placeholder was sampled; it is banned")
        return Rollout(
            prompt_index=index,
            sample_index=choice["index"],
            prompt_tokens=ours,
            response_tokens=response,
            rollout_logprobs=logprobs,
            text=self.encoder.decode(response),
            finish_reason=choice["finish_reason"],
            policy_version=self.policy_version,
        )

    def load(self, model: Qwen25VLStage, *, policy_version: int, skip_parts: tuple) -> None:
        """Give the servers this model's weights. A collective of all ranks.

        Args:
            policy_version: stamped on every rollout from here on.
            skip_parts: frozen parts the servers have already, of "tower" and "merger".

        Raises:
            EngineDied: a server refused or did not answer.
        """
        from ovr_fast.rollout.weight_sync import WeightSync

        if self._sync is None:
            self._sync = WeightSync(
                self.mesh,
                urls=self.urls,
                workers=self.config.rollout.tensor,
                address=self.config.rollout.transfer_address,
                backend=self.backend,
            )
        for server in self.servers:
            server.check_alive()
        self._wake({"weights"})  # keys and values wait until the trainer's weights have gone
        self._sync.send(model, policy_version=policy_version, skip_parts=skip_parts)
        self.policy_version = policy_version

    def close(self) -> None:
        """Stop the servers that were started here."""
        for server in self.servers:
            server.stop()


def _image_part(data: bytes) -> dict:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    encoded = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}}
