"""The prompts of a run: training streams and held-out sets, checked against the model's limits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.images import ImageProcessor
from ovr_fast.data.prompts import Length, Mixture, Reading, read
from ovr_fast.data.rows import render
from ovr_fast.records import ImageLimits, Prompt
from ovr_fast.settings import ConfigError


def training_stream(
    config: Config, recipe_stage: str, chat: ChatTemplate, readings: list[Reading]
) -> Mixture:
    """The prompts of "cold_start" or "rl", mixed by weight; RL prompts over
    ``rl.max_prompt_tokens`` are dropped and counted.

    Args:
        readings: gets what was found in each source.

    Raises:
        DataError: a source cannot be read, or all of its prompts are too long.
    """
    cold = recipe_stage == "cold_start"
    sources, limit, pools = getattr(config, recipe_stage).sources, config.rl.max_prompt_tokens, []
    for source in sources:
        if cold:
            pool, _, reading = read(source, need="response")
            render(pool[0], chat)  # a template that cannot be continued shows in the first row
        else:
            pool, lengths, reading = read(source, need="answer", length=prompt_length(chat))
            short = [p for p, tokens in zip(pool, lengths, strict=True) if tokens <= limit]
            if not short:
                raise DataError(
                    f"{source.path}: all {len(pool)} prompts are longer than "
                    f"rl.max_prompt_tokens={limit}"
                )
            if len(short) < len(pool):
                reading.notes[f"prompts over {limit:,} tokens left out"] += len(pool) - len(short)
            pool = short
        pools.append(pool)
        readings.append(reading)
    return Mixture(pools, [source.weight for source in sources], seed=config.run.seed)


def evaluation_sets(
    config: Config, chat: ChatTemplate, readings: list[Reading]
) -> dict[str, tuple[Prompt, ...]]:
    """The held-out prompts by the name of their set.

    Args:
        readings: gets what was found in each source.

    Raises:
        ConfigError: two sets have one name.
        DataError: a source cannot be read, or a prompt is over ``rl.max_prompt_tokens``.
    """
    sets: dict[str, tuple[Prompt, ...]] = {}
    most, limit = config.evaluation.prompts, config.rl.max_prompt_tokens
    for source in config.evaluation.sources:
        name = source.name or Path(source.path).stem
        if name in sets:
            raise ConfigError(f"two evaluation.sources are called {name!r}; give them names")
        prompts, lengths, reading = read(
            source, need="answer", length=prompt_length(chat), limit=most
        )
        for prompt, tokens in zip(prompts, lengths, strict=True):
            if tokens > limit:
                raise DataError(
                    f"{source.path}: {prompt.id} is longer than rl.max_prompt_tokens={limit}; "
                    "raise it or remove the row"
                )
        sets[name] = tuple(prompts)
        readings.append(reading)
    return sets


def prompt_length(chat: ChatTemplate) -> Length:
    """Counts a prompt's tokens, as servers will be asked it."""

    def count(prompt: Prompt) -> int:
        return len(chat.encode(prompt.messages, prompt.images, generation_prompt=True))

    return count


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
