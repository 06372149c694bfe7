"""From hidden states to softmax statistics and logit gradients, never holding fp32 logits.

The machine under the linear losses. A row's logits are its products with the output embedding
(plus a bias, capped), over the temperature; V is this rank's shard of the vocabulary.

* ``row_statistics``: a matrix product whose epilogue keeps, of every tile of logits, only running
  statistics of each row (largest logit, sum of exponentials, their logit-weighted sum, target's
  logit). With ``store`` it also writes each exponential in the operands' dtype, scaled by the
  running maximum of its row, so at most [C, V] 16-bit numbers exist, for one chunk of C rows.
* ``logit_gradients``: turns those scaled exponentials into logit gradients, in place, one read and
  one write, and moves the rows that have a gradient to the front.

Numerics: products accumulate in fp32 and logits live in registers only, so log-probs are those of
fp32 logits whatever the operands. Statistics are in base 2: one multiply folds 1/temperature and
log2(e). Split width and tile sizes are fixed, so a row's result does not depend on the other rows.
Nothing is added atomically, so two runs give the same bits.

Counted, C rows of width H: 2 C H V operations; bytes (C H + V H) x 2 read when everything is reused
perfectly, C V x 2 written with ``store``; the statistics are 16 bytes a row and split. Tuned for
Qwen2.5-VL-7B on 132 multiprocessors: H 3584, V 152,064 = 33 splits of 18 tiles of 256 columns, so
that every multiple of 4,096 rows fills whole waves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ovr_kernels.reference import LogitOptions, RowValues

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

ROWS = 128  # of a tile of logits
SPLIT_COLUMNS = 4608
GRADIENT_ROWS = 512  # of a program that makes logit gradients
ROW_BLOCKS_A_GROUP = 16
"""2,048 rows x 3584 x 2 bytes = 15 MB of hidden states stay in L2, of whose 50 MB on an H100 each
half of the chip sees its own 25. There 16 and 32 blocks are within 1 %, and 64 are 25 % slower
(LOG.md; benchmarks/head_tiles.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How operands come in the head with specialised warps; the second value of a pair is beside a
    buffer for a tile's exponentials."""

    depth: int  # of a step along H
    slots: tuple[int, int]  # steps in shared memory
    lead: tuple[int, int]  # steps of the first group before the second

    def __post_init__(self) -> None:
        if not all(0 <= a < b for a, b in zip(self.lead, self.slots, strict=True)):
            raise ValueError(f"a lead of {self.lead} needs more slots than {self.slots}")


LONG = Pipeline(depth=64, slots=(4, 3), lead=(2, 1))
"""Rows of 128 bytes, as ``statistics_kernel`` loads."""

SHORT = Pipeline(depth=32, slots=(9, 6), lead=(6, 3))
"""Rows of 64 bytes. Its leads are the best by ``ovr_kernels.schedule``, which does not know what L2
makes of such rows; which of both a card prefers ``benchmarks/head_tiles.py`` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How ``statistics_kernel`` is cut on a device. Each was chosen by its compiled artefact: no
    spills in the loop over H, with and without ``store`` and entropy
    (``python -m ovr_kernels.artefacts``)."""

    columns: int  # of a tile of logits
    depth: int  # of a step along H
    stages: int  # steps in flight
    slices: int  # parts in which a tile's exponentials are made
    store_stages: int  # steps in flight beside a tile of exponentials
    pointers: bool = False  # plain loads; a descriptor's loads are not pipelined before sm_90
    specialised: Pipeline | None = None  # ``specialised.py``'s, which no card has timed yet


def tile_for(capability: int, dtype: torch.dtype) -> Tile:
    """The tile for a compute capability (80, 90, 100 and those after each)."""
    if dtype is torch.float32:  # exact products, for the toy and for tests
        return Tile(columns=128, depth=32, stages=2, slices=4, store_stages=2, pointers=True)
    if capability < 90 or capability >= 120:  # sm_120 has an sm_80's matrix unit and memory
        return Tile(columns=128, depth=32, stages=4, slices=4, store_stages=4, pointers=True)
    if capability < 100:
        return Tile(columns=256, depth=64, stages=4, slices=4, store_stages=3)
    return Tile(columns=128, depth=64, stages=4, slices=2, store_stages=4)


def capability_of(device: torch.device) -> int:
    """10 x major + minor of a GPU; an interpreted kernel is cut as for an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def _halves(tile):
    """Left and right half of a tile's columns, without moving data between threads."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tile.reshape(rows, 2, half).permute(0, 2, 1).split()


@triton.jit
def _exponentials(
    part,  # [BM, n] logits before the scale
    peak,  # [BM] largest logit so far, these included
    total,
    weighted,
    scale,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLICES: tl.constexpr,
):
    """A tile's exponentials in KIND, and the running sums with them, made slice by slice: all of
    them at once in fp32 need more registers than there are beside the logits."""
    if SLICES > 1:
        low, high = _halves(part)
        left, total, weighted = _exponentials(
            low, peak, total, weighted, scale, KIND, ENTROPY, SLICES // 2
        )
        right, total, weighted = _exponentials(
            high, peak, total, weighted, scale, KIND, ENTROPY, SLICES // 2
        )
        found = tl.join(left, right).permute(0, 2, 1).reshape(part.shape)
    else:
        below = part * scale - peak[:, None]
        exponential = tl.exp2(below)
        total += tl.sum(exponential, 1)
        if ENTROPY:
            weighted += tl.sum(exponential * below, 1)
        found = exponential.to(KIND)
    return found, total, weighted


@triton.jit
def _tile_of(row_blocks, splits, BM: tl.constexpr, GROUP: tl.constexpr):
    """First row and split of this program: a group of row blocks visits all splits before the next
    group starts, so that the group's hidden states stay in L2."""
    program = tl.program_id(0)
    first_block = program // (GROUP * splits) * GROUP
    blocks = tl.minimum(row_blocks - first_block, GROUP)
    row_start = (first_block + program % (GROUP * splits) % blocks) * BM
    return row_start, program % (GROUP * splits) // blocks


@triton.jit
def _operand(
    matrix, start, k, rows, depth, stride, SIZE: tl.constexpr, BK: tl.constexpr,
    POINTERS: tl.constexpr,
):  # fmt: skip
    """[SIZE, BK] of a matrix. Rows past its end wrap; what they give is masked later."""
    if POINTERS:
        row = (start + tl.arange(0, SIZE)) % rows
        deep = k + tl.arange(0, BK)
        here = (deep < depth)[None, :]
        block = tl.load(matrix + row[:, None] * stride + deep[None, :], mask=here, other=0.0)
    else:
        block = matrix.load([start, k])
    return block


@triton.jit
def _capped(logits, cap):
    """``cap * tanh(logits / cap)``; exp2 gives 0 or inf far out, and both are right. Near 0, where
    the difference would cancel, its series."""
    x = logits / cap
    square = x * x
    near = logits * (
        1.0 + square * (-0.3333333333 + square * (0.1333333333 - square * 0.053968254))
    )
    far = cap - 2.0 * cap / (1.0 + tl.exp2(x * 2.8853900817779268))
    return tl.where(square < 0.0625, near, far)


@triton.jit
def statistics_kernel(
    hidden,  # [C, H]: a descriptor of blocks of [BM, BK], or with POINTERS a pointer
    weight,  # [V, H]: a descriptor of blocks of [BN, BK], or with POINTERS a pointer
    bias,  # [V], only with BIAS
    targets,  # [C] int64 in the whole vocabulary
    partial,  # [splits, VALUES, C] fp32: max, sum, weighted sum in base 2; then as they are the
    # target's logit and, with VALUES 5, the sum of all
    scaled,  # [C, V], only with STORE
    reference,  # [tiles, C] fp32, what scaled's exponentials are relative to, only with STORE
    rows,
    columns,
    depth,
    hidden_stride,
    weight_stride,
    scaled_stride,
    first_id,  # of this shard in the whole vocabulary
    scale,  # log2(e) / temperature
    softcap,
    STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VALUES: tl.constexpr,
    POINTERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row block against one split of the vocabulary."""
    tiles = tl.cdiv(columns, BN)
    row_start, split = _tile_of(tl.cdiv(rows, BM), tl.cdiv(tiles, SPLIT_TILES), BM, GROUP)
    row = row_start + tl.arange(0, BM)
    target = tl.load(targets + row, mask=row < rows, other=-1) - first_id
    # In 32 bits, which compare twice as fast; the next shard's are not this one's padding.
    target = tl.where(target < columns, target, -1).to(tl.int32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM], tl.float32)
    chosen = tl.zeros([BM], tl.float32)
    summed = tl.zeros([BM], tl.float32)
    number = tl.arange(0, BN)
    for tile in range(split * SPLIT_TILES, tl.minimum((split + 1) * SPLIT_TILES, tiles)):
        column_start = tile * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, depth, BK):
            left = _operand(hidden, row_start, k, rows, depth, hidden_stride, BM, BK, POINTERS)
            right = _operand(
                weight, column_start, k, columns, depth, weight_stride, BN, BK, POINTERS
            )
            acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
        if BIAS:
            own = tl.load(bias + column_start + number, mask=number < columns - column_start)
            own = own.to(tl.float32)
            own = tl.where(own == float("-inf"), -1e30, own)  # a banned word: -inf less -inf is NaN
            acc += own[None, :]
        if SOFTCAP:
            acc = _capped(acc, softcap)
        if VALUES == 5:
            here = (number < columns - column_start)[None, :]
            summed += tl.sum(tl.where(here, acc, 0.0), 1)
        if column_start + BN > columns:  # finite, so that 0 times it is 0
            acc = tl.where((number < columns - column_start)[None, :], acc, -1e30)
        is_target = number[None, :] == (target - column_start)[:, None]
        chosen += tl.sum(tl.where(is_target, acc, 0.0), 1)
        new_peak = tl.maximum(peak, tl.max(acc, 1) * scale)
        step = tl.where(peak == float("-inf"), 0.0, peak - new_peak)
        peak = new_peak
        if ENTROPY:
            weighted = tl.exp2(step) * (weighted + total * step)
        total *= tl.exp2(step)
        exponential, total, weighted = _exponentials(
            acc, peak, total, weighted, scale,
            hidden.dtype.element_ty if POINTERS else hidden.dtype, ENTROPY, SLICES,
        )  # fmt: skip
        if STORE and POINTERS:
            column = column_start + number
            tl.store(
                scaled + row.to(tl.int64)[:, None] * scaled_stride + column[None, :],
                exponential,
                mask=(row < rows)[:, None] & (column < columns)[None, :],
            )
        elif STORE:
            scaled.store([row_start, column_start], exponential)
        if STORE:
            tl.store(reference + tile * rows + row, peak, mask=row < rows)
    out = partial + split * VALUES * rows + row
    tl.store(out, peak, mask=row < rows)
    tl.store(out + rows, total, mask=row < rows)
    tl.store(out + 2 * rows, weighted, mask=row < rows)
    tl.store(out + 3 * rows, chosen, mask=row < rows)
    if VALUES == 5:
        tl.store(out + 4 * rows, summed, mask=row < rows)


@triton.jit
def merge_kernel(
    partial,  # [parts, VALUES, C] fp32
    merged,  # [VALUES, C] fp32, only without FINISH
    targets,  # [C] int64
    values,  # [4, C] fp32: log-probs and entropies in nats, base-2 log-sum-exp, means
    rows,
    parts,
    scale,  # log2(e) / temperature
    mean_scale,  # 1 / (temperature V), of the whole vocabulary
    FINISH: tl.constexpr,
    ENTROPY: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of a vocabulary's parts into those of the whole, in the order of the parts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    chosen = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        entry = partial + part * VALUES * rows + row
        part_peak = tl.load(entry, mask=here, other=0.0)
        part_total = tl.load(entry + rows, mask=here, other=1.0)
        part_weighted = tl.load(entry + 2 * rows, mask=here, other=0.0)
        chosen += tl.load(entry + 3 * rows, mask=here, other=0.0)
        if VALUES == 5:
            summed += tl.load(entry + 4 * rows, mask=here, other=0.0)
        new_peak = tl.maximum(peak, part_peak)
        step = tl.where(peak == float("-inf"), 0.0, peak - new_peak)
        part_step = part_peak - new_peak
        weighted = tl.exp2(step) * (weighted + total * step)
        weighted += tl.exp2(part_step) * (part_weighted + part_total * part_step)
        total = tl.exp2(step) * total + tl.exp2(part_step) * part_total
        peak = new_peak
    if FINISH:
        counted = tl.load(targets + row, mask=here, other=-1) >= 0
        log_total = tl.log2(total)
        # As the exponentials were made: with rounded products the log-prob of a certain token was
        # up to 2e-5 above 0. The total holds the target's own exponential, so what is still above 0
        # is the rounding of its logarithm. A comparison, since a minimum would turn NaN into 0.
        logprob = (tl.fma(chosen, scale, -peak) - log_total) * 0.6931471805599453
        logprob = tl.where(logprob > 0.0, 0.0, logprob)
        tl.store(values + row, tl.where(counted, logprob, 0.0), mask=here)
        tl.store(values + 2 * rows + row, tl.where(counted, peak + log_total, 0.0), mask=here)
        if ENTROPY:
            entropy = (log_total - weighted / total) * 0.6931471805599453
            tl.store(values + rows + row, tl.where(counted, entropy, 0.0), mask=here)
        if VALUES == 5:
            mean = summed * mean_scale
            tl.store(values + 3 * rows + row, tl.where(counted, mean, 0.0), mask=here)
    else:
        tl.store(merged + row, peak, mask=here)
        tl.store(merged + rows + row, total, mask=here)
        tl.store(merged + 2 * rows + row, weighted, mask=here)
        tl.store(merged + 3 * rows + row, chosen, mask=here)
        if VALUES == 5:
            tl.store(merged + 4 * rows + row, summed, mask=here)


@triton.jit
def gradient_kernel(
    scaled,  # [C, V] in and out
    reference,  # [tiles, C] fp32
    normalizers,  # [C] fp32, base 2
    logprobs,  # [C] fp32 nats
    entropies,  # [C] fp32 nats
    targets,  # [C] int64
    logprob_gradients,  # [C] fp32
    entropy_gradients,  # [C] fp32, only with ENTROPY
    normalizer_gradients,  # [C] fp32, only with NORMALIZER
    mean_gradients,  # [C] fp32 over V, only with MEAN
    kept,  # [K] int32, ascending: the rows to make gradients of
    rows,
    kept_rows,
    rows_a_program,  # all kept rows, where one can move
    columns,
    scaled_stride,
    first_id,
    inverse_temperature,
    cap_scale,  # temperature / softcap
    ENTROPY: tl.constexpr,
    NORMALIZER: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
):
    """One vocabulary tile of a run of kept rows.

    A program that owns all rows of its columns walks down them, so a row moves up only after
    everything that stood in its new place was read.
    """
    tile = tl.program_id(0).to(tl.int64)
    column = tile * BN + tl.arange(0, BN)
    first = tl.program_id(1) * rows_a_program
    end = tl.minimum(first + rows_a_program, kept_rows)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = place < end
        row = tl.load(kept + place, mask=here, other=0).to(tl.int64)
        inside = here[:, None] & (column < columns)[None, :]
        exponential = tl.load(
            scaled + row[:, None] * scaled_stride + column[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        shift = tl.load(reference + tile * rows + row, mask=here, other=0.0)
        normalizer = tl.load(normalizers + row, mask=here, other=0.0)
        shift -= normalizer
        wanted = tl.load(logprob_gradients + row, mask=here, other=0.0) * inverse_temperature
        target = tl.load(targets + row, mask=here, other=-1) - first_id
        probability = exponential * tl.exp2(shift)[:, None]
        # d logprob / d z_j = [j = target] - p_j
        is_target = column[None, :] == target[:, None]
        target_probability = tl.exp(tl.load(logprobs + row, mask=here, other=0.0))
        probability = tl.where(is_target, target_probability[:, None], probability)
        gradient = wanted[:, None] * (tl.where(is_target, 1.0, 0.0) - probability)
        if ENTROPY:
            # d entropy / d z_j = -p_j (log p_j + entropy)
            wanted = tl.load(entropy_gradients + row, mask=here, other=0.0) * inverse_temperature
            entropy = tl.load(entropies + row, mask=here, other=0.0)
            logs = tl.log(tl.maximum(probability, 1e-37))
            gradient -= wanted[:, None] * probability * (logs + entropy[:, None])
        if NORMALIZER:  # d normalizer / d z_j = p_j
            wanted = tl.load(normalizer_gradients + row, mask=here, other=0.0)
            gradient += (wanted * inverse_temperature)[:, None] * probability
        if MEAN:  # d mean / d z_j = 1 / V
            wanted = tl.load(mean_gradients + row, mask=here, other=0.0) * inverse_temperature
            gradient += wanted[:, None]
        if SOFTCAP:  # d tanh = 1 - tanh^2
            z = tl.log(tl.maximum(probability, 1e-37)) + (normalizer * 0.6931471805599453)[:, None]
            gradient *= 1.0 - (z * cap_scale) * (z * cap_scale)
        # Every thread has read its rows before any is overwritten. One barrier is enough: rows that
        # a later round reads are at or after its own places.
        tl.debug_barrier()
        tl.store(
            scaled + place.to(tl.int64)[:, None] * scaled_stride + column[None, :],
            gradient.to(scaled.dtype.element_ty),
            mask=inside,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head's operands and options of one call, and how its logits are made."""

    weight: Tensor  # [V, H], with a group this rank's contiguous shard
    bias: Tensor | None  # [V]
    options: LogitOptions

    @property
    def parts(self) -> int:
        """Shards of the vocabulary."""
        group = self.options.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def first_id(self) -> int:
        """Of this rank's shard."""
        group = self.options.group
        return 0 if group is None else dist.get_rank(group) * self.weight.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """Gradients of a loss by ``RowValues``, each [C] fp32; None: it has none."""

    logprobs: Tensor
    entropies: Tensor | None = None
    normalizers: Tensor | None = None
    means: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those that are not None."""
        names = ("logprobs", "entropies", "normalizers", "means")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def kept(self) -> Tensor:
        """The rows that have a gradient, [K] int64, ascending."""
        moved = torch.zeros_like(self.logprobs, dtype=torch.bool)
        for value in self.given().values():
            moved |= value != 0
        return moved.nonzero().squeeze(1)

    def at(self, rows: Tensor | slice) -> Coefficients:
        """Those of some rows."""
        return Coefficients(**{name: value[rows] for name, value in self.given().items()})

    def scaled(self, dtype: torch.dtype) -> tuple[Coefficients, Tensor | None]:
        """Divided by the largest of them, fp32, before logit gradients are rounded to fp16; as they
        are, and None, for other dtypes, whose range is fp32's. With coefficients of 1e-6 (one over
        the tokens of a batch) fp16's gradients were 7 to 25 % wrong."""
        if dtype is not torch.float16 or not self.logprobs.numel():
            return self, None
        scale = torch.stack([v.abs().max() for v in self.given().values()]).max().clamp(min=1e-30)
        return Coefficients(**{name: v / scale for name, v in self.given().items()}), scale


@dataclass(frozen=True, slots=True)
class ScaledExponentials:
    """The logits of a chunk, as exponentials relative to a running maximum."""

    values: Tensor  # [C, V] in the operands' dtype
    reference: Tensor  # [tiles, C] fp32, base 2
    tile_columns: int


def row_statistics(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    entropy: bool,
    mean: bool = False,
    store: bool,
    known: RowValues | None = None,
) -> tuple[RowValues, ScaledExponentials | None]:
    """One matrix product and its statistics.

    Args:
        hidden: [C, H].
        head: weight, bias and options; a group costs one all-gather of 16 bytes a row.
        targets: [C] int64 ids in the whole vocabulary; negative: the row is ignored.
        entropy, mean: also find entropies, means.
        store: also return the exponentials, for ``logit_gradients``.
        known: the statistics, when only the exponentials are wanted again.

    Raises:
        ValueError: 2^31 numbers or more in an operand.
    """
    rows, depth = hidden.shape
    weight, options, device = head.weight, head.options, hidden.device
    columns = weight.shape[0]
    tile = tile_for(capability_of(device), hidden.dtype)
    splits = triton.cdiv(columns, SPLIT_COLUMNS)
    values = 5 if mean and known is None else 4
    partial = torch.empty(splits, values, rows, dtype=torch.float32, device=device)
    stored = None
    if store:
        wide = torch.empty(rows, _round_up(columns, 8), dtype=hidden.dtype, device=device)
        reference = torch.empty(
            triton.cdiv(columns, tile.columns), rows, dtype=torch.float32, device=device
        )
        stored = ScaledExponentials(wide[:, :columns], reference, tile.columns)
    left, right = _aligned(hidden), _aligned(weight)
    if max(left.stride(0) * rows, right.stride(0) * columns) >= 2**31:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} or weight {tuple(weight.shape)} has 2^31 numbers or "
            "more; pass fewer rows at a time"
        )

    def blocks(matrix: Tensor, *shape: int) -> Tensor | TensorDescriptor:
        return matrix if tile.pointers else TensorDescriptor.from_tensor(matrix, list(shape))

    plain = head.bias is None and options.softcap is None and values == 4
    plain = plain and not tile.pointers and capability_of(device) // 10 == 9
    if rows and tile.specialised and plain:
        from ovr_kernels.specialised import launch_specialised  # needs Triton 3.7

        launch_specialised(
            left,
            right,
            targets,
            partial,
            stored.values if stored else None,
            stored.reference if stored else None,
            first_id=head.first_id,
            scale=LOG2_E / options.temperature,
            entropy=entropy and known is None,
            columns=tile.columns,
            split_tiles=SPLIT_COLUMNS // tile.columns,
            group=ROW_BLOCKS_A_GROUP,
            depth=tile.specialised.depth,
            slots=tile.specialised.slots[store],
            lead=tile.specialised.lead[store],
        )
    elif rows:
        statistics_kernel[(triton.cdiv(rows, ROWS) * splits,)](
            blocks(left, ROWS, tile.depth),
            blocks(right, tile.columns, tile.depth),
            partial if head.bias is None else head.bias.contiguous(),
            targets,
            partial,
            blocks(stored.values, ROWS, tile.columns) if stored else partial,
            stored.reference if stored else partial,
            rows,
            columns,
            depth,
            left.stride(0),
            right.stride(0),
            stored.values.stride(0) if stored else 0,
            head.first_id,
            LOG2_E / options.temperature,
            options.softcap or 0.0,
            STORE=store,
            ENTROPY=entropy and known is None,
            BIAS=head.bias is not None,
            SOFTCAP=options.softcap is not None,
            VALUES=values,
            POINTERS=tile.pointers,
            BM=ROWS,
            BN=tile.columns,
            BK=tile.depth,
            SPLIT_TILES=SPLIT_COLUMNS // tile.columns,
            GROUP=ROW_BLOCKS_A_GROUP,
            SLICES=tile.slices,
            PRECISION="ieee" if hidden.dtype is torch.float32 else "tf32",
            num_warps=8,
            num_stages=tile.store_stages if store else tile.stages,
            enable_fp_fusion=True,
        )
    return known or _finish(partial, head, targets, entropy), stored


def _finish(partial: Tensor, head: Head, targets: Tensor, entropy: bool) -> RowValues:
    rows, columns = targets.numel(), head.weight.shape[0] * head.parts
    options, kinds = head.options, partial.shape[1]
    found = torch.zeros(4, rows, dtype=torch.float32, device=partial.device)

    def merge(parts: Tensor, merged: Tensor, finish: bool) -> None:
        if rows:
            merge_kernel[(triton.cdiv(rows, 256),)](
                parts,
                merged,
                targets,
                found,
                rows,
                parts.shape[0],
                LOG2_E / options.temperature,
                1.0 / (options.temperature * columns),
                FINISH=finish,
                ENTROPY=entropy,
                VALUES=kinds,
                BLOCK=256,
                num_warps=4,
                enable_fp_fusion=True,
            )

    if head.parts > 1:
        own = torch.empty(kinds, rows, dtype=torch.float32, device=partial.device)
        merge(partial, own, finish=False)
        every = own.new_empty(head.parts * kinds, rows)
        dist.all_gather_into_tensor(every, own, group=options.group)
        partial = every.view(-1, kinds, rows)
    merge(partial, partial, finish=True)
    logprobs, entropies, normalizers, means = found.unbind(0)
    return RowValues(
        logprobs=logprobs, entropies=entropies, normalizers=normalizers * LN_2, means=means
    )


def logit_gradients(
    exponentials: ScaledExponentials,
    found: RowValues,
    head: Head,
    targets: Tensor,
    by: Coefficients,
    *,
    kept: Tensor,
) -> Tensor:
    """Gradients of the products of hidden and weight, of the kept rows, in place.

    Args:
        exponentials: of ``row_statistics(..., store=True)``; overwritten.
        found: values of the same rows.
        head: that of the forward.
        targets: [C] int64 ids in the whole vocabulary.
        by: gradients of the loss by the rows' values.
        kept: [K] int64, ascending; rows without a gradient left out.

    Returns:
        [K, V], a view of ``exponentials``.
    """
    values, options = exponentials.values, head.options
    rows, columns = values.shape
    nothing = by.logprobs
    # Where every row is kept none moves, and programs for all multiprocessors are made of them.
    run = GRADIENT_ROWS if kept.numel() == rows else kept.numel()
    if kept.numel():
        gradient_kernel[(exponentials.reference.shape[0], triton.cdiv(kept.numel(), run))](
            values,
            exponentials.reference,
            found.normalizers * LOG2_E,
            found.logprobs,
            found.entropies,
            targets,
            by.logprobs.contiguous(),
            nothing if by.entropies is None else by.entropies.contiguous(),
            nothing if by.normalizers is None else by.normalizers.contiguous(),
            nothing if by.means is None else by.means / (columns * head.parts),
            kept.int(),
            rows,
            kept.numel(),
            run,
            columns,
            values.stride(0),
            head.first_id,
            1.0 / options.temperature,
            options.temperature / (options.softcap or 1.0),
            ENTROPY=by.entropies is not None,
            NORMALIZER=by.normalizers is not None,
            MEAN=by.means is not None,
            SOFTCAP=options.softcap is not None,
            BLOCK=16,
            BN=exponentials.tile_columns,
            num_warps=8,  # 2.6 TB/s on an H100; 2.2 with 4
            num_stages=1,  # loads must not run ahead of the stores they would read
            enable_fp_fusion=True,
        )
    return values[: kept.numel()]


class OperandGradients:
    """Gradients of hidden, weight and bias, added up chunk by chunk.

    Args:
        hidden: [R, H] of the call.
        head: of the call.
        wanted: whether hidden, weight and bias need theirs.
        buffer: [V, H] fp32 that the weight's gradient is added to; None: it is made.
        whole: all rows come at once, so nothing has to be added up in fp32.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        *,
        wanted: tuple[bool, bool, bool],
        buffer: Tensor | None = None,
        whole: bool,
    ) -> None:
        self.head, self.buffer = head, buffer
        self.empty = buffer is None  # nothing is in the weight's gradient yet
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight, self.bias, self.factors = buffer, None, None
        if buffer is None and wanted[1]:
            direct = whole and hidden.dtype is torch.bfloat16
            kind = hidden.dtype if direct else torch.float32
            self.weight = torch.empty_like(head.weight, dtype=kind)
        if head.bias is not None and wanted[2]:
            self.bias = torch.zeros_like(head.bias, dtype=torch.float32)
        if hidden.dtype is torch.float16:
            self.factors = torch.ones(hidden.shape[0], 1, device=hidden.device)

    def add(self, gradients: Tensor, hidden: Tensor, places: Tensor, scale: Tensor | None) -> None:
        """Two products. The hidden gradient is reduced over ranks, in fp32, while the weight's is
        made: added in bfloat16 over 8 ranks it is 4e-3 wrong, in fp32 1.7e-3.

        Args:
            gradients: [K, V] of the logits, over ``scale``.
            hidden: [K, H], the same rows.
            places: [K] of those rows in the call.
            scale: fp32 number by which ``gradients`` are too small; hidden's are left so, and
                ``factors`` keeps it.
        """
        part = work = None
        if self.hidden is not None and self.head.parts > 1:
            part = _product(gradients, self.head.weight)
            work = dist.all_reduce(part, group=self.head.options.group, async_op=True)
        elif self.hidden is not None:
            self.hidden[places] = gradients @ self.head.weight
        if self.weight is not None and scale is None:
            add_product(self.weight, gradients.t(), hidden, empty=self.empty)
        elif self.weight is not None and scale is not None:
            product = _product(gradients.t(), hidden).mul_(scale)
            self.weight.copy_(product) if self.empty else self.weight.add_(product)
        if self.bias is not None:
            rows = gradients.sum(0, dtype=torch.float32)
            self.bias += rows if scale is None else rows * scale
        if scale is not None and self.factors is not None:
            self.factors[places] = scale
        if work is not None and part is not None and self.hidden is not None:
            work.wait()
            self.hidden[places] = part.to(self.hidden.dtype)
        self.empty = False

    def finish(self) -> None:
        """No rows are left."""
        if self.empty and self.weight is not None:
            self.weight.zero_()

    def of_operands(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hidden's, weight's and bias's, each in its operand's dtype."""
        kind, hidden = self.head.weight.dtype, self.hidden
        if hidden is not None and self.factors is not None:
            hidden = scaled(hidden, self.factors, kind)
        weight = None if self.weight is None else self.weight.to(kind)
        return hidden, weight, None if self.bias is None else self.bias.to(kind)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times a factor of fp32 (one, or one a row), in one pass and rounded once.

    A factor of no axes would take the gradient's dtype first, and one rounded to bfloat16 makes all
    of it up to 0.4 % wrong; with an axis the product is fp32's. In steps (to fp32, times, back) it
    is 20 bytes a number, in one pass 4: for a head of 152,064 x 3,584, 10.9 and 2.2 GB.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor if factor.dim() else factor.view(1), out=out)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In fp32."""
    out = torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    add_product(out, left, right, empty=True)
    return out


def add_product(out: Tensor, left: Tensor, right: Tensor, *, empty: bool = False) -> None:
    """``out += left @ right``, in fp32 whatever the operands' dtype; ``out =`` where it is
    ``empty``, which may then be of theirs."""
    mixed = left.is_cuda and left.dtype is not torch.float32 and out.dtype is torch.float32
    if empty and out.dtype is left.dtype:
        torch.mm(left, right, out=out)
    elif mixed and empty:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    elif mixed:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    elif empty:
        out.copy_(left.float() @ right.float())
    else:
        out.addmm_(left.float(), right.float())


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix with rows that a descriptor can address: 16-byte starts and unit stride."""
    unit = 16 // matrix.element_size()
    if matrix.shape[1] % unit:
        matrix = torch.nn.functional.pad(matrix, (0, unit - matrix.shape[1] % unit))
    if matrix.stride(1) != 1 or matrix.stride(0) % unit or matrix.data_ptr() % 16:
        matrix = matrix.contiguous()
    return matrix


def _round_up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit
