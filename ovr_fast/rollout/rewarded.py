"""Responses with their rewards."""

from __future__ import annotations

from ovr_fast.data.messages import question_of
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Prompt, Response, Rollout
from ovr_fast.rl.rewards import Verifier


def reward(
    responses: list[Response], prompts: tuple[Prompt, ...], verifier: Verifier, mesh: Mesh
) -> list[Rollout]:
    """The responses with rewards, on rank 0, which checks; none elsewhere. A collective.

    Raises:
        TooManyFailures: too many answer checks failed to trust the rewards; on every rank.
    """

    def check() -> list[Rollout]:
        asked = [prompts[response.prompt_index] for response in responses]
        answers = [prompt.answer or "" for prompt in asked]
        return verifier.reward(
            responses,
            answers,
            [question_of(prompt.messages) for prompt in asked],
            [(prompt.id, prompt.data_source) for prompt in asked],
            [prompt.columns for prompt in asked],
        )

    return mesh.on_first_rank(check, otherwise=[])
