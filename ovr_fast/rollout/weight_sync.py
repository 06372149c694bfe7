"""The trainer's weights into the running servers, through vLLM's weight-transfer API."""

from __future__ import annotations

import base64
import contextlib
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# The servers log to their own files; in the trainer vLLM is a library and stays quiet.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from ovr_fast import stopping
from ovr_fast.model.hf_weights import export_hf, export_hf_everywhere, parameter_table
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.rollout import gloo_transfer
from ovr_fast.rollout.canary import StaleWeights
from ovr_fast.rollout.client import Address, Client, ServerFailed
from ovr_fast.rollout.engine_weights import Expected, form
from ovr_fast.rollout.server import free_port

IPC_BUFFER_BYTES = 4 * 2**30
"""A buffer that goes to colocated servers. No tensor is cut, and vLLM's default of 1 GiB is less
than the embedding of 7B in bfloat16 (152,064 x 3,584 x 2 bytes); that of 72B is 2.5 GB."""


GRACE_S = 30.0
"""After the deadline of a sync, for a transport with a deadline of its own to end it in order."""

LOOK_EVERY_S = 0.5
"""Between two looks at a sync that runs."""

CAUSE_S = 5.0
"""From what a broadcast cannot survive to the end of the process, for the sync to end by itself."""


class MegatronWeights(WeightSource):
    """A Megatron stage as a stream of whole Hugging Face tensors; a collective of all ranks.

    vLLM's trainer engine keeps one source for its life; ``model`` is what it reads next.
    """

    model: Qwen25VLStage
    skip_parts: tuple[str, ...] = ()
    stream: Iterator[tuple[str, Tensor]] | None = None  # what has been begun
    expected: Expected | None = None  # is told what is sent
    at = "was making the transfer group"
    """What this rank is at, or was last: vLLM's transports collect tensors before they send."""

    def __init__(self, *, everywhere: bool, digested: bool = False, compared: bool = False) -> None:
        self.everywhere, self.digested, self.compared = everywhere, digested, compared
        self.digests: dict[str, str] = {}  # of what was sent, where the transport compares them

    def metadata(self) -> list[ParamMeta]:
        return declared(self.model, skip_parts=self.skip_parts)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        export = export_hf_everywhere if self.everywhere else export_hf
        self.digests.clear()
        self.stream = self._told(export(self.model, skip_parts=self.skip_parts))
        return self.stream

    def _told(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        stream = _finished(stream)
        compared = gloo_transfer.as_declared(self.metadata(), stream) if self.compared else stream
        self.at = "had the first tensor gathered"
        for name, tensor in compared:
            self.at = f"had taken {name} to send"
            if self.expected is not None:
                self.expected.add(name, tensor)
            if self.digested:
                self.digests[name] = gloo_transfer.digest_of(tensor)
            yield name, tensor
            self.at = f"had what follows {name} gathered"
        self.at = "had taken all tensors to send"


def declared(model: Qwen25VLStage, *, skip_parts: tuple[str, ...]) -> list[ParamMeta]:
    """What is sent of a model, in order, all parts but these."""
    dtype = next(model.parameters()).dtype
    return [
        ParamMeta(part.name, dtype, part.shape)
        for row in parameter_table(model.shape, model.mesh.pp, value_head=False)
        if row.vision_part not in skip_parts
        for part in row.tensors
    ]


def _finished(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor is there before it is handed on, whatever stream asks for it: vLLM asks inside
    streams of its own, and gathers that wait there behind broadcasts have locked up trainers of
    more than two ranks (huggingface/trl#6797)."""
    if not torch.cuda.is_available():
        yield from stream
        return
    home = torch.cuda.current_stream()
    while True:
        with torch.cuda.stream(home):
            pair = next(stream, None)
            home.synchronize()
        if pair is None:
            return
        yield pair


class _Fanout:
    """vLLM's control-plane client for several servers: every call goes to all of them at once."""

    def __init__(
        self,
        client: Client | None,
        addresses: tuple[Address, ...],
        workers: int,
        timeout_s: float,
        patient: bool,
    ) -> None:
        self.client, self.addresses = client, addresses
        self.workers, self.timeout_s = workers, timeout_s
        self.version = 0
        self.began = time.monotonic()  # of a sync, whose time all calls share
        # Under IPC every rank meets the others after each chunk: a failure waits for the last.
        self.patient = patient
        self.failure: ServerFailed | None = None
        self.receiving = False  # the servers are in a broadcast
        self.refused = ""  # why one will not come to it
        self.call, self.silent = "", list[Address]()  # the last one, and who has not answered it

    def post_all(self, path: str, bodies: Sequence[dict | None] | None = None) -> list[dict]:
        """To each server its body; None: to none of them one."""
        assert self.client is not None  # only rank 0 calls
        silent = list(self.addresses)
        self.call, self.silent = path, silent

        def answered(address: Address, error: ServerFailed | None) -> None:
            silent.remove(address)
            if error is not None and self.receiving:
                self.refused = self.refused or str(error)

        return self.client.post_all(
            self.addresses,
            path,
            bodies or [None] * len(self.addresses),
            timeout_s=self.left_s(),
            answered=answered,
        )

    def left_s(self) -> float:
        """Of a sync's time."""
        return max(1.0, self.timeout_s - (time.monotonic() - self.began))

    def waits_for(self) -> str:
        """What the servers are at, for a sync that does not end."""
        if self.silent:
            return f"{', '.join(map(str, self.silent))} had not answered {self.call}"
        return f"{', '.join(map(str, self.addresses))} had answered {self.call or 'no call'}"

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        # A trainer that was here before may have left its transfer open. Under NCCL its
        # communicator would make the new one fail (vllm-project/vllm#40646).
        try:
            self.post_all("shutdown_weight_transfer_engine")
        except ServerFailed:  # in the middle of an update: that ends first, where there is one
            with contextlib.suppress(ServerFailed):
                self.finish_weight_update()
            self.post_all("shutdown_weight_transfer_engine")
        bodies: list[dict] = [{"init_info": dict(init_info)} for _ in self.addresses]
        if "rank_offset" in init_info:  # transports with a process group of all workers
            for i, body in enumerate(bodies):
                body["init_info"]["rank_offset"] += i * self.workers
        with self._receive():  # workers wait for each other in it
            self.post_all("init_weight_transfer_engine", bodies)

    @contextlib.contextmanager
    def _receive(self) -> Iterator[None]:
        self.receiving = True
        try:
            yield
        finally:
            self.receiving = False

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except ServerFailed as error:
            if not self.patient:
                raise
            self.failure = error

    def start_weight_update(self) -> None:
        with self._patience():
            self._start()

    def _start(self) -> None:
        try:
            self.post_all("start_weight_update")
        except ServerFailed as error:
            # A trainer that was killed in the middle of a sync has left its update open; closed
            # and opened anew, the servers get all weights that can have changed.
            try:
                self.finish_weight_update()
                self.post_all("start_weight_update")
            except ServerFailed:
                raise error from None

    def update_weights(self, update_info) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:  # tuples that JSON cannot carry
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        if self.failure is None:
            bodies = [{"update_info": update_info}] * len(self.addresses)
            with self._receive(), self._patience():
                self.post_all("update_weights", bodies)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {"weight_version": weight_version or str(self.version)}
        if self.failure is None:
            with self._patience():
                self.post_all("finish_weight_update", [body] * len(self.addresses))

    def reset_caches(self, *, encoder: bool) -> None:
        """Drop keys and values of the weights before, and with ``encoder`` their visual tokens.

        Raises:
            ServerFailed: a server could not.
        """
        answers = self.post_all("reset_prefix_cache")
        for address, answer in zip(self.addresses, answers, strict=True):
            if not (answer or {}).get("success", True):
                raise ServerFailed(
                    f"{address} kept keys and values of its old weights: it runs requests that "
                    "are not this run's"
                )
        if encoder:
            self.post_all("reset_encoder_cache")

    def disagree(self, model: Qwen25VLStage) -> ServerFailed | None:
        """Before the first byte: whether a server holds other weights than will be sent, by names,
        types and shapes; names what differs."""
        expected = Expected(workers=self.workers, shape=model.shape, measure=form)
        for meta in declared(model, skip_parts=()):
            expected.add(meta.name, torch.empty(meta.shape, dtype=meta.dtype, device="meta"))
        how = "; start it with `python -m ovr_fast.rollout.serve` and this run's settings"
        asked = {"method": "weight_manifest", "timeout": self.timeout_s}
        try:
            answers = self.post_all("collective_rpc", [asked] * len(self.addresses))
        except ServerFailed as error:
            return ServerFailed(f"a server did not list its weights ({error}){how}")
        for address, answer in zip(self.addresses, answers, strict=True):
            manifest = {k: v for worker in answer["results"] for k, v in worker.items()}
            if odd := expected.misfits(manifest):
                more = f", and {len(odd) - 3} more" if odd[3:] else ""
                return ServerFailed(
                    f"{address} holds other weights than this run's model: {', '.join(odd[:3])}"
                    f"{more}{how}"
                )
        return None

    def compare(self, expected: Expected, version: int) -> None:
        """Raises StaleWeights if a server's weights are not what was sent; names them."""
        answers = self.post_all("weight_checker", [{"action": "checksum"}] * len(self.addresses))
        for address, answer in zip(self.addresses, answers, strict=True):
            if odd := expected.differences(answer["checksums"]):
                raise StaleWeights(
                    f"{address} does not have the weights of step {version} that it was sent: "
                    f"{', '.join(odd[:5])}{f' and {len(odd) - 5} more' if odd[5:] else ''} differ. "
                    "Nothing was sampled from it. Start the servers anew, and --resume"
                )


class WeightSync:
    """Keeps a set of servers in step with a model. Constructed and called on every rank.

    Args:
        mesh: this rank's position and groups.
        client: HTTP to the servers; rank 0 needs it.
        addresses: the servers; rank 0 needs them.
        workers: processes of one server (its tensor-parallel size).
        address: of this process as the servers see it.
        port: there; 0 is any.
        backend: "gloo", "nccl", or "ipc" for servers on the trainer's own GPUs.
        timeout_s: of a whole sync.
        lost: says which server has failed, and why; "" while all work.

    Raises:
        ServerFailed: a server refused or did not answer; on rank 0.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        client: Client | None,
        addresses: tuple[Address, ...],
        workers: int,
        address: str,
        port: int,
        backend: str,
        timeout_s: float,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        gloo_transfer.register()
        self.lost = lost
        self.servers = _Fanout(client, addresses, workers, timeout_s, patient=backend == "ipc")
        self.mesh, self.rank = mesh, mesh.rank
        rank = mesh.rank
        world = 1 + len(addresses) * workers
        port = (port or free_port()) if rank == 0 else 0
        if backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info: TrainerInitInfo = IPCTrainerInitInfo(
                rank=rank, packed=True, packed_buffer_size_bytes=IPC_BUFFER_BYTES
            )
        elif backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            info = NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=world, rank=rank
            )
        else:
            info = gloo_transfer.GlooTrainerInitInfo(
                master_address=address,
                master_port=port,
                world_size=world,
                rank=rank,
                timeout_s=timeout_s,
            )
        self._agreed = False  # the servers hold what will be sent
        # vLLM's NCCL transport compares what is sent with what was declared, as ours over gloo
        # does; that of CUDA IPC trusts it.
        self._source = MegatronWeights(
            everywhere=backend == "ipc",
            digested=backend == "gloo" and rank == 0,
            compared=backend == "ipc",
        )
        # Under NCCL vLLM makes a stream of its own this thread's current one. Models were built on
        # the one before, and memory that was cached for it would lie idle.
        nccl = self._holds_on = backend == "nccl"
        stream = (
            torch.cuda.stream(torch.cuda.current_stream()) if nccl else contextlib.nullcontext()
        )
        # A worker that dies while a communicator is made leaves the others waiting in it.
        with stream, self._deadline(time.monotonic()):
            try:
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    info, client=self.servers, source=self._source
                )
            except RuntimeError as error:
                if self.servers.refused and not isinstance(error, ServerFailed):
                    raise ServerFailed(self.servers.refused) from error  # and not what it broke
                raise

    @torch.no_grad()
    def sync(
        self,
        model: Qwen25VLStage,
        *,
        version: int,
        skip_parts: tuple[str, ...],
        verify: bool = False,
    ) -> ServerFailed | None:
        """Load ``model`` into the servers and drop what they cached for the old weights.

        Args:
            model: this rank's stage.
            version: what the servers report as theirs from here on.
            skip_parts: frozen parts that the servers have already, of "tower" and "merger".
            verify: compare checksums of all that was sent with the servers' own.

        Returns:
            why it did not end, if so, on rank 0 at least; the gathering has ended on all ranks.
        """
        self.servers.began = time.monotonic()
        if not self._agreed:
            refusal = self.mesh.from_first_rank(lambda: self.servers.disagree(model))
            if refusal is not None:
                return refusal
            self._agreed = True
        source, failure = self._source, None
        source.model, source.skip_parts, source.stream = model, skip_parts, None
        if verify and self.rank == 0:
            source.expected = Expected(workers=self.servers.workers, shape=model.shape)
        self.servers.version, self.servers.failure = version, None
        try:
            with self._deadline(self.servers.began):
                self._engine.send_weights()
                if self.servers.failure is not None:
                    raise self.servers.failure
                if self.rank == 0:
                    self.servers.reset_caches(encoder="merger" not in skip_parts)
                    if source.expected is not None:
                        self.servers.compare(source.expected, version)
        except (RuntimeError, ValueError) as error:  # the transport's, or a ServerFailed
            if self.rank != 0 and isinstance(error, ValueError):
                return None  # over CUDA IPC every rank has compared what is sent
            if self.rank != 0:
                raise
            names = ", ".join(map(str, self.servers.addresses))
            failure = (
                error
                if isinstance(error, ServerFailed)
                else ServerFailed(
                    f"weight sync to {names} broke off ({error}); see the servers' logs"
                )
            )
            for _ in source.stream or source:  # the other ranks are in its collectives
                pass
        finally:
            source.stream, source.expected = None, None
            del source.model  # or a model that is done with would stay in memory
        return failure

    def close(self) -> None:
        """Leave the transfer group of a sync that has failed: its servers wait in it for each
        other. On rank 0. (NCCL's is left to the next; to destroy it could wait for them too.)"""
        if isinstance(self._engine, gloo_transfer.GlooTrainerWeightTransferEngine):
            self._engine.shutdown()

    @contextlib.contextmanager
    def _deadline(self, began: float) -> Iterator[None]:
        """Ends the process when the time is over and it still waits, and says who waits for whom. A
        broadcast to a server that hangs cannot be called back under NCCL, so there it ends as soon
        as a server is lost or has refused; under gloo the sync has ended by itself before. On rank
        0."""
        if self.rank != 0:
            yield
            return
        limit, done = self.servers.timeout_s, threading.Event()
        self.servers.refused = ""

        def end(why: str) -> None:
            if done.is_set():
                return
            with contextlib.suppress(OSError):
                print(
                    f"\novr_fast: the weight sync has taken {time.monotonic() - began:.0f} s "
                    f"(rollout.sync_timeout_s={limit:g}) and cannot be broken off: {why}rank 0 "
                    f"{self._source.at}, and {self.servers.waits_for()}; go on with --resume",
                    file=sys.stderr,
                    flush=True,
                )
            stopping.say_last_words()
            os._exit(1)

        def watch() -> None:
            cause, since = "", math.inf
            while not done.wait(LOOK_EVERY_S):
                now = time.monotonic()
                if self._holds_on:
                    why = self.servers.refused or (self.servers.receiving and self.lost())
                    if not why:  # what it has ended is over
                        cause, since = "", math.inf
                    elif not cause:
                        cause, since = f"{why}; ", now
                if now - began > limit + GRACE_S or now - since > CAUSE_S:
                    end(cause)
                    return

        threading.Thread(target=watch, name="weight sync", daemon=True).start()
        try:
            yield
        finally:
            done.set()
