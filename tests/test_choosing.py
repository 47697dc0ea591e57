"""Choosing a size: strategies and budgets, against the design's own words and brute force over all plans."""

import json
from dataclasses import replace

import numpy as np
import pytest

from modular_t5 import AssemblyPlan, BankShape, Latency
from modular_t5.assembly_modular_t5 import SIDES, tilings
from modular_t5.choosing_modular_t5 import LIMITS, Scores, assembly_record, resolve_plan, resolve_plans


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


def test_size_first_shrinks_in_turn_decoder_first():
    assert [plan.depths for plan in shape().plans("size-first")][:5] == [(12, 12), (12, 11), (11, 11), (11, 10), (10, 10)]
    assert shape().plans("size-first")[-1].depths == (2, 2)


def test_speed_first_shrinks_the_decoder_to_its_end():
    depths = [plan.depths for plan in shape().plans("speed-first")]
    assert depths == [(12, d) for d in range(12, 1, -1)] + [(e, 2) for e in range(11, 1, -1)]


def test_depths_that_a_side_cannot_take_are_passed_over():
    # one granularity of 3 over 6 layers: depths 6, 4, 2
    assert [plan.depths for plan in shape(6, 6, (3,)).plans("size-first")] == [(6, 6), (6, 4), (4, 4), (4, 2), (2, 2)]


def test_when_one_side_is_at_its_end_the_other_goes_on():
    assert [plan.depths for plan in shape(6, 2, (2,)).plans("size-first")] == [(6, 2), (6, 1), (5, 1), (4, 1), (3, 1)]


@pytest.mark.parametrize("strategy", ["size-first", "speed-first"])
def test_a_strategy_gives_the_first_plan_of_its_path_that_reaches_the_ratio(strategy):
    path = T5_BASE.plans(strategy)
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


@pytest.mark.parametrize("ratio", [0.99, 6.01, 0, -1, float("nan"), float("inf"), 10**400, "2", True, [2]])
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


# -- budgets -------------------------------------------------------------------------------------------------------------------

LATENCY = Latency(5.0, {"encoder": 1.0, "decoder": 7.0}, hardware="an abacus", request={"batch_size": 1})
TIMED = replace(T5_BASE, latency=LATENCY)


@pytest.mark.parametrize("strategy", ["size-first", "speed-first"])
@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("max_parameters", (222_903_552, 200_000_000, 100_000_000, 57_714_816)),
        ("max_bytes", (10**9, 700_000_000, 230_859_264)),
        ("min_speedup", (1, 1.5, 3.0)),
        ("max_latency_ms", (101, 60.5, 21)),
    ],
)
def test_a_budget_is_met_by_the_first_plan_of_the_path_that_is_within_it(strategy, name, bounds):
    figure = {
        "max_parameters": lambda report: -report.total_parameters,
        "max_bytes": lambda report: -report.bytes,
        "min_speedup": lambda report: report.speedup,
        "max_latency_ms": lambda report: -report.latency_ms,
    }[name]
    plans = TIMED.plans(strategy)
    for bound in bounds:
        chosen = resolve_plan(T5_BASE, strategy, latency=LATENCY, **{name: bound})
        within = [figure(TIMED.report(plan)) >= (bound if name == "min_speedup" else -bound) for plan in plans]
        assert chosen.plan == plans[within.index(True)]


def test_latency_is_a_base_and_a_part_for_each_block():
    report = TIMED.report(AssemblyPlan.parse("1x12/4x3"))
    assert report.latency_ms == 5 + 12 * 1 + 3 * 7
    assert report.speedup == (5 + 12 * 8) / 38
    assert T5_BASE.report(report.plan).latency_ms is T5_BASE.report(report.plan).speedup is None


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_parameters": 1000}, "max_parameters=1000: none of 21 sizes is within it; the nearest is 6x2/6x2 with 57,714,816 par"),
        ({"max_bytes": 1}, "the nearest is 6x2/6x2 with 230,859,264 bytes"),
        ({"max_latency_ms": 20, "latency": LATENCY}, "the nearest is 6x2/6x2 with 21 ms"),
        ({"min_speedup": 5, "latency": LATENCY}, "the nearest is 6x2/6x2 with 4.809523809\\d+ times the teacher's speed"),
        ({"min_speedup": 2}, r"min_speedup needs latency=, what measure_latency\(bank, ...\) returned"),
        ({"max_latency_ms": 20}, "max_latency_ms needs latency="),
        ({}, "give exactly one of ratio, max_parameters, max_bytes, min_speedup, max_latency_ms; got none"),
        ({"ratio": 2, "max_bytes": 10**9}, "exactly one of .*; got ratio, max_bytes"),
        ({"max_megabytes": 3}, "there is no argument or budget 'max_megabytes'; the budgets are ratio, max_parameters"),
        *(({"max_bytes": bound}, "max_bytes must be a positive number, got") for bound in (0, -1, float("nan"), float("inf"), "1", True)),
        ({"latency": 40, "max_latency_ms": 40}, "latency is what measure_latency returns, got 40"),
    ],
)
def test_a_budget_that_nothing_meets_or_that_is_none_says_so(budget, message):
    with pytest.raises(ValueError, match=message):
        resolve_plan(T5_BASE, "size-first", **budget)


def test_a_plan_needs_no_budget_and_takes_none():
    assert resolve_plan(T5_BASE, "2x6/2x6", latency=LATENCY).latency_ms == 5 + 6 * 8
    with pytest.raises(ValueError, match="there is no argument or budget 'share_weight'"):
        resolve_plan(T5_BASE, "2x6/2x6", share_weight=None)
    with pytest.raises(ValueError, match="max_bytes=10 goes with a strategy"):
        resolve_plan(T5_BASE, "2x6/2x6", max_bytes=10)


def test_what_stays_in_float32_counts_four_bytes():
    half = replace(shape(), bytes_per_parameter=2, wide_parameters={"encoder": 10, "decoder": 20})
    plan = AssemblyPlan.parse("2x6/4x3")
    assert half.report(plan).bytes == 2 * half.report(plan).total_parameters + 2 * (6 * 10 + 3 * 20)


def test_an_assembled_model_remembers_what_was_asked_and_what_came_out():
    report = resolve_plan(T5_BASE, "speed-first", max_latency_ms=np.float32(60), latency=LATENCY)
    record = assembly_record(report, "speed-first", max_latency_ms=np.float32(60), latency=LATENCY)
    assert json.loads(json.dumps(record)) == record
    assert record["asked"] == {"strategy": "speed-first", "max_latency_ms": 60}
    assert record["achieved"]["latency_ms"] == report.latency_ms <= 60
    assert record["hardware"] == "an abacus"
    assert record["request"] == {"batch_size": 1}
    assert assembly_record(report, "2x6/2x6") == {"plan": str(report.plan)}


# -- calibrated ----------------------------------------------------------------------------------------------------------------


def scored(shape, seed):
    """The shape with random scores of every module, some of them below zero."""
    random = np.random.default_rng(seed)
    modules = {
        side: {s: (random.random(shape.num_layers[side] // s) * s - 0.3).tolist() for s in shape.granularities[side]} for side in SIDES
    }
    return replace(shape, calibration=Scores(modules, {}).to_dict())


@pytest.mark.parametrize("seed", range(3))
def test_calibrated_finds_the_best_of_all_85_264_plans(seed):
    bank = scored(TIMED, seed)
    sides, modules = [], Scores.of(bank.calibration).modules
    for side in SIDES:
        plans = [AssemblyPlan(tiling, tiling) for tiling in tilings(12, GRANULARITIES)]
        scores = [sum(modules[side][s][start // s] for start, s in plan.blocks(side) if s > 1) for plan in plans]
        sides.append((np.array([len(plan.encoder) for plan in plans]), np.array(scores)))
    (encoder, encoder_score), (decoder, decoder_score) = sides
    total = encoder_score[:, None] + decoder_score
    assert total.size == 85_264
    layers = encoder[:, None] * 7_079_424 + decoder * 9_439_488
    latency = 5 + encoder[:, None] + 7 * decoder
    budgets = [("ratio", bound, layers <= 12 * (7_079_424 + 9_439_488) / bound) for bound in (1, 1.3, 2, 4, 6)]
    budgets += [("max_parameters", bound, layers + 24_676_992 <= bound) for bound in (60_000_000, 120_000_000)]
    budgets += [("max_bytes", 500_000_000, 4 * (layers + 24_676_992) <= 500_000_000)]
    budgets += [("max_latency_ms", 40, latency <= 40), ("min_speedup", 2.5, 101 / latency >= 2.5)]
    for name, bound, within in budgets:
        chosen = bank.choose("calibrated", **{name: bound})
        assert LIMITS[name].within([bank.report(chosen)], name, bound)
        assert Scores.of(bank.calibration).foreseen(chosen) == pytest.approx(total[within].min(), abs=1e-12)


def test_of_what_was_measured_as_a_whole_is_chosen_alone():
    bank = scored(T5_BASE, 0)
    first = bank.plans("calibrated")[0]
    odd = AssemblyPlan.parse("6x2/1x2-2x5")  # not the best of its depths
    assert odd not in bank.plans("calibrated")
    scores = Scores.of(bank.calibration)._replace(plans={first: 100.0, odd: -100.0})
    measured = replace(bank, calibration=scores.to_dict())
    assert Scores.of(scores.to_dict()) == scores
    assert measured.plans("calibrated") == [odd, T5_BASE.teacher, first]


def test_of_plans_within_a_budget_the_preferred_come_first():
    bank = scored(T5_BASE, 0)
    foreseen = [Scores.of(bank.calibration).foreseen(report.plan) for report in resolve_plans(bank, "calibrated", 3)]
    assert foreseen == sorted(foreseen)
    assert bank.choose("calibrated", 3) == resolve_plans(bank, "calibrated", 3)[0].plan
    assert [report.plan for report in resolve_plans(T5_BASE, "2x6/2x6")] == [AssemblyPlan.parse("2x6/2x6")]


def test_calibrated_needs_scores():
    with pytest.raises(ValueError, match="'calibrated' needs scores of this bank's modules: calibrate"):
        resolve_plan(T5_BASE, "calibrated", 2)


def test_of_equal_scores_the_smaller_plan_is_preferred():
    nothing = {side: {s: [0.0] * (12 // s) for s in GRANULARITIES} for side in SIDES}
    assert replace(T5_BASE, calibration=Scores(nothing, {}).to_dict()).choose("calibrated", 1).depths == (2, 2)
