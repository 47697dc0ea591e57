"""Scoring the modules of a bank, so that the strategy `calibrated` can choose among all of its plans.

Each module is scored once, when it alone is in place: by how far its predictions are from the teacher's, with the states of one pass of the
teacher below it. Scores add up to what a plan is foreseen to cost. Where several modules read each other that may be wrong, so the plans
that would be chosen are measured, until under every budget the one that is foreseen to be the best was; of what was measured is chosen.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .choosing_modular_t5 import BankShape, Scores, foreseen_best, preference
from .configuration_modular_t5 import checked_calibration
from .distillation import Taught, log_probabilities, logit_loss
from .layout_modular_t5 import running_own_parts
from .lessons import with_decoder_inputs
from .measuring import evaluating, labelled_batches, on_device
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .recording import Replay, SideRecord, recording


def calibrate(
    bank: ModularT5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    verify: bool = True,
    description: str | None = "Calibrating",
) -> Scores:
    """Score a bank's modules on examples, for `bank.assemble("calibrated", ...)`. The scores are saved with the bank.

    A few hundred examples that the bank was not trained on will do. A score is the mean over their target tokens of the Kullback-Leibler
    divergence of the teacher's predictions from a plan's, in nats.

    Args:
        dataset: as the trainer takes it: `input_ids` and `labels`.
        processing_class: the tokenizer, for padding.
        batch_size: examples at a time.
        verify: measure as a whole the plans that would be chosen, and those of the other strategies, and choose among these alone.
            Takes a pass for each. Without it, the sums of scores choose.
        description: of the progress bars; none without it.

    Raises:
        ValueError: there are no examples, or one without labels; or a plan's predictions are no numbers.
    """
    batches = labelled_batches(bank, dataset, processing_class, batch_size)
    shape = bank.shape
    alone = {
        (side, s, start): _alone(shape, side, s, start)
        for side in SIDES
        for s in shape.granularities[side]
        for start in range(0, shape.num_layers[side], s)
    }
    found = _measured(bank, batches, alone.values(), description)
    modules = {
        side: {s: [found[alone[side, s, start]].added for start in range(0, shape.num_layers[side], s)] for s in shape.granularities[side]}
        for side in SIDES
    }
    scores = Scores(modules, {}, max(score.own_parts for score in found.values()))
    if verify:
        scores = scores._replace(plans={plan: score.whole for plan, score in found.items()})
    while verify and (missing := _worth_measuring(shape, scores)):
        measured = _measured(bank, batches, missing, description)
        scores = scores._replace(plans={**scores.plans, **{plan: score.whole for plan, score in measured.items()}})
    bank.config.calibration = checked_calibration(scores.to_dict(), shape.num_layers, shape.granularities)
    return scores


def divergences(
    bank: ModularT5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    plans: Collection[AssemblyPlan],
    *,
    batch_size: int = 32,
    description: str | None = "Measuring",
) -> dict[AssemblyPlan, float]:
    """How far from the teacher plans are on examples, as `calibrate` measures it; its arguments.

    Raises:
        ValueError: as of `calibrate`, or a plan that the bank cannot run.
    """
    shape = bank.shape
    for plan in plans:
        shape.check(plan)
    found = _measured(bank, labelled_batches(bank, dataset, processing_class, batch_size), plans, description)
    return {plan: score.whole for plan, score in found.items()}


def _alone(shape: BankShape, side: str, span: int, start: int) -> AssemblyPlan:
    """The teacher with one module in place."""
    spans = (1,) * start + (span,) + (1,) * (shape.num_layers[side] - start - span)
    return replace(shape.teacher, **{side: spans})


def _worth_measuring(shape: BankShape, scores: Scores) -> set[AssemblyPlan]:
    """Of the other strategies' plans and of those that are foreseen to be the best of some budget, those that were not measured.

    Whatever a budget counts, the plans within it are, with one of these depths, all with fewer blocks on either side.
    """
    preferred = sorted({*scores.plans, *foreseen_best(shape, scores)}, key=preference(scores))
    wanted = {*shape.plans("size-first"), *shape.plans("speed-first")}
    for encoder in shape.canonical["encoder"]:
        for decoder in shape.canonical["decoder"]:
            wanted.add(next(plan for plan in preferred if plan.depths[0] <= encoder and plan.depths[1] <= decoder))
    return wanted - scores.plans.keys() - {shape.teacher}


class _Score(NamedTuple):
    """How far a plan is from the teacher, and how much of that its modules and the bank's own parts add."""

    whole: float
    own_parts: float

    @property
    def added(self) -> float:
        return self.whole - self.own_parts


@torch.inference_mode()
def _measured(
    bank: ModularT5ForConditionalGeneration,
    batches: Sequence[Mapping[str, torch.Tensor]],
    plans: Collection[AssemblyPlan],
    description: str | None,
) -> dict[AssemblyPlan, _Score]:
    """The plans' scores; batch by batch, so that one pass of the teacher serves them all."""
    totals = {plan: [0.0, 0.0] for plan in plans}
    tokens = 0
    with evaluating(bank), tqdm(total=len(batches) * len(plans), desc=description, disable=description is None, leave=False) as bar:
        for batch in batches:
            examined = _Examined(bank, on_device(batch, bank))
            tokens += examined.tokens
            for plan, total in totals.items():
                for i, divergence in enumerate(examined.divergences(plan)):
                    total[i] += divergence * examined.tokens
                bar.update()
    for plan, total in totals.items():
        if not all(map(math.isfinite, total)):
            raise ValueError(f"the predictions of {plan} are no numbers in {bank.dtype}: calibrate in float32, or look at its modules")
    return {plan: _Score(whole / tokens, own_parts / tokens) for plan, (whole, own_parts) in totals.items()}


class _Originals(NamedTuple):
    """A pass of the original layers, with own parts of the bank or without: states, the encoder's last, distance from the teacher."""

    records: dict[str, SideRecord]
    encoded: torch.Tensor
    divergence: float


class _Examined:
    """A batch, and the passes over it that plans have in common."""

    def __init__(self, bank: ModularT5ForConditionalGeneration, batch: Mapping[str, torch.Tensor]):
        self._bank, self._mask = bank, batch["labels"] != -100
        self.tokens = int(self._mask.sum())
        self._inputs = {name: tensor for name, tensor in with_decoder_inputs(bank, batch).items() if name != "labels"}
        self._inputs |= {"use_cache": False, "return_dict": True}
        self._taught: Taught | None = None
        self._originals: dict[tuple[tuple[str, str], ...], _Originals] = {}
        self._run_originals(bank.shape.teacher)

    def divergences(self, plan: AssemblyPlan) -> tuple[float, float]:
        """From the teacher's predictions, of the plan's and of those that the original layers make with the own parts that it runs."""
        originals = self._run_originals(plan)
        first = {side: next((start for start, span in plan.blocks(side) if span > 1), None) for side in SIDES}
        replays, reused = {}, {}
        if first["encoder"] is None:
            reused = {"encoder_outputs": BaseModelOutput(originals.encoded)}
        # The decoder reads the encoder in every layer, so its states are the originals' only where the encoder is.
        side = "decoder" if first["encoder"] is None else "encoder"
        if first[side]:
            replays[side] = {first[side]: Replay(originals.records[side].recorders[first[side]].passed)}
        with recording(self._bank, plan, dict.fromkeys(SIDES, ()), replays=replays):
            outputs = self._bank(**self._inputs, **reused)
        return self._divergence(outputs.logits), originals.divergence

    def _run_originals(self, plan: AssemblyPlan) -> _Originals:
        """With the own parts that a plan runs."""
        own_parts = tuple(running_own_parts(plan, self._bank.config))
        if own_parts not in self._originals:
            shape = self._bank.shape
            with recording(self._bank, shape.teacher, {side: _starts(shape, side) for side in SIDES}) as records:
                self._bank.switch_parts(plan)
                outputs = self._bank(**self._inputs)
            if self._taught is None:
                self._taught = Taught.of(outputs.logits)
            self._originals[own_parts] = _Originals(records, outputs.encoder_last_hidden_state, self._divergence(outputs.logits))
        return self._originals[own_parts]

    def _divergence(self, logits: torch.Tensor) -> float:
        return logit_loss(log_probabilities(logits), self._taught, self._mask, 1.0).item()


def _starts(shape: BankShape, side: str) -> Iterable[int]:
    """After how many original layers a module may begin, but for the bottom."""
    return {start for s in shape.granularities[side] for start in range(s, shape.num_layers[side], s)}
