"""Pictures into visual tokens: each distinct one once for all samples, by one rank of a replica.

All samples of a prompt share what the tower makes of its picture. The ranks of a data-parallel
replica (tensor x pipeline) each encode a share of the distinct pictures, dealt by the tower's cost,
and gather the results, so the tower is no burden of the first pipeline stage alone. A frozen tower
encodes a picture once for all passes of a step, and keeps recent ones between steps. A trained one
encodes it once a pass; the gradients of all samples are added up before one backward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.batch import PackedBatch, Picture
from ovr_fast.data.packing import deal
from ovr_fast.data.vision import PictureProcessor, stack_patches
from ovr_fast.model.cost import tower_flops
from ovr_fast.model.shape import VisionShape
from ovr_fast.model.vision import VisionTower
from ovr_fast.parallel.mesh import Mesh

Grid = tuple[int, int, int]


@dataclass(slots=True)
class VisionCounters:
    """What pictures cost on this replica since they were last read."""

    tower_passes: float = 0.0  # pictures that went through the tower
    patches: float = 0.0
    cache_hits: float = 0.0  # pictures of a step that an earlier step had encoded
    tflops: float = 0.0  # forward, 1e12 operations


class PictureEncoder:
    """A replica's vision tower. Every method is a collective of the replica's ranks, which must
    call it with the same pictures in the same order.

    Args:
        tower: this rank's copy.
        shape: of the tower.
        mesh: this rank's place.
        processor: of the pictures.
        patch_budget: patches that go through the tower together.
        cache_mib: a frozen tower's tokens kept on the host between steps, MiB; the oldest go first.
    """

    def __init__(
        self,
        tower: VisionTower,
        shape: VisionShape,
        mesh: Mesh,
        processor: PictureProcessor,
        *,
        patch_budget: int = 65_536,
        cache_mib: int = 1024,
    ) -> None:
        self.tower, self.shape, self.mesh, self.processor = tower, shape, mesh, processor
        self.trained = any(parameter.requires_grad for parameter in tower.parameters())
        self.patch_budget, self.cache_limit = patch_budget, cache_mib * 2**20
        self._dtype = tower.patch_embed.weight.dtype
        self._counters = VisionCounters()
        self._held: dict[str, Tensor] = {}
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def hold(self, pictures: Iterable[Picture]) -> None:
        """Encode a step's pictures with the frozen tower, for all its passes."""
        assert not self.trained, "a trained tower's tokens are those of one pass"
        distinct = {picture.digest: picture for picture in pictures}
        self._cache.update(self._held)
        self._held = {digest: self._cache[digest] for digest in distinct if digest in self._cache}
        for digest in self._held:
            self._cache.move_to_end(digest)
        self._counters.cache_hits += len(self._held)
        missing = [picture for digest, picture in distinct.items() if digest not in self._held]
        with torch.no_grad():
            tokens = self._encode(missing)
        for picture, piece in zip(missing, tokens, strict=True):
            self._held[picture.digest] = piece.cpu()
        size = sum(piece.numel() * piece.element_size() for piece in self._cache.values())
        while size > self.cache_limit:
            _, oldest = self._cache.popitem(last=False)
            size -= oldest.numel() * oldest.element_size()

    def forget(self) -> None:
        """Drop what is kept between steps. Called with each checkpoint: a resumed run starts with
        nothing, and a picture encoded in other company may differ in its last bits."""
        self._cache.clear()
        self._held = {}

    def fill(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """The batches with their visual tokens, for a pass without gradients for the tower."""
        distinct = _distinct(batches)
        known = dict(self._held)
        missing = [picture for digest, picture in distinct.items() if digest not in known]
        with torch.no_grad():
            tokens = self._encode(missing)
        known |= {picture.digest: t for picture, t in zip(missing, tokens, strict=True)}
        return [_with_tokens(batch, known) for batch in batches]

    def fill_for_training(
        self, batches: list[PackedBatch]
    ) -> tuple[list[PackedBatch], Callable[[], None]]:
        """The batches with visual tokens that gradients are wanted of, and what to call when all of
        them have been differentiated: it brings the gradients into the tower's buffers."""
        if not self.trained:
            return self.fill(batches), lambda: None
        pictures = list(_distinct(batches).values())
        own: list[tuple[int, Tensor]] = []
        tokens = self._encode(pictures, own=own)
        # In fp32: the gradients of a picture's samples add up here.
        leaves = [piece.detach().float().requires_grad_() for piece in tokens]
        known = {p.digest: leaf for p, leaf in zip(pictures, leaves, strict=True)}

        def finish() -> None:
            if pictures:
                self._backward(leaves, own)

        return [_with_tokens(batch, known) for batch in batches], finish

    def read_counters(self) -> dict[str, float]:
        """Sums over all replicas since the last reading, as ``vision/...`` metrics."""
        names = [field.name for field in fields(self._counters)]
        values = torch.tensor(
            [getattr(self._counters, name) for name in names],
            dtype=torch.float64,
            device=self.mesh.device,
        )
        dist.all_reduce(values, group=self.mesh.dp_group)
        self._counters = VisionCounters()
        return {f"vision/{n}": v for n, v in zip(names, values.tolist(), strict=True)}

    def _encode(
        self, pictures: list[Picture], *, own: list[tuple[int, Tensor]] | None = None
    ) -> list[Tensor]:
        """Tokens ``[G, out_hidden]`` of each picture, on every rank.

        Args:
            own: filled with (index, tokens that lead back to the tower) of this rank's share.
        """
        if not pictures:
            return []
        grids = [self.processor.grid(picture) for picture in pictures]
        costs = [tower_flops(grid, self.shape) for grid in grids]
        self._counters.tower_passes += len(pictures)
        self._counters.patches += sum(t * h * w for t, h, w in grids)
        self._counters.tflops += sum(costs) / 1e12
        ranks, rank = self.mesh.tp * self.mesh.pp, self.mesh.model_rank
        shares = deal(costs, ranks)
        pieces = self._through_tower([pictures[index] for index in shares[rank]])
        if own is not None:
            own.extend(zip(shares[rank], pieces, strict=True))
        if ranks == 1:
            return pieces
        sizes = [sum(self._tokens(grids[index]) for index in share) for share in shares]
        # Equal sizes for one gather; the shares' costs are near equal, so little is padding.
        mine = torch.zeros(
            max(sizes), self.shape.out_hidden, dtype=self._dtype, device=self.mesh.device
        )
        if pieces:
            mine[: sizes[rank]] = torch.cat(pieces).detach()
        everything = mine.new_empty(ranks * len(mine), mine.shape[1])
        dist.all_gather_into_tensor(everything, mine, group=self.mesh.model_group)
        result = {}
        for owner, share in enumerate(shares):
            start = owner * len(mine)
            for index in share:
                end = start + self._tokens(grids[index])
                result[index] = everything[start:end].clone()
                start = end
        return [result[index] for index in range(len(pictures))]

    def _through_tower(self, pictures: list[Picture]) -> list[Tensor]:
        """Tokens of this rank's pictures, packed by patches up to the budget, none cut."""
        groups: list[list[tuple[Tensor, Grid]]] = []
        room = 0
        for picture in pictures:
            patches, grid = self.processor(picture)
            if not groups or len(patches) > room:
                groups.append([])
                room = self.patch_budget
            groups[-1].append((patches, grid))
            room -= len(patches)
        found: list[Tensor] = []
        for group in groups:
            patches, grids = stack_patches(group)
            tokens = self.tower(patches.to(self.mesh.device), grids)
            found += tokens.split([self._tokens(grid) for _, grid in group])
        return found

    def _backward(self, leaves: list[Tensor], own: list[tuple[int, Tensor]]) -> None:
        """Tokens' gradients from the first stage, where they are used, to the ranks that made them;
        then the sum of all ranks' tower gradients, so that every copy steps alike. (Up to the order
        of sums over data-parallel ranks; the first stage's copy is the one that is saved.)"""
        if self.mesh.first_stage:
            assert all(leaf.grad is not None for leaf in leaves), "a picture was not used"
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        whole = torch.cat(found)
        if self.mesh.tp * self.mesh.pp > 1:
            first = dist.get_process_group_ranks(self.mesh.model_group)[0]
            dist.broadcast(whole, first, group=self.mesh.model_group)
        pieces = whole.split([len(leaf) for leaf in leaves])
        if own:
            torch.autograd.backward(
                [tokens for _, tokens in own],
                [pieces[index].to(tokens.dtype) for index, tokens in own],
            )
        if self.mesh.tp * self.mesh.pp > 1:
            for parameter in self.tower.parameters():
                if parameter.requires_grad:
                    dist.all_reduce(parameter.main_grad, group=self.mesh.model_group)  # type: ignore[attr-defined]

    def _tokens(self, grid: Grid) -> int:
        t, h, w = grid
        return t * h * w // self.shape.merge_size**2


def _distinct(batches: list[PackedBatch]) -> dict[str, Picture]:
    return {picture.digest: picture for batch in batches for picture in batch.pictures}


def _with_tokens(batch: PackedBatch, known: dict[str, Tensor]) -> PackedBatch:
    return replace(batch, visual_tokens=tuple(known[p.digest] for p in batch.pictures))
