"""Prompts as requests to a vLLM server, and its answers as responses."""

from __future__ import annotations

import base64
import zlib

import numpy as np

from ovr_fast.config import RolloutConfig
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.records import Prompt, Response
from ovr_fast.rollout.server import ServerFailed
from ovr_fast.shape.model_shape import ModelShape

MEDIA_TOKEN_BIAS = -100.0
"""Added to the logits of image and video placeholders: sampled, they would stand for no image."""


class PromptMismatch(ServerFailed):
    """The server sees another prompt than the trainer."""


def request_seed(run_seed: int, step: int, prompt: int) -> int:
    """Seed of a prompt's first sample, a function of what it is and of nothing else (no order, no
    server). vLLM adds the sample's number to it for the others.

    Args:
        run_seed: ``run.seed``.
        step: 1 is the first.
        prompt: position in the step's prompts.
    """
    return zlib.crc32(f"{run_seed}/{step - 1}/{prompt}".encode()) << 16


def request_body(
    prompt: Prompt,
    rollout: RolloutConfig,
    shape: ModelShape,
    *,
    seed: int,
    samples: int,
    max_tokens: int,
) -> dict:
    """A chat completion request for all samples of a prompt, so that its images travel once."""
    images = iter(prompt.images)
    messages = []
    for message in prompt.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                _image_part(next(images).data) if part["type"] == "image" else part
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    body = {
        "model": "policy",
        "messages": messages,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
        "logit_bias": {
            str(shape.image_token_id): MEDIA_TOKEN_BIAS,
            str(shape.video_token_id): MEDIA_TOKEN_BIAS,
        },
        "seed": seed,
        "n": samples,
        "max_completion_tokens": max_tokens,
    }
    if rollout.stop:
        body["stop"] = list(rollout.stop)
    return body


def _image_part(data: bytes) -> dict:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    encoded = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}}


def parse_responses(
    answer: dict,
    prompt: Prompt,
    index: int,
    *,
    chat: ChatTemplate,
    shape: ModelShape,
    versions: tuple[int, int],
) -> list[Response]:
    """The samples of one prompt, in order.

    Args:
        answer: to ``request_body``.
        prompt: that was asked.
        index: its position in the step's prompts.
        versions: RL steps in the weights of the first and the last token.

    Raises:
        PromptMismatch: the server saw other prompt tokens than the trainer.
        ServerFailed: a response is empty, lacks log-probs, or holds an image placeholder.
    """
    server_tokens = answer["prompt_token_ids"]
    ours = chat.encode(prompt.messages, prompt.images, generation_prompt=True)
    if server_tokens != ours.tolist():
        image = shape.image_token_id
        raise PromptMismatch(
            f"prompt {prompt.id}: the server saw {len(server_tokens)} tokens with "
            f"{server_tokens.count(image)} visual ones, the trainer has {len(ours)} with "
            f"{int((ours == image).sum())}; the model folder's processor settings and chat "
            "template must be the same on both sides"
        )
    responses = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        tokens = np.asarray(choice["token_ids"], dtype=np.int64)
        logprobs = np.asarray(
            [entry["logprob"] for entry in choice["logprobs"]["content"]], dtype=np.float32
        )
        if len(tokens) != len(logprobs) or len(tokens) == 0:
            raise ServerFailed(
                f"prompt {prompt.id}: {len(tokens)} response tokens, {len(logprobs)} log-probs"
            )
        if np.isin(tokens, (shape.image_token_id, shape.video_token_id)).any():
            raise ServerFailed(
                f"prompt {prompt.id}: a media placeholder was sampled, which the request forbids"
            )
        responses.append(
            Response(
                prompt_index=index,
                sample_index=choice["index"],
                prompt_tokens=ours,
                response_tokens=tokens,
                rollout_logprobs=logprobs,
                text=chat.decode(tokens),
                finish_reason=choice["finish_reason"],
                first_policy_version=versions[0],
                last_policy_version=versions[1],
            )
        )
    return responses
