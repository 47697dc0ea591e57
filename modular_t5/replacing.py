"""Which plans a training step runs: a pure function of the seed, the step and how far training has come.

Source of module replacing: Xu et al., "BERT-of-Theseus", EMNLP 2020, arXiv 2002.02925, which this is where a bank has one
granularity; of several granularities and the coarse-to-fine curriculum: Zhou, Le Bras, Choi, "Modular Transformers", Findings of
ACL 2023, arXiv 2306.02379.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .choosing_modular_t5 import BankShape


class Schedule(NamedTuple):
    """The replacing rate at a progress from 0 to 1, given its start and end."""

    rate: Callable[[float, float, float], float]
    description: str


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(lambda start, end, progress: start, "the start all the time"),
    "linear": Schedule(lambda start, end, progress: start + (end - start) * progress, "straight from the start to the end"),
    "ramp": Schedule(
        lambda start, end, progress: start + (end - start) * min(2 * progress, 1.0), "straight to the end by half-time, where it stays"
    ),
}


# Odds of the granularities (ascending) at a progress from 0 to 1; they need not sum to 1.
Odds = Callable[[Sequence[int], float], Sequence[float]]

# How much likelier the favoured end of the granularities is than the other at either end of training.
_TILT = 4.0


def _tilted(granularities: Sequence[int], towards_coarse: float) -> list[float]:
    """Odds that move from fine (`towards_coarse` = -1) through even (0) to coarse (1)."""
    ranks = range(len(granularities))
    middle = (len(granularities) - 1) / 2
    return [math.exp(math.log(_TILT) * towards_coarse * (rank - middle) / max(2 * middle, 1)) for rank in ranks]


class Curriculum(NamedTuple):
    """How the odds of the granularities move."""

    odds: Odds
    description: str


CURRICULA: dict[str, Curriculum] = {
    "coarse-to-fine": Curriculum(lambda s, progress: _tilted(s, 1 - 2 * progress), "coarse modules first, fine ones last: the paper's"),
    "fine-to-coarse": Curriculum(lambda s, progress: _tilted(s, 2 * progress - 1), "fine modules first, coarse ones last"),
    "uniform": Curriculum(lambda s, progress: [1.0] * len(s), "every granularity alike all the time"),
}


# By side, odds by granularity.
SideOdds = Mapping[str, Mapping[int, float]]


def _mixed(draw: random.Random, shape: BankShape, odds: SideOdds, rate: float, count: int) -> Iterator[AssemblyPlan]:
    return (_draw_plan(draw, shape, odds, rate) for _ in range(count))


def _aligned(draw: random.Random, shape: BankShape, odds: SideOdds, rate: float, count: int) -> Iterator[AssemblyPlan]:
    leading, other = ("decoder", "encoder") if any(odds["decoder"].values()) else ("encoder", "decoder")
    spans = [1, *(s for s, number in odds[other].items() if number)]
    partners: dict[int, list[int]] = {}  # of each granularity, spans of the other side that have not had their turn
    for granularity in _shared_out(draw, odds[leading], count):
        if not partners.get(granularity):
            # Modules of like granularity first, so that they all learn in every step that has as many plans.
            *finer, like = [s for s in spans if s <= granularity]
            coarser = [s for s in spans if s > granularity] if granularity == max(odds[leading]) else []
            partners[granularity] = [*draw.sample(finer + coarser, len(finer + coarser)), like]
        yield _draw_plan(draw, shape, {leading: {granularity: 1.0}, other: {partners[granularity].pop(): 1.0}}, rate)


def _shared_out(draw: random.Random, odds: Mapping[int, float], count: int) -> list[int]:
    """`count` granularities, each as often as its odds say, rounded up or down at random (systematic sampling)."""
    total = sum(odds.values())
    places = [count * past / total for past in accumulate(odds.values())]
    offset = draw.random()
    drawn = [list(odds)[min(bisect_right(places, number + offset), len(odds) - 1)] for number in range(count)]
    return draw.sample(drawn, count)


class Sampling(NamedTuple):
    """How the plans of a step are drawn."""

    plans: Callable[[random.Random, BankShape, SideOdds, float, int], Iterator[AssemblyPlan]]
    description: str


SAMPLINGS: dict[str, Sampling] = {
    "aligned": Sampling(
        _aligned,
        "one granularity a side, the encoder's as the decoder's or finer; with odds alike and a plan for each granularity, every module "
        "of the decoder learns in every step",
    ),
    "mixed": Sampling(_mixed, "a granularity of its own for every module: the paper's"),
}


def draw_plans(
    shape: BankShape, *, seed: int, step: int, progress: float, sampling: str, count: int, replacing_rate: float, odds: Odds
) -> tuple[AssemblyPlan, ...]:
    """The plans of a step, each with at least one module.

    Each side is walked from the bottom. Where a module may start, one is taken with probability `replacing_rate`, its granularity
    that of the side, or by the odds among those that fit; else the original layer stays.

    Args:
        shape: of the bank.
        seed, step: integers; equal ones give equal plans, in every process and after a restart.
        progress: of training, from 0 to 1.
        sampling: a name in `SAMPLINGS`.
        count: how many plans.
        replacing_rate: above 0, at most 1.
        odds: a curriculum's, or the user's own function. A granularity of odds 0 is not drawn.

    Raises:
        ValueError: odds that are not one finite number of at least 0 a granularity, or all 0 on both sides.
    """
    odds_of = {side: _checked_odds(odds, shape.granularities[side], progress) for side in SIDES}
    if not any(any(of_side.values()) for of_side in odds_of.values()):
        raise ValueError(f"a curriculum must leave some granularity; its odds are all 0 at a progress of {progress:g}")
    # Seeded by a string, Random hashes it with SHA-512: the same in every process.
    return tuple(SAMPLINGS[sampling].plans(random.Random(f"{seed}/{step}"), shape, odds_of, replacing_rate, count))


def _draw_plan(draw: random.Random, shape: BankShape, odds: SideOdds, replacing_rate: float) -> AssemblyPlan:
    for rate in (*[replacing_rate] * 1000, 1.0):  # a rate too small to ever replace anything must not draw for ever
        plan = AssemblyPlan(*(_draw_spans(draw, shape.num_layers[side], odds[side], rate) for side in SIDES))
        if plan != shape.teacher:
            return plan
    raise AssertionError("every granularity fits at the bottom of its side")


def _checked_odds(odds: Odds, granularities: Sequence[int], progress: float) -> dict[int, float]:
    given = odds(granularities, progress)
    given = given if isinstance(given, Mapping) else list(given)
    fits = not isinstance(given, Mapping) and len(given) == len(granularities)
    if not fits or not all(number >= 0 for number in given) or not math.isfinite(sum(given)):
        raise ValueError(
            f"a curriculum gives a list with a number of at least 0 for each of the granularities {tuple(granularities)}, got {given} "
            f"at a progress of {progress:g}"
        )
    return dict(zip(granularities, given, strict=True))


def _draw_spans(draw: random.Random, num_layers: int, odds: Mapping[int, float], replacing_rate: float) -> tuple[int, ...]:
    spans: list[int] = []
    start = 0
    while start < num_layers:
        # A granularity divides its side, so a module that starts at a multiple of it also ends inside the side.
        fitting = [s for s, number in odds.items() if number and start % s == 0]
        replaced = fitting and draw.random() < replacing_rate
        spans.append(draw.choices(fitting, [odds[s] for s in fitting])[0] if replaced else 1)
        start += spans[-1]
    return tuple(spans)
