"""The loss terms against numpy."""

import numpy as np
import pytest
import torch

from modular_t5.distillation import hidden_state_loss, logit_loss


MASK_BT = torch.tensor([[True, True, False, False], [True, True, True, False]])


def with_noise_in_the_padding(tensor):
    return torch.where(MASK_BT[..., None], tensor, 1e4 * torch.randn_like(tensor))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logit_loss(temperature):
    student_BTV, teacher_BTV = torch.randn(2, 4, 7), torch.randn(2, 4, 7)

    def log_probabilities(logits):
        scaled = logits.double().numpy()[MASK_BT.numpy()] / temperature
        return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))

    p, q = log_probabilities(teacher_BTV), log_probabilities(student_BTV)
    wanted = (np.exp(p) * (p - q)).sum(-1).mean() * temperature**2
    found = logit_loss(with_noise_in_the_padding(student_BTV), with_noise_in_the_padding(teacher_BTV), MASK_BT, temperature)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert logit_loss(teacher_BTV, teacher_BTV, MASK_BT, temperature).item() == pytest.approx(0, abs=1e-6)


def test_hidden_state_loss():
    student_BTD, teacher_BTD = torch.randn(2, 4, 5), 100 * torch.randn(2, 4, 5)
    s, t = (x.double().numpy()[MASK_BT.numpy()] for x in (student_BTD, teacher_BTD))
    found = hidden_state_loss(with_noise_in_the_padding(student_BTD), with_noise_in_the_padding(teacher_BTD), MASK_BT)
    assert found.item() == pytest.approx(((s - t) ** 2).sum() / (t**2).sum(), rel=1e-5)
    assert hidden_state_loss(teacher_BTD, teacher_BTD, MASK_BT) == 0
    assert hidden_state_loss(torch.zeros_like(teacher_BTD), teacher_BTD, MASK_BT) == 1
