"""Sums of losses: what a log says does not depend on how steps are cut, nor on restarts."""

import json

import pytest
import torch

from modular_t5.loss_sums import LossSums


def add(sums, step, *losses):
    for loss in losses:
        sums.add(step, {"loss": torch.tensor(loss), "task_loss": torch.tensor(2 * loss)})


def test_means_a_step_since_the_last_log():
    sums = LossSums()
    assert sums.log(0, float) == {}
    add(sums, 0, 1.0)
    add(sums, 1, 0.5, 1.5)  # in two parts
    assert sums.log(2, float) == {"loss": 1.5, "task_loss": 3.0}
    add(sums, 2, 4.0)
    assert sums.log(3, float) == {"loss": 4.0, "task_loss": 8.0}
    add(sums, 3, 5.0)
    assert sums.mean_of_all(4, float) == (1 + 2 + 4 + 5) / 4
    assert sums.log(4, float)["loss"] == 5.0
    assert sums.mean_of_all(4, float) == 3.0


def test_a_step_that_is_not_finished_does_not_count_yet():
    sums = LossSums()
    add(sums, 0, 1.0)
    add(sums, 1, 2.0)
    assert sums.finished(1) == {"loss": torch.tensor(1.0), "task_loss": torch.tensor(2.0)}
    assert sums.finished(2) == {"loss": torch.tensor(3.0), "task_loss": torch.tensor(6.0)}


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_restart_changes_nothing(cut):
    losses = [0.1, 0.7, 0.3, 0.9, 0.2, 0.6]

    def logs_from(sums, steps):
        logs = []
        for step in steps:
            add(sums, step, losses[step])
            if (step + 1) % 2 == 0:
                logs.append(sums.log(step + 1, torch.Tensor.item))
        return logs, sums.mean_of_all(steps[-1] + 1, torch.Tensor.item)

    whole, mean = logs_from(LossSums(), range(6))
    first = LossSums()
    begun, _ = logs_from(first, range(cut))
    state = json.loads(json.dumps(first.state(cut, lambda total: [total.item()])))
    second = LossSums.of(state, 0, 1, torch.device("cpu"))
    rest, mean_after = logs_from(second, range(cut, 6))
    assert begun + rest == whole
    assert mean_after == mean


def test_processes_go_on_from_their_own_sums_or_from_the_mean():
    state = {"before_last_log": 0.0, "last_log": 0, "since_last_log": {"loss": [1.0, 3.0]}}
    device = torch.device("cpu")
    assert [LossSums.of(state, process, 2, device).finished(1)["loss"] for process in (0, 1)] == [1.0, 3.0]
    assert [LossSums.of(state, process, 3, device).finished(1)["loss"] for process in (0, 1, 2)] == [2.0, 2.0, 2.0]
