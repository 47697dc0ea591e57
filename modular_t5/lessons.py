"""What the plans of a batch learn: from its labels, and from one pass of the teacher that they have in common."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .distillation import Taught, attention_loss, hidden_state_loss, mean_of, prediction_losses
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .recording import Replay, SideRecord, recording, stop_attention_dropout
from .training_args import ModularTrainingArguments


class Lesson:
    """A batch, and what the teacher's pass over it left: predictions, and what went from layer to layer. Without distillation, nothing.

    What encoders put out is kept: of plans that have the same one, the first runs and trains it.

    Args:
        args: which losses there are.
        bank: whose plans they are.
        model: what is called: the bank, or what distributed training wraps it in.
        teacher: the plan of the original layers.
        plans: those that are to learn from it.
        inputs: the batch, with labels.
        fed: whether modules read the teacher's states in place of what the modules below make of them.
    """

    def __init__(
        self,
        args: ModularTrainingArguments,
        bank: ModularT5ForConditionalGeneration,
        model: nn.Module,
        teacher: AssemblyPlan,
        plans: Iterable[AssemblyPlan],
        inputs: Mapping[str, Any],
        *,
        fed: bool,
    ):
        self._args, self._bank, self._model, self._fed = args, bank, model, fed
        self._inputs, self._labels = _without_labels(bank, inputs), inputs["labels"]
        self._predictions: Taught | None = None
        self._records: dict[str, SideRecord] = {}
        self._encoded: dict[tuple[int, ...], torch.Tensor] = {}  # by the spans of the encoder that put it out
        if args.learns_from_teacher:
            self._run_teacher(teacher, plans)

    def _run_teacher(self, teacher: AssemblyPlan, plans: Iterable[AssemblyPlan]) -> None:
        args, bank = self._args, self._bank
        ends = {side: {end for plan in plans for end in (*_module_ends(plan, side), *self._read(plan)[side])} for side in SIDES}
        attended = {side: {end for plan in plans for end in self._attended(plan, side)} for side in SIDES}
        bank.eval()
        with torch.no_grad(), recording(bank, teacher, ends, attention=attended) as self._records:
            outputs = self._model(**self._inputs)
            if args.logit_weight:
                self._predictions = Taught.of(outputs.logits, args.temperature)
        if self._has_teachers_embeddings:
            self._encoded[teacher.encoder] = outputs.encoder_last_hidden_state

    def loss_terms(self, plan: AssemblyPlan) -> tuple[dict[str, torch.Tensor], Seq2SeqLMOutput]:
        """Run a plan: every term that has a weight, by its name in the log, and what the plan put out."""
        args, bank, taught = self._args, self._bank, self._records
        ends = {side: _module_ends(plan, side) for side in SIDES}
        replays, reused = {}, {}
        if taught:
            replays = {
                side: {layers: Replay(taught[side].recorders[layers].passed) for layers in read} for side, read in self._read(plan).items()
            }
            if plan.encoder in self._encoded and ends["decoder"]:
                reused["encoder_outputs"] = BaseModelOutput(self._encoded[plan.encoder])
                ends["encoder"] = set()
        bank.eval()
        self._set_training_modes(plan)
        attended = {side: ends[side] & self._attended(plan, side) for side in SIDES}
        watched = recording(bank, plan, ends, replays=replays, attention=attended)
        with watched as records, _seen_by_ddp(self._model, records):
            outputs = self._model(**self._inputs, **reused)
        if taught:
            self._encoded.setdefault(plan.encoder, outputs.encoder_last_hidden_state.detach())

        terms = prediction_losses(args, outputs.logits, self._labels, self._predictions)
        masks = {"encoder": _source_mask(self._inputs, outputs), "decoder": self._labels != -100}
        sides = [(side, records[side], taught[side], masks[side]) for side in taught]
        if args.hidden_weight:
            states = (hidden_state_loss(ours.state(end), its.state(end), mask) for side, ours, its, mask in sides for end in ends[side])
            terms["hidden_loss"] = mean_of(states, outputs.logits.device)
        if args.attention_weight:
            maps = (
                attention_loss(our_map, its_map, mask)
                for side, ours, its, mask in sides
                for end in attended[side]
                for our_map, its_map in zip(ours.attention[end], its.attention[end], strict=True)
            )
            terms["attention_loss"] = mean_of(maps, outputs.logits.device)
        return terms, outputs

    @property
    def _has_teachers_embeddings(self) -> bool:
        """Whether plans with modules do too; with others, they differ from the teacher from the bottom on."""
        return "embeddings" not in self._bank.config.own_parts

    def _attended(self, plan: AssemblyPlan, side: str) -> set[int]:
        """After how many original layers a module ends that learns from attention."""
        if not self._args.attention_weight:
            return set()
        return _module_ends(plan, side, self._args.attended_span(self._bank.config.granularities[side]))

    def _read(self, plan: AssemblyPlan) -> dict[str, list[int]]:
        """After how many layers of each side the teacher's states stand in for the plan's own.

        Where modules are fed, below every module. Else where they are the same: with the teacher's embeddings, below the first module,
        and in the decoder only if the encoder has no module, for each of its layers reads the encoder.
        """
        starts = {side: [start for start, span in plan.blocks(side) if span > 1] for side in SIDES}
        same = {"encoder": starts["encoder"][:1], "decoder": starts["decoder"][:1] if not starts["encoder"] else []}
        if not self._fed:
            starts = same if self._has_teachers_embeddings else {side: [] for side in SIDES}
        return {side: [start for start in starts[side] if start] for side in SIDES}

    def _set_training_modes(self, plan: AssemblyPlan) -> None:
        """After `bank.eval()`: if asked for, dropout in the plan's modules, nowhere else. So it stays until gradients are computed."""
        self._bank.training = True
        for side in SIDES:
            attended = self._attended(plan, side)
            for (start, span), block in zip(plan.blocks(side), self._bank.blocks_of(plan, side), strict=True):
                if span == 1 or not self._args.module_dropout:
                    # The flag of the block alone: it asks for gradient checkpointing, where that is on, and for nothing else.
                    block.training = True
                    continue
                block.train()
                if start + span in attended:
                    stop_attention_dropout(block)


def with_decoder_inputs(bank: ModularT5ForConditionalGeneration, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the inputs, in which T5's decoder inputs are not left to be made of labels."""
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return dict(inputs)
    return {**inputs, "decoder_input_ids": bank.prepare_decoder_input_ids_from_labels(inputs["labels"])}


def difference_of_depths(plan: AssemblyPlan) -> float:
    """Between the sides, relative to the teacher's: 0 where they are alike."""
    encoder, decoder = (len(plan.spans(side)) / sum(plan.spans(side)) for side in SIDES)
    return abs(encoder - decoder)


def _without_labels(bank: ModularT5ForConditionalGeneration, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with: of labels it would compute a loss of its own."""
    passed = with_decoder_inputs(bank, inputs)
    del passed["labels"]
    return {**passed, "use_cache": False, "return_dict": True}


@contextmanager
def _seen_by_ddp(model: nn.Module, records: Mapping[str, SideRecord]) -> Iterator[None]:
    """Within it, outputs of a model in DDP hold the recorded states: DDP seeks what ran in what its output was made of, and a module that
    is fed leads to none below it."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return

    def put(module: nn.Module, args: Any, output: Seq2SeqLMOutput) -> None:
        for side, record in records.items():
            output[f"{side}_hidden_states"] = tuple(record.state(end) for end in record.recorders)

    handle = model.module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _module_ends(plan: AssemblyPlan, side: str, min_span: int = 2) -> set[int]:
    """After how many original layers a module of the plan ends that stands for at least so many."""
    return {start + span for start, span in plan.blocks(side) if span >= max(min_span, 2)}


def _source_mask(inputs: Mapping[str, Any], outputs: Seq2SeqLMOutput) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(outputs.encoder_last_hidden_state[..., 0], dtype=torch.bool) if mask is None else mask.bool()
