"""The configuration of a bank: a T5's, plus the granularities of each side and the plan that runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import T5Config

from .assembly_modular_t5 import MAX_LAYERS, SIDES, AssemblyPlan, PlanLike, checked_plan, teacher_plan


DEFAULT_GRANULARITIES = (2, 3, 4, 6)

# Wider than any T5 by a factor of ten or more. A file that asks for more is refused before memory is taken.
_LARGEST = {
    "num_layers": MAX_LAYERS,
    "num_decoder_layers": MAX_LAYERS,
    "d_model": 1 << 16,
    "d_kv": 1 << 12,
    "d_ff": 1 << 20,
    "num_heads": 1 << 11,
    "vocab_size": 1 << 24,
    "relative_attention_num_buckets": 1 << 12,
    "relative_attention_max_distance": 1 << 20,
}


class ModularT5Config(T5Config):
    """A `T5Config` with two fields more.

    Args:
        granularities: how many consecutive original layers one module stands in for. One sequence for both sides, or a mapping
            `{"encoder": [...], "decoder": [...]}`, which is also how it is stored. By default those of 2, 3, 4, 6 that divide a
            side's number of layers.
        plan: what the bank runs: an `AssemblyPlan`, its notation (`"2x6/2x6"`) or `{"encoder": [...], "decoder": [...]}`, which is
            also how it is stored. By default all original layers, that is, the teacher.
        kwargs: every field of `T5Config`.

    Raises:
        ValueError: a dimension is not a positive integer of a sane size, a granularity does not divide its side, or the plan
            does not fit.
    """

    model_type = "modular_t5"

    granularities: Mapping[str, Sequence[int]] | Sequence[int] | None = None
    plan: PlanLike | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise ValueError(f"{name} must be an integer from 1 to {largest}, got {value!r}")
        layers = {"encoder": self.num_layers, "decoder": self.num_decoder_layers}
        self.granularities = _normalised_granularities(self.granularities, layers)
        plan = teacher_plan(layers) if self.plan is None else AssemblyPlan.from_any(self.plan)
        self.plan = checked_plan(plan, layers, self.granularities).to_dict()
        # Read by transformers' generation as the number of cache slots, in place of the encoder's depth: see `assemble`.
        self.decoder_layers = len(self.plan["decoder"])


def _normalised_granularities(given: Any, layers: Mapping[str, int]) -> dict[str, list[int]]:
    if given is None:
        given = {side: [s for s in DEFAULT_GRANULARITIES if layers[side] % s == 0] for side in SIDES}
    elif not isinstance(given, Mapping):
        given = dict.fromkeys(SIDES, given)
    if set(given) != set(SIDES):
        raise ValueError(f"granularities by side have the keys 'encoder' and 'decoder', got {sorted(map(str, given))}")
    for side, granularities in given.items():
        if isinstance(granularities, str) or not isinstance(granularities, Iterable):
            raise ValueError(f"granularities are integers such as (2, 3, 6), got {granularities!r} for the {side}")
        for s in granularities:
            if isinstance(s, bool) or not isinstance(s, int) or s < 2:
                raise ValueError(f"a granularity is an integer of at least 2, got {s!r} for the {side}")
            if layers[side] % s:
                fitting = [d for d in range(2, layers[side] + 1) if layers[side] % d == 0]
                raise ValueError(f"granularity {s} does not divide the {side}'s {layers[side]} layers; these do: {fitting}")
    if not any(given.values()):
        raise ValueError(f"a bank needs modules: no granularity is given, or none of {DEFAULT_GRANULARITIES} divides {dict(layers)}")
    return {side: sorted(set(given[side])) for side in SIDES}
