"""What methods of the compact wing have in common: what they report, the loss that they are judged by, matrices as factors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, T5ForConditionalGeneration

from .assembly_modular_t5 import SIDES
from .configuration_compact_t5 import check_keys
from .measuring import evaluating, on_device


@dataclass(frozen=True)
class CompactReport:
    """What a method did to a model.

    Args:
        parameters_before, parameters_after: of the whole model.
        chosen: what was chosen, by name; each method says what.
        error: how far the new model is from the old one; each method says how that is measured.
    """

    parameters_before: int
    parameters_after: int
    chosen: Mapping[str, Any] = field(default_factory=dict)
    error: float | None = None

    @classmethod
    def of(cls, before: PreTrainedModel, after: PreTrainedModel, error: float | None = None, **chosen: Any) -> "CompactReport":
        """Of a model and what was made of it."""
        return cls(before.num_parameters(), after.num_parameters(), chosen, error)

    @property
    def ratio(self) -> float:
        """Parameters before / after, of the whole model."""
        return self.parameters_before / self.parameters_after


def weighted_factors(matrix_VD: torch.Tensor, rank: int, weights_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, rank) and (rank, D), whose product is the nearest to a matrix by squares that are weighed by row.

    The singular values are divided between both alike. Weights are above zero.
    """
    roots_V1 = weights_V.cpu().double().sqrt()[:, None]  # some accelerators have no float64
    left_VR, values_R, right_RD = torch.linalg.svd(roots_V1 * matrix_VD.cpu().double(), full_matrices=False)
    scale_R = values_R[:rank].sqrt()
    tokens_VR, projection_RD = left_VR[:, :rank] * scale_R / roots_V1, scale_R[:, None] * right_RD[:rank]
    return tokens_VR.contiguous().to(matrix_VD), projection_RD.contiguous().to(matrix_VD)


@torch.inference_mode()
def mean_loss(model: T5ForConditionalGeneration, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Cross-entropy of the labels, in nats a token; a `ValueError` if it is no number."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            counted = int((batch["labels"] != -100).sum())
            total += model(**on_device(batch, model), use_cache=False).loss.item() * counted
            tokens += counted
    if not math.isfinite(total):
        raise ValueError(f"the loss of the examples is no number in {model.dtype}: take the model in float32, or look at its weights")
    return total / tokens


def by_side(name: str, given: Any) -> Mapping[str, Any]:
    """What is given for each side, or the same for both; a `ValueError` for what is no side."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(SIDES, given)
    check_keys(name, given, SIDES)
    return given
