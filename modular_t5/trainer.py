"""`ModularTrainer`: a `Seq2SeqTrainer` that trains a bank by module replacing and distillation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.training_args import ParallelMode

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .distillation import hidden_state_loss, logit_loss
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .replacing import CURRICULA, draw_plan


@dataclass
class ModularTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the dials of replacing and distillation.

    Raises:
        ValueError: a dial out of its range, or weights that leave nothing to learn from.
    """

    replacing_rate: float = field(
        default=0.7,
        metadata={"help": "Probability of a module instead of the original layer at every place where one may start; above 0 to 1."},
    )
    curriculum: str = field(
        default="coarse-to-fine",
        metadata={"help": "How the odds of the granularities move: " + "; ".join(f"{k}: {v.description}" for k, v in CURRICULA.items())},
    )
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    logit_weight: float = field(default=1.0, metadata={"help": "Weight of the KL divergence from the teacher's predictions."})
    hidden_weight: float = field(
        default=1.0, metadata={"help": "Weight of the relative squared error of the hidden state at the end of every module."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL divergence; above 0."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("replacing_rate", "temperature", "task_weight", "logit_weight", "hidden_weight"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not 0 < self.replacing_rate <= 1:
            raise ValueError(f"replacing_rate must be above 0 and at most 1, got {self.replacing_rate!r}")
        if self.curriculum not in CURRICULA:
            raise ValueError(f"unknown curriculum {self.curriculum!r}; choose one of {', '.join(CURRICULA)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}")
        weights = {name: getattr(self, name) for name in ("task_weight", "logit_weight", "hidden_weight")}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {weight!r}")
        if not any(weights.values()):
            raise ValueError(f"at least one of {', '.join(weights)} must be above 0")


_REFUSED = {
    "compute_loss_func": "its loss is the task's cross-entropy and distillation, weighed by task_weight, logit_weight and hidden_weight",
    "model_init": "build the bank with ModularT5ForConditionalGeneration.from_t5 and pass it as model",
}


class ModularTrainer(Seq2SeqTrainer):
    """Trains the modules of a bank; everything else of the bank is the teacher, frozen and without dropout.

    Each step runs one random plan in place of the original layers. Its loss is the weighted sum of the task's cross-entropy
    (`task_loss` in the log), the KL divergence from the teacher's predictions (`logit_loss`) and the error of the hidden state at
    the end of every span that a module covers (`hidden_loss`; at the top of a stack, after its final norm). Evaluation and prediction
    run the bank's plan, as they find it.

    Args:
        model: a `ModularT5ForConditionalGeneration`. The parameters outside its modules are set not to require gradients.
        args: `ModularTrainingArguments`.
        kwargs: those of `Seq2SeqTrainer` but `model_init` and `compute_loss_func`. With a tokenizer as `processing_class` and no
            `data_collator`, batches are padded by `DataCollatorForSeq2Seq`.

    Raises:
        ValueError: the model is not a bank, the arguments are not `ModularTrainingArguments`, or one that is not taken is given.
    """

    def __init__(
        self,
        model: ModularT5ForConditionalGeneration | None = None,
        args: ModularTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        for name, reason in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"ModularTrainer does not take {name}: {reason}")
        if not isinstance(model, ModularT5ForConditionalGeneration):
            raise ValueError(
                f"ModularTrainer trains a ModularT5ForConditionalGeneration, got {type(model).__name__}; "
                "build one with ModularT5ForConditionalGeneration.from_t5(model)"
            )
        if not isinstance(args, ModularTrainingArguments):
            raise ValueError(f"ModularTrainer takes ModularTrainingArguments, got {type(args).__name__}")
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError("one process would drive several GPUs by DataParallel, which a bank cannot; start it with torchrun")
        model.requires_grad_(False)
        for module in _modules(model):
            module.requires_grad_(True)
        if data_collator is None and isinstance(processing_class, PreTrainedTokenizerBase):
            data_collator = DataCollatorForSeq2Seq(processing_class, model=model)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self._shape = model.shape
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}  # of each loss term since the last log, and of how many

    def plan_of_step(self, step: int) -> AssemblyPlan:
        """The plan that runs in an optimizer step, of the same training, counted from 0."""
        args = self.args
        progress = step / max(self.state.max_steps - 1, 1)
        return draw_plan(
            self._shape,
            seed=args.seed,
            step=step,
            progress=min(progress, 1.0),
            replacing_rate=args.replacing_rate,
            curriculum=args.curriculum,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a random plan in training, of the bank's plan in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None:
            raise ValueError(f"training needs labels; the batch has {sorted(inputs)}")
        bank = self.accelerator.unwrap_model(model)
        plan = self.plan_of_step(self.state.global_step)

        bank.eval()
        with torch.no_grad(), bank.using(self._shape.teacher):
            teacher = bank(**inputs, output_hidden_states=True, return_dict=True)
        for module in _modules(bank):
            module.train()
        with bank.using(plan):
            # Where the encoder runs as it is, its states are the teacher's.
            reused = {}
            if plan.encoder == self._shape.teacher.encoder:
                reused["encoder_outputs"] = BaseModelOutput(teacher.encoder_last_hidden_state, teacher.encoder_hidden_states)
            student = model(**inputs, **reused, output_hidden_states=True, return_dict=True)
        bank.train()  # as the Trainer left it

        terms = self._loss_terms(plan, inputs, student, teacher)
        for name, term in terms.items():
            total, count = self._sums.get(name, (0, 0))
            self._sums[name] = (total + term.detach(), count + 1)
        weights = {"task_loss": self.args.task_weight, "logit_loss": self.args.logit_weight, "hidden_loss": self.args.hidden_weight}
        loss = sum(weights[name] * term for name, term in terms.items())
        return (loss, student) if return_outputs else loss

    def _loss_terms(
        self, plan: AssemblyPlan, inputs: dict[str, Any], student: Seq2SeqLMOutput, teacher: Seq2SeqLMOutput
    ) -> dict[str, torch.Tensor]:
        labels = inputs["labels"]
        target_mask = labels != -100
        terms = {}
        if self.args.task_weight:
            terms["task_loss"] = student.loss if self.label_smoother is None else self.label_smoother(student, labels)
        if self.args.logit_weight:
            terms["logit_loss"] = logit_loss(student.logits, teacher.logits, target_mask, self.args.temperature)
        if self.args.hidden_weight:
            source_mask = inputs.get("attention_mask")
            if source_mask is None:
                source_mask = torch.ones_like(student.encoder_last_hidden_state[..., 0])
            masks = {"encoder": source_mask.bool(), "decoder": target_mask}
            errors = [
                hidden_state_loss(student[f"{side}_hidden_states"][block + 1], teacher[f"{side}_hidden_states"][start + span], masks[side])
                for side in SIDES
                for block, (start, span) in enumerate(plan.blocks(side))
                if span > 1
            ]
            terms["hidden_loss"] = torch.stack(errors).mean()
        return terms

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the mean of every loss term since the last training log."""
        if "loss" in logs:
            logs.update({name: (total / count).item() for name, (total, count) in self._sums.items()})
            self._sums.clear()
        super().log(logs, *args, **kwargs)


def _modules(bank: ModularT5ForConditionalGeneration) -> Iterator[nn.Module]:
    return (getattr(bank, side).bank for side in SIDES)
