"""Drawing plans: reproducible by arithmetic, legal, and moved by the dials."""

from collections import Counter

import pytest

from modular_t5 import BankShape
from modular_t5.replacing import CURRICULA, SAMPLINGS, SCHEDULES, draw_plans


GRANULARITIES = (2, 3, 4, 6)
SHAPE = BankShape({"encoder": 12, "decoder": 12}, {"encoder": GRANULARITIES, "decoder": GRANULARITIES}, {"encoder": 1, "decoder": 1}, 0)


def draw_all(count, step, seed=0, progress=0.5, replacing_rate=0.7, odds=CURRICULA["uniform"].odds, shape=SHAPE, sampling="mixed"):
    dials = {"sampling": sampling, "count": count, "replacing_rate": replacing_rate, "odds": odds}
    return draw_plans(shape, seed=seed, step=step, progress=progress, **dials)


def draw(*args, **changes):
    return draw_all(1, *args, **changes)[0]


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


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("curriculum", CURRICULA)
def test_every_plan_is_legal_and_replaces_something(curriculum, sampling):
    for step in range(300):
        rate = 0.05 if step % 2 else 1.0
        plans = draw_all(3, step, progress=step / 299, replacing_rate=rate, odds=CURRICULA[curriculum].odds, sampling=sampling)
        assert len(plans) == 3
        assert all(SHAPE.check(plan) != SHAPE.teacher for plan in plans)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_rate_that_replaces_nothing_still_ends(sampling):
    assert draw(0, replacing_rate=1e-12, sampling=sampling) != SHAPE.teacher


def test_aligned_plans_are_uniform_and_take_turns():
    for step in range(50):
        plans = draw_all(8, step, replacing_rate=1.0, sampling="aligned")
        sides = [(set(plan.encoder), set(plan.decoder)) for plan in plans]
        assert all(len(encoder) == len(decoder) == 1 for encoder, decoder in sides)
        pairs = [(min(encoder), min(decoder)) for encoder, decoder in sides]
        assert Counter(decoder for _, decoder in pairs) == dict.fromkeys(GRANULARITIES, 2)
        assert len(set(pairs)) == 8
        assert all(encoder <= decoder for encoder, decoder in pairs)
    seen = {
        pair
        for step in range(50)
        for pair in [tuple(map(min, plan)) for plan in _spans(draw_all(8, step, sampling="aligned", replacing_rate=1.0))]
    }
    assert seen == {(encoder, decoder) for decoder in GRANULARITIES for encoder in (1, *GRANULARITIES) if encoder <= decoder}


def _spans(plans):
    return [(plan.encoder, plan.decoder) for plan in plans]


def test_aligned_plans_replace_by_the_rate():
    spans = Counter(
        span for step in range(300) for plan in draw_all(4, step, replacing_rate=0.5, sampling="aligned") for span in plan.decoder
    )
    assert spans[2] / (spans[2] + spans[3] + spans[4] + spans[6]) > 0.3
    assert spans[1] > 0


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_aligned_plans_of_a_bank_with_modules_on_one_side(side):
    granularities = {"encoder": (), "decoder": (), side: (2, 3)}
    shape = BankShape({"encoder": 6, "decoder": 6}, granularities, {"encoder": 1, "decoder": 1}, 0)
    plans = draw_all(4, 0, replacing_rate=1.0, shape=shape, sampling="aligned")
    other = "decoder" if side == "encoder" else "encoder"
    assert {plan.spans(other) for plan in plans} == {(1,) * 6}
    assert Counter(plan.spans(side)[0] for plan in plans) == {2: 2, 3: 2}


def test_a_curriculum_shares_out_the_plans_of_a_step():
    odds = {0.0: Counter(), 1.0: Counter()}
    for progress, counts in odds.items():
        for step in range(500):
            plans = draw_all(8, step, progress=progress, odds=CURRICULA["coarse-to-fine"].odds, sampling="aligned", replacing_rate=1.0)
            counts.update(plan.decoder[0] for plan in plans)
    expected = CURRICULA["coarse-to-fine"].odds(GRANULARITIES, 0.0)
    for granularity, share in zip(GRANULARITIES, expected, strict=True):
        assert odds[0.0][granularity] / 4000 == pytest.approx(share / sum(expected), abs=0.01)
        assert odds[1.0][granularity] < odds[0.0][granularity] if granularity > 3 else odds[1.0][granularity] > odds[0.0][granularity]


@pytest.mark.parametrize(
    "granularities",
    [{"encoder": (2, 3, 6), "decoder": (2,)}, {"encoder": (2,), "decoder": (2, 3, 6)}, {"encoder": (2, 3, 6), "decoder": ()}],
)
def test_every_module_of_uneven_sides_has_its_turn(granularities):
    shape = BankShape({"encoder": 6, "decoder": 6}, granularities, {"encoder": 1, "decoder": 1}, 0)
    plans = [plan for step in range(50) for plan in draw_all(3, step, replacing_rate=1.0, shape=shape, sampling="aligned")]
    for side, known in granularities.items():
        assert {span for plan in plans for span in plan.spans(side)} - {1} == set(known)


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
    ("schedule", "rates"),
    [("constant", [0.25, 0.25, 0.25, 0.25, 0.25]), ("linear", [0.25, 0.4375, 0.625, 0.8125, 1.0]), ("ramp", [0.25, 0.625, 1.0, 1.0, 1.0])],
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
