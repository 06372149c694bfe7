"""The head with specialised warps, without a GPU: its source emulated against float64, and every
interleaving of its three partitions."""

from __future__ import annotations

import inspect

import pytest
import torch
from gluon_emulator import Emulator, run
from protocol import Hazard, Protocol, check_buffers

from ovr_kernels import head, specialised

LN_2 = 0.6931471805599453
TEMPERATURE = 0.7
SCALE = 1.0 / LN_2 / TEMPERATURE
SOURCE = inspect.getsource(specialised)


def made(rows: int, width: int, vocabulary: int, kind: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Operands, and targets in a vocabulary of which this is the shard from 40 on."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(kind)
    weight = (torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5).to(kind)
    targets = torch.randint(vocabulary + 80, (rows,), generator=generator)
    targets[::7] = -1
    return hidden, weight, targets


def largest_error(
    source: str | None, *, rows: int, width: int, vocabulary: int, kind: torch.dtype, store: bool
) -> float:
    """Of log-sum-exp, entropy and target's logit, absolute, nats; of exponentials in units of their
    rounding."""
    hidden, weight, targets = made(rows, width, vocabulary, kind)
    partial, wide, reference, _ = run(
        source, hidden, weight, targets, scale=SCALE, store=store, entropy=True, columns=32,
        depth=16, slots=3, lead=2, split_tiles=4, first_id=40,
    )  # fmt: skip
    raw = hidden.double() @ weight.double().t()
    logits = raw / TEMPERATURE
    peak, total, weighted, chosen = partial.double().unbind(1)
    top = peak.amax(0)
    share = torch.exp2(peak - top)
    total = (total * share).sum(0)
    weighted = ((weighted + partial[:, 1] * (peak - top)) * share).sum(0)
    normalizer = (total.log2() + top) * LN_2
    entropy = (total.log2() - weighted / total) * LN_2
    wanted = torch.distributions.Categorical(logits=logits)
    own = (targets >= 40) & (targets < 40 + vocabulary)
    at = raw.gather(1, (targets - 40).clamp(0, vocabulary - 1)[:, None])[:, 0]
    errors = [
        normalizer - torch.logsumexp(logits, 1),
        entropy - wanted.entropy(),
        chosen.sum(0) - torch.where(own, at, 0.0),
    ]
    if store:
        shift = reference.double().t().repeat_interleave(32, 1)[:, :vocabulary]
        exact = torch.exp2(logits / LN_2 - shift)
        rounding = torch.finfo(kind).eps
        errors.append((wide.double() - exact) / rounding / exact.clamp(min=1e-3) * 1e-5)
    return max(float(error.abs().max()) for error in errors)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", [False, True], ids=["", "store"])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(150, 72, 300), (1, 16, 5), (128, 32, 128), (64, 17, 129), (257, 40, 31)],
)
def test_against_float64(rows: int, width: int, vocabulary: int, store: bool, kind) -> None:
    shape = dict(rows=rows, width=width, vocabulary=vocabulary)
    assert largest_error(None, **shape, kind=kind, store=store) < 2e-5


def program(source: str | None, *, tiles: int, steps: int, slots: int, lead: int) -> Emulator:
    """One program of so many tiles, and steps a tile, as its partitions say what they do."""
    hidden, weight, targets = made(4, 16 * steps - 3, 32 * tiles, torch.float16)
    *_, ended = run(
        source, hidden, weight, targets, scale=SCALE, store=True, entropy=True, columns=32,
        depth=16, slots=slots, lead=lead, split_tiles=tiles, blocking=False, programs=1,
    )  # fmt: skip
    return ended[0]


def check(source: str | None, *, tiles: int, steps: int, slots: int, lead: int) -> int:
    """How many states the interleavings have; raises Hazard."""
    found = program(source, tiles=tiles, steps=steps, slots=slots, lead=lead)
    written = [check_buffers(found.events[partition]) for partition in (0, 1)]
    if written[0] & written[1]:
        raise Hazard("both groups write one buffer")
    return Protocol(found, steps=steps, lead=lead).check()


@pytest.mark.parametrize(
    ("tiles", "steps", "slots", "lead"),
    [(6, 1, 4, 2), (6, 2, 4, 2), (6, 2, 4, 3), (4, 3, 3, 1), (4, 3, 3, 2), (3, 5, 2, 1),
     (9, 1, 2, 1), (2, 7, 5, 4), (4, 3, 3, 0)],
)  # fmt: skip
def test_no_interleaving_goes_wrong(tiles: int, steps: int, slots: int, lead: int) -> None:
    """Two groups that fold, one warp that loads: 19,600 states with 4 slots, 6 tiles of 2 steps and
    a lead of 2 (``-s`` prints them)."""
    states = check(None, tiles=tiles, steps=steps, slots=slots, lead=lead)
    print(f"{tiles} tiles of {steps} steps, {slots} slots, lead {lead}: {states:,} states")
    assert states > 500


def test_a_lead_of_all_slots_would_wait_for_ever() -> None:
    """So no pipeline has one."""
    with pytest.raises(Hazard, match="all wait for ever"):
        check(None, tiles=2, steps=5, slots=3, lead=3)
    with pytest.raises(ValueError, match="needs more slots"):
        head.Pipeline(depth=32, slots=(9, 6), lead=(6, 6))


def test_a_program_has_a_bit_for_each_of_its_tiles() -> None:
    hidden, weight, targets = made(4, 16, 64, torch.float16)
    with pytest.raises(ValueError, match="a program of 32 tiles"):
        specialised.launch_specialised(
            hidden, weight, targets, hidden, None, None, first_id=0, scale=SCALE, entropy=True,
            columns=32, split_tiles=32, group=16, depth=16, slots=4, lead=2,
        )  # fmt: skip


def check_two_shapes(source: str) -> None:
    """Of programs: tiles of as many steps as there are slots, and of more."""
    check(source, tiles=4, steps=3, slots=3, lead=2)
    check(source, tiles=2, steps=7, slots=5, lead=4)


ROOM = "mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)"
ALSO = "mbarrier.wait(empty.index(SLOTS + slot), ((step // SLOTS) & 1) ^ 1)"
FIRST = """mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
        if PART"""
NEXT = """mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            acc"""
FREED = """mbarrier.arrive(empty.index(PART * SLOTS + (step - 1) % SLOTS), count=1)
            step"""
LAST = """mbarrier.arrive(empty.index(PART * SLOTS + (step - 1) % SLOTS), count=1)
        column"""
OWN = "mbarrier.wait(empty.index(slot), (step // SLOTS) & 1)"
LED = "mbarrier.wait(empty.index(led % SLOTS), (led // SLOTS) & 1)"
BUFFER = """tma.store_wait(0)
            meet()"""
SHOWN = """fence_async_shared()
            meet()"""
PLANTED = {
    "the loader waits for neither": (f"{ROOM}\n            {ALSO}", "pass", "more arrive at"),
    "the loader waits for one group": (ALSO, "pass", "is loaded again"),
    "the loader waits for the other": (ROOM, "pass", "is loaded again"),
    "the loader's phase": (ROOM, ROOM.replace(" ^ 1", ""), "all wait for ever"),
    "a first product does not wait": (FIRST, "if PART", "before it holds step"),
    "a next product does not wait": (NEXT, "acc", "before it holds step"),
    "a product's phase": (NEXT, NEXT.replace("& 1", "& 1 ^ 1"), "before it holds step"),
    "a slot is freed too early": ("mma_wait(1, deps", "mma_wait(2, deps", "is loaded again"),
    "the next slot is freed": (FREED, FREED.replace("(step - 1)", "step"), "all wait for ever"),
    "the last slot is not freed": (LAST, "column", "all wait for ever"),
    "one group frees the other's": (FREED, FREED.replace("PART * SLOTS + ", ""), "for ever"),
    "nothing is waited for": (LED, "pass", "begun without a lead"),
    "the round is not known": (OWN, "pass", "begun without a lead"),
    "the lead's phase": (LED, LED.replace("& 1", "& 1 ^ 1"), "begun without a lead"),
    "a lead of the other's": (LED, LED.replace("led % SLOTS", "SLOTS + led % SLOTS"), "for ever"),
    "one step less": ("(depth, BK)) - 1", "(depth, BK)) - 2", "begun without a lead"),
    "a lead past the tile": ("gl.minimum(LEAD, gl.cdiv(depth, BK))", "SLOTS + 1", "for ever"),
    "half the bytes": ("(BM + BN) * BK * 2", "(BM + BN) * BK", "all wait for ever"),
    "too many bytes": ("(BM + BN) * BK * 2", "(BM + BN) * BK * 3", "all wait for ever"),
    "a buffer is written too early": (BUFFER, "meet()", "while it is being stored"),
    "one thread knows it was read": (BUFFER, "tma.store_wait(0)", "while it is being stored"),
    "no fence": (SHOWN, "meet()", "a buffer is stored after write"),
    "nobody meets": (SHOWN, "fence_async_shared()", "a buffer is stored after write, fence"),
    "one buffer for both": ("buffers.index(PART)", "buffers.index(0)", "both groups write"),
    "a buffer that is gone": ("""    if STORE:
        tma.store_wait(0)
    out""", "    out", "before its last store"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_planted_fault_of_the_protocol_is_found(name: str) -> None:
    right, wrong, message = PLANTED[name]
    assert SOURCE.count(right) == 1
    with pytest.raises(Hazard, match=message):
        check_two_shapes(SOURCE.replace(right, wrong))


WRONG = [
    ("[None, :], logits, -1e30)", "[None, :], logits, 0.0)"),  # padding counts
    ("total *= gl.exp2(change)", "total *= 1.0"),
    ("weighted = gl.exp2(change) * (weighted + total * change)", "weighted *= gl.exp2(change)"),
    ("peak = new_peak", "peak = new_peak + change"),
    ("row_start = row_block + PART * BM", "row_start = row_block"),
    ("gl.where(target < columns, target, -1)", "gl.where(target < 0, 0, target)"),
    ("- first_id", "- 0"),
    ("[tile * BN, k]", "[tile * BN, 0]"),
    ("use_acc=False", "use_acc=True"),
    ("exponentials(\n            high, peak", "exponentials(\n            low, peak"),
    ("split = program % (GROUP * splits) // blocks", "split = 0"),
    ("(searched >> (tile - first_tile)) & 1", "(searched >> tile) & 1"),  # another split's bits
    ("target // BN - first_tile", "target // BN - first_tile + 1"),
    ("return one | other", "return one & other"),
]


@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_a_planted_error_is_seen(right: str, wrong: str) -> None:
    assert SOURCE.count(right) == 1
    changed = SOURCE.replace(right, wrong)
    shape = dict(rows=150, width=72, vocabulary=300, kind=torch.float16, store=False)
    assert not largest_error(changed, **shape) < 2e-5
