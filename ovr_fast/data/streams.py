"""The prompts of a run: training streams and held-out sets, checked against the model's limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ovr_fast.config import Config, DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.images import image_limits
from ovr_fast.data.index import Job, ensure_store, prompt_tokens
from ovr_fast.data.prompts import Mixture, described, read
from ovr_fast.data.store import StoredPrompts, widest
from ovr_fast.records import ImageLimits, Prompt
from ovr_fast.settings import ConfigError

OnFirstRank = Callable[[Callable[[], Any]], Any]
"""Calls its argument on the first rank, while the others wait, and gives its result to all."""


@dataclass(slots=True)
class RunData:
    """All that a run reads, and what was found in it.

    Args:
        config: all settings.
        chat: the model's chat template.
        on_first_rank: reading is the first rank's work.
    """

    config: Config
    chat: ChatTemplate
    on_first_rank: OnFirstRank
    said: list[str]  # a line for each source
    dropped: list[str]  # the messages of rows that were left out
    limits: list[ImageLimits]  # of all that servers may be asked
    left_out: dict[str, int]  # rows or prompts that are too long, by recipe stage

    @classmethod
    def of(cls, config: Config, chat: ChatTemplate, on_first_rank: OnFirstRank) -> RunData:
        """Nothing read yet."""
        return cls(config, chat, on_first_rank, [], [], [], {})

    @property
    def image_limits(self) -> ImageLimits:
        """The most images of a prompt, and the largest sides of an image as the model sees it."""
        return widest(self.limits)

    def training_stream(self, recipe_stage: str) -> Mixture:
        """The prompts of "cold_start" or "rl", mixed by weight. Demonstrations longer than
        ``cold_start.row_tokens``, or prompts over ``rl.max_prompt_tokens``, are left out, counted.

        Raises:
            DataError: a source cannot be read, or all of its rows are too long.
        """
        cold = recipe_stage == "cold_start"
        sources = getattr(self.config, recipe_stage).sources
        what, setting = ("rows", "cold_start.row_tokens") if cold else (
            "prompts", "rl.max_prompt_tokens"
        )  # fmt: skip
        limit = self.config.cold_start.row_tokens if cold else self.config.rl.max_prompt_tokens
        pools = []
        for source in sources:
            pool = self._open(source, need="response" if cold else "answer")
            short = pool.within(limit)
            if not len(short):
                raise DataError(
                    f"{source.path}: all {len(pool)} {what} are longer than {setting}={limit}"
                )
            if len(short) < len(pool):
                left = len(pool) - len(short)
                self.left_out[recipe_stage] = self.left_out.get(recipe_stage, 0) + left
                self.said[-1] += f"; {left:,} {what} over {limit:,} tokens left out"
            if not cold:
                self.limits.append(short.image_limits())
            pools.append(short)
        return Mixture(pools, [source.weight for source in sources], seed=self.config.run.seed)

    def _open(self, source: DataSource, *, need: str) -> StoredPrompts:
        run, chat = self.config.run, self.chat
        job = Job(source, need, self.config.cold_start.turns, str(chat.folder), chat.image_token_id)
        cache = Path(run.data_cache or Path(run.root) / "data_cache")
        folder = Path(
            self.on_first_rank(
                lambda: str(ensure_store(job, chat, cache, workers=run.data_workers))
            )
        )
        meta = json.loads((folder / "meta.json").read_text())
        self.said.append(described(source.path, meta))
        self.dropped += meta["dropped"]
        return StoredPrompts(folder)

    def evaluation_sets(self) -> dict[str, tuple[Prompt, ...]]:
        """The held-out prompts by the name of their set.

        Raises:
            ConfigError: two sets have one name.
            DataError: a source cannot be read, or a prompt is over ``rl.max_prompt_tokens``.
        """
        sets: dict[str, tuple[Prompt, ...]] = {}
        for source in self.config.evaluation.sources:
            name = source.name or Path(source.path).stem
            if name in sets:
                raise ConfigError(f"two evaluation.sources are called {name!r}; give them names")
            prompts, line, dropped, limits = self.on_first_rank(partial(self._held_out, source))
            sets[name] = tuple(prompts)
            self.said.append(line)
            self.dropped += dropped
            self.limits.append(limits)
        return sets

    def _held_out(self, source: DataSource) -> tuple[list[Prompt], str, list[str], ImageLimits]:
        chat, limit = self.chat, self.config.rl.max_prompt_tokens
        prompts, lengths, reading = read(
            source, need="answer", measure=prompt_tokens(chat),
            limit=self.config.evaluation.prompts,
        )  # fmt: skip
        for prompt, tokens in zip(prompts, lengths, strict=True):
            if tokens > limit:
                raise DataError(
                    f"{source.path}: {prompt.id} is longer than rl.max_prompt_tokens={limit}; "
                    "raise it or remove the row"
                )
        return (
            prompts,
            reading.describe(),
            reading.dropped,
            image_limits(prompts, chat.image_processor),
        )
