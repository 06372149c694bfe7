"""The head's statistics with specialised warps, for sm_90: one warp loads, two groups of four fold.

``head.statistics_kernel`` multiplies a tile and then folds it, and while it folds the matrix unit
waits: 8 % of the forward on an H100. Here a loading warp runs ahead through the tiles of a split,
so the next tile's operands arrive meanwhile, and two groups of four warps own 64 rows each of a
tile and its operands (CUTLASS calls that cooperative). The first group leads: the second begins a
tile when the first has multiplied some steps of it, so that one folds while the other multiplies. A
lead needs slots that one group has read and the other has not, and the loader needs some as well:
small steps hide most (``python -m ovr_kernels.model``). Groups with a tile of their own could lead
by half a tile, but would read each row of the embedding twice as often from L2, which feeds this
layout at 8 TB/s already (measured, without specialised warps). The mathematics is
``statistics_kernel``'s, in other slices: the same products, sums in another order.

**Never run on a card**: ``Tile.specialised`` is off until one has timed it. What stands in for one:
its machine code (no spill among the products, which follow each other: ``python -m
ovr_kernels.artefacts``), this source run by an emulator of its instructions against float64, and
every interleaving of a model of its three parts, a group as one thread
(``tests/kernels/test_specialised.py``).

The protocol. The slots hold a step along H each: [128, depth] of hidden states and
[columns, depth] of the embedding. Three barriers a slot, whose phases take turns:

* ``full``: completes when the loader has said how many bytes come, and they are there. Both groups
  wait for it before they multiply.
* ``empty``, one of each group: completes when the group has said that its product that read the
  slot is done (``warpgroup_mma_wait(1)`` after the next product was begun). The loader waits for
  both before it loads again; the first time round for the phase before the first, which is over.
  The second group waits for the first one's before it begins a tile: of the step with which the
  lead is there, and before that of its own. A phase two before the one that is waited for looks
  like it, so each wait needs the one before it: ``full`` tells that the phase before the own step's
  is over, the own step that the phase before the led step's is. A phase after it cannot be over: it
  needs a load that waits for the second group. The lead is less than the slots, or the first group
  would wait for a slot that the second holds.

Before its first tile a group also meets for the bits of ``searched``, which nothing else waits for.
A group's thread that says so speaks for four warps: the compiler has them meet first, which the
gate of ``ovr_kernels.artefacts`` looks for.

With ``STORE`` a group's exponentials leave through a buffer of its own: it waits until the store
before has been read, all four warps write, a fence shows it to the copy engine, they meet, and a
thread of each warp stores 64 columns: each waits for its own, and then they meet.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if hasattr(tma, "async_load"):  # Triton 3.9's names, and those of 3.7
    copy_in, copy_out = tma.async_load, tma.async_store
else:
    copy_in, copy_out = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6's name

LOADER_REGISTERS, FOLDER_REGISTERS = 24, 240
"""A thread's. 128 of a folding thread's are logits."""

SLICES = 8
"""Parts in which a tile's exponentials are made; Triton 3.9 spills less than with 4."""


@gluon.jit
def halves(tile):
    """Left and right half of a tile's columns, without moving data between threads."""
    rows: gl.constexpr = tile.shape[0]
    half: gl.constexpr = tile.shape[1] // 2
    return tile.reshape([rows, 2, half]).permute((0, 2, 1)).split()


@gluon.jit
def exponentials(
    part,  # [64, n] logits before the scale
    peak,  # [64] largest logit so far, these included
    total,
    weighted,
    scale,
    buffer,  # [64, BN] in shared memory, only with STORE
    START: gl.constexpr,  # column of the part in the buffer
    ROW: gl.constexpr,  # layout of the rows' values
    STORE: gl.constexpr,
    ENTROPY: gl.constexpr,
    SLICES: gl.constexpr,
):
    """A tile's exponentials, into the buffer and the running sums, slice by slice: all of them at
    once in fp32 need more registers than there are beside the logits."""
    if SLICES > 1:
        low, high = halves(part)
        WIDTH: gl.constexpr = part.shape[1] // 2
        total, weighted = exponentials(
            low, peak, total, weighted, scale, buffer, START, ROW, STORE, ENTROPY, SLICES // 2
        )
        total, weighted = exponentials(
            high, peak, total, weighted, scale, buffer, START + WIDTH, ROW, STORE, ENTROPY,
            SLICES // 2,
        )  # fmt: skip
    else:
        OWN: gl.constexpr = gl.SliceLayout(1, part.type.layout)
        below = part * scale - gl.convert_layout(peak, OWN, assert_trivial=True)[:, None]
        exponential = gl.exp2(below)
        total += gl.convert_layout(gl.sum(exponential, 1), ROW, assert_trivial=True)
        if ENTROPY:
            products = gl.sum(exponential * below, 1)
            weighted += gl.convert_layout(products, ROW, assert_trivial=True)
        if STORE:
            buffer.slice(START, part.shape[1], 1).store(exponential.to(buffer.dtype))
    return total, weighted


@gluon.jit
def either(one, other):
    """Bits of both."""
    return one | other


@gluon.jit
def load(
    hidden, weight, lefts, rights, full, empty, row_start, first_tile, last_tile, depth,
    BN: gl.constexpr, BK: gl.constexpr, SLOTS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """The loading warp: every step of every tile, as soon as its slot is free."""
    step = 0
    for tile in range(first_tile, last_tile):
        for k in range(0, depth, BK):
            slot = step % SLOTS
            mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.wait(empty.index(SLOTS + slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            copy_in(hidden, [row_start, k], full.index(slot), lefts.index(slot))
            copy_in(weight, [tile * BN, k], full.index(slot), rights.index(slot))
            step += 1


@gluon.jit
def fold(
    PART: gl.constexpr,  # which 64 rows of the 128
    targets,
    partial,
    scaled,
    reference,
    lefts,
    rights,
    buffers,
    full,
    empty,
    row_block,
    split,
    first_tile,
    last_tile,
    rows,
    columns,
    depth,
    first_id,
    scale,
    BN: gl.constexpr,
    BK: gl.constexpr,
    SLOTS: gl.constexpr,
    LEAD: gl.constexpr,
    STORE: gl.constexpr,
    ENTROPY: gl.constexpr,
    SLICES: gl.constexpr,
):
    """A group of four warps: the products of its 64 rows with a split, and their statistics."""
    BM: gl.constexpr = 64
    TILE: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    row_start = row_block + PART * BM
    row = row_start + gl.arange(0, BM, layout=ROW)
    target = gl.load(targets + row, mask=row < rows, other=-1) - first_id
    # In 32 bits, which compare twice as fast; the next shard's are not this one's padding.
    target = gl.where(target < columns, target, -1).to(gl.int32)
    # A bit of each tile that has a target of these rows: the others, nine of ten where targets are
    # spread evenly, are not searched, which is a third of a tile's instructions.
    place = target // BN - first_tile
    there = (target >= 0) & (place >= 0) & (place < last_tile - first_tile)
    searched = gl.reduce(gl.where(there, 1 << gl.where(there, place, 0), 0), 0, either)
    peak = gl.full([BM], float("-inf"), gl.float32, layout=ROW)
    total = gl.zeros([BM], gl.float32, layout=ROW)
    weighted = gl.zeros([BM], gl.float32, layout=ROW)
    chosen = gl.zeros([BM], gl.float32, layout=ROW)
    number = gl.arange(0, BN, layout=COLUMN)
    last = gl.zeros([BM, BN], gl.float32, layout=TILE)
    step = 0
    for tile in range(first_tile, last_tile):
        slot = step % SLOTS
        mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
        if PART * LEAD > 0:
            led = step + gl.minimum(LEAD, gl.cdiv(depth, BK)) - 1
            mbarrier.wait(empty.index(slot), (step // SLOTS) & 1)
            mbarrier.wait(empty.index(led % SLOTS), (led // SLOTS) & 1)
        acc = warpgroup_mma(
            lefts.index(slot).slice(PART * BM, BM, 0), rights.index(slot).permute((1, 0)),
            warpgroup_mma_init(last), use_acc=False, is_async=True,
        )  # fmt: skip
        step += 1
        for _ in range(BK, depth, BK):
            slot = step % SLOTS
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            acc = warpgroup_mma(
                lefts.index(slot).slice(PART * BM, BM, 0), rights.index(slot).permute((1, 0)),
                acc, is_async=True,
            )  # fmt: skip
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(PART * SLOTS + (step - 1) % SLOTS), count=1)
            step += 1
        logits = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(PART * SLOTS + (step - 1) % SLOTS), count=1)
        column_start = tile * BN
        if column_start + BN > columns:  # finite, so that 0 times it is 0
            logits = gl.where((number < columns - column_start)[None, :], logits, -1e30)
        if (searched >> (tile - first_tile)) & 1:
            is_target = number[None, :] == (target - column_start)[:, None]
            chosen += gl.sum(gl.where(is_target, logits, 0.0), 1)
        new_peak = gl.maximum(peak, gl.max(logits, 1) * scale)
        change = gl.where(peak == float("-inf"), 0.0, peak - new_peak)
        peak = new_peak
        if ENTROPY:
            weighted = gl.exp2(change) * (weighted + total * change)
        total *= gl.exp2(change)
        if STORE:
            tma.store_wait(0)
            meet()
            buffer = buffers.index(PART)
            total, weighted = exponentials(
                logits, peak, total, weighted, scale, buffer, 0, ROW, STORE, ENTROPY, SLICES
            )
            fence_async_shared()
            meet()
            copy_out(scaled, [row_start, column_start], buffer)
            gl.store(reference + tile * rows + row, peak, mask=row < rows)
        else:
            total, weighted = exponentials(
                logits, peak, total, weighted, scale, buffers, 0, ROW, STORE, ENTROPY, SLICES
            )
        last = logits
    if STORE:
        tma.store_wait(0)
    out = partial + split * 4 * rows + row
    gl.store(out, peak, mask=row < rows)
    gl.store(out + rows, total, mask=row < rows)
    gl.store(out + 2 * rows, weighted, mask=row < rows)
    gl.store(out + 3 * rows, chosen, mask=row < rows)


@gluon.jit
def specialised_kernel(
    hidden,  # a descriptor of blocks of [128, BK] of [C, H]
    weight,  # of [BN, BK] of [V, H]
    targets,  # [C] int64 in the whole vocabulary
    partial,  # [splits, 4, C] fp32, as ``statistics_kernel``'s
    scaled,  # a descriptor of blocks of [64, BN] of [C, V], only with STORE
    reference,  # [tiles, C] fp32, only with STORE
    rows,
    columns,
    depth,
    first_id,  # of this shard in the whole vocabulary
    scale,  # log2(e) / temperature
    STORE: gl.constexpr,
    ENTROPY: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    SLOTS: gl.constexpr,
    LEAD: gl.constexpr,
    SPLIT_TILES: gl.constexpr,
    GROUP: gl.constexpr,
    SLICES: gl.constexpr,
    FOLDER: gl.constexpr,
    LOADER: gl.constexpr,
):
    """One row block against one split of the vocabulary."""
    KIND: gl.constexpr = hidden.dtype
    BM: gl.constexpr = 128
    lefts = gl.allocate_shared_memory(KIND, [SLOTS, BM, BK], hidden.layout)
    rights = gl.allocate_shared_memory(KIND, [SLOTS, BN, BK], weight.layout)
    buffers = lefts
    if STORE:
        buffers = gl.allocate_shared_memory(KIND, [2, BM // 2, BN], scaled.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(empty.index(SLOTS + slot), count=1)
    # A group of row blocks visits all splits before the next one: its hidden states stay in L2.
    tiles = gl.cdiv(columns, BN)
    splits = gl.cdiv(tiles, SPLIT_TILES)
    program = gl.program_id(0)
    first_block = program // (GROUP * splits) * GROUP
    blocks = gl.minimum(gl.cdiv(rows, BM) - first_block, GROUP)
    row_start = (first_block + program % (GROUP * splits) % blocks) * BM
    split = program % (GROUP * splits) // blocks
    first_tile = split * SPLIT_TILES
    last_tile = gl.minimum(first_tile + SPLIT_TILES, tiles)
    BYTES: gl.constexpr = (BM + BN) * BK * 2
    gl.warp_specialize(
        [
            (fold, (0, targets, partial, scaled, reference, lefts, rights, buffers, full, empty,
                    row_start, split, first_tile, last_tile, rows, columns, depth, first_id, scale,
                    BN, BK, SLOTS, LEAD, STORE, ENTROPY, SLICES)),
            (fold, (1, targets, partial, scaled, reference, lefts, rights, buffers, full, empty,
                    row_start, split, first_tile, last_tile, rows, columns, depth, first_id, scale,
                    BN, BK, SLOTS, LEAD, STORE, ENTROPY, SLICES)),
            (load, (hidden, weight, lefts, rights, full, empty, row_start, first_tile, last_tile,
                    depth, BN, BK, SLOTS, BYTES)),
        ],
        [4, 1],
        [FOLDER, LOADER],
    )  # fmt: skip


def launch_specialised(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    partial: Tensor,
    scaled: Tensor | None,
    reference: Tensor | None,
    *,
    first_id: int,
    scale: float,
    entropy: bool,
    columns: int,
    split_tiles: int,
    group: int,
    depth: int,
    slots: int,
    lead: int,
) -> None:
    """``specialised_kernel`` on all of [C, H] and [V, H]; the other tensors as it wants them.

    Args:
        columns, depth: of a tile, and of a step along H.
        split_tiles: tiles of a program.
        group: row blocks that visit all splits before the next ones.
        slots, lead: steps in shared memory, and those of the first group's lead.
    """
    if split_tiles > 31:
        raise ValueError(f"a program of {split_tiles} tiles: 31 have a bit each in 32")
    kind = gl.bfloat16 if hidden.dtype is torch.bfloat16 else gl.float16

    def blocks(matrix: Tensor, shape: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(shape, kind)
        return TensorDescriptor.from_tensor(matrix, shape, layout)

    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    splits = triton.cdiv(triton.cdiv(vocabulary, columns), split_tiles)
    specialised_kernel[(triton.cdiv(rows, 128) * splits,)](
        blocks(hidden, [128, depth]),
        blocks(weight, [columns, depth]),
        targets,
        partial,
        partial if scaled is None else blocks(scaled, [64, columns]),
        partial if reference is None else reference,
        rows,
        vocabulary,
        width,
        first_id,
        scale,
        STORE=scaled is not None,
        ENTROPY=entropy,
        BN=columns,
        BK=depth,
        SLOTS=slots,
        LEAD=lead,
        SPLIT_TILES=split_tiles,
        GROUP=group,
        SLICES=SLICES,
        FOLDER=FOLDER_REGISTERS,
        LOADER=LOADER_REGISTERS,
        num_warps=4,
        enable_fp_fusion=True,
    )
