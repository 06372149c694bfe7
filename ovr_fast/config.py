"""Settings: frozen dataclasses, one per concern, from a TOML file and ``section.key=value``.

The string under a field says what it is, its unit, its range, what switches it off, and where the
default comes from. An unknown key, a wrong type or a contradiction ends with one message.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REWARD_METHODS = ("exact", "math_verify")
FROZEN_PARTS: dict[str, tuple[str, ...]] = {
    "frozen": ("tower", "merger"),
    "merger": ("tower",),
    "full": (),
}
"""What each ``model.train_vision`` leaves as it is: not trained, not sent to the engine again."""


class ConfigError(ValueError):
    """A setting that cannot be used. The message names it and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Name of the run's folder."""
    root: str = "runs"
    """Folder that holds run folders."""
    stages: tuple[str, ...] = ("cold_start", "rl")
    """What to do, in order: "cold_start", "rl", or both. RL starts from the cold start."""
    seed: int = 0
    """Everything random follows from it: data order, sampling, value head."""
    save_every: int = 50
    """Steps between checkpoints; one is always written at the end of a stage."""
    keep: int = 2
    """Checkpoints kept per stage; the oldest go first. At least 1."""
    export_every: int = 0
    """RL steps between Hugging Face folders hf_STEP of the policy, to evaluate or to average; 0:
    only hf, at the end."""
    record_rollouts: bool = False
    """Write all rollouts of each RL step to rollouts/STEP.parquet, for --only train."""
    readable_rollouts: int = 4
    """Rollouts a step written in readable form to rollouts.jsonl; 0 writes none."""
    wandb: bool = False
    """Also report to Weights & Biases (install the extra "wandb"); TensorBoard is always on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str = ""
    """Hugging Face folder of a Qwen2.5-VL: weights, config, tokenizer, processor."""
    dtype: str = "bfloat16"
    """Of weights and activations: "bfloat16" or "float32". Gradients and Adam are float32."""
    train_vision: str = "frozen"
    """What of the vision side RL trains: "frozen", "merger" or "full". The paper does not say;
    STEP3-VL-10B, its successor, freezes the encoder. The cold start always freezes both."""
    vision_patches: int = 65536
    """Patches that go through the vision tower together; pictures are never cut."""
    vision_cache_mib: int = 1024
    """A frozen tower's visual tokens kept on each rank's host between steps, MiB."""
    kernels: str = "auto"
    """Operators: "triton", "reference" (plain PyTorch), or "auto": Triton on a GPU, where each is
    compared with its reference before the first step."""
    recompute: str = "none"
    """What the backward computes again instead of keeping it: "none"; "selective": all but the
    results of matrix products and attention, for little work; "full": all but each layer's input,
    for a third more work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    """Ranks that share each layer. Must divide heads, key/value heads, MLP width, vocabulary."""
    pipeline: int = 1
    """Stages the layers are cut into. What is left of the world is data parallel."""
    offload: str = "none"
    """What of a model waits on the host while it is not in use: "none"; "optimizer": gradients and
    the optimizer's state; "model": its weights as well."""
    world: int = 0
    """For --dry-run alone: plan for this many ranks. 0: the ranks that torchrun started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    path: str = ""
    """JSONL or Parquet file, or, with the package "datasets", a dataset folder or name."""
    name: str = ""
    """What messages and evaluation metrics call it; empty: the file's stem."""
    weight: float = 1.0
    """Share of this source in the mix, relative to the others."""
    split: str = "train"
    """Split of a dataset; not used for files."""
    prompt: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    images: str = "images"
    """Column with the pictures (paths, bytes or Hugging Face images); absent or empty: text only.
    "<image>" in the prompt marks a picture's place; without marks they come first."""
    answer: str = "answer"
    """Column with the verifiable answer (RL, evaluation)."""
    response: str = "response"
    """Column with the response to learn (cold start)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    min_lr: float = 0.0
    """Rate at the end of a cosine decay; not used where the rate is constant."""
    beta1: float = 0.9
    """AdamW. OVR appendix B."""
    beta2: float = 0.95
    """AdamW. OVR appendix B."""
    weight_decay: float = 0.0
    """AdamW; 0 is off. OVR appendix B."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 is off. Open-Reasoner-Zero's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartConfig:
    steps: int = 0
    """Optimizer steps."""
    rows_per_step: int = 640
    """Packed rows in a global batch. OVR section 4.1 (640)."""
    row_tokens: int = 65536
    """Tokens of a packed row; longer examples are dropped and counted. OVR section 4.1 (64k)."""
    decay: str = "cosine"
    """Shape of the rate after warm-up: "cosine" to min_lr, or "constant"."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-4))
    sources: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig:
    steps: int = 0
    """Rollout batches. OVR: 900."""
    prompts_per_step: int = 512
    """Distinct prompts of a step. OVR appendix B."""
    samples_per_prompt: int = 16
    """Responses to each. OVR appendix B."""
    max_prompt_tokens: int = 2048
    """Longer prompts (visual tokens included) are dropped and counted. Open-Reasoner-Zero."""
    max_response_tokens: int = 24576
    """A response is truncated here, and then earns 0. OVR's first context stage is 24k."""
    context_tokens: tuple[int, ...] = ()
    """Response limits to grow through, ascending, the last equal to max_response_tokens; []: that
    from the first step on. OVR: [24576, 32768, 49152]."""
    context_steps: tuple[int, ...] = ()
    """Step at which each limit after the first begins (OVR: [300, 700]); []: each begins when the
    mean length stops growing."""
    context_patience: int = 50
    """Steps over which "stops growing" is judged: this many against as many before them."""
    max_tokens_per_microbatch: int = 32768
    """Tokens packed into one forward pass of one rank."""
    policy_steps: int = 1
    """Optimizer steps of the actor over the rollout batch. 1 is strictly on-policy. OVR."""
    critic_steps: int = 4
    """Optimizer steps of the critic over the same batch, as mini-batches of one pass. OVR."""
    gamma: float = 1.0
    """Discount per token, 0..1. OVR."""
    gae_lambda: float = 1.0
    """GAE's bias/variance dial, 0..1. OVR."""
    clip_eps: float = 0.2
    """The ratio new/old counts inside [1 - clip_eps, 1 + clip_eps]. OVR section 3.2."""
    value_clip_eps: float = 0.0
    """Values move at most this far from their old value; 0 is off. ORZ's code has 0.2, the paper
    prints the unclipped loss."""
    normalize_advantages: bool = True
    """One mean and one standard deviation over all response tokens of the step. OVR."""
    kl_coef: float = 0.0
    """Weight of the k3 KL term to the cold-start model; 0 is off and loads no reference. OVR."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 is off. OVR."""
    decay: str = "constant"
    """Shape of both rates after warm-up: "constant" (OVR), or "cosine" to min_lr at rl.steps; a
    resumed run with more steps follows the longer cosine from where it is."""
    actor: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-6, warmup_steps=50)
    )
    critic: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5e-6, warmup_steps=50)
    )
    sources: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    servers: int = 1
    """vLLM servers that the trainer starts; 0 with urls."""
    urls: tuple[str, ...] = ()
    """Servers that run already, instead of starting any. They need the options and environment of
    ``ovr_fast/rollout/server.py``, VLLM_SERVER_DEV_MODE=1 among them."""
    placement: str = "disaggregated"
    """"disaggregated": servers on GPUs of their own, weights by NCCL; "colocated": on the trainer's
    GPUs, which they leave while it trains, weights by CUDA IPC. On a CPU both share the cores, and
    weights go by gloo."""
    tensor: int = 1
    """GPUs of one server."""
    compile: bool = True
    """Whether a server compiles the model when it starts: tens of seconds, then faster samples."""
    gpu_memory_utilization: float = 0.85
    """Share of its GPU that a server may take."""
    kv_cache_gib: int = 1
    """Memory for keys and values of a server on a CPU, GiB."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob. OVR appendix B."""
    top_p: float = 1.0
    """Share of the probability that is sampled from. OVR appendix B. Below 1 the trainer's
    log-probs are not those of the sampling distribution, and the log-prob gap shows it."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, beside the end token."""
    max_in_flight: int = 256
    """Prompts, each with all its samples, sent to one server at a time."""
    startup_timeout_s: float = 600.0
    """How long a server may take until it answers."""
    request_timeout_s: float = 1800.0
    """How long all samples of one prompt may take."""
    transfer_address: str = "127.0.0.1"
    """Address of the trainer's first rank as the servers see it, for weight sync."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    method: str = "exact"
    """"exact": equal after normalisation (OVR); "math_verify": equivalent as mathematics."""
    timeout_s: float = 5.0
    """A check that takes longer is killed and counted as a timeout, reward 0."""
    workers: int = 2
    """Processes that check answers."""
    max_failure_share: float = 0.1
    """The run stops if the checks of more than this share of a step's rollouts fail to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """RL steps between evaluations; 0 evaluates only before and after each stage."""
    prompts: int = 200
    """Prompts of each source; the first ones of the file."""
    sources: tuple[SourceConfig, ...] = ()
    """Held-out sets; one sample at the training temperature a prompt, as the paper's curves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _check(self)


def _check(c: Config) -> None:
    """Contradictions between settings that need neither the model nor the data to be seen."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
        need(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")

    for stage in c.run.stages:
        one_of("run.stages", stage, ("cold_start", "rl"))
    need(
        c.run.stages in (("cold_start",), ("rl",), ("cold_start", "rl")),
        f"run.stages={list(c.run.stages)} must be cold_start, rl, or both in that order",
    )
    one_of("model.dtype", c.model.dtype, ("bfloat16", "float32"))
    one_of("model.train_vision", c.model.train_vision, tuple(FROZEN_PARTS))
    need(c.model.vision_patches >= 1, "model.vision_patches must be at least 1")
    need(c.model.vision_cache_mib >= 0, "model.vision_cache_mib must not be negative")
    one_of("model.kernels", c.model.kernels, ("auto", "reference", "triton"))
    one_of("model.recompute", c.model.recompute, ("none", "selective", "full"))
    one_of("parallel.offload", c.parallel.offload, ("none", "optimizer", "model"))
    one_of("cold_start.decay", c.cold_start.decay, ("cosine", "constant"))
    one_of("rl.decay", c.rl.decay, ("cosine", "constant"))
    one_of("reward.method", c.reward.method, REWARD_METHODS)
    need(c.run.name not in ("", ".", ".."), "run.name is empty; it names the run's folder")
    need(c.evaluation.prompts >= 1, f"evaluation.prompts={c.evaluation.prompts} must be over 0")
    need(c.reward.workers >= 1, f"reward.workers={c.reward.workers} must be at least 1")
    need(c.model.path != "", "model.path is not set; it must be a Hugging Face folder")
    need(c.run.keep >= 1, f"run.keep={c.run.keep} must be at least 1")
    need(c.run.export_every >= 0, "run.export_every must not be negative")
    need(c.run.save_every >= 1, f"run.save_every={c.run.save_every} must be at least 1")
    if "cold_start" in c.run.stages:
        need(c.cold_start.steps > 0, "cold_start.steps must be over 0 (or change run.stages)")
        need(bool(c.cold_start.sources), "cold_start.sources is empty; name a data file")
    if "rl" in c.run.stages:
        r = c.rl
        need(r.steps > 0, "rl.steps must be over 0 (or change run.stages)")
        need(bool(r.sources), "rl.sources is empty; name a data file")
        need(r.policy_steps >= 1 and r.critic_steps >= 1, "rl.*_steps must be at least 1")
        need(
            r.critic_steps % r.policy_steps == 0,
            f"rl.critic_steps={r.critic_steps} must be a multiple of "
            f"rl.policy_steps={r.policy_steps}",
        )
        rollouts = r.prompts_per_step * r.samples_per_prompt
        need(
            rollouts >= r.critic_steps,
            f"{rollouts} rollouts a step cannot be cut into rl.critic_steps={r.critic_steps}",
        )
        longest = r.max_prompt_tokens + r.max_response_tokens
        need(
            r.max_tokens_per_microbatch >= longest,
            f"rl.max_tokens_per_microbatch={r.max_tokens_per_microbatch} is shorter than one "
            f"prompt and response ({r.max_prompt_tokens} + {r.max_response_tokens} = {longest})",
        )
        limits, begins = r.context_tokens, r.context_steps
        need(
            not limits or (limits[-1] == r.max_response_tokens and _ascending(limits)),
            f"rl.context_tokens={list(limits)} must ascend to rl.max_response_tokens="
            f"{r.max_response_tokens}",
        )
        need(
            not begins or (len(begins) == len(limits) - 1 and _ascending(begins)),
            f"rl.context_steps={list(begins)} must ascend, one for each of rl.context_tokens="
            f"{list(limits)} but the first",
        )
        need(r.context_patience >= 1, "rl.context_patience must be at least 1")
        need(0 < r.clip_eps < 1, f"rl.clip_eps={r.clip_eps} must be between 0 and 1")
        for name in ("gamma", "gae_lambda"):
            value = getattr(r, name)
            need(0 <= value <= 1, f"rl.{name}={value} must be between 0 and 1")
    if "rl" in c.run.stages or c.evaluation.sources:
        need(
            bool(c.rollout.urls) != (c.rollout.servers > 0),
            "set either rollout.servers or rollout.urls (and the other to 0 or [])",
        )
        one_of("rollout.placement", c.rollout.placement, ("disaggregated", "colocated"))
        need(
            c.rollout.placement == "disaggregated" or not c.rollout.urls,
            "rollout.placement=colocated needs servers that the trainer starts: set "
            "rollout.servers, and rollout.urls to []",
        )
        need(c.rollout.max_in_flight >= 1, "rollout.max_in_flight must be at least 1")
        need(c.rollout.temperature > 0, "rollout.temperature must be over 0")
        need(0 < c.rollout.top_p <= 1, "rollout.top_p must be over 0 and at most 1")


def _ascending(values: tuple[int, ...]) -> bool:
    return all(a < b for a, b in zip((0, *values[:-1]), values, strict=True))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides (values in TOML), check everything.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, a value has the wrong
            type, or settings contradict each other.
    """
    try:
        tree = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"{override!r} is not of the form section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is a string
        node = tree
        *sections, last = key.strip().split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {section} is not a section")
        node[last] = value
    return _build(Config, tree, "")


def _build(kind: type, tree: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown setting {name}{_nearest(name, kind, where)}")
        values[key] = _convert(hints[key], value, name)
    # Sections keep their own defaults where the file says nothing about a part of them.
    for item in dataclasses.fields(kind):
        given = tree.get(item.name)
        if isinstance(given, dict) and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
            values[item.name] = dataclasses.replace(
                default, **{key: getattr(values[item.name], key) for key in given}
            )
    return kind(**values)


def _nearest(name: str, kind: type, where: str) -> str:
    """The most similar setting: in the same section first, then anywhere."""
    here = [f"{where}{item.name}" for item in dataclasses.fields(kind)]
    close = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if not close:
        close = difflib.get_close_matches(name, list(_all_names(Config, "")), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; {where or 'the file'} has {here}"


def _all_names(kind: type, where: str) -> typing.Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _all_names(hint, f"{where}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{where}{name}"


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is a section, not a value")
        return _build(hint, value, f"{name}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        (item,) = typing.get_args(hint)[:1]
        if isinstance(value, str) and item is str:
            value = [value]
        if not isinstance(value, list):
            raise ConfigError(f"{name}={value!r} must be a list")
        return tuple(_convert(item, part, f"{name}[{i}]") for i, part in enumerate(value))
    if isinstance(hint, types.UnionType):
        raise ConfigError(f"{name}: settings have one type")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name}={value!r} must be a {hint.__name__}")
    return value


def to_toml(config: Config) -> str:
    """The resolved settings as a TOML file that ``load_config`` reads back."""
    lines: list[str] = []

    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, str):
            escaped = item.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            return f'"{escaped}"'
        if isinstance(item, tuple):
            return "[" + ", ".join(map(value, item)) + "]"
        return repr(item)

    def section(node: Any, where: str) -> None:
        plain, nested, tables = [], [], []
        for item in dataclasses.fields(node):
            current = getattr(node, item.name)
            if dataclasses.is_dataclass(current):
                nested.append((item.name, current))
            elif isinstance(current, tuple) and current and dataclasses.is_dataclass(current[0]):
                tables.append((item.name, current))
            else:
                plain.append(f"{item.name} = {value(current)}")
        if where and plain:
            lines.extend([f"[{where}]", *plain, ""])
        prefix = f"{where}." if where else ""
        for name, current in nested:
            section(current, prefix + name)
        for name, rows in tables:
            for row in rows:
                body = [
                    f"{item.name} = {value(getattr(row, item.name))}"
                    for item in dataclasses.fields(row)
                ]
                lines.extend([f"[[{prefix}{name}]]", *body, ""])

    section(config, "")
    return "\n".join(lines)
