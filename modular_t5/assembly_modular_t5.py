"""Which sizes a bank can take: plans, their notation, and the tilings they are made of. Pure arithmetic, no torch.

A *side* (encoder or decoder) of `n` layers is tiled by *spans*: 1 is an original layer, a granularity `s` is the module that
stands in for `s` consecutive original layers and therefore starts at a multiple of `s`. An `AssemblyPlan` holds one tiling a side.

Source: "Modular Transformers: Compressing Transformers into Modularized Layers for Flexible Efficient Inference", Zhou, Le Bras,
Choi, Findings of ACL 2023, arXiv 2306.02379.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any


SIDES = ("encoder", "decoder")
MAX_LAYERS = 256  # a side; the deepest public T5 has 48

_RUN = re.compile(r"([1-9]\d{0,2})x([1-9]\d{0,2})")
PLAN_EXAMPLE = "'1x6-2x3/4x3' (encoder: six original layers, three modules of granularity 2; decoder: three of granularity 4)"


@dataclass(frozen=True)
class AssemblyPlan:
    """Two tuples of spans, bottom layer first. Prints as, and is parsed from, `1x6-2x3/4x3`.

    Raises `ValueError` if a span is not a positive integer or does not start at a multiple of itself.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    def __post_init__(self) -> None:
        for side in SIDES:
            spans = getattr(self, side)
            if isinstance(spans, str) or not isinstance(spans, Iterable):
                raise ValueError(f"the {side} of a plan is a sequence of spans such as (1, 1, 2), got {spans!r}")
            object.__setattr__(self, side, _checked_spans(side, tuple(spans)))

    @classmethod
    def parse(cls, text: str) -> "AssemblyPlan":
        """The plan that `text` writes down: `<encoder>/<decoder>`, each side runs of `<span>x<count>` joined by `-`."""
        sides = text.split("/") if isinstance(text, str) else ()
        if len(sides) != 2:
            raise ValueError(f"a plan has two sides, encoder/decoder, like {PLAN_EXAMPLE}; got {text!r}")
        return cls(*(_parsed_spans(side, text) for side in sides))

    @classmethod
    def from_any(cls, plan: "PlanLike") -> "AssemblyPlan":
        """`plan` as it is, or read from its notation or from its JSON form `{"encoder": [...], "decoder": [...]}`."""
        if isinstance(plan, cls):
            return plan
        if isinstance(plan, str):
            return cls.parse(plan)
        if isinstance(plan, Mapping) and set(plan) == set(SIDES):
            return cls(plan["encoder"], plan["decoder"])
        raise ValueError(f"a plan is an AssemblyPlan, a string like {PLAN_EXAMPLE}, or a mapping of both sides; got {plan!r}")

    def to_dict(self) -> dict[str, list[int]]:
        """The JSON form: two lists of integers."""
        return {side: list(self.spans(side)) for side in SIDES}

    def spans(self, side: str) -> tuple[int, ...]:
        return getattr(self, side)

    def blocks(self, side: str) -> Iterator[tuple[int, int]]:
        """`(first original layer, span)` of every block of a side, bottom first."""
        start = 0
        for span in self.spans(side):
            yield start, span
            start += span

    @property
    def depths(self) -> tuple[int, int]:
        """Blocks of the encoder, blocks of the decoder."""
        return len(self.encoder), len(self.decoder)

    def __str__(self) -> str:
        return "/".join(_printed_spans(self.spans(side)) for side in SIDES)


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number in type, numpy's included; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """The same of any real number."""
    return isinstance(value, Real) and not isinstance(value, bool)


PlanLike = AssemblyPlan | str | Mapping[str, Iterable[int]]


def _checked_spans(side: str, spans: tuple[Any, ...]) -> tuple[int, ...]:
    if not spans:
        raise ValueError(f"the {side} of a plan needs at least one span")
    start = 0
    for span in spans:
        if not is_integer(span) or span < 1:
            raise ValueError(f"a span is a positive integer, got {span!r} in the {side} spans {spans}")
        if start % span:
            raise ValueError(
                f"a module of granularity {span} stands in for layers that begin at a multiple of {span}, "
                f"but the {side} spans {spans} put one at layer {start}"
            )
        start += span
    if start > MAX_LAYERS:
        raise ValueError(f"the {side} spans cover {start} layers; a side has at most {MAX_LAYERS}")
    return tuple(map(int, spans))


def _parsed_spans(side: str, text: str) -> tuple[int, ...]:
    spans: list[int] = []
    for run in side.split("-"):
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run!r} in the plan {text!r} is not <span>x<count>; a plan looks like {PLAN_EXAMPLE}")
        span, count = map(int, match.groups())
        if len(spans) + count > MAX_LAYERS:
            raise ValueError(f"the {side} of a plan has at most {MAX_LAYERS} spans; {text[:60]!r}... has more")
        spans += [span] * count
    return tuple(spans)


def _printed_spans(spans: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for span in spans:
        if runs and runs[-1][0] == span:
            runs[-1][1] += 1
        else:
            runs.append([span, 1])
    return "-".join(f"{span}x{count}" for span, count in runs)


def teacher_plan(num_layers: Mapping[str, int]) -> AssemblyPlan:
    """All original layers."""
    return AssemblyPlan(*((1,) * num_layers[side] for side in SIDES))


def checked_plan(plan: AssemblyPlan, num_layers: Mapping[str, int], granularities: Mapping[str, Iterable[int]]) -> AssemblyPlan:
    """`plan`, if sides of these layers and granularities can run it; else a `ValueError` that says what is wrong."""
    for side in SIDES:
        spans, known = plan.spans(side), (1, *granularities[side])
        unknown = sorted(set(spans) - set(known))
        if unknown:
            raise ValueError(
                f"the plan {plan} uses granularity {unknown[0]} in the {side}; there are {', '.join(map(str, known))} there "
                "(1 is an original layer)"
            )
        if sum(spans) != num_layers[side]:
            raise ValueError(f"the {side} of the plan {plan} covers {sum(spans)} layers; it has {num_layers[side]}")
    return plan


def tilings(num_layers: int, granularities: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Every legal tiling of `num_layers` layers, in lexicographic order: 292 for 12 layers and granularities 2, 3, 4, 6."""
    spans = (1, *sorted(granularities))

    def extend(head: tuple[int, ...], start: int) -> Iterator[tuple[int, ...]]:
        if start == num_layers:
            yield head
        for span in spans:
            if start % span == 0 and start + span <= num_layers:
                yield from extend((*head, span), start + span)

    return extend((), 0)


def cheapest_tilings(
    num_layers: int, granularities: Iterable[int], cost: Callable[[int, int], tuple[float, ...]]
) -> dict[int, tuple[tuple[float, ...], tuple[int, ...]]]:
    """`{number of blocks: (cost, tiling)}`, deepest first: for every depth that a side can take, the legal tiling that costs least.

    Ties go to the lexicographically smallest tiling (coarse modules at the top of the stack). Solved from the top layer down: costs
    add up, so the best tiling of the layers above is part of the best tiling.

    Args:
        cost: of the block that covers `span` layers from `start` on, as a tuple of numbers of one length; the first counts most.
    """
    spans = (1, *sorted(granularities))
    # best[start][depth] is (cost, tiling) of the layers from `start` to the top with `depth` blocks
    best: list[dict[int, tuple[tuple[float, ...], tuple[int, ...]]]] = [{} for _ in range(num_layers + 1)]
    best[num_layers][0] = (tuple(0 for _ in cost(0, 1)), ())
    for start in reversed(range(num_layers)):
        for span in spans:
            if start % span or start + span > num_layers:
                continue
            of_block = cost(start, span)
            for depth, (above, tiling) in best[start + span].items():
                candidate = (tuple(a + b for a, b in zip(above, of_block, strict=True)), (span, *tiling))
                incumbent = best[start].get(depth + 1)
                if incumbent is None or candidate < incumbent:
                    best[start][depth + 1] = candidate
    return {depth: best[0][depth] for depth in sorted(best[0], reverse=True)}


@lru_cache
def canonical_tilings(num_layers: int, granularities: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """`{number of blocks: canonical tiling}`, deepest first, for every depth that a side can take.

    Canonical is the legal tiling with that many blocks whose spans, sorted from coarse to fine, are lexicographically smallest
    (fine modules before coarse ones); ties go to the lexicographically smallest tuple (coarse modules at the top of the stack).
    With the number of blocks fixed, that is: the counts of the coarsest, the next coarsest, ... are smallest.
    """
    coarse_first = sorted((1, *granularities), reverse=True)
    cheapest = cheapest_tilings(num_layers, granularities, lambda start, span: tuple(int(span == other) for other in coarse_first))
    return {depth: tiling for depth, (_, tiling) in cheapest.items()}
