"""What a reward function gives for a file's own answers and for wrong ones, before a run pays."""

from __future__ import annotations

import numpy as np

from ovr_fast.config import DataSource, RewardConfig
from ovr_fast.data.messages import question_of
from ovr_fast.data.prompts import read_source
from ovr_fast.records import Prompt, Response
from ovr_fast.rl.rewards import Verifier

ROWS = 100


def check_reward(source: DataSource, function: str) -> bool:
    """Print the rewards of three responses to each of the first rows: the row's own (its response,
    or its answer in a box), another row's answer, and nothing. Returns whether the function failed
    nowhere and likes a row's own answer best.

    Raises:
        DataError: the source cannot be read, or has no answers.
        RewardFunctionError: the function is not there.
    """
    prompts = read_source(source, need="answer", limit=ROWS)
    verifier = Verifier(RewardConfig(function=function, max_failure_share=1.0))
    try:
        means, failed = {}, 0
        for kind in ("its own answer", "another row's", "nothing"):
            texts = [_text(kind, prompts, place) for place in range(len(prompts))]
            rollouts = verifier.reward(
                [_response(text, place) for place, text in enumerate(texts)],
                [prompt.answer or "" for prompt in prompts],
                [question_of(prompt.messages) for prompt in prompts],
                [(prompt.id, prompt.data_source) for prompt in prompts],
                [prompt.columns for prompt in prompts],
            )
            rewards = [rollout.reward for rollout in rollouts]
            failed += sum(rollout.outcome in ("crash", "timeout") for rollout in rollouts)
            means[kind] = float(np.mean(rewards))
            print(
                f"  {kind}: reward {means[kind]:.3f} on average, {min(rewards):.3f} to "
                f"{max(rewards):.3f}, of {len(rewards):,} rows"
            )
    finally:
        verifier.close()
    own, *others = means.values()
    fine = not failed and own > max(others)
    if failed:
        print(f"  {failed:,} calls failed; a run would give them 0")
    elif not fine:
        print("  a row's own answer earns no more than a wrong one or none: nothing can be learned")
    return fine


def _text(kind: str, prompts: list[Prompt], place: int) -> str:
    prompt = prompts[place]
    if kind == "its own answer":
        return prompt.response or f"The answer is \\boxed{{{prompt.answer}}}."
    if kind == "nothing":
        return ""
    others = [p.answer for p in prompts if p.answer != prompt.answer]
    other = others[place % len(others)] if others else "no other answer"
    return f"The answer is \\boxed{{{other}}}."


def _response(text: str, place: int) -> Response:
    return Response(
        prompt_index=place,
        sample_index=0,
        prompt_tokens=np.zeros(0, dtype=np.int64),
        response_tokens=np.zeros(len(text) // 4, dtype=np.int64),
        rollout_logprobs=np.zeros(len(text) // 4, dtype=np.float32),
        text=text,
        finish_reason="stop",
        versions=(),
    )
