"""What every rank of a layout does in the distributed tests; rank 0 writes what it found.

Run by ``test_layouts.py`` under torchrun: MODELS_FOLDER OUT_FILE TP PP
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import step_ranks
from ovr_fast.config import ModelConfig, OptimizerConfig, RLConfig
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.packing import PositionTable, deal, pack, response_boundaries
from ovr_fast.learner import Learner, build_stage, policy_head, score_values
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.hf_weights import export_hf, export_hf_everywhere, save_hf
from ovr_fast.model.shape import read_shape
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.ppo import gather
from ovr_fast.rl.losses import PolicyTargets, actor_loss, critic_loss
from ovr_fast.score import encode_conversations

CONFIG = RLConfig(kl_coef=0.1, entropy_coef=0.01, value_clip_eps=0.2)


def main(models: Path, output: Path, tp: int, pp: int) -> None:
    mesh = start_mesh(tensor=tp, pipeline=pp)
    found: dict = {}
    for name in ("tied", "wide"):
        folder = models / name
        shape = read_shape(folder)
        encoder = ChatEncoder(folder, image_token_id=shape.image_token_id)
        conversations = models / "conversations" / "conversations.jsonl"
        sequences = [
            replace(sequence, response_start=len(sequence.tokens) - 6 - i)
            for i, sequence in enumerate(encode_conversations(conversations, encoder))
        ]
        share = deal([len(s.tokens) for s in sequences], mesh.dp)[mesh.dp_rank]
        own = [sequences[i] for i in share]
        batches = pack(
            own,
            list(range(len(own))),
            positions=PositionTable(encoder.pictures, shape.image_token_id),
            max_tokens=260,
            multiple=mesh.tp,
        )
        ends = response_boundaries(own)
        global_ends = response_boundaries(sequences)
        total = int(global_ends[-1])
        generator = torch.Generator().manual_seed(0)
        draws = {key: torch.randn(total, generator=generator) for key in ("a", "r", "l")}
        mine = np.concatenate([np.arange(global_ends[i], global_ends[i + 1]) for i in share])
        recompute = {(2, 1): "selective", (2, 2): "full"}.get((tp, pp), "none")
        settings = ModelConfig(path="-", dtype="float32", train_vision="full", recompute=recompute)
        for kind in ("actor", "critic"):
            stage = build_stage(
                shape, mesh, settings, weights=folder, value_head=kind == "critic", seed=3
            )
            pictures = PictureEncoder(stage.visual, shape.vision, mesh, encoder.pictures)
            learner = Learner(kind, stage, pictures, OptimizerConfig(lr=1e-3, max_grad_norm=0.5))
            values = torch.zeros(len(mine))
            if kind == "critic":
                values = gather(batches, score_values(stage, batches, pictures), ends, mesh.device)
            targets = PolicyTargets(
                old_values_R=values,
                advantages_R=draws["a"][mine],
                returns_R=draws["r"][mine],
                rollout_logprobs_R=draws["l"][mine],
                old_logprobs_R=None,
                ref_logprobs_R=draws["l"][mine] - 5.0,
            )

            def loss(rows, batch, kind=kind, stage=stage, targets=targets, total=total):
                shared = dict(config=CONFIG, global_tokens=total)
                if kind == "critic":
                    return critic_loss(
                        stage.value_head(rows), batch, targets, operators=stage.operators, **shared
                    )
                head = policy_head(stage, rows, batch, temperature=0.7)
                return actor_loss(head, batch, targets, **shared)

            if mesh.dp_rank == 0 and kind == "actor":
                weights = {n: t.clone() for n, t in export_hf(stage)}
                everywhere = {n: t.clone() for n, t in export_hf_everywhere(stage)}
                if mesh.model_rank == mesh.tp * mesh.pp - 1:  # the last of the replica
                    torch.save(everywhere, output.with_suffix(f".{name}.last"))
                found[f"{name}/weights"] = weights
            gradients = learner.gradients(batches, loss)
            found[f"{name}/{kind}/gradients"] = {
                n: t.clone() for n, t in export_hf(stage, values=gradients)
            }
            report = learner.update(batches, loss)
            found[f"{name}/{kind}/report"] = report
            found[f"{name}/{kind}/stepped"] = {n: t.clone() for n, t in export_hf(stage)}
            if kind == "actor":
                save_hf(stage, output.with_suffix(f".{name}.hf"), like=folder)
    found["step"] = step_ranks.run(models, mesh, output.parent / "checkpoints", output.stem)
    if mesh.rank == 0:
        torch.save(found, output)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
