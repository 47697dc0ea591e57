"""Loss terms of distillation, as pure functions of tensors. Every one is a mean over the tokens that a mask leaves, 0 if none.

Shapes: B batch, T tokens of a side, K tokens attended to, D d_model, N heads, V vocabulary. A mask is true where a token counts;
padding never does.
"""

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax


def task_loss(student_BTV: torch.Tensor, labels_BT: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy with the labels; -100 is padding."""
    total = cross_entropy(student_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="sum", label_smoothing=label_smoothing)
    return total / _count(labels_BT != -100)


def logit_loss(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, mask_BT: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) at a temperature, times its square so that gradients keep their scale.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    student, teacher = (log_softmax(logits[mask_BT].float() / temperature, dim=-1) for logits in (student_BTV, teacher_BTV))
    return kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / _count(mask_BT)


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


def _count(mask: torch.Tensor) -> torch.Tensor:
    return mask.sum().clamp(min=1)
