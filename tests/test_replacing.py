"""Drawing plans: reproducible by arithmetic, legal, and moved by the dials."""

from collections import Counter

import pytest

from modular_t5 import BankShape
from modular_t5.replacing import CURRICULA, draw_plan


GRANULARITIES = (2, 3, 4, 6)
SHAPE = BankShape({"encoder": 12, "decoder": 12}, {"encoder": GRANULARITIES, "decoder": GRANULARITIES}, {"encoder": 1, "decoder": 1}, 0)


def draw(step, seed=0, progress=0.5, replacing_rate=0.7, curriculum="uniform", shape=SHAPE):
    return draw_plan(shape, seed=seed, step=step, progress=progress, replacing_rate=replacing_rate, curriculum=curriculum)


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
        plan = draw(step, progress=step / 299, replacing_rate=0.05 if step % 2 else 1.0, curriculum=curriculum)
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
        spans = Counter(draw(step, progress=progress, replacing_rate=1.0, curriculum=curriculum).encoder[0] for step in range(2000))
        return spans[6] / spans.total()

    early, late = share_of_sixes(0.0), share_of_sixes(1.0)
    if drift:
        assert (late - early) * drift > 0.2
    else:
        assert early == late == pytest.approx(0.25, abs=0.03)
