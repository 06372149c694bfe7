"""The shape of a Qwen2.5-VL, read from a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovr_fast.errors import ModelError
from ovr_fast.settings import ConfigError
from ovr_fast.torchvision_ops import declare_if_broken


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """The vision tower and its merger."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    channels: int
    merge_size: int  # patches per visual token along each side
    window_size: int  # pixels along each side
    full_attention_layers: tuple[int, ...]
    out_hidden: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patch_dim(self) -> int:
        """Values in one patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The language model, and the ids it shares with the tokenizer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope_base: float
    mrope_sections: tuple[int, int, int]
    max_positions: int
    tied_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionShape

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def check_tensor_parallel(self, tensor: int) -> None:
        """Raises ConfigError if the model cannot be sharded over ``tensor`` ranks."""
        for what, size in (
            ("attention heads", self.heads),
            ("key/value heads", self.kv_heads),
            ("MLP width", self.intermediate),
            ("vocabulary", self.vocab),
        ):
            if size % tensor:
                raise ConfigError(
                    f"parallel.tensor={tensor} does not divide the model's {what} ({size})"
                )

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of one decoder layer, of one embedding (input or output), and of the whole
        language model, vision tower and merger."""
        kv = self.kv_heads * self.head_dim
        layer = (
            self.hidden * (self.hidden + 2 * kv)
            + self.hidden
            + 2 * kv
            + self.hidden**2
            + 3 * self.hidden * self.intermediate
            + 2 * self.hidden
        )
        embedding = self.vocab * self.hidden
        embeddings = embedding * (1 if self.tied_embeddings else 2)
        v = self.vision
        block = (
            4 * v.hidden**2
            + 4 * v.hidden
            + 3 * v.hidden * v.intermediate
            + 2 * v.intermediate
            + v.hidden
            + 2 * v.hidden
        )
        wide = v.hidden * v.merge_size**2
        return {
            "layer": layer,
            "embedding": embedding,
            "language": self.layers * layer + embeddings + self.hidden,
            "tower": v.patch_dim * v.hidden + v.layers * block,
            "merger": v.hidden
            + wide * wide
            + wide
            + wide * self.vision.out_hidden
            + self.vision.out_hidden,
        }


def read_shape(folder: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder, in the published or the transformers 5 form.

    Raises:
        ModelError: no such folder, no ``config.json``, another architecture, or a variant that
            this trainer does not have (sliding window, scaled rotary embedding).
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist; model.path must be a Hugging Face folder of a Qwen2.5-VL"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); fetch it again") from error
    kind = raw.get("model_type")
    if kind != "qwen2_5_vl":
        raise ModelError(f"{folder} holds a {kind!r} model; this trainer is for qwen2_5_vl")
    declare_if_broken()
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig.from_pretrained(folder)
    text: Any = config.text_config
    vision: Any = config.vision_config
    rope = text.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "mrope"):
        raise ModelError(f"{folder}: rotary embedding {rope['rope_type']!r} is not supported")
    if any(kind != "full_attention" for kind in text.layer_types):
        raise ModelError(f"{folder}: sliding-window attention is not supported")
    return ModelShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=text.intermediate_size,
        vocab=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope_base=rope["rope_theta"],
        mrope_sections=tuple(rope.get("mrope_section", (16, 24, 24))),
        max_positions=text.max_position_embeddings,
        tied_embeddings=config.tie_word_embeddings,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision=VisionShape(
            hidden=vision.hidden_size,
            layers=vision.depth,
            heads=vision.num_heads,
            intermediate=vision.intermediate_size,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            channels=vision.in_channels,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            full_attention_layers=tuple(vision.fullatt_block_indexes),
            out_hidden=vision.out_hidden_size,
        ),
    )
