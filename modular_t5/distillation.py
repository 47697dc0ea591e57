"""Loss terms of distillation, and how arguments weigh them. Every term is a mean over the tokens that a mask leaves, 0 if none.

Shapes: B batch, T tokens of a side, K tokens attended to, D d_model, N heads, V vocabulary. A mask is true where a token counts;
padding never does. Where the vocabulary is large beside the model, these terms are a good part of a step: what several of them, or several
students of one teacher, have in common is an argument.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch.nn.functional import log_softmax

from .training_args import DistillationArguments


def log_probabilities(logits_BTV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of the predictions, in float32: B, T, V."""
    return log_softmax(logits_BTV.float() / temperature if temperature != 1 else logits_BTV.float(), dim=-1)


class Taught(NamedTuple):
    """A teacher's predictions at a temperature: their probabilities (B, T, V), and at every token the sum of p log p (B, T)."""

    probabilities: torch.Tensor
    negative_entropy: torch.Tensor

    @classmethod
    def of(cls, logits_BTV: torch.Tensor, temperature: float = 1.0) -> "Taught":
        logs_BTV = log_probabilities(logits_BTV, temperature)
        probabilities_BTV = logs_BTV.exp()
        return cls(probabilities_BTV, (probabilities_BTV * logs_BTV).sum(-1))


def prediction_losses(
    args: DistillationArguments, logits_BTV: torch.Tensor, labels_BT: torch.Tensor, taught: Taught | None
) -> dict[str, torch.Tensor]:
    """`task_loss` and `logit_loss`, those that have a weight; the latter where something is taught."""
    logs = {at: log_probabilities(logits_BTV, at) for at in args.temperatures}
    terms = {}
    if args.task_weight:
        terms["task_loss"] = task_loss(logs[1], labels_BT, args.label_smoothing_factor)
    if args.logit_weight and taught is not None:
        terms["logit_loss"] = logit_loss(logs[args.temperature], taught, labels_BT != -100, args.temperature)
    return terms


def mean_of(terms: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of terms of equal weight; 0 if there are none."""
    terms = list(terms)
    return torch.stack(terms).mean() if terms else torch.zeros((), device=device)


def weighed(args: DistillationArguments, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of terms, each `<term>_loss` by its `<term>_weight`."""
    return sum(getattr(args, name.removesuffix("_loss") + "_weight") * term for name, term in terms.items())


def task_loss(log_probabilities_BTV: torch.Tensor, labels_BT: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy with the labels; -100 is padding."""
    mask_BT = labels_BT != -100
    losses_BT = -log_probabilities_BTV.gather(-1, labels_BT.where(mask_BT, 0)[..., None])[..., 0]
    if label_smoothing:
        losses_BT = (1 - label_smoothing) * losses_BT - label_smoothing * log_probabilities_BTV.mean(-1)
    return _mean(losses_BT, mask_BT)


def logit_loss(log_probabilities_BTV: torch.Tensor, taught: Taught, mask_BT: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student), both at a temperature, times its square so that gradients keep their scale.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    divergence_BT = taught.negative_entropy - (taught.probabilities * log_probabilities_BTV).sum(-1)
    return _mean(divergence_BT, mask_BT) * temperature**2


def hidden_state_loss(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Squared error of a token's state, relative to the teacher's squared size there: 0 is equal, 1 is as good as zeros.

    Relative, because T5's residual stream grows by orders of magnitude from the bottom of a stack to its top, and within a layer
    from one token to the next.
    """
    student, teacher = student_BTD[mask_BT].float(), teacher_BTD[mask_BT].float()
    sizes = teacher.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / sizes).sum() / _count(mask_BT)


def attention_loss(student_BNTK: torch.Tensor, teacher_BNTK: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Squared distance of a token's attention probabilities, as a mean over the heads: 0 is equal, 2 is the largest.

    Source: Jiao et al., "TinyBERT", Findings of EMNLP 2020, arXiv 1909.10351, who compare the scores before the softmax.
    """
    student, teacher = (maps.float().transpose(1, 2)[mask_BT] for maps in (student_BNTK, teacher_BNTK))
    return (student - teacher).square().sum(-1).mean(-1).sum() / _count(mask_BT)


def _mean(losses_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return losses_BT.where(mask_BT, 0).sum() / _count(mask_BT)


def _count(mask: torch.Tensor) -> torch.Tensor:
    return mask.sum().clamp(min=1)
