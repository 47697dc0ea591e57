"""Plans, tilings and strategies, against the design's own words and a brute-force reference."""

import json

import numpy as np
import pytest

from modular_t5 import STRATEGIES, AssemblyPlan, BankShape
from modular_t5.assembly_modular_t5 import canonical_tilings, tilings
from modular_t5.choosing_modular_t5 import resolve_plan


GRANULARITIES = (2, 3, 4, 6)
# T5-base: one encoder block, one decoder block, and the rest
T5_BASE = BankShape(
    {"encoder": 12, "decoder": 12},
    {"encoder": GRANULARITIES, "decoder": GRANULARITIES},
    {"encoder": 7_079_424, "decoder": 9_439_488},
    24_676_992,
)


def shape(encoder=12, decoder=12, granularities=GRANULARITIES):
    both = {"encoder": granularities, "decoder": granularities}
    return BankShape({"encoder": encoder, "decoder": decoder}, both, {"encoder": 100, "decoder": 150}, 1000)


def brute_force_canonical(num_layers, granularities):
    best = {}
    for tiling in tilings(num_layers, granularities):
        key = (sorted(tiling, reverse=True), tiling)
        best[len(tiling)] = min(best.get(len(tiling), key), key)
    return {depth: tiling for depth, (_, tiling) in best.items()}


def test_twelve_layers_have_292_tilings_all_legal_and_distinct():
    found = list(tilings(12, GRANULARITIES))
    assert len(found) == len(set(found)) == 292
    for tiling in found:
        AssemblyPlan(tiling, tiling)
        assert sum(tiling) == 12


@pytest.mark.parametrize(
    ("num_layers", "granularities"), [(12, GRANULARITIES), (6, (2, 3, 6)), (8, (2, 4)), (9, (3,)), (10, (5, 10)), (16, (2, 4, 8)), (1, ())]
)
def test_canonical_tilings_are_those_of_the_definition(num_layers, granularities):
    assert canonical_tilings(num_layers, granularities) == brute_force_canonical(num_layers, granularities)


def test_the_designs_canonical_examples():
    canonical = canonical_tilings(12, GRANULARITIES)
    assert list(canonical) == list(range(12, 1, -1))
    assert canonical[9] == (1, 1, 1, 1, 1, 1, 2, 2, 2)
    assert canonical[5] == (2, 2, 2, 3, 3)
    assert canonical[3] == (4, 4, 4)


def test_notation_and_json_are_inverse_of_each_other_on_every_tiling():
    found = list(tilings(12, GRANULARITIES))
    for encoder, decoder in zip(found, reversed(found), strict=True):
        plan = AssemblyPlan(encoder, decoder)
        assert AssemblyPlan.parse(str(plan)) == plan
        assert AssemblyPlan.from_any(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_designs_notation_example():
    plan = AssemblyPlan.parse("1x6-2x3/4x3")
    assert plan == AssemblyPlan((1, 1, 1, 1, 1, 1, 2, 2, 2), (4, 4, 4))
    assert str(plan) == "1x6-2x3/4x3"
    assert plan.to_dict() == {"encoder": [1, 1, 1, 1, 1, 1, 2, 2, 2], "decoder": [4, 4, 4]}
    assert list(plan.blocks("decoder")) == [(0, 4), (4, 4), (8, 4)]


def test_size_first_shrinks_in_turn_decoder_first():
    assert [plan.depths for plan in shape().path("size-first")][:5] == [(12, 12), (12, 11), (11, 11), (11, 10), (10, 10)]
    assert shape().path("size-first")[-1].depths == (2, 2)


def test_speed_first_shrinks_the_decoder_to_its_end():
    depths = [plan.depths for plan in shape().path("speed-first")]
    assert depths == [(12, d) for d in range(12, 1, -1)] + [(e, 2) for e in range(11, 1, -1)]


def test_depths_that_a_side_cannot_take_are_passed_over():
    # one granularity of 3 over 6 layers: depths 6, 4, 2
    assert [plan.depths for plan in shape(6, 6, (3,)).path("size-first")] == [(6, 6), (6, 4), (4, 4), (4, 2), (2, 2)]


def test_when_one_side_is_at_its_end_the_other_goes_on():
    assert [plan.depths for plan in shape(6, 2, (2,)).path("size-first")] == [(6, 2), (6, 1), (5, 1), (4, 1), (3, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_gives_the_first_plan_of_its_path_that_reaches_the_ratio(strategy):
    path = T5_BASE.path(strategy)
    ratios = [T5_BASE.report(plan).layer_ratio for plan in path]
    assert ratios == sorted(ratios)
    for ratio in (1, 1.1, 1.25, 2, 3, 4.2, 5.99, 6):
        index = path.index(T5_BASE.choose(strategy, ratio))
        assert ratios[index] >= ratio
        assert index == 0 or ratios[index - 1] < ratio


def test_the_designs_ratios_of_t5_base():
    for plan, layers, total in (("2x6/2x6", 2.00, 1.80), ("1x12/4x3", 1.75, 1.62)):
        report = T5_BASE.report(AssemblyPlan.parse(plan))
        assert round(report.layer_ratio, 2) == layers
        assert round(report.total_ratio, 2) == total
        assert report.bytes == 4 * report.total_parameters
    assert T5_BASE.report(AssemblyPlan.parse("6x2/6x2")).layer_ratio == T5_BASE.largest_ratio == 6


@pytest.mark.parametrize("ratio", [0.99, 6.01, 0, -1, float("nan"), float("inf"), 10**400, "2", None, True, [2]])
def test_a_ratio_out_of_range_names_the_range(ratio):
    with pytest.raises(ValueError, match=r"from 1 \(the teacher\) to 6 .*got"):
        resolve_plan(shape(), "size-first", ratio)


@pytest.mark.parametrize("strategy", ["fastest", "", "sizefirst"])
def test_an_unknown_strategy_lists_the_choices(strategy):
    with pytest.raises(ValueError, match=r"'size-first'.*'speed-first'"):
        resolve_plan(shape(), strategy, 2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("1x12", "unknown strategy '1x12'.*a plan like"),
        ("1x12/1x12/1x12", "two sides"),
        ("1x12/", "'' in the plan"),
        ("0x3/1x12", "'0x3' in the plan"),
        ("2x0/1x12", "'2x0' in the plan"),
        ("2x-6/1x12", "'2x' in the plan"),
        ("1x999-1x999/1x12", "at most 256"),
        ("1x9999999999/1x12", "is not <span>x<count>"),
        ("1x11/1x12", "covers 11 layers; it has 12"),
        ("1x1-2x1-1x9/1x12", "begin at a multiple of 2, but .* put one at layer 1"),
        ("5x2-2x1/1x12", "uses granularity 5 in the encoder; there are 1, 2, 3, 4, 6"),
        (((1,) * 12, (1,) * 12), "a plan is an AssemblyPlan"),
        ({"encoder": [1] * 12}, "a plan is an AssemblyPlan"),
        ({"encoder": [1.0] * 12, "decoder": [1] * 12}, "a span is a positive integer, got 1.0"),
        ({"encoder": [True] * 12, "decoder": [1] * 12}, "a span is a positive integer, got True"),
        ({"encoder": "1x12", "decoder": [1] * 12}, "sequence of spans"),
        ({"encoder": [], "decoder": [1] * 12}, "at least one span"),
        (3, "a plan is an AssemblyPlan"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(plan, message):
    with pytest.raises(ValueError, match=message):
        resolve_plan(shape(), plan)


def test_the_largest_ratio_named_is_accepted():
    odd = BankShape({"encoder": 6, "decoder": 3}, {"encoder": (2, 3, 6), "decoder": (3,)}, {"encoder": 701, "decoder": 1003}, 9)
    with pytest.raises(ValueError, match="got 1000") as caught:
        odd.choose("size-first", 1000)
    named = float(str(caught.value).split(" to ")[1].split()[0])
    assert odd.choose("size-first", named).depths == (1, 1)
    assert odd.largest_ratio - named < 1e-4


def test_numpy_numbers_are_numbers():
    assert shape().choose("size-first", np.float32(2)) == shape().choose("size-first", np.int64(2)) == shape().choose("size-first", 2)
    plan = AssemblyPlan(np.array([2, 2]), (np.int64(4),))
    assert json.dumps(plan.to_dict()) == '{"encoder": [2, 2], "decoder": [4]}'


def test_a_plan_with_a_ratio_is_refused():
    with pytest.raises(ValueError, match="already fixes the size"):
        resolve_plan(shape(), "2x6/2x6", 2)
