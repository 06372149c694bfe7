"""The prompts of a run: training streams and held-out sets, checked against the model's limits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.images import ImageProcessor
from ovr_fast.data.prompts import Mixture, read_source
from ovr_fast.records import ImageLimits, Prompt
from ovr_fast.settings import ConfigError


def training_stream(config: Config, recipe_stage: str, chat: ChatTemplate) -> Mixture:
    """The prompts of "cold_start" or "rl", mixed by weight; RL prompts over
    ``rl.max_prompt_tokens`` are dropped, and their number printed.

    Raises:
        DataError: a source cannot be read, or all of its prompts are too long.
    """
    if recipe_stage == "cold_start":
        sources = config.cold_start.sources
        pools = [read_source(source, need="response") for source in sources]
        return Mixture(pools, [source.weight for source in sources], seed=config.run.seed)
    sources, limit, pools = config.rl.sources, config.rl.max_prompt_tokens, []
    for source in sources:
        pool = read_source(source, need="answer")
        short = [prompt for prompt in pool if _length(prompt, chat) <= limit]
        if not short:
            raise DataError(
                f"{source.path}: all {len(pool)} prompts are longer than "
                f"rl.max_prompt_tokens={limit}"
            )
        if len(short) < len(pool) and os.environ.get("RANK", "0") == "0":
            print(f"{source.path}: dropped {len(pool) - len(short)} prompts over {limit} tokens")
        pools.append(short)
    return Mixture(pools, [source.weight for source in sources], seed=config.run.seed)


def evaluation_sets(config: Config, chat: ChatTemplate) -> dict[str, tuple[Prompt, ...]]:
    """The held-out prompts by the name of their set.

    Raises:
        ConfigError: two sets have one name.
        DataError: a source cannot be read, or a prompt is over ``rl.max_prompt_tokens``.
    """
    sets: dict[str, tuple[Prompt, ...]] = {}
    for source in config.evaluation.sources:
        name = source.name or Path(source.path).stem
        if name in sets:
            raise ConfigError(f"two evaluation.sources are called {name!r}; give them names")
        sets[name] = tuple(read_source(source, need="answer", limit=config.evaluation.prompts))
        for prompt in sets[name]:
            if _length(prompt, chat) > config.rl.max_prompt_tokens:
                raise DataError(
                    f"{source.path}: {prompt.id} is longer than rl.max_prompt_tokens="
                    f"{config.rl.max_prompt_tokens}; raise it or remove the row"
                )
    return sets


def _length(prompt: Prompt, chat: ChatTemplate) -> int:
    return len(chat.encode(prompt.messages, prompt.images, generation_prompt=True))


def image_limits(prompts: Iterable[Prompt], processor: ImageProcessor) -> ImageLimits:
    """The most images of a prompt, and the largest sides of an image as the model sees it."""
    count = width = height = 0
    for prompt in prompts:
        count = max(count, len(prompt.images))
        for image in prompt.images:
            _, rows, columns = processor.grid(image)
            width = max(width, columns * processor.patch_size)
            height = max(height, rows * processor.patch_size)
    return ImageLimits(count=count, width=width, height=height)
