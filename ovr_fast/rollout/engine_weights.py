"""What a server's weights must be, from the tensors that are sent to it: their forms before a sync,
their checksums after it.

vLLM's parameters are joined from Hugging Face tensors, and cut over the workers, as below;
``weight_manifest`` gives the form of each on each worker, ``/weight_checker`` a SHA-256. The vision
side is compared where one worker holds it whole.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as List

import torch
from torch import Tensor

from ovr_fast.rollout.engine_manifest import form_of
from ovr_fast.rollout.gloo_transfer import bytes_of
from ovr_fast.shape.model_shape import ModelShape

_JOINED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj)\.weight$")
_BY_ROWS = re.compile(r"\.(q_proj|gate_proj|up_proj|embed_tokens)\.|^lm_head\.")
_KEYS_VALUES = re.compile(r"\.(k_proj|v_proj)\.")
_VOCABULARY = re.compile(r"(lm_head|embed_tokens)\.weight$")
_WORKER = re.compile(r"^(?:\w+:)*?tp(?P<rank>\d+):(?P<name>.+)$")

_EMPTY = hashlib.sha256(b"").hexdigest()

VOCABULARY_BLOCK = 64
"""vLLM fills the vocabulary up to a multiple of this, with zeros."""


def digest(parts: List[Tensor]) -> str:
    """SHA-256 of a parameter's bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(bytes_of(part))
    return found.hexdigest()


def form(parts: List[Tensor]) -> str:
    """Type and shape of a parameter; tensors without memory (``meta``) will do."""
    whole = torch.cat([*parts])
    return form_of(whole.shape, whole.dtype)


class Expected:
    """Fed with what is sent, in any order; then says which of a server's weights differ.

    Args:
        workers: tensor-parallel size of a server.
        shape: of the model. Where its embeddings are tied, vLLM has them once.
        measure: of a parameter that is joined of these parts along its rows: ``digest`` or
            ``form``.
    """

    def __init__(
        self,
        *,
        workers: int,
        shape: ModelShape,
        measure: Callable[[List[Tensor]], str] = digest,
    ) -> None:
        self.workers, self.measure = workers, measure
        self.tied, self.kv_heads = shape.tied_embeddings, shape.kv_heads
        self._parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._found: dict[tuple[int, str], str] = {}  # by worker and vLLM's name

    def add(self, name: str, tensor: Tensor) -> None:
        """One Hugging Face tensor, whole."""
        if name.startswith("visual.") and self.workers > 1:
            return
        if name == "lm_head.weight" and self.tied:
            return
        engine = name if name.startswith("visual.") else f"language_model.{name}"
        *_, part, _ = engine.split(".")
        if part not in _JOINED or ".mlp.merger" in engine:
            self._finish(engine, {name: tensor})
            return
        joined, wanted = _JOINED[part]
        engine = engine.replace(f".{part}.", f".{joined}.")
        parts = self._parts[engine]
        parts[part] = tensor if tensor.is_meta else tensor.cpu()
        if len(parts) == len(wanted):
            stem, kind = name.split(f".{part}.")
            self._finish(engine, {f"{stem}.{each}.{kind}": parts[each] for each in wanted})
            del self._parts[engine]

    def _finish(self, engine: str, tensors: dict[str, Tensor]) -> None:
        for rank in range(self.workers):
            pieces = [self._piece(tensor, name, rank) for name, tensor in tensors.items()]
            self._found[rank, engine] = self.measure(pieces)

    def _piece(self, tensor: Tensor, name: str, rank: int) -> Tensor:
        if _VOCABULARY.search(name):
            missing = -len(tensor) % VOCABULARY_BLOCK
            tensor = torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])
        if self.workers == 1:
            return tensor
        if _BY_COLUMNS.search(name):
            return tensor.chunk(self.workers, dim=1)[rank]
        if _KEYS_VALUES.search(name):  # a head is on several workers where they are more
            parts = min(self.workers, self.kv_heads)
            return tensor.chunk(parts, dim=0)[rank * parts // self.workers]
        if _BY_ROWS.search(name):
            return tensor.chunk(self.workers, dim=0)[rank]
        return tensor

    def differences(self, checksums: dict[str, str]) -> list[str]:
        """The weights of a server that are not what was sent, by vLLM's names.

        Args:
            checksums: answer of ``/weight_checker``. Weights that were not sent are not compared,
                nor those that the server holds in another form and has emptied (a CPU's products).
        """
        found = _by_worker(checksums)
        return sorted(
            self._named(key)
            for key, expected in self._found.items()
            if found.get(key) not in (expected, _EMPTY)
        )

    def misfits(self, manifest: dict[str, str]) -> list[str]:
        """Where a server's weights are not those that will be sent, in words.

        Args:
            manifest: answers of ``weight_manifest``, of all workers, by their names. Everything
                must have been added that is ever sent.

        Not compared: the vision side where a server has none (its prompts have no images), or has
        it on several workers; tied embeddings' second name, which a server has in mid-update.
        """
        found, expected = _by_worker(manifest), dict(self._found)
        if self.workers > 1 or not any(name.startswith("visual.") for _, name in found):
            found, expected = _without_vision(found), _without_vision(expected)
        if self.tied:
            found = {key: value for key, value in found.items() if "lm_head" not in key[1]}
        return [
            f"{self._named(key)} is {found.get(key, 'missing')} there and "
            f"{expected.get(key, 'missing')} here"
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)
        ]

    def _named(self, key: tuple[int, str]) -> str:
        rank, name = key
        return f"{name} (worker {rank})" if self.workers > 1 else name


def _without_vision(weights: dict[tuple[int, str], str]) -> dict[tuple[int, str], str]:
    return {key: value for key, value in weights.items() if not key[1].startswith("visual.")}


def _by_worker(answers: dict[str, str]) -> dict[tuple[int, str], str]:
    """vLLM's keys, taken apart."""
    matches = {key: _WORKER.match(key) for key in answers}
    return {(int(m["rank"]), m["name"]): answers[key] for key, m in matches.items() if m}
