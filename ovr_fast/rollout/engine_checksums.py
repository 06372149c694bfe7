"""What a server's weights must hash to, from the tensors that were sent to it.

vLLM's ``/weight_checker`` gives a SHA-256 of each of its parameters on each worker. Those are
joined from Hugging Face tensors, and cut over the workers, as below. The vision side is compared
where one worker holds it whole.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict

import torch
from torch import Tensor

from ovr_fast.rollout.gloo_transfer import bytes_of

_JOINED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj)\.weight$")
_BY_ROWS = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head|embed_tokens)\.")
_VOCABULARY = re.compile(r"(lm_head|embed_tokens)\.weight$")
_WORKER = re.compile(r"^(?:\w+:)*?tp(?P<rank>\d+):(?P<name>.+)$")

_EMPTY = hashlib.sha256(b"").hexdigest()

VOCABULARY_BLOCK = 64
"""vLLM fills the vocabulary up to a multiple of this, with zeros."""


class Expected:
    """Fed with what is sent, in any order; then says which of a server's weights differ.

    Args:
        workers: tensor-parallel size of a server.
        tied: the output embedding is the input's, which vLLM then has once.
    """

    def __init__(self, *, workers: int, tied: bool) -> None:
        self.workers, self.tied = workers, tied
        self._parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._sums: dict[tuple[int, str], str] = {}  # by worker and vLLM's name

    def add(self, name: str, tensor: Tensor) -> None:
        """One Hugging Face tensor, whole."""
        if name.startswith("visual.") and self.workers > 1:
            return
        if name == "lm_head.weight" and self.tied:
            return
        engine = name if name.startswith("visual.") else f"language_model.{name}"
        *_, part, _ = engine.split(".")
        if part not in _JOINED or ".mlp.merger" in engine:
            self._finish(engine, name, [tensor])
            return
        joined, wanted = _JOINED[part]
        engine = engine.replace(f".{part}.", f".{joined}.")
        parts = self._parts[engine]
        parts[part] = tensor.cpu()
        if len(parts) == len(wanted):
            self._finish(engine, name, [parts[each] for each in wanted])
            del self._parts[engine]

    def _finish(self, engine: str, name: str, tensors: list[Tensor]) -> None:
        for rank in range(self.workers):
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(bytes_of(self._piece(tensor, name, rank)))
            self._sums[rank, engine] = digest.hexdigest()

    def _piece(self, tensor: Tensor, name: str, rank: int) -> Tensor:
        if _VOCABULARY.search(name):
            missing = -len(tensor) % (VOCABULARY_BLOCK * self.workers)
            tensor = torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])
        if self.workers == 1:
            return tensor
        if _BY_COLUMNS.search(name):
            return tensor.chunk(self.workers, dim=1)[rank]
        if _BY_ROWS.search(name):
            return tensor.chunk(self.workers, dim=0)[rank]
        return tensor

    def differences(self, checksums: dict[str, str]) -> list[str]:
        """The weights of a server that are not what was sent, by vLLM's names.

        Args:
            checksums: answer of ``/weight_checker``. Weights that were not sent are not compared,
                nor those that the server holds in another form and has emptied (a CPU's products).
        """
        found = {}
        for key, value in checksums.items():
            if match := _WORKER.match(key):
                found[int(match["rank"]), match["name"]] = value
        return sorted(
            f"{name} (worker {rank})" if self.workers > 1 else name
            for (rank, name), expected in self._sums.items()
            if found.get((rank, name)) not in (expected, _EMPTY)
        )
