"""A gloo engine for vLLM's weight-transfer API: what its NCCL engine is on GPUs, on CPUs.

Registered under the name ``gloo`` by the entry point in ``pyproject.toml`` in every process that
vLLM starts, and by the trainer for its own side. The protocol is vLLM's: the trainer's rank 0 and
all workers form one group, metadata travels by the control plane, weights by broadcast in buckets.
Each bucket carries a checksum, so that a damaged or misaligned stream is an error, not a policy.

Only this module and ``weight_sync`` import vLLM.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

BUCKET_BYTES = 64 * 2**20
"""Bytes broadcast at a time; the only memory a sync needs beside one gathered parameter."""


def register() -> None:
    """Make ``gloo`` known to vLLM's two registries; safe to call again."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)


def _join(
    address: str,
    port: int,
    rank: int,
    world: int,
    timeout_s: float,
    call: Future[None] | None = None,
    refused: Callable[[], str] = lambda: "",
) -> dist.ProcessGroupGloo:
    """The group of the trainer and all workers.

    Args:
        call: rank 0's, that asks the workers to join: its failure ends the waiting for them.
        refused: why one of them will not come, while the others' answers are waited for.

    Raises:
        RuntimeError: they were not all there in time.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        address, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    here, deadline = store.add("here", 1), time.monotonic() + timeout_s
    while call is not None and here < world:
        if call.done():
            call.result()
        if why := refused():
            raise RuntimeError(why)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{here - 1} of {world - 1} workers came within {timeout_s:g} s")
        time.sleep(0.02)
        here = store.add("here", 0)
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world, timeout)


def _broadcast(group: Any, buffer: Tensor, within_s: float | None = None) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    if within_s is not None:
        options.timeout = timedelta(seconds=within_s)
    group.broadcast([buffer], options).wait()


def _checksum(payload: Tensor) -> Tensor:
    return torch.tensor([zlib.crc32(payload.numpy().data)], dtype=torch.int64).view(torch.uint8)


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, copied: a storage that NumPy has seen cannot be emptied any more, as those
    of weights that leave the device are."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def as_declared(
    metadata: list[ParamMeta], stream: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream, each tensor of which has the name, type and shape of its turn.

    Raises:
        ValueError: one has not, is missing or is too much; names it.
    """
    found = iter(stream)
    for meta in metadata:
        name, tensor = next(found, ("nothing", torch.empty(0)))
        given = (name, tensor.dtype, tuple(tensor.shape))
        if given != (meta.name, meta.dtype, tuple(meta.shape)):
            raise ValueError(
                f"weight sync: declared {meta}, but the stream gave {name} {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        yield name, tensor
    for name, _ in found:
        raise ValueError(f"weight sync: {name} was streamed but not declared")


def _buckets(sizes: list[int]) -> Iterator[list[int]]:
    """Indices of consecutive tensors whose bytes fill a bucket; a tensor over the
    bucket size is a bucket of its own."""
    bucket: list[int] = []
    used = 0
    for index, size in enumerate(sizes):
        if bucket and used + size > BUCKET_BYTES:
            yield bucket
            bucket, used = [], 0
        bucket.append(index)
        used += size
    if bucket:
        yield bucket


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join: where the trainer listens, and the worker's first rank."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Names, dtypes and shapes of the weights to come, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    sent: dict[str, str] = field(default_factory=dict)  # SHA-256 of each, after the last of them


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The worker's side: receive buckets and load them into the model."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: dist.ProcessGroupGloo | None = None
    received: dict[str, str]  # SHA-256 of each, since the update began

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + (
            parallel.data_parallel_index * parallel.world_size + parallel.rank
        )
        self.group = _join(
            init_info.master_address,
            init_info.master_port,
            rank,
            init_info.world_size,
            init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.received = {}
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class ends with an accelerator synchronise, and there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise RuntimeError("gloo weight transfer: init_transfer_engine was not called")
        if update_info.sent:
            self._compare(update_info.sent)
            return
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in zip(update_info.shapes, dtypes, strict=True)
        ]
        for bucket in _buckets(sizes):
            payload_bytes = sum(sizes[i] for i in bucket)
            buffer = torch.empty(payload_bytes + 8, dtype=torch.uint8)
            _broadcast(self.group, buffer)
            payload, checksum = buffer.split([payload_bytes, 8])
            if not torch.equal(_checksum(payload), checksum):
                raise RuntimeError(
                    f"gloo weight transfer: checksum of {update_info.names[bucket[0]]} .. "
                    f"{update_info.names[bucket[-1]]} differs from the trainer's"
                )
            pieces = payload.split([sizes[i] for i in bucket])
            weights = [
                (
                    update_info.names[i],
                    # A clone of its own: a bucket's pieces need not be aligned for their dtype.
                    piece.clone().view(dtypes[i]).view(update_info.shapes[i]),
                )
                for i, piece in zip(bucket, pieces, strict=True)
            ]
            self.received |= {name: digest_of(weight) for name, weight in weights}
            model: Any = self.model  # every vLLM model has load_weights, nn.Module has not
            model.load_weights(weights)

    def _compare(self, sent: dict[str, str]) -> None:
        differ = sorted(
            name
            for name in sent.keys() | self.received.keys()
            if sent.get(name) != self.received.get(name)
        )
        if differ:
            raise RuntimeError(
                f"gloo weight transfer: {', '.join(differ[:5])} "
                f"{f'and {len(differ) - 5} more ' if differ[5:] else ''}arrived otherwise than the "
                "trainer has them"
            )

    def shutdown(self) -> None:
        self.group = None


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Where rank 0 of the trainer listens, and how many processes join (itself included)."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's side: rank 0 broadcasts, the other ranks join the gathering."""

    init_info_cls = GlooTrainerInitInfo
    group: dist.ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        worker_info = GlooInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )
        # The workers block until the trainer joins, so the call has to run beside the joining.
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            call = pool.submit(client.init_weight_transfer_engine, asdict(worker_info))
            engine.group = _join(
                init_info.master_address,
                init_info.master_port,
                0,
                init_info.world_size,
                init_info.timeout_s,
                call,
                lambda: client.refused,
            )
            call.result()
        finally:
            pool.shutdown(wait=False)  # the others' answers come when they miss the store
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        metadata = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        update = GlooUpdateInfo(
            names=[m.name for m in metadata],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in metadata],
            shapes=[list(m.shape) for m in metadata],
        )
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            call = pool.submit(self.client.update_weights, asdict(update))
            try:
                self._broadcast_all(metadata)
            except RuntimeError:
                if call.done():
                    call.result()  # what a server said is the cause, the broadcast's end is not
                raise
            call.result()
            sent = getattr(self.source, "digests", None)
            if sent:
                check = GlooUpdateInfo(names=[], dtype_names=[], shapes=[], sent=sent)
                self.client.update_weights(asdict(check))
        finally:
            # If the broadcast failed, the servers' call never returns; do not wait for it.
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def _broadcast_all(self, metadata: list) -> None:
        assert self.group is not None
        assert self.source is not None
        sizes = [torch.Size(m.shape).numel() * m.dtype.itemsize for m in metadata]
        stream = as_declared(metadata, self.source)
        for bucket in _buckets(sizes):
            buffer = torch.empty(sum(sizes[i] for i in bucket) + 8, dtype=torch.uint8)
            offset = 0
            for i in bucket:
                _, tensor = next(stream)
                flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                buffer[offset : offset + sizes[i]] = flat
                offset += sizes[i]
            buffer[offset:] = _checksum(buffer[:offset])
            left_s = self.client.left_s()  # type: ignore[attr-defined]  # ours has it
            _broadcast(self.group, buffer, left_s)
        for _ in stream:  # none is left, but to be named
            pass

    def shutdown(self) -> None:
        self.group = None
