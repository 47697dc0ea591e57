"""Leaving layers out, and one layer at several depths.

Sources: Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", arXiv 1909.11556, for layers that may be left
out, which a model is trained for by `encoder_layerdrop` and `decoder_layerdrop` of `CompactT5Config`; Lan et al., "ALBERT", arXiv
1909.11942, for layers that share their weights.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence

from transformers import T5ForConditionalGeneration

from .assembly_modular_t5 import SIDES, is_integer
from .building_modular_t5 import built, run_like
from .compacting import CompactReport, by_side
from .configuration_compact_t5 import ATTENTIONS
from .configuration_modular_t5 import INITIALIZATIONS, set_cache_depth
from .layout_modular_t5 import BIAS_TABLE
from .modeling_compact_t5 import CompactT5ForConditionalGeneration, running_tensors, structure_of


def drop_layers(
    model: T5ForConditionalGeneration, *, encoder: Iterable[int] = (), decoder: Iterable[int] = ()
) -> tuple[T5ForConditionalGeneration, CompactReport]:
    """Leave layers out: a model of the same class, stock if it was. A stack's relative position biases stay, whichever layers go.

    Args:
        model: a T5; left alone.
        encoder, decoder: the layers of each side that go, counted from 0.

    Returns:
        The model and a report: the layers that are left, by side.

    Raises:
        ValueError: there is no such layer, or none would be left.
    """
    structure = structure_of(model)
    if not isinstance(encoder, Iterable) or not isinstance(decoder, Iterable):
        raise ValueError(f"encoder and decoder name the layers that go, such as [1, 3]; got {encoder!r} and {decoder!r}")
    kept = {side: _kept(model, side, list(dropped)) for side, dropped in zip(SIDES, (encoder, decoder), strict=True)}
    config = run_like(model, copy.deepcopy(model.config))
    config.num_layers, config.num_decoder_layers = (len(kept[side]) for side in SIDES)
    set_cache_depth(config)
    for name in ("tied_feed_forwards", "tied_layers"):
        if ties := structure.get(name):
            setattr(config, name, {side: _ties_among(ties[side], kept[side]) for side in SIDES})
    if heads := structure.get("heads"):
        config.heads = {kind: [heads[kind][layer] for layer in kept[side]] for kind, side in ATTENTIONS.items()}
    sources = {}
    for name, tensor in running_tensors(model).items():
        side, kind, *rest = name.split(".")
        if kind != "block" or name.endswith(BIAS_TABLE):
            sources[name] = tensor
        elif int(rest[0]) in kept[side]:
            sources[".".join([side, kind, str(kept[side].index(int(rest[0]))), *rest[1:]])] = tensor
    shallower = built(type(model), config, sources, model.generation_config)
    return shallower, CompactReport.of(model, shallower, **kept)


def share_layers(
    model: T5ForConditionalGeneration, run: int | Mapping[str, int], *, initialization: str = "bottom-first"
) -> tuple[CompactT5ForConditionalGeneration, CompactReport]:
    """Let every so many consecutive layers share the weights of one of them. Training afterwards recovers some of what that costs.

    Args:
        model: a T5; left alone.
        run: how many share, on both sides, or by side; a side that is not named is left as it is.
        initialization: whose weights: `"first"`, `"middle"`, `"last"`, or `"bottom-first"`: the first at the bottom of a stack, else the
            last.

    Returns:
        The model and a report: for each layer the one whose weights it started from, by side.

    Raises:
        ValueError: a run does not divide its side, or feed-forwards are shared or heads gone already.
    """
    structure = structure_of(model)
    runs = by_side("run", run)
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"unknown initialization {initialization!r}; choose one of {', '.join(INITIALIZATIONS)}")
    if done := [name for name in ("tied_layers", "tied_feed_forwards", "heads") if structure.get(name)]:
        raise ValueError(f"layers that share their weights are alike, and this model's are not free to be ({done[0]}): share layers before")
    running, tensors, ties, taken = running_tensors(model), {}, {}, {}
    for side in SIDES:
        count = len(getattr(model, side).block)
        run = runs.get(side, 1)
        if not is_integer(run) or run < 1 or count % run:
            fitting = [each for each in range(1, count + 1) if count % each == 0]
            raise ValueError(f"the {side}'s {count} layers can share by {', '.join(map(str, fitting))}, got {run!r}")
        ties[side] = [layer - layer % run for layer in range(count)]
        taken[side] = [start + INITIALIZATIONS[initialization](start, run) for start in ties[side]]
        for start in range(0, count, run):
            tensors |= {
                name.replace(f".block.{taken[side][start]}.", f".block.{start}."): tensor
                for name, tensor in running.items()
                if name.startswith(f"{side}.block.{taken[side][start]}.") and not name.endswith(BIAS_TABLE)
            }
    compact = CompactT5ForConditionalGeneration.from_t5(model, tensors, tied_layers=ties)
    return compact, CompactReport.of(model, compact, **taken)


def _kept(model: T5ForConditionalGeneration, side: str, dropped: Sequence[int]) -> list[int]:
    count = len(getattr(model, side).block)
    if not all(is_integer(layer) and 0 <= layer < count for layer in dropped):
        raise ValueError(f"the layers of the {side} are 0 to {count - 1}, got {dropped!r} to leave out")
    kept = [layer for layer in range(count) if layer not in set(dropped)]
    if not kept:
        raise ValueError(f"a T5 needs a layer in its {side}; all {count} were to be left out")
    return kept


def _ties_among(ties: Sequence[int], kept: Sequence[int]) -> list[int]:
    """The same, of the layers that are kept, by their new numbers."""
    return [next(new for new, other in enumerate(kept) if ties[other] == ties[layer]) for layer in kept]
