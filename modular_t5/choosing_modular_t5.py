"""Which of a bank's sizes to take: strategies, and what each size costs. Pure arithmetic, no torch."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from .assembly_modular_t5 import PLAN_EXAMPLE, SIDES, AssemblyPlan, PlanLike, canonical_tilings, checked_plan, teacher_plan


def _size_first(encoder_depths: list[int], decoder_depths: list[int]) -> Iterator[tuple[int, int]]:
    encoder, decoder = 0, 0
    yield encoder_depths[0], decoder_depths[0]
    while encoder + 1 < len(encoder_depths) or decoder + 1 < len(decoder_depths):
        if decoder + 1 < len(decoder_depths):
            decoder += 1
            yield encoder_depths[encoder], decoder_depths[decoder]
        if encoder + 1 < len(encoder_depths):
            encoder += 1
            yield encoder_depths[encoder], decoder_depths[decoder]


def _speed_first(encoder_depths: list[int], decoder_depths: list[int]) -> Iterator[tuple[int, int]]:
    for decoder in decoder_depths:
        yield encoder_depths[0], decoder
    for encoder in encoder_depths[1:]:
        yield encoder, decoder_depths[-1]


class Strategy(NamedTuple):
    """A path of `(encoder depth, decoder depth)` from the teacher to the smallest plan, given each side's depths, deepest first."""

    path: Callable[[list[int], list[int]], Iterator[tuple[int, int]]]
    description: str


STRATEGIES: dict[str, Strategy] = {
    "size-first": Strategy(_size_first, "shrinks both sides in turn, decoder first: the most quality for a size"),
    "speed-first": Strategy(_speed_first, "shrinks the decoder to its end, then the encoder: the decoder runs once a token"),
}


class PlanReport(NamedTuple):
    """What a plan costs. Layer parameters are those of the blocks; total adds embeddings, position biases, final norms, head."""

    plan: AssemblyPlan
    layer_ratio: float
    total_ratio: float
    layer_parameters: int
    total_parameters: int
    bytes: int


@dataclass(frozen=True)
class BankShape:
    """The counts of a bank that choosing a plan needs; mappings have the keys `encoder` and `decoder`.

    Args:
        num_layers: original layers a side.
        granularities: of each side, ascending.
        block_parameters: parameters of one block a side, without the relative position bias.
        shared_parameters: what every plan has: embeddings, relative position biases, final norms, an untied head.
        bytes_per_parameter: 4 for float32, 2 for bfloat16.
        own_head_parameters: what a plan with modules in the decoder has on top, where the bank trained a head of its own.
    """

    num_layers: Mapping[str, int]
    granularities: Mapping[str, tuple[int, ...]]
    block_parameters: Mapping[str, int]
    shared_parameters: int
    bytes_per_parameter: int = 4
    own_head_parameters: int = 0

    @property
    def teacher(self) -> AssemblyPlan:
        """All original layers."""
        return teacher_plan(self.num_layers)

    def check(self, plan: AssemblyPlan) -> AssemblyPlan:
        """`plan`, if this bank can run it; else a `ValueError` that says what is wrong."""
        return checked_plan(plan, self.num_layers, self.granularities)

    @property
    def largest_ratio(self) -> float:
        """Of the smallest plan, at which every strategy ends."""
        smallest = (min(canonical_tilings(self.num_layers[side], tuple(self.granularities[side])).items())[1] for side in SIDES)
        return self.report(AssemblyPlan(*smallest)).layer_ratio

    def path(self, strategy: str) -> list[AssemblyPlan]:
        """The plans of a strategy, from the teacher to the smallest; raises `ValueError` for an unknown strategy."""
        if strategy not in STRATEGIES:
            choices = ", ".join(f"{name!r} ({row.description})" for name, row in STRATEGIES.items())
            raise ValueError(f"unknown strategy {strategy!r}; choose one of {choices}, or write a plan like {PLAN_EXAMPLE}")
        encoder, decoder = (canonical_tilings(self.num_layers[side], tuple(self.granularities[side])) for side in SIDES)
        depths = STRATEGIES[strategy].path(list(encoder), list(decoder))
        return [AssemblyPlan(encoder[encoder_depth], decoder[decoder_depth]) for encoder_depth, decoder_depth in depths]

    def report(self, plan: AssemblyPlan) -> PlanReport:
        """Parameters, bytes and ratios of a plan."""
        layers, teacher_layers = (
            sum(len(each.spans(side)) * self.block_parameters[side] for side in SIDES) for each in (self.check(plan), self.teacher)
        )
        own_head = self.own_head_parameters if set(plan.decoder) != {1} else 0
        total, teacher_total = layers + self.shared_parameters + own_head, teacher_layers + self.shared_parameters
        return PlanReport(plan, teacher_layers / layers, teacher_total / total, layers, total, total * self.bytes_per_parameter)

    def choose(self, strategy: str, ratio: float) -> AssemblyPlan:
        """The first plan of a strategy's path whose layer ratio (teacher's layer parameters / its own) reaches `ratio`.

        Raises `ValueError` for an unknown strategy and for a ratio that is not a number, below 1, or above the bank's largest.
        """
        plans = self.path(strategy)
        if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 1 <= ratio <= self.largest_ratio:
            largest = math.floor(10_000 * self.largest_ratio) / 10_000  # rounded up, it would be refused itself
            raise ValueError(f"ratio must be a number from 1 (the teacher) to {largest:.12g} ({plans[-1]}), got {ratio!r}")
        return next(plan for plan in plans if self.report(plan).layer_ratio >= ratio)


def resolve_plan(shape: BankShape, strategy: PlanLike, ratio: float | None = None) -> AssemblyPlan:
    """A strategy's name with a ratio, or a plan without one, as a plan that the bank of this shape can run.

    Raises `ValueError` if neither fits; the message holds the choices.
    """
    if isinstance(strategy, str) and "/" not in strategy:
        return shape.choose(strategy, ratio)
    if ratio is not None:
        raise ValueError(f"a ratio goes with a strategy ({', '.join(STRATEGIES)}); the plan {strategy} already fixes the size")
    return shape.check(AssemblyPlan.from_any(strategy))
