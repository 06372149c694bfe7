"""The models of each recipe stage, wired once for training, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.learner.learner import Learner
from ovr_fast.learner.passes import FrozenModel, build_model
from ovr_fast.model.attention import attention_kernel, check_attention
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.vision_encoder import VisionEncoder, VisionEncoders
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.settings import ConfigError
from ovr_fast.shape.model_shape import ModelShape
from ovr_kernels import reference as reference_operators
from ovr_kernels.selection import describe as describe_operators
from ovr_kernels.selection import operators_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a PPO step: actor and critic, which it trains, the frozen reference of the KL
    term, and their vision encoders. A group's baseline takes the critic's place."""

    mesh: Mesh
    chat: ChatTemplate
    actor: Learner
    critic: Learner | None  # None where rl.advantage is not a critic's
    reference: FrozenModel | None  # None where the KL term is off
    vision: VisionEncoders

    @property
    def operators(self) -> Any:
        """The operators of this device, Triton or PyTorch (``ovr_kernels.selection``)."""
        return self.actor.model.operators


EncoderClass = Callable[..., VisionEncoder]


def vision_encoder(
    model: Qwen25VLStage, config: Config, chat: ChatTemplate, make: EncoderClass = VisionEncoder
) -> VisionEncoder:
    """The encoder of a model's images, with the settings' budgets."""
    return make(
        model.visual,
        model.shape.vision,
        model.mesh,
        chat.image_processor,
        patch_budget=config.model.vision_patches,
        cache_mib=config.model.vision_cache_mib,
    )


def build_ppo(
    config: Config,
    shape: ModelShape,
    mesh: Mesh,
    chat: ChatTemplate,
    *,
    weights: Path,
    make_encoder: EncoderClass = VisionEncoder,
) -> Models:
    """Actor, critic (but with ``rl.advantage=group``) and, with a KL term, reference, all from the
    same weights.

    A frozen tower is one module, and its visual tokens are shared; a trained one is each model's
    own.

    Args:
        weights: Hugging Face folder.
        make_encoder: benchmarks put a naive one here.
    """
    rl, frozen = config.rl, config.model.train_vision == "frozen"

    def learner(name: str, model: Qwen25VLStage, vision: VisionEncoder) -> Learner:
        return Learner(
            name,
            model,
            vision,
            getattr(rl, name),
            decay=rl.decay,
            total_steps=rl.steps * (rl.policy_steps if name == "actor" else rl.critic_steps),
            offload=config.parallel.offload,
        )

    actor_model = build_model(shape, mesh, config.model, weights=weights)
    tower = actor_model.visual if frozen else None
    vision = vision_encoder(actor_model, config, chat, make_encoder)
    encoders = [vision]
    critic_model = None
    if rl.has_critic:
        critic_model = build_model(
            shape, mesh, config.model, weights=weights, value_head=True, seed=config.run.seed,
            tower=tower,
        )  # fmt: skip
        if not frozen:
            encoders.append(vision_encoder(critic_model, config, chat, make_encoder))
    reference = None
    if rl.kl_coef:
        reference_model = build_model(
            shape, mesh, config.model, weights=weights, train_vision="frozen", tower=tower
        ).requires_grad_(False)
        if not frozen:
            encoders.append(vision_encoder(reference_model, config, chat, make_encoder))
        reference = FrozenModel(reference_model, encoders[-1])
    critic = critic_model and (critic_model, vision if frozen else encoders[1])
    return Models(
        mesh=mesh,
        chat=chat,
        actor=learner("actor", actor_model, vision),
        critic=None if critic is None else learner("critic", *critic),
        reference=reference,
        vision=VisionEncoders(encoders),
    )


def build_whole(
    config: Config, shape: ModelShape, mesh: Mesh, chat: ChatTemplate, *, weights: Path
) -> FrozenModel:
    """A model of which no part counts as frozen, to give servers all of its weights."""
    model = build_model(shape, mesh, config.model, weights=weights, train_vision="full")
    return FrozenModel(model, vision_encoder(model, config, chat))


def build_cold_start(
    config: Config, shape: ModelShape, mesh: Mesh, chat: ChatTemplate, *, weights: Path
) -> Learner:
    """The cold start's model; its vision side is always frozen."""
    model = build_model(shape, mesh, config.model, weights=weights, train_vision="frozen")
    return Learner(
        "cold_start",
        model,
        vision_encoder(model, config, chat),
        config.cold_start.optimizer,
        decay=config.cold_start.decay,
        total_steps=config.cold_start.steps,
        offload=config.parallel.offload,
    )


def check_operators(config: Config, shape: ModelShape, mesh: Mesh) -> str:
    """Which kernels run, as a line of a log; Triton's are first compared with their references at
    this model's shapes, and a GPU's attention with float32.

    Raises:
        ConfigError: ``model.kernels`` cannot run here, or a kernel differs from its reference.
    """
    device, dtype = mesh.device, getattr(torch, config.model.dtype)
    try:
        operators = operators_for(device, config.model.kernels)
    except ValueError as error:
        raise ConfigError(f"model.kernels={config.model.kernels}: {error}") from error
    if device.type == "cuda":
        from ovr_kernels.parity import ParityError, Shapes, check_parity
    if operators is not reference_operators:
        shapes = Shapes(
            hidden=shape.hidden,
            vocab=shape.vocab // mesh.tp,
            intermediate=shape.intermediate // mesh.tp,
            heads=(shape.heads + 2 * shape.kv_heads) // mesh.tp,
            head_dim=shape.head_dim,
            rope_base=shape.rope_base,
            sections=shape.mrope_sections,
            vision_hidden=shape.vision.hidden,
            vision_intermediate=shape.vision.intermediate,
            vision_head_dim=shape.vision.head_dim,
            temperature=config.rollout.temperature,
        )
        try:
            check_parity(shapes, device=device, dtype=dtype)
        except ParityError as error:
            raise ConfigError(f"{error}; or run with model.kernels=reference") from error
    if device.type == "cuda" and (dtype is not torch.float32 or config.rl.share_prefixes):
        try:
            check_attention(
                heads=shape.heads // mesh.tp,
                kv_heads=shape.kv_heads // mesh.tp,
                head_dim=shape.head_dim,
                device=device,
                dtype=dtype,
                share_prefixes=config.rl.share_prefixes,
            )
        except ParityError as error:
            raise ConfigError(str(error)) from error
    return (
        f"attention: {attention_kernel(device.type, dtype)}; "
        f"operators: {describe_operators(operators, device)}"
    )


def trained_parameters(learner: Learner) -> str:
    """How many parameters of each part this rank trains, as a line of a log."""
    parts: dict[str, int] = {}
    for name, parameter in learner.model.named_parameters():
        part = "language"
        if name.startswith("visual."):
            part = "merger" if name.startswith("visual.merger") else "tower"
        parts[part] = parts.get(part, 0) + parameter.requires_grad * parameter.numel()
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    return f"{learner.name} trains (on this rank): {counts}"
