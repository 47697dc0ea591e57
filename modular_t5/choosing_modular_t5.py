"""Which of a bank's sizes to take: strategies, budgets, and what each size costs. Pure arithmetic, no torch."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict, Unpack

from .assembly_modular_t5 import (
    PLAN_EXAMPLE,
    SIDES,
    AssemblyPlan,
    PlanLike,
    canonical_tilings,
    cheapest_tilings,
    checked_plan,
    is_number,
    teacher_plan,
)


class Scores(NamedTuple):
    """What calibrating found: how far from the teacher a bank gets.

    Args:
        modules: of each side and granularity, by each module when it alone is in place.
        plans: by plans that were measured as a whole; none if that was not asked for.
        own_parts: by what the bank has of its own beside modules, which every plan with modules runs.
    """

    modules: Mapping[str, Mapping[int, Sequence[float]]]
    plans: Mapping[AssemblyPlan, float]
    own_parts: float = 0.0

    @classmethod
    def of(cls, calibration: Mapping[str, Any]) -> "Scores":
        """Out of its JSON form."""
        modules = {side: {int(s): scores for s, scores in of_side.items()} for side, of_side in calibration["modules"].items()}
        plans = {AssemblyPlan.from_any(plan): score for plan, score in calibration.get("plans", {}).items()}
        return cls(modules, plans, calibration.get("own_parts", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        modules = {side: {str(s): list(scores) for s, scores in of_side.items()} for side, of_side in self.modules.items()}
        return {"modules": modules, "plans": {str(plan): score for plan, score in self.plans.items()}, "own_parts": self.own_parts}

    def foreseen(self, plan: AssemblyPlan) -> float:
        """Measured, or else the sum of the modules' scores; nothing for the teacher."""
        if plan in self.plans:
            return self.plans[plan]
        of_modules = [self.modules[side][span][start // span] for side in SIDES for start, span in plan.blocks(side) if span > 1]
        return self.own_parts + sum(of_modules) if of_modules else 0.0


@dataclass(frozen=True)
class Latency:
    """What generating for one batch takes on one machine: a part that every plan has, and a part for each block of a side.

    Args:
        base_ms: embeddings, head, search and everything else that no block does, in milliseconds.
        block_ms: of one block a side, over the whole generation, with the keys `encoder` and `decoder`.
        hardware: the machine that it was measured on.
        request: what was measured: batch size, lengths in tokens, beams, and whatever else it depends on.
    """

    base_ms: float
    block_ms: Mapping[str, float]
    hardware: str = ""
    request: Mapping[str, Any] | None = None

    def of(self, plan: AssemblyPlan) -> float:
        """Milliseconds that a plan takes."""
        return self.base_ms + sum(len(plan.spans(side)) * self.block_ms[side] for side in SIDES)


class PlanReport(NamedTuple):
    """What a plan costs. Layer parameters are those of the blocks; total adds embeddings, position biases, final norms, head.

    Milliseconds and speed-up over the teacher are known where a `Latency` is given.
    """

    plan: AssemblyPlan
    layer_ratio: float
    total_ratio: float
    layer_parameters: int
    total_parameters: int
    bytes: int
    latency_ms: float | None = None
    speedup: float | None = None


class Budgets(TypedDict, total=False):
    """The keywords of everything that chooses a size by a strategy; exactly one of them is given, or a ratio, beside `latency`.

    Args:
        max_parameters: all of them, embeddings included.
        max_bytes: of those parameters.
        min_speedup: over the teacher, by `latency`.
        max_latency_ms: for the request that `latency` was measured with.
        latency: what `measure_latency` returned.
    """

    max_parameters: int
    max_bytes: int
    min_speedup: float
    max_latency_ms: float
    latency: Latency


class Limit(NamedTuple):
    """What a budget bounds: which figure of a size, from below or from above, and how to say it."""

    figure: Callable[[Any], float]
    at_least: bool
    said: str

    def within(self, sizes: Sequence[Any], name: str, bound: float) -> list[Any]:
        """Of sizes, each with a `plan`, those that a bound leaves; a `ValueError` that names the nearest if there is none."""
        left = [size for size in sizes if (self.figure(size) >= bound if self.at_least else self.figure(size) <= bound)]
        if not left:
            nearest = (max if self.at_least else min)(sizes, key=self.figure)
            said = self.said.format(self.figure(nearest))
            raise ValueError(f"{name}={bound!r}: none of {len(sizes)} sizes is within it; the nearest is {nearest.plan} with {said}")
        return left


LIMITS: dict[str, Limit] = {
    "ratio": Limit(lambda report: report.layer_ratio, True, "a layer ratio of {:.12g}"),
    "max_parameters": Limit(lambda report: report.total_parameters, False, "{:,} parameters"),
    "max_bytes": Limit(lambda report: report.bytes, False, "{:,} bytes"),
    "min_speedup": Limit(lambda report: report.speedup, True, "{:.12g} times the teacher's speed"),
    "max_latency_ms": Limit(lambda report: report.latency_ms, False, "{:.12g} ms"),
}


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
        wide_parameters: of one block a side, those that stay in float32 whatever the rest is in.
        calibration: what `Scores.to_dict` gives, where the bank was calibrated.
        latency: where it was measured.
    """

    num_layers: Mapping[str, int]
    granularities: Mapping[str, tuple[int, ...]]
    block_parameters: Mapping[str, int]
    shared_parameters: int
    bytes_per_parameter: int = 4
    own_head_parameters: int = 0
    wide_parameters: Mapping[str, int] | None = None
    calibration: Mapping[str, Any] | None = None
    latency: Latency | None = None

    @property
    def teacher(self) -> AssemblyPlan:
        """All original layers."""
        return teacher_plan(self.num_layers)

    def check(self, plan: AssemblyPlan) -> AssemblyPlan:
        """`plan`, if this bank can run it; else a `ValueError` that says what is wrong."""
        return checked_plan(plan, self.num_layers, self.granularities)

    @property
    def canonical(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """The canonical tilings of each side by depth, deepest first."""
        return {side: canonical_tilings(self.num_layers[side], tuple(self.granularities[side])) for side in SIDES}

    @property
    def smallest(self) -> AssemblyPlan:
        """The plan with the fewest blocks, at which every path ends."""
        return AssemblyPlan(*(self.canonical[side][min(self.canonical[side])] for side in SIDES))

    @property
    def largest_ratio(self) -> float:
        """Of the smallest plan."""
        return self.report(self.smallest).layer_ratio

    def plans(self, strategy: str) -> list[AssemblyPlan]:
        """The plans of a strategy, the preferred ones first; raises `ValueError` for an unknown strategy."""
        if strategy not in STRATEGIES:
            choices = ", ".join(f"{name!r} ({row.description})" for name, row in STRATEGIES.items())
            raise ValueError(f"unknown strategy {strategy!r}; choose one of {choices}, or write a plan like {PLAN_EXAMPLE}")
        return list(STRATEGIES[strategy].plans(self))

    def report(self, plan: AssemblyPlan) -> PlanReport:
        """Parameters, bytes, ratios and speed of a plan."""
        layers, teacher_layers = (
            sum(len(each.spans(side)) * self.block_parameters[side] for side in SIDES) for each in (self.check(plan), self.teacher)
        )
        own_head = self.own_head_parameters if set(plan.decoder) != {1} else 0
        total, teacher_total = layers + self.shared_parameters + own_head, teacher_layers + self.shared_parameters
        wide = sum(len(plan.spans(side)) * (self.wide_parameters or {}).get(side, 0) for side in SIDES)
        size = total * self.bytes_per_parameter + wide * (4 - self.bytes_per_parameter)
        speed = ()
        if self.latency is not None:
            speed = (self.latency.of(plan), self.latency.of(self.teacher) / self.latency.of(plan))
        return PlanReport(plan, teacher_layers / layers, teacher_total / total, layers, total, size, *speed)

    def choices(self, strategy: str, ratio: float | None = None, **budgets: Any) -> list[PlanReport]:
        """The plans of a strategy within a budget: a layer ratio (teacher's layer parameters / its own), or one of `Budgets`.

        The preferred ones come first. Raises `ValueError` for an unknown strategy, for none or several budgets, for a bound that is
        not a number in its range, and for one that no plan of the strategy meets; the message names the nearest plan.
        """
        plans = self.plans(strategy)
        name, bound = the_one_budget({"ratio": ratio, **budgets}, LIMITS)
        if name == "ratio" and not (is_number(bound) and 1 <= bound <= self.largest_ratio):
            largest = math.floor(10_000 * self.largest_ratio) / 10_000  # rounded up, it would be refused itself
            raise ValueError(f"ratio must be a number from 1 (the teacher) to {largest:.12g} ({self.smallest}), got {bound!r}")
        if name in ("min_speedup", "max_latency_ms") and self.latency is None:
            raise ValueError(f"{name} needs latency=, what measure_latency(bank, ...) returned for your machine, batch and lengths")
        return LIMITS[name].within([self.report(plan) for plan in plans], name, bound)

    def choose(self, strategy: str, ratio: float | None = None, **budgets: Any) -> AssemblyPlan:
        """The first of `choices`."""
        return self.choices(strategy, ratio, **budgets)[0].plan

    @property
    def strategies(self) -> list[str]:
        """By name, those that can choose a plan of this bank."""
        return [name for name, strategy in STRATEGIES.items() if strategy.applies(self)]


def the_one_budget(given: Mapping[str, Any], known: Iterable[str]) -> tuple[str, float]:
    """Name and bound of the only budget that is not None; a `ValueError` if it is not the only one, or no positive number."""
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"there is no argument or budget {unknown[0]!r}; the budgets are {', '.join(known)}")
    given = {name: bound for name, bound in given.items() if bound is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(known)}; got {', '.join(given) or 'none'}")
    ((name, bound),) = given.items()
    if name != "ratio" and not (is_number(bound) and 0 < bound < math.inf):
        raise ValueError(f"{name} must be a positive number, got {bound!r}")
    return name, bound


def _size_first(shape: BankShape) -> Iterator[AssemblyPlan]:
    encoders, decoders = (list(shape.canonical[side].values()) for side in SIDES)
    encoder, decoder = 0, 0
    yield AssemblyPlan(encoders[0], decoders[0])
    while encoder + 1 < len(encoders) or decoder + 1 < len(decoders):
        if decoder + 1 < len(decoders):
            decoder += 1
            yield AssemblyPlan(encoders[encoder], decoders[decoder])
        if encoder + 1 < len(encoders):
            encoder += 1
            yield AssemblyPlan(encoders[encoder], decoders[decoder])


def _speed_first(shape: BankShape) -> Iterator[AssemblyPlan]:
    encoders, decoders = (list(shape.canonical[side].values()) for side in SIDES)
    for decoder in decoders:
        yield AssemblyPlan(encoders[0], decoder)
    for encoder in encoders[1:]:
        yield AssemblyPlan(encoder, decoders[-1])


def _calibrated(shape: BankShape) -> Iterator[AssemblyPlan]:
    if shape.calibration is None:
        raise ValueError("the strategy 'calibrated' needs scores of this bank's modules: calibrate(bank, dataset, ...) makes them")
    scores = Scores.of(shape.calibration)
    # What was measured as a whole is trusted alone, and the teacher.
    plans = {shape.teacher, *scores.plans} if scores.plans else set(foreseen_best(shape, scores))
    yield from sorted(plans, key=preference(scores))


def preference(scores: Scores) -> Callable[[AssemblyPlan], tuple[Any, ...]]:
    """A key to sort plans by: the least score first, of equal ones the smaller plan."""
    return lambda plan: (scores.foreseen(plan), sum(plan.depths), plan.encoder, plan.decoder)


def foreseen_best(shape: BankShape, scores: Scores) -> Iterator[AssemblyPlan]:
    """Of each pair of depths, the plan with the least sum of its modules' scores.

    What a plan costs depends on its depths alone, so the best of these within a budget is, by sums, the best of all plans within it.
    """
    encoders, decoders = (_best_of_depths(shape, side, scores.modules[side]) for side in SIDES)
    for encoder in encoders:
        for decoder in decoders:
            yield AssemblyPlan(encoder, decoder)


def _best_of_depths(shape: BankShape, side: str, scores: Mapping[int, Sequence[float]]) -> list[tuple[int, ...]]:
    """Of every depth of a side, the tiling of the least score; original layers cost nothing."""

    def score(start: int, span: int) -> tuple[float]:
        return (scores[span][start // span] if span > 1 else 0.0,)

    return [tiling for _, tiling in cheapest_tilings(shape.num_layers[side], shape.granularities[side], score).values()]


class Strategy(NamedTuple):
    """A bank's plans, the preferred ones first, what it prefers in a line, and whether it can choose of a bank."""

    plans: Callable[[BankShape], Iterator[AssemblyPlan]]
    description: str
    applies: Callable[[BankShape], bool] = lambda shape: True


STRATEGIES: dict[str, Strategy] = {
    "size-first": Strategy(_size_first, "shrinks both sides in turn, decoder first: the most quality for a size"),
    "speed-first": Strategy(_speed_first, "shrinks the decoder to its end, then the encoder: the decoder runs once a token"),
    "calibrated": Strategy(
        _calibrated, "the least loss that is foreseen, by scores of this bank's modules", lambda shape: shape.calibration is not None
    ),
}


def resolve_plan(shape: BankShape, strategy: PlanLike, ratio: float | None = None, **budgets: Unpack[Budgets]) -> PlanReport:
    """The first of `resolve_plans`, which see."""
    return resolve_plans(shape, strategy, ratio, **budgets)[0]


def resolve_plans(shape: BankShape, strategy: PlanLike, ratio: float | None = None, **budgets: Unpack[Budgets]) -> list[PlanReport]:
    """A strategy's name with a budget, or a plan without one: plans that the bank of this shape can run, and what each costs.

    Of a strategy these are all within the budget, the preferred ones first. Raises `ValueError` if neither fits; the message
    holds the choices.
    """
    latency = budgets.pop("latency", None)
    if not isinstance(latency, Latency | None):
        raise ValueError(f"latency is what measure_latency returns, got {latency!r}")
    shape = replace(shape, latency=latency or shape.latency)
    if isinstance(strategy, str) and "/" not in strategy:
        return shape.choices(strategy, ratio, **budgets)
    if unknown := sorted(set(budgets) - set(LIMITS)):
        raise ValueError(f"there is no argument or budget {unknown[0]!r}; the budgets are {', '.join(LIMITS)}")
    if given := [f"{name}={bound!r}" for name, bound in {"ratio": ratio, **budgets}.items() if bound is not None]:
        raise ValueError(f"{given[0]} goes with a strategy ({', '.join(STRATEGIES)}); the plan {strategy} already fixes the size")
    return [shape.report(AssemblyPlan.from_any(strategy))]


def assembly_record(report: PlanReport, strategy: PlanLike, ratio: float | None = None, **budget: Unpack[Budgets]) -> dict[str, Any]:
    """What an assembled model remembers: its plan, and if a strategy chose that, what was asked and what came out, as plain JSON."""
    latency = budget.pop("latency", None)
    asked = {name: bound for name, bound in {"ratio": ratio, **budget}.items() if bound is not None}
    if not asked:
        return {"plan": str(report.plan)}
    achieved = {name: figure for name, figure in report._asdict().items() if figure is not None and name != "plan"}
    measured = {} if latency is None else {"hardware": latency.hardware, "request": latency.request}
    asked = {name: bound if isinstance(bound, int) else float(bound) for name, bound in asked.items()}
    return {"plan": str(report.plan), "asked": {"strategy": strategy, **asked}, "achieved": achieved, **measured}
