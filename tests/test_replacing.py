"""Drawing plans: reproducible by arithmetic, legal, and moved by the dials."""

from collections import Counter

import pytest

from modular_t5 import BankShape
from modular_t5.replacing import CURRICULA, SCHEDULES, draw_plan


GRANULARITIES = (2, 3, 4, 6)
SHAPE = BankShape({"encoder": 12, "decoder": 12}, {"encoder": GRANULARITIES, "decoder": GRANULARITIES}, {"encoder": 1, "decoder": 1}, 0)


def draw(step, seed=0, progress=0.5, replacing_rate=0.7, odds=CURRICULA["uniform"].odds, shape=SHAPE):
    return draw_plan(shape, seed=seed, step=step, progress=progress, replacing_rate=replacing_rate, odds=odds)


def test_a_plan_is_a_function_of_seed_and_step():
    assert [draw(step) for step in range(50)] == [draw(step) for step in reversed(range(50))][::-1]
    assert [draw(step) for step in range(50)] != [draw(step, seed=1) for step in range(50)]
    assert len({str(draw(step)) for step in range(50)}) > 40


def test_the_draw_is_the_same_on_every_machine():
    assert [str(draw(step)) for step in range(3)] == [
        "4x1-1x2-3x1-1x3/2x2-1x2-2x1-1x2-2x1",
        "1x2-2x1-4x1-1x1-3x1/6x1-3x2",
        "1x2-2x1-1x6-2x1/4x2-2x1-1x2",
    ]


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_every_plan_is_legal_and_replaces_something(curriculum):
    for step in range(300):
        plan = draw(step, progress=step / 299, replacing_rate=0.05 if step % 2 else 1.0, odds=CURRICULA[curriculum].odds)
        assert SHAPE.check(plan) != SHAPE.teacher


def test_a_rate_that_replaces_nothing_still_ends():
    assert draw(0, replacing_rate=1e-12) != SHAPE.teacher


def test_a_rate_of_one_leaves_no_original_where_a_module_fits():
    for step in range(100):
        for side in ("encoder", "decoder"):
            assert not [start for start, span in draw(step, replacing_rate=1.0).blocks(side) if span == 1 and start % 2 == 0]


@pytest.mark.parametrize(("curriculum", "drift"), [("coarse-to-fine", -1), ("uniform", 0), ("fine-to-coarse", 1)])
def test_a_curriculum_moves_the_odds(curriculum, drift):
    def share_of_sixes(progress):
        # Over the bottom of the stack every granularity may start, so the share there is the odds.
        odds = CURRICULA[curriculum].odds
        spans = Counter(draw(step, progress=progress, replacing_rate=1.0, odds=odds).encoder[0] for step in range(2000))
        return spans[6] / spans.total()

    early, late = share_of_sixes(0.0), share_of_sixes(1.0)
    if drift:
        assert (late - early) * drift > 0.2
    else:
        assert early == late == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("schedule", "rates"), [("constant", [0.25, 0.25, 0.25, 0.25, 0.25]), ("linear", [0.25, 0.4375, 0.625, 0.8125, 1.0])]
)
def test_schedules(schedule, rates):
    assert [SCHEDULES[schedule].rate(0.25, 1.0, progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == rates


def test_the_rate_is_the_share_of_places_that_are_replaced():
    places = replaced = 0
    for step in range(3000):
        for start, span in draw(step, replacing_rate=0.3).blocks("decoder"):
            places += start % 2 == 0 or start % 3 == 0
            replaced += span > 1
    # A little above 0.3, for plans without a module are drawn again.
    assert replaced / places == pytest.approx(0.3, abs=0.02)


def test_odds_of_ones_own():
    def only_threes_at_the_end(granularities, progress):
        return [float(s == 3 or progress < 1) for s in granularities]

    late = [draw(step, progress=1.0, odds=only_threes_at_the_end) for step in range(100)]
    assert {span for plan in late for side in ("encoder", "decoder") for span in plan.spans(side)} == {1, 3}
    assert {span for step in range(100) for span in draw(step, odds=only_threes_at_the_end).decoder} == {1, 2, 3, 4, 6}


def test_one_granularity_is_bert_of_theseus():
    """Every module by itself, in place or not by the toss of one coin."""
    shape = BankShape({"encoder": 6, "decoder": 6}, {"encoder": (2,), "decoder": (2,)}, {"encoder": 1, "decoder": 1}, 0)
    counts = Counter()
    for step in range(4000):
        plan = draw(step, replacing_rate=0.5, shape=shape)
        counts.update((side, start) for side in ("encoder", "decoder") for start, span in plan.blocks(side) if span == 2)
    assert set(counts) == {(side, start) for side in ("encoder", "decoder") for start in (0, 2, 4)}
    assert all(count / 4000 == pytest.approx(0.5, abs=0.03) for count in counts.values())


@pytest.mark.parametrize(
    ("odds", "message"),
    [
        (lambda s, progress: [1.0], r"each of the granularities \(2, 3, 4, 6\), got \[1.0\]"),
        (lambda s, progress: [-1.0, 1, 1, 1], "at least 0 for each"),
        (lambda s, progress: [float("nan"), 1, 1, 1], "at least 0 for each"),
        (lambda s, progress: [0, 0, 0, 0], "all 0 at a progress of 0.5"),
    ],
)
def test_odds_that_are_none_are_refused(odds, message):
    with pytest.raises(ValueError, match=message):
        draw(0, odds=odds)
