"""Settings: what a user can get wrong, and what the file formats promise."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from ovr_fast.config import Config, OptimizerConfig, load_config
from ovr_fast.learner.rate import learning_rate
from ovr_fast.plan.describe import describe
from ovr_fast.plan.memory import PARTS, MemoryPlan, memory_plan
from ovr_fast.settings import (
    ConfigError,
    Rule,
    describe_settings,
    settings_of,
    settings_table,
    to_toml,
)
from ovr_fast.shape.folder import PUBLISHED, find_model
from ovr_fast.shape.model_shape import read_shape

CONFIGS = Path(__file__).parents[2] / "configs"


def load(*overrides: str) -> Config:
    return load_config(CONFIGS / "tiny.toml", list(overrides))


def test_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    for file in CONFIGS.glob("*.toml"):
        config = load_config(file)
        for described in (False, True):
            (tmp_path / "config.toml").write_text(to_toml(config, described=described))
            assert load_config(tmp_path / "config.toml") == config


def test_overrides_take_toml_values_and_bare_words() -> None:
    config = load("rl.actor.lr=1e-5", "run.name=other", "rollout.stop=['a', 'b']", "rl.gamma=1")
    assert config.rl.actor.lr == 1e-5
    assert config.run.name == "other"
    assert config.rollout.stop == ("a", "b")
    assert config.rl.gamma == 1.0


def test_a_section_given_in_part_keeps_its_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'run.stages = ["rl"]\nmodel.path = "m"\nrl.steps = 1\nrl.sources = [{path = "d"}]\n'
        "rl.actor.beta1 = 0.8\nrl.critic.beta1 = 0.8\n"
        "rl.max_tokens_per_microbatch = 65536\n"
    )
    config = load_config(tmp_path / "a.toml")
    assert (config.rl.actor.beta1, config.rl.actor.lr) == (0.8, 1e-6)
    assert (config.rl.critic.beta1, config.rl.critic.lr) == (0.8, 5e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.clip_epsilon=0.1", "unknown setting rl.clip_epsilon; did you mean rl.clip_eps?"),
        ("rl.learning_rate=0.1", "unknown setting rl.learning_rate"),
        ("paralel.tensor=2", "did you mean parallel"),
        ("rl.steps=many", "rl.steps='many' must be a int"),
        ("rl.gamma=2.0", "rl.gamma=2.0 must be at least 0 and at most 1"),
        ("rl.max_tokens_per_microbatch=100", "shorter than one prompt and response"),
        ("rl.critic_steps=3", None),
        ("run.stages=['rl', 'cold_start']", "in that order"),
        ("model.dtype=float16", "model.dtype='float16' is not one of bfloat16, float32"),
        ("rl.policy_steps=3", "must be a multiple"),
        ("rollout.servers=0", "set one of rollout.servers, rollout.urls and rollout.expect"),
        ("rl", "not of the form section.key=value"),
        ("rl.actor.min_lr=1.0", "rl.actor.min_lr=1.0 is over rl.actor.lr=0.00015"),
        ("run.name=a/../b", "run.name='a/../b' must be a folder's name"),
        ("rollout.urls=localhost:8000", "must begin with http://, https:// or unix:/"),
        ('rl.sources=[{path="a", weight=nan}]', "rl.sources[0].weight=nan must be a finite"),
        ("rl.prompts_per_step=-8", "rl.prompts_per_step=-8 must be at least 1"),
    ],
)
def test_a_wrong_setting_is_one_message_that_names_it(override: str, message: str | None) -> None:
    if message is None:
        load(override)
        return
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert message in str(caught.value)


def bounds(rule: Rule, whole: bool) -> list[tuple[float, bool]]:
    """A value on each side of each bound, and whether it is allowed."""
    step = 1 if whole else 1e-6
    cases: list[tuple[float, bool]] = []
    for bound, inside, outside in (
        (rule.at_least, 0, -step), (rule.over, step, 0), (rule.at_most, 0, step),
        (rule.under, -step, 0),
    ):  # fmt: skip
        if bound is not None:
            cases += [(bound + inside, True), (bound + outside, False)]
    if not whole:
        cases += [(math.inf, False), (-math.inf, False), (math.nan, False)]
    return cases


NUMBERS = [
    (setting.name, setting.rule, isinstance(setting.value, int))
    for setting in settings_of(load("rl.context_tokens=[96]"))
    if isinstance(setting.value, int | float) and not isinstance(setting.value, bool)
]
TESTED_TOGETHER = {"rollout.servers"}
"""Bounds that another setting has to follow: with no servers, urls."""


@pytest.mark.parametrize(("name", "rule", "whole"), NUMBERS, ids=[name for name, *_ in NUMBERS])
def test_every_number_is_held_to_its_range(name: str, rule: Rule, whole: bool) -> None:
    assert whole or rule.range, f"{name} has no range"
    assert bounds(rule, whole), f"{name} has no range"
    for value, allowed in bounds(rule, whole):
        value = int(value) if whole else float(value)
        assert bool(rule.problem(value)) != allowed, (name, value)
        if not allowed:
            with pytest.raises(ConfigError, match="must be"):
                set_value(name, value)


def set_value(name: str, value: object) -> Config:
    """The toy's settings with one value, which may be of an item of a list."""
    match = re.fullmatch(r"(.*)\[(\d+)\]\.(\w+)", name)
    if match is None:
        return load(f"{name}={value!r}")
    sources, _, key = match.groups()
    return load(f'{sources}=[{{path="a", {key}={value!r}}}]')


def test_every_choice_is_checked_and_every_setting_described() -> None:
    for setting in settings_of(load()):
        assert len(setting.rule.meaning) >= 10, setting.name
        if setting.rule.choices and isinstance(setting.value, str):
            with pytest.raises(ConfigError, match="is not one of"):
                set_value(setting.name, "other")
            for choice in setting.rule.choices:
                assert not setting.rule.problem(choice)
    names = {setting.name for setting in settings_of(load()) if "[" not in setting.name}
    page, text = settings_table(Config), describe_settings(Config)
    assert all(f"`{name}`" in page for name in names)
    assert "| `cold_start.optimizer.lr` | float | `0.0002` |" in page  # the section's own default
    assert all(f"  {name}: " in text for name in names)


def test_the_settings_page_is_that_of_the_code() -> None:
    page = (CONFIGS / "SETTINGS.md").read_text()
    assert page == settings_table(Config), "python -m ovr_fast.config > configs/SETTINGS.md"


@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-8-sig", ""), ("utf-16", "not UTF-8"), ("latin-1", "not UTF-8")]
)
def test_files_in_other_encodings(tmp_path: Path, encoding: str, message: str) -> None:
    text = (CONFIGS / "tiny.toml").read_text() + "\n# \u00fc\n"
    (tmp_path / "a.toml").write_text(text, encoding=encoding)
    if not message:
        assert load_config(tmp_path / "a.toml") == load()
        return
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.toml")


def test_the_rate_warms_up_and_decays_as_the_paper_s() -> None:
    settings = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=4)

    def rates(decay: str, updates: tuple[int, ...]) -> list[float]:
        return [learning_rate(n, settings, decay=decay, total=12) for n in updates]

    assert rates("constant", (1, 2, 4, 5, 12)) == [0.25, 0.5, 1.0, 1.0, 1.0]
    # By hand: after the warm-up 8 steps, halfway the mean of both, then the minimum and no less.
    assert rates("cosine", (4, 5, 9, 13, 20)) == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])
    plain = OptimizerConfig(lr=1e-6)
    assert learning_rate(1, plain, decay="constant", total=0) == 1e-6


def test_the_published_shapes_have_the_published_sizes() -> None:
    totals = {
        path.name: sum(
            map(read_shape(path).parameter_counts().get, ("language", "tower", "merger"))
        )
        for path in PUBLISHED.iterdir()
    }
    assert totals == {
        "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
        "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    }


SOURCES = ("[paper]", "[ORZ]", "[ours]", "[derived]", "[GRPO]")


@pytest.mark.parametrize(
    ("name", "ranks", "data"),
    [
        ("ovr_7b_cold_start", 64, 8),
        ("ovr_7b_rl", 32, 4),
        ("ovr_7b_grpo", 32, 4),
        ("ovr_3b_rl", 8, 8),
        ("ovr_72b_rl", 64, 1),
    ],
)
def test_the_papers_settings_plan_for_64_gpus(name: str, ranks: int, data: int) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
    plan = describe(config, shape, ranks)
    assert f"{ranks} ranks = " in plan
    assert f" x data {data}\n" in plan
    for line in (CONFIGS / f"{name}.toml").read_text().splitlines():
        setting = line.split("#")[0].strip()
        if "=" in setting and not setting.startswith("#"):  # every number with its source
            assert any(mark in line for mark in SOURCES) or (
                line.startswith("name =") or "stages" in line
            ), line


def test_both_layouts_fit_and_the_file_says_what_is_counted() -> None:
    text = (CONFIGS / "ovr_7b_rl.toml").read_text()
    header = text[: text.index("[run]")]
    begin = header.index("parallel.world=8")
    words = header[begin : header.rindex("# --dry-run counts:")].replace("#", "")
    overrides = [word for word in words.split() if "=" in word]
    for world, more in ((32, []), (8, overrides)):
        config = load_config(CONFIGS / "ovr_7b_rl.toml", more)
        shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
        plan = memory_plan(config, shape, world, recipe_stage="rl")
        assert plan.total < 70
        lines = [line.strip() for line in describe(config, shape, world).splitlines()]
        (counted,) = [line.split(maxsplit=2)[2] for line in lines if line.startswith("memory, rl")]
        assert f"#   {counted}" in header
    for line in lines:
        if "GiB stay while" in line or "GiB of the host" in line:
            assert f"#   {line}" in header  # of the second
    node = round(8 * plan.host_total)
    assert f"a node of 8 needs {node} GiB" in header
    assert plan.server * 2**30 == 2 * sum(shape.parameter_counts()[part] for part in PARTS)


@pytest.mark.parametrize(
    ("name", "world", "more"),
    [
        ("ovr_3b_rl", 8, []),
        (
            "ovr_3b_rl",
            1,
            [
                "parallel.world=1",
                "rollout.servers=1",
                "rl.prompts_per_step=8",
                "rl.samples_per_prompt=8",
            ],
        ),
        ("ovr_7b_grpo", 32, []),
        ("ovr_72b_rl", 64, []),
        ("ovr_72b_rl", 128, ["parallel.world=128"]),
    ],
)
def test_the_other_sizes_fit_and_say_so(name: str, world: int, more: list[str]) -> None:
    config = load_config(CONFIGS / f"{name}.toml", more)
    shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
    assert memory_plan(config, shape, world, recipe_stage="rl").card < 79.6
    lines = describe(config, shape, world).splitlines()
    (counted,) = [line.split(maxsplit=2)[2] for line in lines if line.startswith("memory, rl")]
    text = (CONFIGS / f"{name}.toml").read_text()
    assert f"#   {counted}" in text
    assert all(word in text for word in more)


def test_a_layout_that_does_not_fit_is_named() -> None:
    config = load_config(CONFIGS / "ovr_7b_rl.toml", ["model.recompute=selective"])
    shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
    assert "DOES NOT FIT a card of 79.6 GiB; most of it is activations" in describe(
        config, shape, 32
    )
    fitting = load_config(CONFIGS / "ovr_7b_rl.toml")
    assert "DOES NOT FIT" not in describe(fitting, shape, 32)


def test_recomputing_and_offloading_are_in_the_plan() -> None:
    def plan(*overrides: str) -> MemoryPlan:
        config = load_config(CONFIGS / "ovr_7b_rl.toml", list(overrides))
        shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
        return memory_plan(config, shape, 32, recipe_stage="rl")

    plans = [plan(f"model.recompute={r}") for r in ("none", "selective", "full")]
    # By hand: 15 layers x 2 microbatches x 53,248 tokens / 4 ranks of 7 KiB (a hidden state), or of
    # 171 KiB (13 hidden states, 2 x 512 of keys and values twice, 3 MLP widths).
    tokens = 53_248 / 2**30
    kept = [each.activations for each in plans]
    assert kept[2] == pytest.approx(tokens / 4 * 30 * 7168, rel=1e-3)
    assert kept[0] == pytest.approx(tokens / 4 * 30 * 175_104, rel=1e-3)
    assert kept[1] == pytest.approx(kept[0] * 38.25 / 42.75, rel=1e-3)
    # Of a layer's backward: what is computed again, gradients of 3 hidden states of whole sequences
    # and of 2 MLP widths of this rank's, and of its gate and up projection's weight.
    gradients = tokens * 2 * (3 * 3584 + 2 * 18_944 / 4) + 2 * 2 * 18_944 * 3584 / 4 / 2**30
    again = [0.0, tokens / 4 * 175_104 * (1 - 38.25 / 42.75), tokens / 4 * (175_104 - 7168)]
    for each, more in zip(plans, again, strict=True):
        assert each.layer == pytest.approx(more + gradients, rel=2e-3)
    moved = [plan(f"parallel.offload={o}") for o in ("none", "optimizer", "model")]
    assert moved[0].optimizer > 1.5 * moved[1].optimizer
    assert moved[1].optimizer == moved[2].optimizer
    assert moved[0].weights == moved[1].weights > moved[2].weights
    assert moved[0].waiting > moved[1].waiting > moved[2].waiting


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=8"], 64, "does not divide the model's attention heads (28)"),
        (["parallel.tensor=4", "parallel.pipeline=5"], 64, "does not divide the 64 processes"),
        (["parallel.tensor=1", "parallel.pipeline=32"], 64, "more than the 28 layers"),
        (["rl.prompts_per_step=1"], 64, "too few for rl.critic_steps"),
        (
            [
                "rl.max_response_tokens=130000",
                "rl.max_tokens_per_microbatch=200000",
                "rl.context_tokens=[]",
                "rl.context_steps=[]",
            ],
            64,
            "positions",
        ),
    ],
)
def test_a_layout_that_does_not_fit_says_what_does_not_divide(
    overrides: list[str], world: int, message: str
) -> None:
    config = load_config(CONFIGS / "ovr_7b_rl.toml", overrides)
    shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
    with pytest.raises(ConfigError) as caught:
        describe(config, shape, world)
    assert message in str(caught.value)
