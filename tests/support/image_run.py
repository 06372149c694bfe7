"""PPO steps on invented rollouts about images, for tests and benchmarks."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ovr_fast.config import Config, OptimizerConfig, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.images import load_image
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.mesh import Mesh, start_mesh
from ovr_fast.recipe.build import Models, build_ppo
from ovr_fast.records import ImageFile, Prompt, Rollout, RolloutBatch, VersionSpan
from ovr_fast.shape.model_shape import read_shape
from support.toy_run import ROOT

SAMPLES = 16


@functools.cache
def lone_mesh() -> Mesh:
    """The mesh of this process alone. One for all tests: each new one brings a dozen process groups
    with threads that last as long as the process (4,400 of them once took a whole core)."""
    return start_mesh(tensor=1, pipeline=1)


def settings(folder: Path, *overrides: str, lr: float) -> Config:
    """The toy's settings for another model, at one constant rate."""
    config = load_config(ROOT / "configs" / "tiny.toml", [f"model.path={folder}", *overrides])
    optimizer = OptimizerConfig(lr=lr)
    rl = replace(config.rl, actor=optimizer, critic=optimizer, decay="constant")
    return replace(config, rl=rl)


def build(
    folder: Path, config: Config, mesh: Mesh | None = None, make_encoder: type = VisionEncoder
) -> Models:
    """Actor and critic of a model folder, wired as the trainer wires them."""
    shape = read_shape(folder)
    chat = ChatTemplate(folder, image_token_id=shape.image_token_id)
    return build_ppo(
        config, shape, mesh or lone_mesh(), chat, weights=folder, make_encoder=make_encoder
    )


def an_image(seed: int, size: tuple[int, int] = (90, 61)) -> ImageFile:
    """Noise of a height and width."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return load_image(buffer.getvalue(), origin=f"image {seed}")


def image_settings(folder: Path, train_vision: str) -> Config:
    """Settings for ``image_rollouts``."""
    more = [f"model.train_vision={train_vision}", "rl.max_tokens_per_microbatch=4096"]
    return settings(folder, *more, lr=1e-4)


def image_rollouts(
    chat: ChatTemplate, count: int = 4, size: tuple[int, int] = (90, 61)
) -> RolloutBatch:
    """``SAMPLES`` responses to each of ``count`` prompts; all but the last have an image."""
    rng = np.random.default_rng(0)
    prompts, rollouts = [], []
    for index in range(count):
        images = (an_image(index, size),) if index < count - 1 else ()
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "how many red?"}]
        messages = ({"role": "user", "content": content},)
        prompts.append(
            Prompt(id=f"prompt {index}", data_source="test", messages=messages, images=images,
                   answer="1", response=None)
        )  # fmt: skip
        tokens = chat.encode(messages, images, generation_prompt=True)
        for sample in range(SAMPLES):
            response = rng.integers(5, 100, size=int(rng.integers(2, 9)))
            rollouts.append(a_rollout(index, sample, tokens, response, reward=sample % 2))
    return RolloutBatch(step=1, prompts=tuple(prompts), rollouts=tuple(rollouts))


def a_rollout(
    prompt: int,
    sample: int,
    prompt_tokens: np.ndarray,
    response_tokens: np.ndarray,
    *,
    reward: float,
    logprobs: np.ndarray | None = None,
) -> Rollout:
    """A finished response; its log-probs are 0 if none are given."""
    if logprobs is None:
        logprobs = np.zeros(len(response_tokens), dtype=np.float32)
    return Rollout(
        prompt_index=prompt,
        sample_index=sample,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        rollout_logprobs=logprobs,
        text="",
        finish_reason="stop",
        versions=(VersionSpan(0, 0),),
        reward=float(reward),
        outcome="correct" if reward else "wrong",
    )
