"""vLLM on a pretended card: what is "sampled" there is old bytes, so each request gets one token a
step, at a log-prob of -1. A plug-in of vLLM's (``vllm.general_plugins``), in rehearsals alone."""

from __future__ import annotations

import itertools
from pathlib import Path

ENTRY = "[vllm.general_plugins]\novr_fast_rehearsal = ovr_fast.rehearse.engine:register\n"


def write_plugin(folder: Path) -> Path:
    """A folder that, on ``PYTHONPATH``, makes vLLM call ``register``."""
    about = folder / "ovr_fast_rehearsal-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ovr-fast-rehearsal\nVersion: 0\n")
    (about / "entry_points.txt").write_text(ENTRY)
    return folder


def register() -> None:
    """Called by vLLM in each of its processes."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    from vllm.distributed.device_communicators import cuda_wrapper
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    from ovr_fast.rehearse.stand_ins import put

    # The runtime that vLLM opens by name is the pretended one (VLLM_CUDART_SO_PATH).
    put(cuda_wrapper, find_loaded_library=lambda lib_name: None)
    get_output, tokens = AsyncOutput.get_output, itertools.cycle(range(20, 60))

    @torch.inference_mode()
    def sampled(self):
        self.num_sampled_tokens_np[:] = 1
        for row in range(len(self.sampled_token_ids)):
            self.sampled_token_ids[row] = next(tokens)
        if (found := self.logprobs_tensors) is not None:
            found.logprob_token_ids.copy_(torch.from_numpy(self.sampled_token_ids[:, :1].copy()))
            found.logprobs.fill_(-1.0)
            found.selected_token_ranks.fill_(1)
        return get_output(self)

    put(AsyncOutput, get_output=sampled)
