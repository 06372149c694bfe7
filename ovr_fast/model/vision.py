"""The vision tower and merger of Qwen2.5-VL, on one packed buffer of patches.

All images of a microbatch go through together: most layers attend inside windows, a few inside
whole images, both by boundaries, so nothing is padded and no image sees another.

Axes: P patches · G groups of merge^2 patches (one visual token each) · I images.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovr_fast.model.attention import packed_attention
from ovr_fast.records import Segments
from ovr_fast.shape.model_shape import VisionShape
from ovr_kernels.reference import RotaryTable, axial_table


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, hidden: int, eps: float, dtype: torch.dtype, operators: ModuleType) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype))
        self.eps, self.operators = eps, operators

    def forward(self, hidden: Tensor) -> Tensor:
        return self.operators.rms_norm(hidden, self.weight, self.eps)

    def added(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised sum, and the sum."""
        return self.operators.add_rms_norm(hidden, residual, self.weight, self.eps)


class VisionBlock(nn.Module):
    """Attention inside windows or images, then a gated MLP, both with biases."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype, operators: ModuleType) -> None:
        super().__init__()
        hidden, wide = shape.hidden, shape.intermediate
        self.heads, self.head_dim, self.operators = shape.heads, shape.head_dim, operators
        self.norm1 = RMSNorm(hidden, 1e-6, dtype, operators)
        self.norm2 = RMSNorm(hidden, 1e-6, dtype, operators)
        self.qkv = nn.Linear(hidden, 3 * hidden, dtype=dtype)
        self.proj = nn.Linear(hidden, hidden, dtype=dtype)
        self.gate = nn.Linear(hidden, wide, dtype=dtype)
        self.up = nn.Linear(hidden, wide, dtype=dtype)
        self.down = nn.Linear(wide, hidden, dtype=dtype)

    def forward(
        self, hidden: Tensor, positions_2P: Tensor, table: RotaryTable, segments: Segments
    ) -> Tensor:
        heads = self.qkv(self.norm1(hidden)).view(-1, 3 * self.heads, self.head_dim)
        heads = self.operators.rotate(heads, positions_2P, table, rotary_heads=2 * self.heads)
        q, k, v = heads.chunk(3, dim=1)
        mixed = packed_attention(q, k, v, segments, causal=False)
        normal, hidden = self.norm2.added(self.proj(mixed.reshape(hidden.shape)), hidden)
        gate_up = torch.cat([self.gate(normal), self.up(normal)], dim=-1)
        return hidden + self.down(self.operators.swiglu(gate_up))


class Merger(nn.Module):
    """Joins each merge x merge group of patches into one visual token of the language model."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype, operators: ModuleType) -> None:
        super().__init__()
        self.wide = shape.hidden * shape.merge_size**2
        self.norm = RMSNorm(shape.hidden, 1e-6, dtype, operators)
        self.fc1 = nn.Linear(self.wide, self.wide, dtype=dtype)
        self.fc2 = nn.Linear(self.wide, shape.out_hidden, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        joined = self.norm(hidden).view(-1, self.wide)
        return self.fc2(nn.functional.gelu(self.fc1(joined)))


class VisionTower(nn.Module):
    """Pixels to visual tokens (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1)."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype, operators: ModuleType) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = nn.Linear(shape.patch_dim, shape.hidden, bias=False, dtype=dtype)
        self.blocks = nn.ModuleList(
            VisionBlock(shape, dtype, operators) for _ in range(shape.layers)
        )
        self.merger = Merger(shape, dtype, operators)

    def forward(self, patches_PD: Tensor, grid_thw_I3: Tensor) -> Tensor:
        """Visual tokens ``[P / merge^2, out_hidden]`` of all images, in image order.

        Args:
            patches_PD: [P, D] pixels in merge order (the image processor's order).
            grid_thw_I3: [I, 3] int64 on the CPU, patches along time, height, width.
        """
        shape, device = self.shape, patches_PD.device
        merge = shape.merge_size**2
        order_G, windows, images = window_order(grid_thw_I3, shape)
        order_G, windows, images = order_G.to(device), windows.to(device), images.to(device)
        hidden = self.patch_embed(patches_PD.to(self.patch_embed.weight.dtype))
        hidden = hidden.view(-1, merge, shape.hidden)[order_G].view(-1, shape.hidden)
        places_2P = patch_positions(grid_thw_I3, shape).to(device)
        places_2P = places_2P.view(2, -1, merge)[:, order_G].flatten(1)
        table = axial_table(base=10000.0, head_dim=shape.head_dim, device=device)
        trained = self.patch_embed.weight.requires_grad
        for index, block in enumerate(self.blocks):
            whole = index in shape.full_attention_layers
            inputs = hidden, places_2P, table, images if whole else windows
            # A minibatch's images wait for their backward together: a trained tower keeps each
            # block's input alone.
            if torch.is_grad_enabled() and trained:
                hidden = checkpoint(block, *inputs, use_reentrant=False)
            else:
                hidden = block(*inputs)
        return self.merger(hidden)[torch.argsort(order_G)]


def window_order(grid_thw_I3: Tensor, shape: VisionShape) -> tuple[Tensor, Segments, Segments]:
    """How to sort visual tokens by window, and where windows and images end.

    Windows of ``window_size`` pixels tile each frame from its top left corner; those at the right
    and bottom borders are smaller where the image does not divide.

    Returns:
        order [G] int64: visual token (in image order) at each place of the sorted buffer;
        windows and images as segments of the patches, on the CPU.
    """
    side = shape.window_size // shape.patch_size // shape.merge_size  # visual tokens
    merge = shape.merge_size**2
    order, window_sizes, image_sizes, offset = [], [], [], 0
    for t, h, w in grid_thw_I3.tolist():
        rows, columns = h // shape.merge_size, w // shape.merge_size
        down = torch.arange(rows) // side
        across = torch.arange(columns) // side
        windows_across = (columns + side - 1) // side
        frame = (down[:, None] * windows_across + across[None]).flatten()
        per_frame = int(frame[-1]) + 1
        window = (torch.arange(t)[:, None] * per_frame + frame[None]).flatten()
        order.append(torch.argsort(window, stable=True) + offset)
        window_sizes.append(torch.bincount(window))
        image_sizes += [rows * columns] * t  # full attention is per frame
        offset += t * rows * columns

    sizes = torch.cat(window_sizes).tolist()
    return (
        torch.cat(order),
        Segments.of([size * merge for size in sizes]),
        Segments.of([size * merge for size in image_sizes]),
    )


def patch_positions(grid_thw_I3: Tensor, shape: VisionShape) -> Tensor:
    """Row and column [2, P] int64 of each patch within its image, in merge order."""
    m, places = shape.merge_size, []
    for t, h, w in grid_thw_I3.tolist():
        frame = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h // m, m, w // m, m, 2)
        places.append(frame.transpose(1, 2).reshape(-1, 2).repeat(t, 1))
    return torch.cat(places).t()
