"""Loss terms of distillation, as pure functions of tensors.

Shapes: B batch, T tokens of a side, D d_model, V vocabulary. A mask is true where a token counts; padding never does.
"""

import torch
from torch.nn.functional import kl_div, log_softmax


def logit_loss(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, mask_BT: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student) at a temperature, times its square so that gradients keep their scale.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    student, teacher = (log_softmax(logits[mask_BT].float() / temperature, dim=-1) for logits in (student_BTV, teacher_BTV))
    return kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hidden_state_loss(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Squared error over the tokens, relative to the teacher's squared size there: 0 is equal, 1 is as good as zeros.

    Relative, because T5's residual stream grows by orders of magnitude from the bottom of a stack to its top.
    """
    student, teacher = student_BTD[mask_BT].float(), teacher_BTD[mask_BT].float()
    return (student - teacher).square().sum() / teacher.square().sum()
