"""How long two groups and a loader take, against programs that are worked by hand."""

from __future__ import annotations

import pytest

from ovr_kernels.schedule import Timing, program_cycles

STEP, FOLD, LATENCY = 100.0, 150.0, 40.0


def cycles(
    *, tiles: int, steps: int, slots: int, lead: int, alone: float = 1.0, gap: float = 0.0
) -> float:
    timing = Timing(step=STEP, fold=FOLD, alone=alone, latency=LATENCY, gap=gap)
    return program_cycles(timing, tiles=tiles, steps=steps, slots=slots, lead=lead)


def test_equal_groups_multiply_and_fold_at_the_same_time() -> None:
    """Nothing is hidden: both folds follow both products, tile after tile. (The operands of the
    next tile arrive meanwhile.)"""
    for tiles in (1, 3):
        assert cycles(tiles=tiles, steps=4, slots=3, lead=0) == pytest.approx(
            LATENCY + tiles * (4 * 2 * STEP + 2 * FOLD)
        )


def test_a_lead_hides_a_fold_under_the_other_s_products() -> None:
    """Two steps of lead are longer than a fold: but for the first load and the last fold the matrix
    unit always works."""
    assert cycles(tiles=5, steps=8, slots=4, lead=2) == pytest.approx(
        LATENCY + 5 * 8 * 2 * STEP + FOLD
    )


def test_a_short_lead_hides_its_own_length_of_each_fold() -> None:
    """One step: 100 of 150 cycles; between two tiles each group's fold leaves 50 open."""
    whole = cycles(tiles=6, steps=8, slots=4, lead=1) - cycles(tiles=5, steps=8, slots=4, lead=1)
    assert whole == pytest.approx(8 * 2 * STEP + 2 * (FOLD - STEP))


def test_a_group_that_folds_alone_may_be_slower() -> None:
    """At half the rate a fold takes 300 cycles, of which two steps hide 200. In the other 100 both
    fold, which slows neither."""
    many, few = (cycles(tiles=n, steps=8, slots=5, lead=2, alone=0.5) for n in (6, 5))
    assert many - few == pytest.approx(8 * 2 * STEP + FOLD / 0.5 - 2 * STEP)


def test_a_gap_shows_where_a_group_has_the_unit_to_itself() -> None:
    """A product of its own runs meanwhile: only what a gap takes longer is waited for. While both
    multiply, two products run."""
    for gap, more in ((STEP, 0.0), (STEP + 30.0, 30.0)):
        equal, none = (cycles(tiles=1, steps=8, slots=8, lead=0, gap=g) for g in (gap, 0.0))
        assert equal == pytest.approx(none)
        led, none = (cycles(tiles=1, steps=8, slots=8, lead=7, gap=g) for g in (gap, 0.0))
        assert led - none >= 6 * more


def test_a_lead_of_all_slots_waits_for_ever() -> None:
    with pytest.raises(ValueError, match="3 slots and a lead of 3"):
        cycles(tiles=2, steps=8, slots=3, lead=3)
