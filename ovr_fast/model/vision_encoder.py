"""Images to visual tokens: each distinct image goes through the tower once, for all its samples.

All samples of a prompt share their image's visual tokens. The ranks of a data-parallel replica
(tensor x pipeline) each encode a share of the distinct images, balanced by the tower's FLOPs, and
gather the results, so the tower does not burden the first pipeline stage alone. A frozen tower
encodes an image once for all passes of a step, and keeps recent ones between steps. A trained one
encodes it once a pass; the gradients of all samples are summed before one backward.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.data.balance import greedy_partition
from ovr_fast.data.images import ImageProcessor, stack_patches
from ovr_fast.model.vision import VisionTower
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import ImageFile, Microbatch
from ovr_fast.shape.cost import tower_flops
from ovr_fast.shape.model_shape import VisionShape

Grid = tuple[int, int, int]


@dataclass(slots=True)
class VisionCounters:
    """What images cost on this replica since they were last read."""

    tower_passes: float = 0.0  # images that went through the tower
    patches: float = 0.0
    cache_hits: float = 0.0  # images of a step that an earlier step had encoded
    tflops: float = 0.0  # forward, 1e12 operations


class VisionEncoder:
    """A replica's vision tower. Every method is a collective of the replica's ranks, which must
    call it with the same images in the same order.

    Args:
        tower: this rank's copy.
        shape: of the tower.
        mesh: this rank's position and groups.
        processor: of the images.
        patch_budget: patches that go through the tower together.
        cache_mib: a frozen tower's tokens kept on the host between steps, MiB; the oldest go first.
    """

    def __init__(
        self,
        tower: VisionTower,
        shape: VisionShape,
        mesh: Mesh,
        processor: ImageProcessor,
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
        self._early: set[str] = set()  # of ``_held``, by ``encode_early``
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode_step(self, batches: List[Microbatch]) -> None:
        """Encode a step's images with the frozen tower, once for all its passes."""
        assert not self.trained, "a trained tower's tokens are those of one pass"
        distinct = _distinct(batches)
        # Of early images those of the step: which others a replica has is a question of arrival.
        self._cache.update(
            {d: t for d, t in self._held.items() if d not in self._early or d in distinct}
        )
        self._held = {digest: self._cache[digest] for digest in distinct if digest in self._cache}
        for digest in self._held:
            self._cache.move_to_end(digest)
        self._counters.cache_hits += len(self._held.keys() - self._early)
        self._early = set()
        missing = [image for digest, image in distinct.items() if digest not in self._held]
        with torch.no_grad():
            tokens = self._encode(missing)
        if missing:  # one transfer; clones, so that an image can leave the cache by itself
            pieces = torch.cat(tokens).cpu().split([len(piece) for piece in tokens])
            for image, piece in zip(missing, pieces, strict=True):
                self._held[image.digest] = piece.clone()
        size = sum(piece.numel() * piece.element_size() for piece in self._cache.values())
        while size > self.cache_limit:
            _, oldest = self._cache.popitem(last=False)
            size -= oldest.numel() * oldest.element_size()

    def encode_early(self, batches: List[Microbatch]) -> None:
        """Encode images for the passes before ``encode_step`` or ``forget_early``, each by itself:
        a tower's results are not bitwise batch-invariant, and which images come here together is a
        question of which response ends first."""
        distinct = _distinct(batches)
        found = {d: self._cache[d] for d in distinct if d in self._cache and d not in self._held}
        self._held |= found
        missing = [image for digest, image in distinct.items() if digest not in self._held]
        with torch.no_grad():
            tokens = self._encode(missing, budget=0)
        for image, piece in zip(missing, tokens, strict=True):
            self._held[image.digest] = piece.cpu()
            self._early.add(image.digest)

    def forget_early(self) -> None:
        """Drop them, where no ``encode_step`` follows."""
        self._held, self._early = {}, set()

    def clear_cache(self) -> None:
        """Drop what is kept between steps. Called with each checkpoint: a resumed run starts with
        an empty cache, and a tower's results are not bitwise batch-invariant."""
        self._cache.clear()
        self.forget_early()

    def fill(self, batches: List[Microbatch]) -> list[Microbatch]:
        """The batches with their visual tokens, for a pass without gradients for the tower."""
        distinct = _distinct(batches)
        known = dict(self._held)
        missing = [image for digest, image in distinct.items() if digest not in known]
        with torch.no_grad():
            tokens = self._encode(missing)
        known |= {image.digest: t for image, t in zip(missing, tokens, strict=True)}
        return [_with_tokens(batch, known) for batch in batches]

    def fill_for_training(
        self, batches: List[Microbatch]
    ) -> tuple[list[Microbatch], Callable[[], None]]:
        """The batches with visual tokens that gradients are wanted of, and what to call when all of
        them have been differentiated: it brings the gradients into the tower's buffers."""
        if not self.trained:
            return self.fill(batches), lambda: None
        images = list(_distinct(batches).values())
        own: list[tuple[int, Tensor]] = []
        tokens = self._encode(images, own=own)
        # In fp32: the gradients of an image's samples add up here.
        leaves = [piece.detach().float().requires_grad_() for piece in tokens]
        known = {p.digest: leaf for p, leaf in zip(images, leaves, strict=True)}

        def finish() -> None:
            if images:
                self._backward(leaves, own)

        return [_with_tokens(batch, known) for batch in batches], finish

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is encoded inside is not the step's work."""
        kept = replace(self._counters)
        yield
        self._counters = kept

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
        self,
        images: list[ImageFile],
        *,
        own: list[tuple[int, Tensor]] | None = None,
        budget: int | None = None,
    ) -> list[Tensor]:
        """Tokens ``[G, out_hidden]`` of each image, on every rank.

        Args:
            budget: patches that go through the tower together; None: ``patch_budget``.
            own: filled with (index, tokens that lead back to the tower) of this rank's share.
        """
        if not images:
            return []
        grids = [self.processor.grid(image) for image in images]
        costs = [tower_flops(grid, self.shape) for grid in grids]
        self._counters.tower_passes += len(images)
        self._counters.patches += sum(t * h * w for t, h, w in grids)
        self._counters.tflops += sum(costs) / 1e12
        ranks, rank = self.mesh.tp * self.mesh.pp, self.mesh.model_rank
        shares = greedy_partition(costs, ranks)
        pieces = self._through_tower(
            [images[index] for index in shares[rank]],
            self.patch_budget if budget is None else budget,
        )
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
        return [result[index] for index in range(len(images))]

    def _through_tower(self, images: list[ImageFile], budget: int) -> list[Tensor]:
        """Tokens of this rank's images, packed by patches up to ``budget``, none cut."""
        groups: list[list[tuple[Tensor, Grid]]] = []
        room = 0
        for image in images:
            patches, grid = self.processor(image)
            if not groups or len(patches) > room:
                groups.append([])
                room = budget
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
            assert all(leaf.grad is not None for leaf in leaves), "an image was not used"
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


def _distinct(batches: List[Microbatch]) -> dict[str, ImageFile]:
    return {image.digest: image for batch in batches for image in batch.images}


def _with_tokens(batch: Microbatch, known: dict[str, Tensor]) -> Microbatch:
    return replace(batch, visual_tokens=tuple(known[p.digest] for p in batch.images))


class VisionEncoders:
    """The vision encoders of a step's models: one, which all share, while the tower is frozen.

    Args:
        encoders: the actor's first.
    """

    def __init__(self, encoders: List[VisionEncoder]) -> None:
        self.encoders = tuple(encoders)

    @property
    def trained(self) -> bool:
        """Whether images go through the tower in each pass, with gradients."""
        return self.encoders[0].trained

    def encode(self, batches: List[Microbatch]) -> None:
        """Encode a step's images for all passes, if the tower is frozen. A collective."""
        if not self.trained:
            self.encoders[0].encode_step(batches)

    def clear_cache(self) -> None:
        """See ``VisionEncoder.clear_cache``."""
        for encoder in self.encoders:
            encoder.clear_cache()

    def read_counters(self) -> dict[str, float]:
        """``vision/...`` metrics of all towers since the last reading. A collective."""
        totals: Counter[str] = Counter()
        for encoder in self.encoders:
            totals.update(encoder.read_counters())
        return dict(totals)
