"""Merging feed-forward sublayers: a run of them becomes one, which all of their layers share.

Hidden features of the run are matched with those of its first feed-forward, by the permutation under which they correlate most on
real text; the permuted weights are averaged and tied. Training afterwards, by any Trainer, recovers what that costs.

Source: Verma, Murray, Duh, "Merging Feed-Forward Sublayers for Compressed Transformers", arXiv 2501.06126.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

from .assembly_modular_t5 import SIDES, is_integer
from .compacting import CompactReport, by_side, mean_loss
from .configuration_compact_t5 import check_keys
from .measuring import evaluating, labelled_batches, on_device
from .modeling_compact_t5 import CompactT5ForConditionalGeneration, structure_of
from .presenting import heat_maps


def aligning_permutation(correlation_FF: torch.Tensor) -> torch.Tensor:
    """Which feature of another feed-forward goes into the place of each of the first's, so that the sum of correlations is largest.

    Args:
        correlation_FF: of each feature of the first with each of the other.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("aligning feed-forwards needs scipy: pip install scipy") from error
    return torch.from_numpy(linear_sum_assignment(correlation_FF.cpu().numpy(), maximize=True)[1])


def permuted(weights: Mapping[str, torch.Tensor], permutation_F: torch.Tensor) -> dict[str, torch.Tensor]:
    """A feed-forward's weights by name (`wo.weight`, and `wi` or `wi_0` and `wi_1`), its features in another order; it does the same."""
    return {name: tensor[:, permutation_F] if name == "wo.weight" else tensor[permutation_F] for name, tensor in weights.items()}


def averaged(of_many: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of tensors of each name."""
    return {name: torch.stack([each[name] for each in of_many]).mean(0) for name in of_many[0]}


class FeatureMoments:
    """Second moments of the hidden features of a side's feed-forwards, summed up over tokens.

    Features are taken relative to their means in the first batch, so that float32 is enough.

    Args:
        pairs: of layers whose features are compared. Each holds a matrix (features, features), which is what this needs memory for.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]]):
        self._tokens = 0
        self._origins: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []
        self._products: dict[tuple[int, int], Any] = dict.fromkeys(pairs, 0.0)
        self._permutations: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, features_TF: Sequence[torch.Tensor]) -> None:
        """Of a batch, by layer."""
        features_TF = [of_layer.float() for of_layer in features_TF]
        if not self._tokens:
            self._origins = [of_layer.mean(0) for of_layer in features_TF]
            self._sums, self._squares = ([torch.zeros_like(origin) for origin in self._origins] for _ in range(2))
        self._tokens += len(features_TF[0])
        features_TF = [of_layer - origin for of_layer, origin in zip(features_TF, self._origins, strict=True)]
        for layer, of_layer in enumerate(features_TF):
            self._sums[layer] += of_layer.sum(0)
            self._squares[layer] += of_layer.square().sum(0)
        for first, other in self._products:
            self._products[first, other] += features_TF[first].T @ features_TF[other]

    def covariance(self, first: int, other: int) -> torch.Tensor:
        """(features of the first, features of the other)."""
        return self._products[first, other] / self._tokens - torch.outer(self._sums[first], self._sums[other]) / self._tokens**2

    def correlation(self, first: int, other: int) -> torch.Tensor:
        """The same, by the features' deviations; 0 for a feature that never changes."""
        one, two = (self._deviation(layer) for layer in (first, other))
        return (self.covariance(first, other) / torch.outer(one, two)).nan_to_num(0.0, 0.0, 0.0)

    def permutation(self, first: int, other: int) -> torch.Tensor:
        """`aligning_permutation` of the correlation, found once."""
        if (first, other) not in self._permutations:
            self._permutations[first, other] = aligning_permutation(self.correlation(first, other))
        return self._permutations[first, other]

    def similarity(self, first: int, other: int) -> float:
        """Linear centered kernel alignment: 1 for features that are the same up to rotation and scale, 0 for features that never change.

        Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414.
        """
        cross, one, two = (self.covariance(*pair).square().sum() for pair in ((first, other), (first, first), (other, other)))
        return (cross / (one * two).sqrt()).nan_to_num(0.0).item()

    def _deviation(self, layer: int) -> torch.Tensor:
        deviation = (self._squares[layer] / self._tokens - (self._sums[layer] / self._tokens).square()).clamp(min=0).sqrt()
        return torch.where(deviation > 1e-5 * self._origins[layer].abs(), deviation, 0.0)  # less is rounding


def merge_feed_forwards(
    model: T5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    run: int | Mapping[str, int],
    *,
    start: Mapping[str, int] | None = None,
    align: bool = True,
    batch_size: int = 32,
    description: str | None = "Merging",
) -> tuple[CompactT5ForConditionalGeneration, CompactReport]:
    """Replace a run of consecutive feed-forwards of a side by one that their layers share. Norms stay a layer's own.

    Of all places where a run may begin the one is taken after which the mean loss of the examples' labels is the least.

    Features are compared in memory of d_ff x d_ff numbers for each pair of layers that may share one, a side at a time; with `start`
    there are few.

    Args:
        model: a T5; left alone.
        dataset: a few hundred examples, `input_ids` and `labels`.
        processing_class: the tokenizer, for padding.
        run: how many become one, on both sides, or by side; a side that is not named is left as it is.
        start: by side, the layer that its run begins at, in place of comparing.
        align: match features before averaging. Without, they are averaged as they lie.
        description: of the progress bars; none without it.

    Returns:
        The model and a report: which layers of each side share one (`encoder`, `decoder`), the loss with each place where there were
        several (`losses`); the error is the loss that was added, in nats a token.

    Raises:
        ValueError: a run is not of 2 layers to all, does not fit where it is to start, or goes over feed-forwards that are shared
            already; there are no examples, or their loss is no number.
        ImportError: scipy is not installed.
    """
    ties = _ties(model)
    runs = _checked_runs(by_side("run", run), ties)
    starts = _checked_starts({} if start is None else start, runs, ties)
    batches = labelled_batches(model, dataset, processing_class, batch_size)
    loss, merged, losses, chosen = mean_loss(model, batches), model, {}, {}
    for side, run in runs.items():
        moments = _moments(model, batches, side, _pairs(starts[side], run), description) if align else None
        losses[side] = {
            begin: mean_loss(_merged(model, side, range(begin, begin + run), moments), batches)
            for begin in tqdm(starts[side], desc=description, disable=description is None, leave=False)
            if len(starts[side]) > 1
        }
        begin = min(losses[side] or starts[side], key=losses[side].get)
        chosen[side] = list(range(begin, begin + run))
        merged = _merged(merged, side, chosen[side], moments)
    return merged, CompactReport.of(model, merged, mean_loss(merged, batches) - loss, **chosen, losses=losses)


def feed_forward_similarity(
    model: T5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    description: str | None = "Comparing",
) -> dict[str, torch.Tensor]:
    """By side, how alike the features of every two feed-forwards are on examples (`FeatureMoments.similarity`), (layers, layers).

    Arguments and errors as of `merge_feed_forwards`.
    """
    batches, similar = labelled_batches(model, dataset, processing_class, batch_size), {}
    for side in SIDES:
        layers = range(len(getattr(model, side).block))
        moments = _moments(model, batches, side, [(i, j) for i in layers for j in layers[i:]], description)
        similar[side] = torch.tensor([[moments.similarity(min(i, j), max(i, j)) for j in layers] for i in layers])
    return similar


def plot_similarity(similarity: Mapping[str, torch.Tensor], path: str | os.PathLike, title: str = "") -> None:
    """A heat map of what `feed_forward_similarity` returns, a row and a column a layer.

    Raises:
        ValueError: there is none, or of another side.
        ImportError: matplotlib is not installed.
    """
    check_keys("similarity", similarity, SIDES)
    heat_maps("plot_similarity", similarity, path, axes=("layer", "layer"), measure="similarity of feed-forwards", title=title)


def _ties(model: T5ForConditionalGeneration) -> dict[str, list[int]]:
    """By side, for each layer the one whose feed-forward it runs."""
    structure = structure_of(model)
    if structure.get("tied_layers"):
        raise ValueError("this model's layers share all their weights, feed-forwards too: merge feed-forwards of one without tied_layers")
    layers = {"encoder": structure["num_layers"], "decoder": structure["num_decoder_layers"]}
    return copy.deepcopy(structure.get("tied_feed_forwards")) or {side: list(range(layers[side])) for side in SIDES}


def _checked_runs(runs: Mapping[str, int], ties: Mapping[str, list[int]]) -> dict[str, int]:
    if not runs:
        raise ValueError("run names no side; it takes a number, or numbers by side")
    for side, run in runs.items():
        if not is_integer(run) or not 2 <= run <= len(ties[side]):
            raise ValueError(f"a run is of 2 to {len(ties[side])} feed-forwards of the {side}, got {run!r}")
    return {side: runs[side] for side in SIDES if side in runs}


def _checked_starts(given: Mapping[str, int], runs: Mapping[str, int], ties: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """By side, where its run may begin: on feed-forwards that one layer runs alone."""
    check_keys("start", given, list(runs))
    possible = {}
    for side, run in runs.items():
        shared = {layer for layer, tie in enumerate(ties[side]) if ties[side].count(tie) > 1}
        fitting = [begin for begin in range(len(ties[side]) - run + 1) if shared.isdisjoint(range(begin, begin + run))]
        if not fitting:
            raise ValueError(f"no {run} consecutive feed-forwards of the {side} are left that are not shared: {ties[side]}")
        if side in given and not (is_integer(given[side]) and given[side] in fitting):
            raise ValueError(f"a run of {run} in the {side} may start at {', '.join(map(str, fitting))}; got {given[side]!r}")
        possible[side] = [given[side]] if side in given else fitting
    return possible


def _pairs(starts: Iterable[int], run: int) -> set[tuple[int, int]]:
    return {(begin, begin + i) for begin in starts for i in range(1, run)}


@torch.inference_mode()
def _moments(
    model: T5ForConditionalGeneration,
    batches: Sequence[Mapping[str, torch.Tensor]],
    side: str,
    pairs: Iterable[tuple[int, int]],
    description: str | None,
) -> FeatureMoments:
    """Of the features that a side's feed-forwards make of the examples, padding left out."""
    moments = FeatureMoments(pairs)
    features: list[torch.Tensor] = []
    # Layers that share a feed-forward have one, whose hook is called by each of them.
    last = dict.fromkeys(block.layer[-1].DenseReluDense.wo for block in getattr(model, side).block)
    with evaluating(model):
        for batch in tqdm(batches, desc=description, disable=description is None, leave=False):
            inputs = on_device(batch, model)
            mask_BT = inputs["attention_mask"].bool() if side == "encoder" else inputs["labels"] != -100
            hooks = [matrix.register_forward_pre_hook(_recorder(features, mask_BT)) for matrix in last]
            try:
                model(**inputs, use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            moments.add(features)
            features.clear()
    return moments


def _recorder(found: list[torch.Tensor], mask_BT: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
    """A hook that appends what a module is given, of the tokens that count, to `found`."""

    def record(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found.append(inputs[0][mask_BT])

    return record


def _merged(
    model: T5ForConditionalGeneration, side: str, layers: Sequence[int], moments: FeatureMoments | None
) -> CompactT5ForConditionalGeneration:
    """A model whose `layers` share the mean of their feed-forwards, matched with the first where there are moments."""
    ties, first, aligned = _ties(model), layers[0], []
    for layer in layers:
        feed_forward = getattr(model, side).block[layer].layer[-1].DenseReluDense
        weights = dict(feed_forward.named_parameters())
        if layer != first and moments is not None:
            weights = permuted(weights, moments.permutation(first, layer).to(model.device))
        aligned.append(weights)
        ties[side][layer] = first
    path = f"{side}.block.{first}.layer.{len(getattr(model, side).block[first].layer) - 1}.DenseReluDense"
    tensors = {f"{path}.{name}": tensor for name, tensor in averaged(aligned).items()}
    return CompactT5ForConditionalGeneration.from_t5(model, tensors, tied_feed_forwards=ties)
