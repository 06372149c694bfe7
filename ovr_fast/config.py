"""All settings of a run: frozen dataclasses, one per concern.

Each field is declared once, by ``setting``: default, meaning, range, unit, and whether a resumed
run may change it. Error messages, ``--help``, ``configs/SETTINGS.md`` and the comments in a run
folder's config.toml are made from that. An unknown key, a wrong type, a value out of range or a
contradiction ends with one message.

    python -m ovr_fast.config > configs/SETTINGS.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ovr_fast.settings import ConfigError, read_settings, setting, settings_of, settings_table

REWARD_METHODS = ("exact", "math_verify")
FROZEN_PARTS: dict[str, tuple[str, ...]] = {
    "frozen": ("tower", "merger"),
    "merger": ("tower",),
    "full": (),
}
"""What each ``model.train_vision`` leaves as it is: not trained, not sent to the servers again."""


def _folder_name(value: str) -> str:
    good = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", value)
    return "" if good else "must be a folder's name: letters, digits, and . _ - inside"


_LOOPBACK = r"unix:|https?://(localhost|127\.|\[?::1\]?)"


def _url(value: str) -> str:
    good = re.fullmatch(r"https?://[^/\s]+.*|unix:/\S+", value)
    return "" if good else "must begin with http://, https:// or unix:/ (a socket file)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str = setting(
        "run",
        "Name of the run's folder: letters, digits, and . _ - inside.",
        check=_folder_name,
        may_change=True,
    )
    data_cache: str = setting(
        "",
        "Folder of what was read of the data (its rows, measured, and images that lie in no file): "
        "read once, mapped by all ranks, kept for the next start; empty: data_cache in run.root.",
        may_change=True,
    )
    data_workers: int = setting(
        0,
        "Processes in which the first rank reads a large source; 0: one a core.",
        at_least=0,
        unit="processes",
        may_change=True,
    )
    root: str = setting(
        "runs",
        "Folder that holds run folders.",
        may_change=True,
    )
    stages: tuple[str, ...] = setting(
        ("cold_start", "rl"),
        'What to do, in order: "cold_start", "rl", or both. RL starts from the cold start.',
        choices=("cold_start", "rl"),
    )
    seed: int = setting(
        0,
        "Everything random follows from it: data order, sampling, value head.",
        at_least=0,
        at_most=2**32 - 1,
    )
    save_every: int = setting(
        50,
        "Steps between checkpoints; one is always written at the end of a recipe stage.",
        at_least=1,
        unit="steps",
        may_change=True,
    )
    keep: int = setting(
        2,
        "Checkpoints kept per recipe stage; the oldest go first.",
        at_least=1,
        may_change=True,
    )
    export_every: int = setting(
        0,
        "RL steps between Hugging Face folders hf_STEP of the policy, to evaluate or to "
        "average; 0: only hf, at the end.",
        at_least=0,
        unit="steps",
        may_change=True,
    )
    record_rollouts: bool = setting(
        False,
        "Write all rollouts of each RL step to rollouts/STEP.parquet, for --only train.",
        may_change=True,
    )
    readable_rollouts: int = setting(
        4,
        "Rollouts a step written in readable form to rollouts.jsonl; 0 writes none.",
        at_least=0,
        may_change=True,
    )
    wandb: bool = setting(
        False,
        'Also report to Weights & Biases (install the extra "wandb"); TensorBoard is always on.',
        may_change=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str = setting(
        "",
        "Hugging Face folder of a Qwen2.5-VL: weights, config, tokenizer, processor.",
    )
    dtype: str = setting(
        "bfloat16",
        'Of weights and activations: "bfloat16" or "float32". Gradients and Adam are float32.',
        choices=("bfloat16", "float32"),
    )
    train_vision: str = setting(
        "frozen",
        'Vision parameters that RL trains: "frozen" none, "merger" the merger, "full" '
        "tower and merger. The paper does not say; STEP3-VL-10B, its successor, freezes "
        "the encoder. The cold start always freezes both.",
        choices=tuple(FROZEN_PARTS),
    )
    vision_patches: int = setting(
        65536,
        "Patches that go through the vision tower together; images are never cut.",
        at_least=1,
        unit="patches",
        may_change=True,
    )
    vision_cache_mib: int = setting(
        1024,
        "A frozen tower's visual tokens kept on each rank's host between steps, MiB.",
        at_least=0,
        unit="MiB",
        may_change=True,
    )
    kernels: str = setting(
        "auto",
        'Operators: "triton", "reference" (plain PyTorch), or "auto": Triton on a GPU, '
        "the reference on a CPU. Triton kernels are compared with their references "
        "before the first step.",
        choices=("auto", "reference", "triton"),
    )
    recompute: str = setting(
        "none",
        'What the backward computes again instead of keeping it: "none"; "selective": '
        'all but the results of matrix products and attention, for little work; "full": '
        "all but each layer's input, for a third more work.",
        choices=("none", "selective", "full"),
        may_change=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tensor: int = setting(
        1,
        "Ranks that share each layer. Must divide heads, key/value heads, MLP width, vocabulary.",
        at_least=1,
        unit="ranks",
        may_change=True,
    )
    pipeline: int = setting(
        1,
        "Pipeline stages that the layers are cut into. What is left of the world is data parallel.",
        at_least=1,
        unit="ranks",
        may_change=True,
    )
    offload: str = setting(
        "none",
        'What of a model waits on the host while it is not in use: "none"; "optimizer": '
        'gradients and the optimizer\'s state; "model": its weights as well.',
        choices=("none", "optimizer", "model"),
        may_change=True,
    )
    world: int = setting(
        0,
        "Ranks that these settings are for: --dry-run plans for them, and a start with "
        "any other number is refused. 0: whatever torchrun starts.",
        at_least=0,
        unit="ranks",
        may_change=True,
    )


SOURCE_FORMATS = (
    "auto", "columns", "sharegpt", "verl", "messages", "trl", "alpaca", "easyr1", "question",
    "imagefolder",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    path: str = setting(
        "",
        'JSONL or Parquet file, or, with the package "datasets", a dataset folder or name.',
    )
    name: str = setting(
        "",
        "What messages and evaluation metrics call it; empty: the file's stem.",
    )
    weight: float = setting(
        1.0,
        "Share of this source in the training mix, relative to the others; not used in evaluation.",
        over=0,
    )
    split: str = setting(
        "train",
        "Split of a dataset; not used for files.",
    )
    format: str = setting(
        "auto",
        'Which columns are what: "columns" takes the four below; the others are named after who '
        'writes such files; "auto" goes by the first row\'s columns, and says which it took.',
        choices=SOURCE_FORMATS,
    )
    prompt: str = setting(
        "prompt",
        "Column with the prompt: text, or a list of chat messages. With a dot, a record's column "
        "(reward_model.ground_truth); so the next three.",
    )
    images: str = setting(
        "images",
        "Column with the images (paths, data URLs, base64, bytes or Hugging Face images); absent "
        'or empty: text only. "<image>" in the prompt marks an image\'s place; without marks they '
        "come first.",
    )
    answer: str = setting(
        "answer",
        "Column with the verifiable answer (RL, evaluation).",
    )
    response: str = setting(
        "response",
        "Column with the response to learn (cold start).",
    )
    columns: tuple[str, ...] = setting(
        (),
        "Further columns that a reward function takes by name.",
    )
    image_folder: str = setting(
        "",
        "Folder that the images' paths start from; empty: the file's.",
    )
    max_image_pixels: int = setting(
        100_000_000,
        "An image of more pixels is a bad row; it is refused before it is decoded.",
        at_least=1,
        unit="pixels",
    )
    on_bad_row: str = setting(
        "stop",
        'What a row that cannot be used does: "stop" ends the start with its name; "drop" leaves '
        "it out, counts it, and lists it in the run folder (dropped_rows.txt).",
        choices=("stop", "drop"),
    )
    max_bad_share: float = setting(
        0.05,
        "The start ends if more than this share of the rows would be dropped.",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    lr: float = setting(
        1e-6,
        "Peak learning rate.",
        at_least=0,
        may_change=True,
    )
    warmup_steps: int = setting(
        0,
        "Optimizer steps over which the rate rises linearly from 0.",
        at_least=0,
        unit="optimizer steps",
    )
    min_lr: float = setting(
        0.0,
        "Rate at the end of a cosine decay, at most lr; not used where the rate is constant.",
        at_least=0,
    )
    beta1: float = setting(
        0.9,
        "AdamW. OVR appendix B.",
        at_least=0,
        under=1,
    )
    beta2: float = setting(
        0.95,
        "AdamW. OVR appendix B.",
        at_least=0,
        under=1,
    )
    weight_decay: float = setting(
        0.0,
        "AdamW; 0 is off. OVR appendix B.",
        at_least=0,
    )
    max_grad_norm: float = setting(
        1.0,
        "Gradients are scaled down to this norm; 0 is off. The default of Open-Reasoner-Zero.",
        at_least=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartConfig:
    steps: int = setting(
        0,
        "Optimizer steps.",
        at_least=0,
        unit="steps",
        may_change=True,
    )
    rows_per_step: int = setting(
        640,
        "Packed rows in a global batch. OVR section 4.1 (640).",
        at_least=1,
    )
    row_tokens: int = setting(
        65536,
        "Tokens of a packed row; longer examples are dropped and counted. OVR section 4.1 (64k).",
        at_least=1,
        unit="tokens",
    )
    decay: str = setting(
        "cosine",
        'Shape of the rate after warm-up: "cosine" to min_lr, or "constant".',
        choices=("cosine", "constant"),
    )
    turns: str = setting(
        "all",
        'Which of the assistant\'s turns in a conversation are trained: "all", or the "last".',
        choices=("all", "last"),
    )
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-4))
    sources: tuple[DataSource, ...] = setting((), "Demonstrations: prompts with responses.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig:
    steps: int = setting(
        0,
        "Rollout batches. OVR: 900.",
        at_least=0,
        unit="steps",
        may_change=True,
    )
    prompts_per_step: int = setting(
        512,
        "Distinct prompts of a step. OVR appendix B.",
        at_least=1,
    )
    samples_per_prompt: int = setting(
        16,
        "Responses to each. OVR appendix B.",
        at_least=1,
    )
    max_prompt_tokens: int = setting(
        2048,
        "Longer prompts (visual tokens included) are dropped and counted. Open-Reasoner-Zero.",
        at_least=1,
        unit="tokens",
    )
    max_response_tokens: int = setting(
        24576,
        "A response (evaluation's too) is truncated here, and then earns 0. OVR's first "
        "context limit is 24k.",
        at_least=1,
        unit="tokens",
    )
    context_tokens: tuple[int, ...] = setting(
        (),
        "Response limits to grow through, ascending, the last equal to "
        "max_response_tokens; []: that from the first step on. OVR: [24576, 32768, "
        "49152].",
        at_least=1,
        unit="tokens",
    )
    context_steps: tuple[int, ...] = setting(
        (),
        "Steps after which each limit after the first begins (OVR: [300, 700]); []: "
        "each begins when the mean length stops growing.",
        at_least=1,
        unit="steps",
        may_change=True,
    )
    context_patience: int = setting(
        50,
        'Steps over which "stops growing" is judged: this many against as many before them.',
        at_least=1,
        unit="steps",
    )
    max_tokens_per_microbatch: int = setting(
        32768,
        "Tokens packed into one forward pass of one rank.",
        at_least=1,
        unit="tokens",
    )
    share_prefixes: bool = setting(
        False,
        "The responses to one prompt in a microbatch have its text and images once, and attend to "
        "them: the same gradients for fewer tokens.",
        may_change=True,
    )
    score_while_sampling: bool = setting(
        False,
        "A finished response gets its values (and old and reference log-probs, where a step needs "
        "them) while others are still being sampled: the step then waits for the longer of the "
        "two. For servers on GPUs of their own.",
        may_change=True,
    )
    policy_steps: int = setting(
        1,
        "Optimizer steps of the actor over the rollout batch; with a critic it must divide "
        "rl.critic_steps. 1 is strictly on-policy. OVR.",
        at_least=1,
    )
    critic_steps: int = setting(
        4,
        "Optimizer steps of the critic over the same batch, as mini-batches of one pass. OVR.",
        at_least=1,
    )
    advantage: str = setting(
        "gae",
        'What a token is credited with: "gae", by a critic (OVR); "group", the response\'s reward '
        "against those of its prompt's other responses: no critic is built, and a step costs 3 "
        "forward passes in place of 6.75. GRPO as published has rl.normalize_advantages=false.",
        choices=("gae", "group"),
    )
    group_baseline: str = setting(
        "mean",
        'Of rl.advantage=group, subtracted from a reward: "mean" of the group (GRPO, Shao et al. '
        '2024; Dr. GRPO, Liu et al. 2025), or "leave_one_out", of the others (RLOO, Ahmadian et '
        "al. 2024).",
        choices=("mean", "leave_one_out"),
    )
    group_scale: str = setting(
        "deviation",
        'Of rl.advantage=group: "deviation" divides by the group\'s standard deviation (GRPO); '
        '"none" (Dr. GRPO, RLOO).',
        choices=("deviation", "none"),
    )
    refill: bool = setting(
        False,
        "Prompts whose responses all earn the same, which teach a group nothing, are left out, and "
        "others are sampled until the step is full (DAPO's dynamic sampling, Yu et al. 2025).",
    )
    refill_most: int = setting(
        10,
        "Steps' worth of prompts that rl.refill samples for one step; then the run stops.",
        at_least=2,
        may_change=True,
    )
    gamma: float = setting(
        1.0,
        "Discount per token, 0..1. OVR.",
        at_least=0,
        at_most=1,
    )
    gae_lambda: float = setting(
        1.0,
        "GAE's bias/variance dial, 0..1. OVR.",
        at_least=0,
        at_most=1,
    )
    objective: str = setting(
        "ppo",
        'The actor\'s loss: "ppo" (Schulman et al. 2017, eq. 7; OVR), "cispo" (MiniMax-M1 2025, '
        'eq. 4), "gspo" (Zheng et al. 2025: ratios of whole responses), "reinforce" (no ratio). '
        "With one policy step on fresh responses all have one gradient.",
        choices=("ppo", "cispo", "gspo", "reinforce"),
    )
    normalization: str = setting(
        "token_mean",
        'What a token counts in the actor\'s loss: "token_mean", all alike (OVR, DAPO); '
        '"sequence_mean", its response\'s share (GRPO, GSPO); "constant_length", 1 / '
        "max_response_tokens of it (Dr. GRPO).",
        choices=("token_mean", "sequence_mean", "constant_length"),
    )
    clip_eps: float = setting(
        0.2,
        "The ratio new/old counts inside [1 - clip_eps, 1 + clip_eps]. OVR section 3.2. GSPO's is "
        "a length's root: 3e-4, and 4e-4 above.",
        over=0,
        under=1,
    )
    clip_eps_high: float = setting(
        0.0,
        "Upper bound of its own, 1 + clip_eps_high (DAPO's clip-higher: 0.28); 0: as clip_eps.",
        at_least=0,
    )
    dual_clip: float = setting(
        0.0,
        "PPO's loss of a token with a negative advantage is at most so many times it (Ye et al. "
        "2020, eq. 5; 3); 0 is off.",
        at_least=0,
    )
    value_clip_eps: float = setting(
        0.0,
        "Values move at most this far from their old value; 0 is off. ORZ's code has "
        "0.2, the paper prints the unclipped loss.",
        at_least=0,
        unit="reward",
    )
    normalize_advantages: bool = setting(
        True,
        "One mean and one standard deviation over all response tokens of the step. OVR; false for "
        "the group's own scale alone.",
    )
    kl_coef: float = setting(
        0.0,
        "Weight of the KL term to the cold-start model; 0 is off and loads no reference. OVR.",
        at_least=0,
    )
    kl_in: str = setting(
        "loss",
        'Where it stands: in the "loss", or, estimated per token before the updates, in the '
        '"reward" (with rl.advantage=gae).',
        choices=("loss", "reward"),
    )
    kl_estimator: str = setting(
        "k3",
        "Schulman (2020). In the loss k2's gradient is that of KL(policy || reference), k3's that "
        "of KL(reference || policy), k1's nothing (refused); in the reward k1 is usual.",
        choices=("k1", "k2", "k3"),
    )
    entropy_coef: float = setting(
        0.0,
        "Weight of the entropy bonus; 0 is off. OVR.",
        at_least=0,
    )
    importance_cap: float = setting(
        0.0,
        "The actor's loss is weighed by the trainer's over vLLM's probability of a token, at most "
        "this (truncated importance sampling, Yao et al. 2025); 0 is off.",
        at_least=0,
    )
    decay: str = setting(
        "constant",
        'Shape of both rates after warm-up: "constant" (OVR), or "cosine" to min_lr at '
        "rl.steps; a resumed run with more steps follows the longer cosine from where "
        "it is.",
        choices=("constant", "cosine"),
    )
    actor: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-6, warmup_steps=50)
    )
    critic: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5e-6, warmup_steps=50)
    )
    sources: tuple[DataSource, ...] = setting((), "Prompts with verifiable answers.")

    @property
    def has_critic(self) -> bool:
        """Whether one is built and trained."""
        return self.advantage == "gae"

    @property
    def values_of_first_update(self) -> bool:
        """Whether the values of the first critic minibatch come out of its own update: at gamma =
        lambda = 1 its targets need none. (Estimated while others are sampled all are.)"""
        early = self.score_while_sampling and self.critic_steps > 1
        return self.has_critic and self.gamma == self.gae_lambda == 1.0 and not early

    @property
    def value_passes(self) -> float:
        """Share of the step's rollouts whose values are estimated by a pass without gradients."""
        if self.values_of_first_update:
            return (self.critic_steps - 1) / self.critic_steps
        return float(self.has_critic)

    @property
    def minibatches(self) -> int:
        """Parts that a rollout batch is cut into: one a critic step, or, without one, a policy
        step."""
        return self.critic_steps if self.has_critic else self.policy_steps

    @property
    def passes(self) -> tuple[str, ...]:
        """Of a step, without and with gradients, in their order."""
        old = self.policy_steps > 1 or (self.kl_coef != 0 and self.kl_in == "reward")
        asked = {
            "values": self.value_passes > 0, "old log-probs": old,
            "reference log-probs": self.kl_coef != 0, "critic": self.has_critic, "actor": True,
        }  # fmt: skip
        return tuple(name for name, needed in asked.items() if needed)

    @property
    def early_passes(self) -> tuple[str, ...]:
        """Of ``passes``, those that are made of a response while others are being sampled."""
        if not self.score_while_sampling:
            return ()
        return tuple(name for name in self.passes if name not in ("critic", "actor"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    servers: int = setting(
        1,
        "vLLM servers that the trainer starts; 0 with urls.",
        at_least=0,
        may_change=True,
    )
    urls: tuple[str, ...] = setting(
        (),
        "Servers that run already, instead of starting any: those of `python -m "
        "ovr_fast.rollout.serve`.",
        check=_url,
        may_change=True,
    )
    expect: int = setting(
        0,
        "Servers that will have registered themselves, instead of starting any: those of `python "
        "-m ovr_fast.rollout.serve --register`.",
        at_least=0,
        may_change=True,
    )
    placement: str = setting(
        "disaggregated",
        '"disaggregated": servers on GPUs of their own, weights by NCCL; "colocated": '
        "on the trainer's GPUs, which they leave while it trains, weights by CUDA IPC. "
        "On a CPU both share the cores, and weights go by gloo.",
        choices=("disaggregated", "colocated"),
        may_change=True,
    )
    tensor: int = setting(
        1,
        "Tensor-parallel size of one vLLM server.",
        at_least=1,
        unit="GPUs",
        may_change=True,
    )
    compile: bool = setting(
        True,
        "Whether a server compiles the model when it starts: tens of seconds, then faster samples.",
    )
    gpu_memory_utilization: float = setting(
        0.85,
        "Share of its GPU that a server may take.",
        over=0,
        at_most=1,
        may_change=True,
    )
    kv_cache_gib: int = setting(
        1,
        "Memory for keys and values of a server on a CPU, GiB.",
        at_least=1,
        unit="GiB",
        may_change=True,
    )
    temperature: float = setting(
        1.0,
        "Of sampling, and of every log-prob. OVR appendix B.",
        over=0,
    )
    top_p: float = setting(
        1.0,
        "Share of the probability that is sampled from. OVR appendix B. Below 1 the "
        "trainer's log-probs are not those of the sampling distribution, and "
        "rollout/logprob_gap shows it.",
        over=0,
        at_most=1,
    )
    stop: tuple[str, ...] = setting(
        (),
        "Strings that end a response, beside the end token.",
    )
    max_in_flight: int = setting(
        1024,
        "Responses that one server works on at a time, at most: no more than fit into its keys and "
        "values are sent to it.",
        at_least=1,
        unit="responses",
        may_change=True,
    )
    startup_timeout_s: float = setting(
        600.0,
        "A starting server that neither logs nor uses the CPU for so long is given up, "
        "and one that has not started after six times as long.",
        over=0,
        unit="s",
        may_change=True,
    )
    max_staleness: int = setting(
        0,
        "Steps by which the weights that began a response may be behind those it trains. 0 is "
        "strictly on-policy; with more, the next steps' prompts are sampled while the trainer "
        "works.",
        at_least=0,
        unit="steps",
    )
    partial: bool = setting(
        False,
        "A step takes as many responses as it needs of those that are finished; the others go on, "
        "with the next weights. Needs max_staleness, within which each is waited for.",
    )
    probe_timeout_s: float = setting(
        30.0,
        "A server that does not answer a question for its counters for so long has failed.",
        over=0,
        unit="s",
        may_change=True,
    )
    stall_timeout_s: float = setting(
        300.0,
        "A server that has responses to sample and makes no token for so long has failed.",
        over=0,
        unit="s",
        may_change=True,
    )
    patience_s: float = setting(
        1800.0,
        "How long a run waits while no server is left; those that it started, it starts anew, "
        "colocated ones three times.",
        over=0,
        unit="s",
        may_change=True,
    )
    sync_timeout_s: float = setting(
        300.0,
        "A weight sync that takes longer has failed.",
        over=0,
        unit="s",
        may_change=True,
    )
    verify_weights_every: int = setting(
        50,
        "After a sync with a new server, and every so many steps, the servers' checksums of all "
        "weights are compared with what was sent; 0 is never. Each sync is followed by a canary.",
        at_least=0,
        unit="steps",
        may_change=True,
    )
    transfer_address: str = setting(
        "127.0.0.1",
        "Address of the trainer's first rank as the servers see it, for weight sync.",
        may_change=True,
    )
    transfer_port: int = setting(
        0,
        "Port there that servers can reach; 0 is any.",
        at_least=0,
        at_most=65535,
        may_change=True,
    )


ROW_NAMES = (
    "response", "answer", "question", "id", "data_source", "finish_reason", "response_tokens",
)  # fmt: skip
"""What a reward function gets by name of every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPart:
    name: str = setting("", "Its metric is reward/NAME.", check=_folder_name)
    function: str = setting("", "As reward.function.")
    weight: float = setting(1.0, "The reward is the sum of the parts, each times its weight.")
    sources: tuple[str, ...] = setting(
        (), "Names of the data sources whose responses it rewards; []: all."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    method: str = setting(
        "exact",
        '"exact": equal after normalisation (OVR); "math_verify": equivalent as mathematics.',
        choices=REWARD_METHODS,
    )
    function: str = setting(
        "",
        'In place of method: "file.py:name" or "package.module:name" of a function that takes '
        "response and answer (and, where it names them, question, id, data_source, finish_reason, "
        "response_tokens and what the source's columns name) and gives a number, or a dict of "
        "numbers with reward among them; the others become metrics reward/NAME. It may be async, "
        "or take responses and answers, lists.",
    )
    parts: tuple[RewardPart, ...] = setting(
        (), "In place of function: several of them, weighted, for all sources or some."
    )
    batch: int = setting(
        64,
        "Responses that an async function, or one of lists, gets at a time in each process.",
        at_least=1,
        unit="responses",
        may_change=True,
    )
    timeout_s: float = setting(
        5.0,
        "A check that takes longer is killed and counted as a timeout, reward 0.",
        over=0,
        unit="s",
        may_change=True,
    )
    workers: int = setting(
        2,
        "Processes that check answers.",
        at_least=1,
        unit="processes",
        may_change=True,
    )
    memory_gib: float = setting(
        4.0,
        "Address space of a check; one that takes more is counted as a crash, reward 0.",
        at_least=0.5,
        unit="GiB",
        may_change=True,
    )
    max_failure_share: float = setting(
        0.1,
        "The run stops if the checks of more than this share of a step's rollouts fail to end.",
        at_least=0,
        at_most=1,
        may_change=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    every: int = setting(
        0,
        "RL steps between evaluations; 0 evaluates only before and after each recipe stage.",
        at_least=0,
        unit="steps",
        may_change=True,
    )
    prompts: int = setting(
        200,
        "Prompts of each source; the first ones of the file.",
        at_least=1,
    )
    sources: tuple[DataSource, ...] = setting(
        (),
        "Held-out sets; one sample at the training temperature a prompt, as the paper's curves.",
    )
    benchmarks: tuple[str, ...] = setting(
        (),
        "Benchmarks that are measured with them: names of shipped adapters, or TOML files "
        "(python -m ovr_fast.evaluate).",
    )
    benchmark_data: str = setting("", "Folder of the benchmarks' files.")
    benchmark_questions: int = setting(
        100,
        "First questions of each benchmark; 0: all of them.",
        at_least=0,
    )


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
        for item in settings_of(self):
            if problem := item.rule.problem(item.value):
                raise ConfigError(f"{item.name}={item.value!r} {problem}")
        _check_stages(self)
        if "cold_start" in self.run.stages:
            _check_cold_start(self.cold_start)
        if "rl" in self.run.stages:
            _check_rl(self.rl)
            _check_reward(self)
            _need(
                self.rl.has_critic or not self.rollout.partial,
                "rollout.partial=true takes the finished responses of a prompt without the others, "
                "and rl.advantage=group compares them: set one of the two otherwise",
            )
            _need(
                not self.rl.score_while_sampling
                or (self.rollout.placement == "disaggregated" and not self.rollout.max_staleness),
                "rl.score_while_sampling takes the trainer's GPUs while servers sample the step: "
                "set rollout.placement=disaggregated, and rollout.max_staleness=0 (sampled ahead, "
                "most responses are there before their step begins)",
            )
            _need(
                not (self.rl.refill and self.rollout.max_staleness),
                "rl.refill samples until a step is full, and rollout.max_staleness ahead of it: "
                "set one of the two otherwise",
            )
        if "rl" in self.run.stages or self.evaluation.sources or self.evaluation.benchmarks:
            _check_rollout(self.rollout)
        _need(
            not self.evaluation.benchmarks or bool(self.evaluation.benchmark_data),
            "evaluation.benchmarks needs evaluation.benchmark_data, the folder of their files",
        )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_stages(c: Config) -> None:
    _need(
        c.run.stages in (("cold_start",), ("rl",), ("cold_start", "rl")),
        f"run.stages={list(c.run.stages)} must be cold_start, rl, or both in that order",
    )
    _need(c.model.path != "", "model.path is not set; it must be a Hugging Face folder")


def _check_optimizer(name: str, optimizer: OptimizerConfig, decay: str) -> None:
    _need(
        decay == "constant" or optimizer.min_lr <= optimizer.lr,
        f"{name}.min_lr={optimizer.min_lr} is over {name}.lr={optimizer.lr}: the rate would rise",
    )


def _check_cold_start(c: ColdStartConfig) -> None:
    _need(c.steps > 0, "cold_start.steps must be over 0 (or change run.stages)")
    _need(bool(c.sources), "cold_start.sources is empty; name a data file")
    _check_optimizer("cold_start.optimizer", c.optimizer, c.decay)


def _check_rl(r: RLConfig) -> None:
    _need(r.steps > 0, "rl.steps must be over 0 (or change run.stages)")
    _need(bool(r.sources), "rl.sources is empty; name a data file")
    _check_optimizer("rl.actor", r.actor, r.decay)
    _check_objective(r)
    _need(
        bool(r.early_passes) or not r.score_while_sampling,
        f"rl.score_while_sampling=true has nothing to do: the passes of a step are "
        f"{', '.join(r.passes)}, and none comes before the updates",
    )
    if r.has_critic:
        _check_optimizer("rl.critic", r.critic, r.decay)
        _need(
            r.critic_steps % r.policy_steps == 0,
            f"rl.critic_steps={r.critic_steps} must be a multiple of rl.policy_steps="
            f"{r.policy_steps}",
        )
    steps = "critic_steps" if r.has_critic else "policy_steps"
    rollouts = r.prompts_per_step * r.samples_per_prompt
    _need(
        rollouts >= r.minibatches,
        f"{rollouts} rollouts a step cannot be cut into rl.{steps}={r.minibatches}",
    )
    longest = r.max_prompt_tokens + r.max_response_tokens
    _need(
        r.max_tokens_per_microbatch >= longest,
        f"rl.max_tokens_per_microbatch={r.max_tokens_per_microbatch} is shorter than one "
        f"prompt and response ({r.max_prompt_tokens} + {r.max_response_tokens} = {longest})",
    )
    limits, begins = r.context_tokens, r.context_steps
    _need(
        not limits or (limits[-1] == r.max_response_tokens and _ascending(limits)),
        f"rl.context_tokens={list(limits)} must ascend to rl.max_response_tokens="
        f"{r.max_response_tokens}",
    )
    _need(
        not begins or (len(begins) == len(limits) - 1 and _ascending(begins)),
        f"rl.context_steps={list(begins)} must ascend, one for each of rl.context_tokens="
        f"{list(limits)} but the first",
    )


def _check_reward(c: Config) -> None:
    reward = c.reward
    _need(
        not (reward.function and reward.parts),
        "reward.function and reward.parts are two ways to say it: keep one",
    )
    names = [part.name for part in reward.parts]
    _need(len(set(names)) == len(names), f"two of reward.parts have one name: {', '.join(names)}")
    sources = [*c.rl.sources, *c.evaluation.sources]
    known = {source.name or Path(source.path).stem for source in sources}
    for part in reward.parts:
        _need(part.function != "", f"reward.parts {part.name} names no function")
        strange = [name for name in part.sources if name not in known]
        _need(
            not strange,
            f"reward.parts {part.name} is for the source {(strange or [''])[0]!r}; there are "
            f"{', '.join(sorted(known))}",
        )
    bare = [
        name
        for name in sorted(known)
        if reward.parts and not any(not p.sources or name in p.sources for p in reward.parts)
    ]
    _need(not bare, f"no part of reward.parts is for the source {(bare or [''])[0]!r}")
    taken = [name for source in sources for name in source.columns if name in ROW_NAMES]
    _need(not taken, f"columns={taken!r} of a source: every reward function has these")


def _check_objective(r: RLConfig) -> None:
    _need(
        r.has_critic or r.samples_per_prompt > 1,
        "rl.advantage=group needs rl.samples_per_prompt of 2 or more",
    )
    _need(
        r.dual_clip == 0 or (r.dual_clip > 1 and r.objective == "ppo"),
        f"rl.dual_clip={r.dual_clip} must be over 1, and goes with rl.objective=ppo",
    )
    _need(
        not (r.kl_coef and r.kl_in == "loss" and r.kl_estimator == "k1"),
        "rl.kl_estimator=k1 in the loss pushes nowhere: its gradient is 0 in expectation. Take k2 "
        "or k3" + (", or rl.kl_in=reward" if r.has_critic else ""),
    )
    _need(
        r.has_critic or r.kl_coef == 0 or r.kl_in == "loss",
        "rl.kl_in=reward gives each token a reward of its own, which a group's baseline does not "
        "know: take rl.kl_in=loss, or rl.advantage=gae",
    )
    if r.objective == "gspo":
        _need(
            not r.score_while_sampling,
            "rl.objective=gspo does not go with rl.score_while_sampling: its bounds are narrower "
            "than what another packing rounds in bfloat16",
        )
        _need(
            not r.has_critic and r.normalization == "sequence_mean",
            "rl.objective=gspo weighs whole responses: set rl.advantage=group and "
            "rl.normalization=sequence_mean",
        )
        _need(
            not (r.kl_coef or r.entropy_coef or r.importance_cap),
            "rl.objective=gspo takes no rl.kl_coef, rl.entropy_coef or rl.importance_cap: they are "
            "per token",
        )


def check_transfer_address(r: RolloutConfig, urls: Iterable[str]) -> None:
    """Raises ConfigError if servers at these addresses cannot reach the trainer by its own."""
    away = [url for url in urls if not re.match(_LOOPBACK, url)]
    _need(
        not away or not re.match(_LOOPBACK, f"http://{r.transfer_address}"),
        f"{(away or [''])[0]} would look for the trainer at rollout.transfer_address="
        f"{r.transfer_address!r}, which is each machine's own: set it to the trainer's address as "
        "the servers see it",
    )


def _check_rollout(r: RolloutConfig) -> None:
    _need(
        bool(r.urls) + (r.servers > 0) + (r.expect > 0) == 1,
        "set one of rollout.servers, rollout.urls and rollout.expect (and the others to 0 or [])",
    )
    check_transfer_address(r, r.urls)
    _need(
        r.placement == "disaggregated" or r.servers > 0,
        "rollout.placement=colocated needs servers that the trainer starts: set "
        "rollout.servers, and rollout.urls to []",
    )
    _need(
        r.max_staleness > 0 or not r.partial,
        "rollout.partial=true lets responses go on with the next step's weights: set "
        "rollout.max_staleness to the steps that one may take, 2 or more",
    )
    _need(
        not (r.max_staleness and r.stop),
        "rollout.stop does not go with rollout.max_staleness: a string that lies across a weight "
        "sync would not be seen",
    )


def _ascending(values: tuple[int, ...]) -> bool:
    return all(a < b for a, b in zip((0, *values[:-1]), values, strict=True))


def data_parallel_size(world: int, *, tensor: int, pipeline: int) -> int:
    """How many replicas ``world`` ranks hold.

    Raises:
        ConfigError: the layout does not divide the world.
    """
    if tensor < 1 or pipeline < 1 or world % (tensor * pipeline):
        raise ConfigError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} does not divide the "
            f"{world} processes that were started; change one of them or --nproc-per-node"
        )
    return world // (tensor * pipeline)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides (values in TOML), check everything.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, a value has the wrong
            type or is out of range, or settings contradict each other.
    """
    return read_settings(Config, path, overrides or [])


if __name__ == "__main__":
    print(settings_table(Config), end="")
