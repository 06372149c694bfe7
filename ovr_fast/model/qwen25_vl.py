"""Qwen2.5-VL from Megatron-core parts: one pipeline stage of it, on packed sequences.

The first stage has the embedding, the last the final norm and either the output embedding (actor)
or a value head (critic). The language model is sharded over tensor ranks, and so are the tokens
between its matrix products (sequence parallelism, Korthikanti et al. 2022): what norms and residual
sums keep for the backward is cut by the tensor size. Every rank has the whole vision tower: the
ranks of a replica split its images (``VisionEncoder``).

Axes: T packed tokens · t a tensor rank's share of them, T / tp · R response rows · H hidden.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovr_fast.config import FROZEN_PARTS
from ovr_fast.model.attention import packed_attention
from ovr_fast.model.recompute import keep_saved_ops
from ovr_fast.model.vision import RMSNorm, VisionTower
from ovr_fast.observe.ranges import with_ranges
from ovr_fast.parallel.megatron import (
    ColumnParallelLinear,
    MegatronModule,
    ModelType,
    RowParallelLinear,
    TransformerConfig,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Microbatch, Segments, to_device
from ovr_fast.shape.cost import split_layers
from ovr_fast.shape.model_shape import ModelShape
from ovr_kernels.objective import PolicyObjective
from ovr_kernels.reference import LinearPolicyStatistics, RotaryTable, mrope_table
from ovr_kernels.selection import operators_for


def megatron_config(shape: ModelShape, mesh: Mesh, dtype: torch.dtype) -> TransformerConfig:
    """The part of Megatron's settings that its layers, schedules and optimizer read."""
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        ffn_hidden_size=shape.intermediate,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        sequence_parallel=mesh.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=mesh.device.type == "cpu",
        perform_initialization=False,  # every weight is loaded, or set by the value head below
        variable_seq_lengths=True,  # packed microbatches differ in length
        moe_token_dispatcher_type="alltoall",  # the only one Megatron allows with the line above
        # Losses arrive already scaled to the global batch, whatever the microbatches and ranks.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,  # needs Apex
        batch_p2p_comm=mesh.device.type == "cuda",
    )


def _no_init(weight: Tensor) -> None:
    """Weight initialisation for Megatron's layers: none."""


class Attention(nn.Module):
    """Grouped-query attention with QKV biases and M-RoPE, heads sharded over tensor ranks."""

    def __init__(self, shape: ModelShape, config: TransformerConfig, operators: ModuleType) -> None:
        super().__init__()
        self.operators = operators
        tp = config.tensor_model_parallel_size
        self.head_dim = shape.head_dim
        self.heads, self.kv_heads = shape.heads // tp, shape.kv_heads // tp
        parts = dict(config=config, init_method=_no_init, skip_bias_add=False)
        # A rank's rows are its queries, then its keys, then its values.
        self.qkv = ColumnParallelLinear(
            shape.hidden,
            (shape.heads + 2 * shape.kv_heads) * shape.head_dim,
            bias=True,
            gather_output=False,
            **parts,
        )
        self.proj = RowParallelLinear(
            shape.heads * shape.head_dim,
            shape.hidden,
            bias=False,
            input_is_parallel=True,
            **parts,
        )

    def forward(
        self, hidden: Tensor, positions_3T: Tensor, table: RotaryTable, segments: Segments
    ) -> Tensor:
        """[t, 1, H] to [t, 1, H]; positions_3T: [3, T]."""
        mixed, _ = self.qkv(hidden)  # gathers the tensor ranks' tokens: [t, 1, H] to [T, 1, ...]
        heads = mixed.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        heads = self.operators.rotate(
            heads, positions_3T, table, rotary_heads=self.heads + self.kv_heads
        )
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        out = packed_attention(q, k, v, segments, causal=True)
        return self.proj(out.reshape(mixed.shape[0], 1, -1))[0]


class MLP(nn.Module):
    """SwiGLU, width sharded over tensor ranks."""

    def __init__(self, shape: ModelShape, config: TransformerConfig, operators: ModuleType) -> None:
        super().__init__()
        self.operators = operators
        parts = dict(config=config, init_method=_no_init, bias=False, skip_bias_add=False)
        # A rank's rows are its part of the gate, then its part of the up projection.
        self.gate_up = ColumnParallelLinear(
            shape.hidden, 2 * shape.intermediate, gather_output=False, **parts
        )
        self.down = RowParallelLinear(
            shape.intermediate, shape.hidden, input_is_parallel=True, **parts
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.operators.swiglu(self.gate_up(hidden)[0]))[0]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: ModelShape, config: TransformerConfig, operators: ModuleType) -> None:
        super().__init__()
        norm = (shape.hidden, shape.norm_eps, config.params_dtype, operators)
        self.attention_norm = RMSNorm(*norm)
        self.attention = Attention(shape, config, operators)
        self.mlp_norm = RMSNorm(*norm)
        self.mlp = MLP(shape, config, operators)
        for module in (self.attention_norm, self.mlp_norm):
            # They see a share of the tokens: Megatron sums their gradients over tensor ranks.
            module.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden: Tensor, positions_3T: Tensor, table: RotaryTable, segments: Segments
    ) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), positions_3T, table, segments)
        normal, hidden = self.mlp_norm.added(attended, hidden)
        return hidden + self.mlp(normal)


class ValueHead(nn.Module):
    """One number per row: the expected reward from here on.

    No bias, normal with standard deviation ``1 / (H + 1)`` (Open-Reasoner-Zero's code; the paper's
    U(-sqrt 5, sqrt 5) would start the critic hundreds of reward units off). Kept in float32: its
    output is the baseline that every advantage is measured from.
    """

    def __init__(self, hidden: int, device: torch.device, seed: int) -> None:
        super().__init__()
        start = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter((start / (hidden + 1)).to(device))

    def forward(self, hidden_RH: Tensor) -> Tensor:
        """[R, H] to [R] fp32."""
        return (hidden_RH.float() @ self.weight.t()).squeeze(-1)


class Qwen25VLStage(MegatronModule):
    """This rank's stage of an actor or a critic.

    Args:
        shape: the whole model.
        mesh: this rank's position and groups.
        dtype: of weights and activations.
        value_head: a critic; the last stage ends in a value head instead of logits.
        train_vision: a key of ``FROZEN_PARTS``.
        kernels: see ``ModelConfig.kernels``.
        tower: another model's, to share while it is frozen; None: one of its own.
        recompute: see ``ModelConfig.recompute``.
        seed: of the value head.
    """

    def __init__(
        self,
        shape: ModelShape,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        value_head: bool,
        train_vision: str,
        recompute: str,
        kernels: str = "auto",
        tower: VisionTower | None = None,
        seed: int = 0,
    ) -> None:
        config = megatron_config(shape, mesh, dtype)
        super().__init__(config)
        self.shape, self.mesh, self.recompute = shape, mesh, recompute
        self.train_vision = train_vision
        self.is_critic = value_head  # on every stage; the head itself is on the last
        self.operators = operators = with_ranges(operators_for(mesh.device, kernels))
        self.table = mrope_table(
            base=shape.rope_base,
            head_dim=shape.head_dim,
            sections=shape.mrope_sections,
            device=mesh.device,
        )
        # Names that Megatron's schedules and gradient reduction look for.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = mesh.first_stage, mesh.last_stage
        self.share_embeddings_and_output_weights = shape.tied_embeddings and not value_head
        self.input_tensor: Tensor | None = None

        self.layer_range = split_layers(shape, mesh.pp, head=not value_head)[mesh.pp_rank]
        # Keyed by the layer's number in the whole model, so that names need no offset.
        self.layers = nn.ModuleDict(
            {str(index): DecoderLayer(shape, config, operators) for index in self.layer_range}
        )
        tied_copy = mesh.last_stage and self.share_embeddings_and_output_weights
        # On every stage: the ranks of a replica split its images (``VisionEncoder``).
        self.visual = tower or VisionTower(shape.vision, dtype, operators)
        if mesh.first_stage or tied_copy:
            self.embedding = VocabParallelEmbedding(
                shape.vocab, shape.hidden, init_method=_no_init, config=config
            )
        if self.share_embeddings_and_output_weights and mesh.pp > 1 and hasattr(self, "embedding"):
            # A bucket of its own: first and last stage then scatter its gradient alike, before
            # Megatron adds the two.
            self.embedding.weight.shared_embedding = True
        if tied_copy and not mesh.first_stage:
            self.embedding.weight.shared = True  # counted once in the gradient norm
        if mesh.last_stage:
            self.norm = RMSNorm(shape.hidden, shape.norm_eps, dtype, operators)
            if value_head:
                self.value_head = ValueHead(shape.hidden, mesh.device, seed)
            elif not self.share_embeddings_and_output_weights:
                self.head = VocabParallelEmbedding(
                    shape.vocab, shape.hidden, init_method=_no_init, config=config
                )
        self.to(mesh.device)
        self._mark_shards()
        self._freeze(train_vision)

    def _mark_shards(self) -> None:
        """Tell Megatron's gradient norm which parameters are shards (its own initialisation would
        have, but nothing is initialised here); all others count once per tensor group."""
        for module in self.modules():
            if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
                dim = 0
            elif isinstance(module, RowParallelLinear):
                dim = 1
            else:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                sharded = name == "weight" or dim == 0
                if sharded and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, dim, 1)

    def _freeze(self, train_vision: str) -> None:
        for name, parameter in self.visual.named_parameters():
            part = "merger" if name.startswith("merger.") else "tower"
            parameter.requires_grad_(part not in FROZEN_PARTS[train_vision])
            if not self.pre_process:
                parameter.shared = True  # type: ignore[attr-defined]  # once in the gradient norm

    @property
    def output_weight(self) -> Tensor:
        """[V / tp, H] this rank's shard of the output embedding (last stage of an actor)."""
        tied = self.share_embeddings_and_output_weights
        return self.embedding.weight if tied else self.head.weight

    @property
    def output_gradient(self) -> Tensor:
        """[V / tp, H] fp32, Megatron's buffer for the gradient of ``output_weight``."""
        return cast(Any, self.output_weight).main_grad

    @property
    def _tp_group(self) -> dist.ProcessGroup | None:
        return self.mesh.tp_group if self.mesh.tp > 1 else None

    def logprobs(self, hidden_RH: Tensor, batch: Microbatch, *, temperature: float) -> Tensor:
        """Log-probs [R] fp32 nats of the labels, from the last stage's rows."""
        return self.operators.linear_logprob(
            hidden_RH,
            self.output_weight,
            batch.labels_R,
            temperature=temperature,
            tp_group=self._tp_group,
        )

    def policy_loss(
        self, hidden_RH: Tensor, batch: Microbatch, objective: PolicyObjective, **tokens: Any
    ) -> tuple[Tensor, LinearPolicyStatistics]:
        """``reference.linear_policy_loss`` of the labels; the output embedding's gradient goes
        straight into Megatron's buffer.

        Args:
            tokens: advantages, log-probs, weights and temperature, as the operator takes them.
        """
        return self.operators.linear_policy_loss(
            hidden_RH,
            self.output_weight,
            batch.labels_R,
            objective,
            tp_group=self._tp_group,
            weight_gradient=self.output_gradient,
            **tokens,
        )

    def gspo_loss(
        self, hidden_RH: Tensor, batch: Microbatch, **responses: Any
    ) -> tuple[Tensor, LinearPolicyStatistics]:
        """``reference.linear_gspo_loss`` of the labels, as ``policy_loss``.

        Args:
            responses: advantages, log-probs, bounds, weights and temperature, as the operator takes
                them.
        """
        return self.operators.linear_gspo_loss(
            hidden_RH,
            self.output_weight,
            batch.labels_R,
            cu_seqlens=batch.responses.cu_seqlens_S1,
            tp_group=self._tp_group,
            weight_gradient=self.output_gradient,
            return_entropy=True,
            **responses,
        )

    def cross_entropy(
        self, hidden_RH: Tensor, batch: Microbatch, *, weights: float
    ) -> tuple[Tensor, LinearPolicyStatistics]:
        """``reference.linear_cross_entropy`` of the labels, as ``policy_loss``."""
        return self.operators.linear_cross_entropy(
            hidden_RH,
            self.output_weight,
            batch.labels_R,
            weights=weights,
            tp_group=self._tp_group,
            weight_gradient=self.output_gradient,
        )

    def values(self, hidden_RH: Tensor) -> Tensor:
        """A critic's values [R] fp32, reward units, from the last stage's rows."""
        return self.value_head(hidden_RH)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight whose gradient Megatron sums over the first and last stage."""
        return self.embedding.weight

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by Megatron's schedules with what the previous stage sent."""
        self.input_tensor = input_tensor[0]

    def forward(self, batch: Microbatch) -> Tensor:
        """Hidden states [t, 1, H] for the next stage; on the last, normalised rows [R, H]."""
        if self.pre_process:
            hidden = self._embed(batch)
            if self.mesh.tp > 1:
                hidden = scatter_to_sequence_parallel_region(hidden).clone()  # no view of T
        else:
            assert self.input_tensor is not None
            hidden = self.input_tensor
        for layer in self.layers.values():
            inputs = hidden, batch.positions_3T, self.table, batch.segments
            if self.recompute != "none" and torch.is_grad_enabled():
                more: dict[str, Any] = {}
                if self.recompute == "selective":
                    more["context_fn"] = keep_saved_ops
                hidden = checkpoint(layer, *inputs, use_reentrant=False, **more)
            else:
                hidden = layer(*inputs)
        if not self.post_process:
            return hidden
        if self.mesh.tp > 1:  # the head gives every tensor rank the whole gradient of the rows
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return self.norm(hidden.squeeze(1)[batch.predictor_index_R])

    def _embed(self, batch: Microbatch) -> Tensor:
        hidden = self.embedding(batch.tokens_T[None]).transpose(0, 1)  # [T, 1, H]
        if not batch.images:
            return hidden
        if len(batch.visual_tokens) != len(batch.images):
            raise ValueError("the batch's images are not encoded: VisionEncoder.fill comes first")
        visual = torch.cat([to_device(piece, hidden.device) for piece in batch.visual_tokens])
        return hidden.index_copy(0, batch.visual_index_G, visual.to(hidden.dtype)[:, None])
