"""A learner's weights and AdamW state as the pieces that a checkpoint is made of."""

from __future__ import annotations

import torch

from ovr_fast.learner.optimizer import ShardedAdamW
from ovr_fast.model.hf_weights import parameter_table, rectangles
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.parallel.checkpoint import Piece


def learner_pieces(
    name: str, model: Qwen25VLStage, optimizer: ShardedAdamW, *, steps_done: int
) -> list[Piece]:
    """Trained weights (in fp32, as the optimizer holds them) and Adam's moments, as this rank's
    rectangles of the whole model's tensors. Frozen parts come from the weights folder.

    Args:
        name: of the learner; the pieces are called ``name/what/tensor``.
        steps_done: optimizer steps so far.
    """
    table = parameter_table(model.shape, model.mesh.pp, value_head=model.is_critic)
    rows = {row.ours: row for row in table}
    main_of = optimizer.main_parameters()
    pieces = []
    for key, parameter in model.named_parameters():
        if parameter not in main_of:
            continue  # frozen, or none of it is this data-parallel rank's
        held = optimizer.distributed._get_model_param_range_map(parameter)["param"]
        main = main_of[parameter]
        assert main.numel() == held.end - held.start, key
        moments = optimizer.inner.state[main]
        if not moments:  # the optimizer makes them at its first step
            moments.update(
                step=torch.tensor(float(steps_done), device=model.mesh.device),
                exp_avg=torch.zeros_like(main),
                exp_avg_sq=torch.zeros_like(main),
            )
        for what, flat in (
            ("weight", main),
            ("exp_avg", moments["exp_avg"]),
            ("exp_avg_sq", moments["exp_avg_sq"]),
        ):
            for part in rectangles(rows[key], held.start, held.end, model.mesh):
                pieces.append(
                    Piece(
                        name=f"{name}/{what}/{part.tensor}",
                        shape=part.shape,
                        offsets=part.offsets,
                        tensor=flat.detach().view(-1)[part.begin : part.end].view(part.sizes),
                        owned=part.first_replica and not getattr(parameter, "shared", False),
                    )
                )
    return pieces
