"""Plans and tilings, against the design's own words and a brute-force reference."""

import json

import pytest

from modular_t5 import AssemblyPlan
from modular_t5.assembly_modular_t5 import canonical_tilings, tilings


GRANULARITIES = (2, 3, 4, 6)


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
