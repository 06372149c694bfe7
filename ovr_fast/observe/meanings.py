"""What every number in ``metrics.jsonl`` is: one definition each, over all ranks.

    python -m ovr_fast.observe.meanings > configs/METRICS.md

A row is written by rank 0 and speaks of the whole run: a mean is over all rollouts or tokens of the
step, a sum over all ranks' work; times alone are those of the rank that wrote it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Depends = Literal["", "layout", "machine"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """One metric. ``depends``: "" where the same rollouts give the same number on any number of
    ranks, up to rounding; "layout" where ranks decide what work there is; "machine"."""

    text: str
    unit: str = ""
    depends: Depends = ""


METRICS = {
    "stage": Meaning("base, cold_start or rl"),
    "step": Meaning("Of the recipe stage, from 1; 0 is before its first."),
    "cold_start/loss": Meaning("Cross-entropy, mean over response tokens.", "nats"),
    "cold_start/grad_norm": Meaning("Of the whole gradient, before clipping."),
    "cold_start/lr": Meaning("Of this step."),
    "cold_start/tokens": Meaning("Of all rows: prompts and responses.", "tokens"),
    "cold_start/response_tokens": Meaning("That are trained on.", "tokens"),
    "cold_start/examples": Meaning("In the step's rows."),
    "cold_start/empty_share": Meaning("Of the rows' length that holds no token."),
    "cold_start/dropped": Meaning("Examples longer than a row, left out at the start."),
    "rollout/reward": Meaning("Mean over rollouts."),
    "rollout/length_tokens": Meaning("Response length, mean.", "tokens"),
    "rollout/length_p50_tokens": Meaning("Response length, median.", "tokens"),
    "rollout/length_p90_tokens": Meaning("Nine of ten responses are shorter.", "tokens"),
    "rollout/length_max_tokens": Meaning("The longest response.", "tokens"),
    "rollout/length_correct_tokens": Meaning(
        "Of correct responses, mean; absent where there is none.", "tokens"),
    "rollout/length_wrong_tokens": Meaning(
        "Of all others, mean; absent where there is none.", "tokens"),
    "rollout/repeat": Meaning(
        "Share of a response's sequences of 16 tokens that stood in it before, mean."),
    "rollout/response_tokens": Meaning("Of all responses.", "tokens"),
    "rollout/visual_tokens": Meaning("Of all prompts, each sample's counted.", "tokens"),
    "rollout/truncated": Meaning("Share of responses that reached the limit."),
    "rollout/limit_tokens": Meaning("At which a response is truncated.", "tokens"),
    "rollout/mixed_prompts": Meaning("Share of prompts whose samples differ in reward."),
    "rollout/solved_prompts": Meaning("Share of prompts with a rewarded sample (pass@n)."),
    "rollout/all_right_prompts": Meaning("Share of prompts whose samples are all rewarded."),
    "rollout/policy_version": Meaning("The oldest weights that began a response."),
    "rollout/staleness": Meaning(
        "Steps by which the weights that sampled a trained token are behind, mean over tokens.",
        "steps"),
    "rollout/staleness_max": Meaning("The same, of the oldest token.", "steps"),
    "rollout/refill_prompts": Meaning(
        "Prompts that were sampled for the step, with those that taught nothing; only with "
        "rl.refill.", "prompts"),
    "rollout/refill_mixed": Meaning("Share of those whose samples differ in reward."),
    "rollout/refill_reward": Meaning("Mean over the responses to all of them."),
    "rollout/sampled_tokens": Meaning(
        "Response tokens that servers have given, of the whole run: those trained on, those kept "
        "and those dropped, by reason.", "tokens"),
    "rollout/trained_tokens": Meaning("Of them, those that steps have trained on.", "tokens"),
    "rollout/kept_tokens": Meaning("Of them, those that wait for a later step.", "tokens"),
    "rollout/dropped_refill_tokens": Meaning(
        "Of them, those of prompts that rl.refill left out.", "tokens"),
    "rollout/dropped_stop_tokens": Meaning(
        "Of them, those of responses that a stop broke off.", "tokens"),
    "servers/idle": Meaning("Share of the step in which a server had no request, mean."),
    "servers/restarts": Meaning("Servers that were started anew."),
    "servers/retries": Meaning("Requests that failed with their server and were sent again."),
    "servers/lost_s": Meaning("Without a server, from its failure to its return, added.", "s"),
    "rollout/logprob_gap": Meaning(
        "vLLM's log-prob of a response token against the trainer's before its first update, mean "
        "of the absolute difference.", "nats"),
    "rollout/kl": Meaning("The same two, as k3 estimates it, mean over response tokens.", "nats"),
    **{f"reward/{outcome}": Meaning(f"Share of responses: {text}.") for outcome, text in (
        ("correct", "the boxed answer is right"), ("wrong", "it is not"),
        ("truncated", "cut before an answer"), ("no_answer", "ended without one"),
        ("scored", "ended, and reward.function saw it"),
        ("timeout", "the verifier took too long"), ("crash", "the verifier died"))},
    "reward/NAME": Meaning(
        "What reward.function names beside its reward, or a part of reward.parts, mean over the "
        "rollouts that have it."),
    "actor/loss": Meaning("As rl.normalization weighs tokens, mean of all policy updates."),
    "actor/entropy": Meaning("Of the policy, mean over response tokens.", "nats"),
    "actor/ratio": Meaning(
        "Of new to old probability, mean over response tokens; GSPO's over responses."),
    "actor/clip_frac": Meaning(
        "Share of response tokens (GSPO: responses) whose ratio is outside its bounds, also where "
        "the clip does not bind."),
    "actor/kl": Meaning(
        "To the reference policy, by rl.kl_estimator, mean; only with rl.kl_coef.", "nats"),
    "actor/grad_norm": Meaning("Before clipping, mean over policy updates."),
    "actor/lr": Meaning("Of the last update."),
    "critic/loss": Meaning("Mean over response tokens, of all critic updates."),
    "critic/grad_norm": Meaning("Before clipping, mean over critic updates."),
    "critic/lr": Meaning("Of the last update."),
    "critic/value": Meaning("Before the updates, mean over response tokens."),
    "critic/return": Meaning("Mean over response tokens."),
    "critic/explained_variance": Meaning("Of the returns, by the values before the updates."),
    "pack/empty_share": Meaning(
        "Of rl.max_tokens_per_microbatch, over all ranks' microbatches.", "", "layout"),
    "pack/imbalance": Meaning(
        "Largest load of a replica over the mean, minus 1; the worst minibatch.", "", "layout"),
    "pack/bubble": Meaning(
        "Share of an update's time in which a pipeline stage waits for another, by the estimated "
        "FLOPs of its microbatches; with pipeline ranks.", "", "layout"),
    "pack/shared_tokens": Meaning(
        "Prompt tokens that rl.share_prefixes left out of the microbatches, all replicas added.",
        "tokens", "layout"),
    "pack/shared_share": Meaning(
        "Those tokens, of all prompts' and responses', each prompt counted with each response.",
        "", "layout"),
    "vision/tower_passes": Meaning(
        "Images through a tower, all replicas added: an image whose samples are on two replicas "
        "is encoded by both, as one is that is scored (rl.score_while_sampling) on another replica "
        "than it is trained on.", "images", "layout"),
    "vision/patches": Meaning("Of those images.", "patches", "layout"),
    "vision/cache_hits": Meaning(
        "Images of the step that a replica had from an earlier one, added.", "images", "layout"),
    "vision/tflops": Meaning("Of the tower's forward passes, added.", "1e12 operations", "layout"),
    "perf/train_tflop": Meaning(
        "Counted, of the step's passes over all rollouts; no recomputation, and nothing of what "
        "rl.refill has dropped or rl.share_prefixes left out (which is a question of the layout).",
        "1e12 operations"),
    "perf/forward_passes": Meaning("Passes of the decoder, a backward is two."),
    "perf/tokens_per_second": Meaning(
        "Response tokens (cold start: all) over the step's time without starting, evaluation, "
        "export and saving.", "", "machine"),
    "perf/tflops_per_rank": Meaning(
        "perf/train_tflop over the ranks and the time of the training phases and time/hidden_s.",
        "", "machine"),
    "perf/mfu": Meaning("That, of the GPU's bf16 peak.", "", "machine"),
    "memory/peak_gib": Meaning("Of the rank that had most, in this step.", "GiB", "machine"),
    "time/hidden_s": Meaning(
        "Of scoring responses while others were sampled (rl.score_while_sampling); in "
        "time/generate_s.", "s", "machine"),
    "time/PHASE_s": Meaning(
        "Of rank 0; every second is in exactly one phase, all of them in time/step_s.", "s",
        "machine"),
    "eval/SET/accuracy": Meaning(
        "Share of a held-out set's questions answered right; with reward.function the mean "
        "reward."),
    "eval/SET/error": Meaning("Standard error of that over questions, or their clusters."),
    "eval/SET/no_answer": Meaning("Share without a boxed answer."),
    "eval/SET/undecided": Meaning(
        "Of a benchmark: share that rules cannot decide; counted as wrong."),
    "eval/SET/length_tokens": Meaning("Response length, mean.", "tokens"),
}  # fmt: skip


def meaning_of(key: str) -> Meaning:
    """Of a key of a row.

    Raises:
        KeyError: nothing defines it.
    """
    key = re.sub(r"^time/(?!hidden_s).+_s$", "time/PHASE_s", key)
    key = re.sub(r"^eval/.+/", "eval/SET/", key)
    return METRICS["reward/NAME" if key.startswith("reward/") and key not in METRICS else key]


def same_on_any_layout(key: str) -> bool:
    """Whether the same rollouts give the same number on any number of ranks."""
    return meaning_of(key).depends == ""


def table() -> str:
    """As Markdown."""
    depends = {"": "", "layout": "how many ranks there are", "machine": "the machine"}
    lines = [
        "# metrics.jsonl",
        "",
        "Every key of a row, made by `python -m ovr_fast.observe.meanings`. A number is of all "
        "ranks together, a time of rank 0.",
        "The same rollouts give the same number on any layout, but where the last column says what "
        "else it depends on.",
        "",
        "| key | what | unit | depends on |",
        "|---|---|---|---|",
    ]
    for key, meaning in METRICS.items():
        lines.append(f"| `{key}` | {meaning.text} | {meaning.unit} | {depends[meaning.depends]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
