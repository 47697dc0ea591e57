"""Training one size by itself, in the ways of the field: what a bank is compared with. Stock T5s throughout."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerFF

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .distillation import Taught, attention_loss, hidden_state_loss, mean_of, prediction_losses, weighed
from .recording import eager_attention, stop_attention_dropout
from .training_args import DistillationArguments


# What a T5 puts out of each side's attention.
_ATTENTIONS = {"encoder": ("encoder_attentions",), "decoder": ("decoder_attentions", "cross_attentions")}


class DistillationTrainer(Seq2SeqTrainer):
    """Trains a stock T5, all of it, from labels and, if there is one, from a deeper T5.

    The loss is the weighted sum of the task's cross-entropy, of the KL divergence from the teacher's predictions, of the error of
    the hidden state after every block, compared with the teacher's where the block's span ends; at the top of a stack after its final norm;
    and of the attention probabilities of blocks of `attention_min_span`, by default of a side's longest if they stand for more than
    a layer, compared with those of the last layer of the span. The terms are those of `ModularTrainer`. Without teacher, the first alone:
    fine-tuning.

    Sources: Sanh et al., "DistilBERT", arXiv 1910.01108; Shleifer, Rush, "Pre-trained Summarization Distillation", arXiv 2010.13002, who
    find hidden states of an encoder-decoder to help where the student's layers are the teacher's.

    Args:
        teacher: run without dropout and gradients; not changed.
        plan: which layers of the teacher each block of the model stands for.
    """

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        args: DistillationArguments,
        *,
        teacher: T5ForConditionalGeneration | None = None,
        plan: AssemblyPlan | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, **kwargs)
        if teacher is not None and plan is None:
            raise ValueError("a teacher's states and attention are compared where the plan says; pass it")
        if teacher is None and args.learns_from_teacher:
            raise ValueError("logit_weight, hidden_weight and attention_weight do nothing without a teacher; pass one, or set them to 0")
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self.plan = plan
        self._attends = args.attention_weight > 0 and any(list(self._attended(side)) for side in SIDES)
        if args.learns_from_attention_alone and not self._attends:
            raise ValueError(f"attention_weight alone leaves a student of plan {plan} nothing to learn from; set another weight above 0")
        # Every loss here is a mean over the tokens of a batch; the Trainer is to average over batches.
        self.model_accepts_loss_kwargs = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        with eager_attention(self.model, self.teacher) if self._attends else nullcontext():
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """The weighted sum in training; in evaluation the cross-entropy, without label smoothing."""
        args, labels = self.args, inputs["labels"]
        if not model.training:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        passed = {name: value for name, value in inputs.items() if name != "labels"}
        passed.setdefault("decoder_input_ids", self.model.prepare_decoder_input_ids_from_labels(labels))
        passed |= {"use_cache": False, "output_hidden_states": args.hidden_weight > 0, "output_attentions": self._attends}
        if self._attends:
            stop_attention_dropout(model)
        outputs = model(**passed)
        predictions = taught = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(**passed)
            predictions = Taught.of(taught.logits, args.temperature) if args.logit_weight else None
        terms = prediction_losses(args, outputs.logits, labels, predictions)
        if self.teacher is not None:
            masks = {"encoder": inputs["attention_mask"].bool(), "decoder": labels != -100}
        if args.hidden_weight:
            states = (
                hidden_state_loss(outputs[kind][block + 1], taught[kind][end], masks[side])
                for side in SIDES
                for kind in [f"{side}_hidden_states"]
                for block, end in self._ends(side)
            )
            terms["hidden_loss"] = mean_of(states, outputs.logits.device)
        if self._attends:
            maps = (
                attention_loss(outputs[kind][block], taught[kind][end - 1], masks[side])
                for side in SIDES
                for kind in _ATTENTIONS[side]
                for block, end in self._attended(side)
            )
            terms["attention_loss"] = mean_of(maps, outputs.logits.device)
        loss = weighed(args, terms)
        return (loss, outputs) if return_outputs else loss

    def _ends(self, side: str, min_span: int = 1) -> Iterator[tuple[int, int]]:
        """Of a side's blocks that stand for at least so many of the teacher's layers: number from 0, and after how many layers it ends."""
        return ((block, start + span) for block, (start, span) in enumerate(self.plan.blocks(side)) if span >= min_span)

    def _attended(self, side: str) -> Iterator[tuple[int, int]]:
        """The same of those that learn from attention."""
        return self._ends(side, self.args.attended_span(self.plan.spans(side)))


class LayerDropTrainer(Seq2SeqTrainer):
    """Fine-tunes a stock T5 while every block but each side's first is left out of a step with probability `drop_rate`.

    The first holds the position bias of all. Afterwards any blocks may be left out: train once, many depths.

    Source: Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020, arXiv 1909.11556.
    """

    def __init__(self, *args: Any, drop_rate: float, **kwargs: Any):
        if not 0 < drop_rate < 1:
            raise ValueError(f"drop_rate must lie between 0 and 1, got {drop_rate!r}")
        super().__init__(*args, **kwargs)
        self.drop_rate = drop_rate
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        draw = random.Random(f"{self.args.seed}/{self.state.global_step}")
        with layers_left_out(self.model, lambda: draw.random() < self.drop_rate):
            return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)


@contextmanager
def layers_left_out(model: T5ForConditionalGeneration, left_out: Callable[[], bool]) -> Iterator[None]:
    """Within it, the stacks run without the blocks that are drawn, one draw each, a side's first excepted. Only without a cache."""
    stacks = {side: getattr(model, side) for side in SIDES}
    whole = {side: stack.block for side, stack in stacks.items()}
    for side, stack in stacks.items():
        first, *others = whole[side]
        stack.block = nn.ModuleList([first, *(block for block in others if not left_out())])
    try:
        yield
    finally:
        for side, stack in stacks.items():
            stack.block = whole[side]


def set_dropout(model: nn.Module, rate: float, inner: float) -> None:
    """Of every T5 block in a model: of embeddings and residual branches, and `inner` of attention and feed-forward, the costlier ones."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    for module in model.modules():
        if isinstance(module, T5Attention):
            module.dropout = inner
        elif isinstance(module, T5LayerFF):
            module.DenseReluDense.dropout.p = inner
