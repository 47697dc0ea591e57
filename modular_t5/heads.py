"""Pruning attention heads, those first that the loss hardly depends on.

Source: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019, arXiv 1905.10650.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

from .assembly_modular_t5 import is_integer
from .compacting import CompactReport, mean_loss
from .configuration_compact_t5 import ATTENTIONS, check_keys
from .measuring import evaluating, labelled_batches, on_device
from .modeling_compact_t5 import CompactT5ForConditionalGeneration, attention_path, structure_of
from .presenting import heat_maps


@torch.inference_mode(False)
def head_importance(
    model: T5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    description: str | None = "Weighing heads",
) -> dict[str, torch.Tensor]:
    """How much the loss of examples depends on each head: the mean size of its derivative by a gate on the head.

    Of each layer the numbers are divided by their Euclidean norm, as the source does, so that layers compare.

    Args:
        dataset: a few hundred examples, `input_ids` and `labels`.
        processing_class: the tokenizer, for padding.
        batch_size: examples at a time.
        description: of the progress bar; none without it.

    Returns:
        By kind of attention (`encoder`, `decoder`, `cross`), (layers, heads); 0 for heads that are gone.

    Raises:
        ValueError: there are no examples, or one has no labels; or what comes out are no numbers.
    """
    return _importance(model, labelled_batches(model, dataset, processing_class, batch_size), description)


def _importance(
    model: T5ForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]], description: str | None
) -> dict[str, torch.Tensor]:
    heads, num_heads = _heads(model), model.config.num_heads
    importance = {kind: torch.zeros(len(of_layers), num_heads) for kind, of_layers in heads.items()}
    with evaluating(model), torch.enable_grad():
        for batch in tqdm(batches, desc=description, disable=description is None, leave=False):
            inputs = on_device(batch, model)
            gates = {
                (kind, layer): torch.ones(len(inputs["labels"]), len(of_layer), device=model.device, requires_grad=True)
                for kind, of_layers in heads.items()
                for layer, of_layer in enumerate(of_layers)
            }
            derivatives = torch.autograd.grad(_summed_loss(model, inputs, gates), list(gates.values()))
            for (kind, layer), derivative_BH in zip(gates, derivatives, strict=True):
                importance[kind][layer, heads[kind][layer]] += derivative_BH.abs().sum(0).cpu()
    if not all(of_kind.isfinite().all() for of_kind in importance.values()):
        raise ValueError(f"derivatives of the loss are no numbers in {model.dtype}: take the model in float32, or look at its weights")
    return {kind: nn.functional.normalize(of_kind, dim=-1) for kind, of_kind in importance.items()}


@torch.inference_mode(False)
def prune_heads(
    model: T5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    count: int | None = None,
    *,
    max_parameters: int | None = None,
    rounds: int = 1,
    batch_size: int = 32,
    description: str | None = "Pruning heads",
) -> tuple[CompactT5ForConditionalGeneration, CompactReport]:
    """Take away the least important heads, of all layers and kinds of attention together. Every attention keeps one at least.

    Args:
        model: a T5; left alone.
        dataset, processing_class, batch_size: as of `head_importance`.
        count: how many heads go.
        max_parameters: in its place, of the model afterwards; as few go as need to, none if it has no more.
        rounds: in so many equal parts, importance weighed anew before each; at most as many as heads go.
        description: of the progress bars; none without it.

    Returns:
        The model and a report: the heads that are left, by kind and layer (`heads`), and their importance before the last round
        (`importance`); the error is the loss that was added, in nats a token.

    Raises:
        ValueError: not exactly one of `count` and `max_parameters`, more than there is to take, or layers that share their weights.
    """
    heads = _heads(model)
    most = sum(len(of_layer) - 1 for of_layers in heads.values() for of_layer in of_layers)
    count = _checked_count(model, count, max_parameters, most)
    if not is_integer(rounds) or rounds < 1:
        raise ValueError(f"rounds must be a positive integer, got {rounds!r}")
    batches = labelled_batches(model, dataset, processing_class, batch_size)
    rounds, pruned, importance = min(rounds, max(count, 1)), model, {}
    for done in range(rounds):
        importance = _importance(pruned, batches, description)
        heads = without_least(_heads(pruned), importance, count * (done + 1) // rounds - count * done // rounds)
        pruned = _with_heads(pruned, heads)
    error = mean_loss(pruned, batches) - mean_loss(model, batches)
    return pruned, CompactReport.of(model, pruned, error, heads=heads, importance=importance)


def without_least(
    heads: Mapping[str, Sequence[Sequence[int]]], importance: Mapping[str, torch.Tensor], count: int
) -> dict[str, list[list[int]]]:
    """`heads` without the `count` least important ones, but for the last of an attention."""
    left = {kind: [list(of_layer) for of_layer in of_layers] for kind, of_layers in heads.items()}
    order = sorted(
        (float(importance[kind][layer, head]), kind, layer, head)
        for kind, of_layers in left.items()
        for layer, of_layer in enumerate(of_layers)
        for head in of_layer
    )
    for _, kind, layer, head in order:
        if count and len(left[kind][layer]) > 1:
            left[kind][layer].remove(head)
            count -= 1
    return left


def plot_heads(importance: Mapping[str, torch.Tensor], path: str | os.PathLike, title: str = "") -> None:
    """A heat map of what `head_importance` returns, a row a layer, a column a head.

    Raises:
        ValueError: there is none, or of another kind of attention.
        ImportError: matplotlib is not installed.
    """
    check_keys("importance", importance, list(ATTENTIONS))
    names = {"encoder": "encoder", "decoder": "decoder", "cross": "decoder, over the source"}
    maps = {names[kind]: of_kind for kind, of_kind in importance.items()}
    heat_maps("plot_heads", maps, path, axes=("head", "layer"), measure="importance", title=title)


def _heads(model: T5ForConditionalGeneration) -> dict[str, list[list[int]]]:
    """By kind of attention and layer, the heads that there are."""
    if structure_of(model).get("tied_layers"):
        raise ValueError("this model's layers share all their weights, heads too: prune the T5 that it was made of before")
    every = list(range(model.config.num_heads))
    layers = {kind: len(getattr(model, side).block) for kind, side in ATTENTIONS.items()}
    return getattr(model.config, "heads", None) or {kind: [every] * layers[kind] for kind in ATTENTIONS}


def _checked_count(model: T5ForConditionalGeneration, count: int | None, max_parameters: int | None, most: int) -> int:
    """How many heads go."""
    if (count is None) == (max_parameters is None):
        raise ValueError("give exactly one of count and max_parameters")
    of_head = 4 * model.config.d_model * model.config.d_kv
    if max_parameters is not None:
        if not is_integer(max_parameters):
            raise ValueError(f"max_parameters must be an integer, got {max_parameters!r}")
        count = max(0, -((max_parameters - model.num_parameters()) // of_head))
        if count > most:
            fewest = model.num_parameters() - most * of_head
            raise ValueError(f"max_parameters={max_parameters}: with one head an attention the model has {fewest:,} parameters")
    if not is_integer(count) or not 0 <= count <= most:
        raise ValueError(f"count must be an integer from 0 to {most}, which leaves one head an attention; got {count!r}")
    return int(count)


def _summed_loss(
    model: T5ForConditionalGeneration, inputs: Mapping[str, torch.Tensor], gates: Mapping[tuple[str, int], torch.Tensor]
) -> torch.Tensor:
    """Of every example the mean over its tokens; with a gate (examples, heads) on what each attention's heads say."""

    def gate(gate_BH: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            states_BTN = inputs[0]
            return (states_BTN * gate_BH[:, None].repeat_interleave(model.config.d_kv, dim=-1).to(states_BTN),)

        return hook

    hooks = []
    for (kind, layer), gate_BH in gates.items():
        hooks.append(model.get_submodule(attention_path(kind, layer)).o.register_forward_pre_hook(gate(gate_BH)))
    labels = inputs["labels"]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    losses_BT = nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
    return (losses_BT.sum(-1) / (labels != -100).sum(-1)).sum()


def _with_heads(model: T5ForConditionalGeneration, heads: Mapping[str, list[list[int]]]) -> CompactT5ForConditionalGeneration:
    """The model with some of its heads."""
    tensors, d_kv = {}, model.config.d_kv
    for kind, of_layers in _heads(model).items():
        for layer, of_layer in enumerate(of_layers):
            path = attention_path(kind, layer)
            columns = [of_layer.index(head) * d_kv + i for head in heads[kind][layer] for i in range(d_kv)]
            attention = model.get_submodule(path)
            tensors |= {f"{path}.{matrix}.weight": getattr(attention, matrix).weight[columns] for matrix in "qkv"}
            tensors[f"{path}.o.weight"] = attention.o.weight[:, columns]
    return CompactT5ForConditionalGeneration.from_t5(model, tensors, heads=heads)
