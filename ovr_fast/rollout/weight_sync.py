"""The trainer's weights into the running servers, through vLLM's weight-transfer API."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The servers log to their own files; in the trainer vLLM is a library and stays quiet.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from ovr_fast.model.hf_weights import export_hf, export_hf_everywhere, parameter_table
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.rollout import gloo_transfer
from ovr_fast.rollout.client import post_control_all
from ovr_fast.rollout.server import ServerFailed, free_port

IPC_BUFFER_BYTES = 4 * 2**30
"""A buffer that goes to colocated servers. No tensor is cut, and vLLM's default of 1 GiB is less
than the embedding of 7B in bfloat16 (152,064 x 3,584 x 2 bytes); that of 72B is 2.5 GB."""


class MegatronWeights(WeightSource):
    """A Megatron stage as a stream of whole Hugging Face tensors; a collective of all ranks.

    vLLM's trainer engine keeps one source for its life; ``model`` is what it reads next.
    """

    model: Qwen25VLStage
    skip_parts: tuple[str, ...] = ()

    def __init__(self, *, everywhere: bool) -> None:
        self.everywhere = everywhere

    def metadata(self) -> list[ParamMeta]:
        dtype = next(self.model.parameters()).dtype
        return [
            ParamMeta(part.name, dtype, part.shape)
            for row in parameter_table(self.model.shape, self.model.mesh.pp, value_head=False)
            if row.vision_part not in self.skip_parts
            for part in row.tensors
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        export = export_hf_everywhere if self.everywhere else export_hf
        return export(self.model, skip_parts=self.skip_parts)


class _Fanout:
    """vLLM's control-plane client for several servers: every call goes to all of them at once."""

    def __init__(self, urls: tuple[str, ...], workers: int, timeout_s: float) -> None:
        self.urls, self.workers, self.timeout_s = urls, workers, timeout_s
        self.version = 0

    def post_all(self, path: str, bodies: Sequence[dict | None]) -> None:
        post_control_all(self.urls, path, bodies, timeout_s=self.timeout_s)

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        bodies: list[dict] = [{"init_info": dict(init_info)} for _ in self.urls]
        if "rank_offset" in init_info:  # transports with a process group of all workers
            for i, body in enumerate(bodies):
                body["init_info"]["rank_offset"] += i * self.workers
        self.post_all("init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        nothing: list[dict | None] = [None] * len(self.urls)
        try:
            self.post_all("start_weight_update", nothing)
        except ServerFailed as error:
            # A trainer that was killed in the middle of a sync has left its update open; closed
            # and opened anew, the servers get all weights that can have changed.
            try:
                self.finish_weight_update()
                self.post_all("start_weight_update", nothing)
            except ServerFailed:
                raise error from None

    def update_weights(self, update_info) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:  # tuples that JSON cannot carry; the servers are on the loopback
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self.post_all("update_weights", [{"update_info": update_info}] * len(self.urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {"weight_version": weight_version or str(self.version)}
        self.post_all("finish_weight_update", [body] * len(self.urls))


class WeightSync:
    """Keeps servers in step with a model. Constructed and called on every rank.

    Args:
        mesh: this rank's position and groups.
        urls: the servers (rank 0 needs them).
        workers: processes of one server (its tensor-parallel size).
        address: of this process as the servers see it.
        backend: "gloo", "nccl", or "ipc" for servers on the trainer's own GPUs.
        timeout_s: of one control call.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        urls: tuple[str, ...],
        workers: int,
        address: str,
        backend: str,
        timeout_s: float,
    ) -> None:
        gloo_transfer.register()
        self.client = _Fanout(urls, workers, timeout_s)
        rank = mesh.rank
        world = 1 + len(urls) * workers
        port = free_port() if rank == 0 else 0
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
                master_address=address, master_port=port, world_size=world, rank=rank
            )
        self._source = MegatronWeights(everywhere=backend == "ipc")
        # Under NCCL vLLM makes a stream of its own this thread's current one. Models were built on
        # the one before, and memory that was cached for it would lie idle.
        nccl = backend == "nccl"
        with torch.cuda.stream(torch.cuda.current_stream()) if nccl else contextlib.nullcontext():
            self._engine = WeightTransferTrainerFactory.trainer_init(
                info, client=self.client, source=self._source
            )
        self.rank = rank

    @torch.no_grad()
    def sync(
        self, model: Qwen25VLStage, *, policy_version: int, skip_parts: tuple[str, ...]
    ) -> None:
        """Load ``model`` into all servers and drop what they cached for the old weights.

        Args:
            model: this rank's stage.
            policy_version: what the servers report as theirs from here on.
            skip_parts: frozen parts that the servers have already, of "tower" and "merger".

        Raises:
            ServerFailed: a server refused or did not answer.
        """
        self.client.version = policy_version
        self._source.model, self._source.skip_parts = model, skip_parts
        try:
            self._engine.send_weights()
        except RuntimeError as error:  # the transport's; a server's own refusal is ServerFailed
            if isinstance(error, ServerFailed):
                raise
            raise ServerFailed(
                f"weight sync to {', '.join(self.client.urls)} broke off ({error}); see the "
                "servers' logs"
            ) from error
        finally:
            del self._source.model  # or a model that is done with would stay in memory
        if self.rank == 0:
            # Keys and values of the old policy must not serve the new one.
            self.client.post_all("reset_prefix_cache", [None] * len(self.client.urls))
            if "merger" not in skip_parts:  # cached image embeddings are of the old weights
                self.client.post_all("reset_encoder_cache", [None] * len(self.client.urls))
