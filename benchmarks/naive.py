"""The same PPO step as it is usually written first: the baseline of ``benchmarks/step.py``.

transformers' model, right-padded microbatches in the order of the rollouts, whole logits in
float32, passes for old and reference log-probs whether needed or not, and every sample's image
through the tower in every pass. The mathematics is ours, and so are the gradients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_fast.data.images import ImageProcessor, stack_patches
from ovr_fast.records import Prompt, Rollout, RolloutBatch
from workload import DEVICE, DTYPE


class NaivePPO:
    """Actor, critic and reference from one folder.

    Args:
        microbatch: sequences in a forward pass.
        critic_steps: optimizer steps of the critic.
        lr: of both.
    """

    def __init__(self, folder: Path, *, microbatch: int, critic_steps: int, lr: float) -> None:
        def load() -> Qwen2_5_VLForConditionalGeneration:
            kind = Qwen2_5_VLForConditionalGeneration
            return kind.from_pretrained(folder, dtype=DTYPE).to(DEVICE)

        self.actor, self.critic, self.reference = load(), load(), load()
        hidden = self.actor.config.text_config.hidden_size
        start = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0))
        self.value_head = nn.Parameter((start / (hidden + 1)).to(DEVICE))
        self.critic.lm_head = nn.Identity()
        for model in (self.actor, self.critic):
            model.model.visual.requires_grad_(False)
        self.processor = ImageProcessor(folder)
        self.microbatch, self.critic_steps = microbatch, critic_steps
        self.image_token_id = self.actor.config.image_token_id

        def optimizer(parameters):
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            return trained, torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

        self.actor_parameters, self.actor_optimizer = optimizer(self.actor.parameters())
        self.critic_parameters, self.critic_optimizer = optimizer(
            [*self.critic.parameters(), self.value_head]
        )

    def learn(self, batch: RolloutBatch) -> dict[str, float]:
        """One step. Returns what is to be compared with ours."""
        prompts = list(batch.prompts)
        order = np.random.default_rng(0).permutation(len(batch.rollouts))
        rollouts = [batch.rollouts[index] for index in order]
        chunks = [
            rollouts[i : i + self.microbatch] for i in range(0, len(rollouts), self.microbatch)
        ]
        batches = [self._pad(chunk, prompts) for chunk in chunks]
        with torch.no_grad():
            values = [self._values(batch) for batch in batches]
            old = [self._logprobs(self.actor, batch) for batch in batches]
            for batch in batches:  # what a KL term of weight 0 would look at
                self._logprobs(self.reference, batch)
        returns = [batch["reward"][:, None].expand_as(batch["mask"]) for batch in batches]
        masks = [batch["mask"] for batch in batches]
        every = torch.cat(
            [(r - v)[m] for r, v, m in zip(returns, values, masks, strict=True)]
        ).double()
        mean, deviation = every.mean(), every.std(correction=0)
        advantages = [
            ((r - v - mean) / (deviation + 1e-8)).float()
            for r, v in zip(returns, values, strict=True)
        ]
        critic_loss = 0.0
        for turn in range(self.critic_steps):
            part = range(turn, len(batches), self.critic_steps)
            tokens = sum(int(masks[i].sum()) for i in part)
            self.critic_optimizer.zero_grad()
            for i in part:
                error = (self._values(batches[i]) - returns[i])[masks[i]]
                loss = 0.5 * error.square().sum() / tokens
                loss.backward()
                critic_loss += float(loss.detach()) * tokens
            nn.utils.clip_grad_norm_(self.critic_parameters, 1.0)
            self.critic_optimizer.step()
        tokens = sum(int(mask.sum()) for mask in masks)
        self.actor_optimizer.zero_grad()
        for batch, before, advantage, mask in zip(batches, old, advantages, masks, strict=True):
            ratio = (self._logprobs(self.actor, batch) - before).exp()
            clipped = ratio.clamp(0.8, 1.2)
            loss = -torch.minimum(ratio * advantage, clipped * advantage)[mask].sum() / tokens
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.actor_parameters, 1.0)
        self.actor_optimizer.step()
        return {"actor/grad_norm": float(norm), "critic/loss": critic_loss / tokens}

    def padded_tokens(self, rollouts: list[Rollout]) -> list[tuple[int, int]]:
        """Sequences and padded length of every microbatch."""
        order = np.random.default_rng(0).permutation(len(rollouts))
        sizes = [len(rollouts[i].prompt_tokens) + len(rollouts[i].response_tokens) for i in order]
        chunks = [sizes[i : i + self.microbatch] for i in range(0, len(sizes), self.microbatch)]
        return [(len(chunk), max(chunk)) for chunk in chunks]

    def _pad(self, rollouts: list[Rollout], prompts: list[Prompt]) -> dict[str, Tensor]:
        rows = [np.concatenate([r.prompt_tokens, r.response_tokens]) for r in rollouts]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        seen, mask = torch.zeros_like(ids), torch.zeros(len(rows), longest - 1, dtype=torch.bool)
        for index, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
            ids[index, : len(row)] = torch.from_numpy(row)
            seen[index, : len(row)] = 1
            mask[index, len(rollout.prompt_tokens) - 1 : len(row) - 1] = True
        images = [p for r in rollouts for p in prompts[r.prompt_index].images]
        patches, grids = stack_patches([self.processor(image) for image in images])
        tensors = {
            "input_ids": ids,
            "attention_mask": seen,
            "mm_token_type_ids": (ids == self.image_token_id).int(),
            "pixel_values": patches,
            "image_grid_thw": torch.as_tensor(grids),
            "mask": mask,
            "reward": torch.tensor([r.reward for r in rollouts]),
        }
        return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}

    @staticmethod
    def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in batch.items() if name not in ("mask", "reward")}

    def _logprobs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**self._inputs(batch)).logits[:, :-1].float()
        targets = batch["input_ids"][:, 1:, None]
        return F.log_softmax(logits, dim=-1).gather(-1, targets)[..., 0]

    def _values(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.critic(**self._inputs(batch)).logits[:, :-1].float()
        return (hidden @ self.value_head.T)[..., 0]
