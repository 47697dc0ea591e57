"""Sums of losses between two logs, in a form that a checkpoint can hold: a log after a restart says what it would have said without."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


class LossSums:
    """Of a loss and its terms, by name, over the finished steps since the last log; of the loss `"loss"` also over all before.

    A step may come in several parts, and a checkpoint may be written in the middle of one: it counts once the step's number is past.
    """

    def __init__(self) -> None:
        self._finished: dict[str, torch.Tensor] = {}
        self._latest: dict[str, torch.Tensor] = {}
        self._latest_step = 0
        self._before_last_log = 0.0
        self._last_log = 0

    def add(self, step: int, terms: Mapping[str, torch.Tensor]) -> None:
        """Part of a step, counted from 0; scalars."""
        if step != self._latest_step:
            self._finished, self._latest, self._latest_step = self.finished(step), {}, step
        for name, term in terms.items():
            self._latest[name] = self._latest.get(name, 0) + term.detach().float()

    def finished(self, steps: int) -> dict[str, torch.Tensor]:
        """The sums when so many steps are done."""
        if self._latest_step == steps or not self._latest:
            return self._finished
        return {name: total + self._finished.get(name, 0) for name, total in self._latest.items()}

    def log(self, steps: int, mean: Callable[[torch.Tensor], float]) -> dict[str, float]:
        """Means a step since the last log, which this now is; empty if there is nothing. `mean` is over the processes."""
        sums = {name: mean(total) for name, total in self.finished(steps).items()}
        since, self._last_log = steps - self._last_log, steps
        self._finished, self._latest = {}, {}
        self._before_last_log += sums.get("loss", 0.0)
        return {name: total / since for name, total in sums.items()}

    def mean_of_all(self, steps: int, mean: Callable[[torch.Tensor], float]) -> float:
        """Mean loss of all steps."""
        finished = self.finished(steps)
        return (self._before_last_log + (mean(finished["loss"]) if finished else 0.0)) / steps

    def state(self, steps: int, of_each: Callable[[torch.Tensor], list[float]]) -> dict[str, Any]:
        """In JSON's types. `of_each` gives the numbers of all processes."""
        sums = {name: of_each(total) for name, total in self.finished(steps).items()}
        return {"before_last_log": self._before_last_log, "last_log": self._last_log, "since_last_log": sums}

    @classmethod
    def of(cls, state: Mapping[str, Any], process: int, processes: int, device: torch.device) -> "LossSums":
        """What a process goes on from; with another number of processes than before, from their mean."""
        sums = cls()
        sums._before_last_log, sums._last_log = state["before_last_log"], state["last_log"]
        for name, totals in state["since_last_log"].items():
            total = totals[process] if len(totals) == processes else sum(totals) / len(totals)
            sums._finished[name] = torch.tensor(total, device=device)
        return sums
