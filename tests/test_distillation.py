"""The loss terms against numpy."""

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from modular_t5.distillation import Taught, attention_loss, hidden_state_loss, log_probabilities, logit_loss, task_loss


MASK_BT = torch.tensor([[True, True, False, False], [True, True, True, False]])


def with_noise_in_the_padding(tensor):
    return torch.where(MASK_BT[..., None], tensor, 1e4 * torch.randn_like(tensor))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logit_loss(temperature):
    student_BTV, teacher_BTV = torch.randn(2, 4, 7), torch.randn(2, 4, 7)

    def reference(logits):
        scaled = logits.double().numpy()[MASK_BT.numpy()] / temperature
        return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))

    p, q = reference(teacher_BTV), reference(student_BTV)
    wanted = (np.exp(p) * (p - q)).sum(-1).mean() * temperature**2

    def loss(student, teacher):
        return logit_loss(log_probabilities(student, temperature), Taught.of(teacher, temperature), MASK_BT, temperature)

    found = loss(with_noise_in_the_padding(student_BTV), with_noise_in_the_padding(teacher_BTV))
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert loss(teacher_BTV, teacher_BTV).item() == pytest.approx(0, abs=1e-5)


def test_hidden_state_loss():
    student_BTD, teacher_BTD = torch.randn(2, 4, 5), 100 * torch.randn(2, 4, 5)
    s, t = (x.double().numpy()[MASK_BT.numpy()] for x in (student_BTD, teacher_BTD))
    found = hidden_state_loss(with_noise_in_the_padding(student_BTD), with_noise_in_the_padding(teacher_BTD), MASK_BT)
    assert found.item() == pytest.approx((((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean(), rel=1e-5)
    assert hidden_state_loss(teacher_BTD, teacher_BTD, MASK_BT) == 0
    assert hidden_state_loss(torch.zeros_like(teacher_BTD), teacher_BTD, MASK_BT).item() == pytest.approx(1)


def test_attention_loss():
    student_BNTK, teacher_BNTK = (torch.randn(2, 3, 4, 5).softmax(-1) for _ in range(2))
    s, t = (maps.double().numpy().transpose(0, 2, 1, 3)[MASK_BT.numpy()] for maps in (student_BNTK, teacher_BNTK))
    noisy = torch.where(MASK_BT[:, None, :, None], student_BNTK, 1e4 * torch.randn_like(student_BNTK))
    assert attention_loss(noisy, teacher_BNTK, MASK_BT).item() == pytest.approx(((s - t) ** 2).sum(-1).mean(), rel=1e-5)
    assert attention_loss(teacher_BNTK, teacher_BNTK, MASK_BT) == 0
    there, elsewhere = torch.eye(5)[[0, 0, 0, 0]].expand(2, 3, 4, 5), torch.eye(5)[[1, 1, 1, 1]].expand(2, 3, 4, 5)
    assert attention_loss(there, elsewhere, MASK_BT).item() == pytest.approx(2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_task_loss(smoothing):
    logits_BTV = torch.randn(2, 4, 7)
    labels_BT = torch.where(MASK_BT, torch.randint(7, (2, 4)), -100)
    logs = logits_BTV.double().log_softmax(-1).numpy()[MASK_BT.numpy()]
    of_labels = logs[np.arange(len(logs)), labels_BT[MASK_BT].numpy()]
    wanted = -(1 - smoothing) * of_labels.mean() - smoothing * logs.mean()
    assert task_loss(log_probabilities(with_noise_in_the_padding(logits_BTV)), labels_BT, smoothing).item() == pytest.approx(
        wanted, rel=1e-5
    )
    if smoothing:
        trainers = LabelSmoother(epsilon=smoothing)(Seq2SeqLMOutput(logits=logits_BTV), labels_BT.clone())
        assert trainers.item() == pytest.approx(wanted, rel=1e-5)


def test_padding_alone_has_no_loss():
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    logits, states, maps = torch.randn(2, 4, 7), torch.randn(2, 4, 5), torch.rand(2, 3, 4, 5)
    logs = log_probabilities(logits)
    assert task_loss(logs, torch.full((2, 4), -100)) == 0
    assert logit_loss(logs, Taught.of(logits), nothing) == 0
    assert hidden_state_loss(states, states, nothing) == 0
    assert attention_loss(maps, maps, nothing) == 0
