"""`ModularTrainingArguments`: the dials of replacing and distillation."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from transformers import Seq2SeqTrainingArguments

from .assembly_modular_t5 import is_integer
from .replacing import CURRICULA, SAMPLINGS, SCHEDULES


# `<term>_weight` weighs what the log calls `<term>_loss`.
LOSS_WEIGHTS = ("task_weight", "logit_weight", "hidden_weight", "attention_weight")


def _choices(table: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {row.description}" for name, row in table.items())


@dataclass
class DistillationArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the weights of what is learned from labels and a teacher.

    Raises:
        ValueError: a dial out of its range, one that would do nothing, or weights that leave nothing to learn from.
    """

    task_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    logit_weight: float = field(default=1.0, metadata={"help": "Weight of the KL divergence from the teacher's predictions."})
    hidden_weight: float = field(
        default=1.0, metadata={"help": "Weight of the relative squared error of hidden states where modules, or a student's blocks, end."}
    )
    attention_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the squared error of attention probabilities, those of the modules, or of a student's blocks, that "
            "attention_min_span says. Above 0, attention runs in eager mode, and what learns has no dropout of its own there."
        },
    )
    attention_min_span: int | None = field(
        default=None,
        metadata={
            "help": "With attention_weight, how many layers a module or block stands for at least whose attention is compared; by default "
            "as many as the coarsest of a bank's side, or as a student's longest if that is more than one. In the log, a plan without any "
            "counts as 0."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL divergence; above 0."})

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {name: getattr(self, name) for name in LOSS_WEIGHTS}
        for name, value in {**weights, "temperature": self.temperature}.items():
            check_finite(name, value)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}")
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {weight!r}")
        if not any(weights.values()):
            raise ValueError(f"at least one of {', '.join(weights)} must be above 0")
        if self.temperature != 1 and not self.logit_weight:
            raise ValueError(f"temperature={self.temperature!r} does nothing without the loss that it belongs to; set logit_weight above 0")
        if self.attention_min_span is not None:
            if not is_integer(self.attention_min_span) or self.attention_min_span < 1:
                raise ValueError(f"attention_min_span must be an integer of at least 1, got {self.attention_min_span!r}")
            if not self.attention_weight:
                raise ValueError(f"attention_min_span={self.attention_min_span} does nothing without attention_weight; set that above 0")
        if self.label_smoothing_factor and not self.task_weight:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor!r} trains nothing without the task's loss; set task_weight above 0"
            )

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a loss that compares with a teacher has a weight."""
        return bool(self.logit_weight or self.hidden_weight or self.attention_weight)

    @property
    def learns_from_attention_alone(self) -> bool:
        """Whether no other loss has a weight."""
        return not any(getattr(self, name) for name in LOSS_WEIGHTS if name != "attention_weight")

    def attended_span(self, spans: Iterable[int]) -> int:
        """`attention_min_span`, or its default on a side where modules or blocks have these spans."""
        return max((2, *spans)) if self.attention_min_span is None else self.attention_min_span

    @property
    def temperatures(self) -> set[float]:
        """At which predictions are needed: 1 for the task's loss, that of the distillation for its own."""
        return {temperature for temperature, weight in ((1, self.task_weight), (self.temperature, self.logit_weight)) if weight}


def check_finite(name: str, value: Any) -> None:
    """A `ValueError` unless a dial is a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


@dataclass
class ModularTrainingArguments(DistillationArguments):
    """`Seq2SeqTrainingArguments` and the dials of replacing and distillation.

    Raises:
        ValueError: a dial out of its range, one that would do nothing, or weights that leave nothing to learn from.
    """

    replacing_rate: float = field(
        default=1.0,
        metadata={"help": "Probability of a module instead of the original layer at every place where one may start; above 0 to 1."},
    )
    replacing_rate_schedule: str = field(
        default="constant", metadata={"help": f"How the replacing rate moves during training. {_choices(SCHEDULES)}"}
    )
    replacing_rate_end: float | None = field(
        default=None, metadata={"help": "Where a schedule other than constant ends; above 0 to 1, by default 1."}
    )
    plans_per_step: int | None = field(
        default=None,
        metadata={
            "help": "How many plans every step runs, one after the other on the same examples; the loss is their mean. By default one for "
            "each granularity of the side that has more, and as many again where both sides have modules."
        },
    )
    plan_sampling: str = field(default="aligned", metadata={"help": f"How the plans of a step are drawn. {_choices(SAMPLINGS)}"})
    teacher_fed_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of training, at its start, in which every module reads the teacher's states of its side in place of what the "
            "modules below it make of them; 0 to 1. By default 0.2, and 0 if hidden_weight is 0."
        },
    )
    curriculum: str = field(
        default="uniform", metadata={"help": f"How the odds of the granularities move during training. {_choices(CURRICULA)}"}
    )
    module_dropout: bool = field(
        default=False,
        metadata={"help": "Train modules with dropout, at the rate of the teacher's configuration. Distillation does better without."},
    )
    train_final_norms: bool = field(
        default=False, metadata={"help": "Train a copy of each side's final norm, used where the side has modules."}
    )
    train_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Train a copy of the embeddings, and of a head that is tied to them, used by every plan with modules. What is "
            "assembled holds it in place of the teacher's: it costs no memory."
        },
    )
    train_head: bool = field(
        default=False,
        metadata={"help": "Train a copy of the head, used where the decoder has modules; tied to the embeddings no more, it costs memory."},
    )
    eval_plans: list[str] | None = field(
        default=None,
        metadata={
            "help": "Plans to evaluate under, such as 2x6/2x6. By default the teacher, size-first 2x, speed-first 1.9x and the "
            "smallest; an empty list stands for the plan that the bank runs."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replacing_rate_schedule not in SCHEDULES:
            raise ValueError(f"unknown replacing_rate_schedule {self.replacing_rate_schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.replacing_rate_schedule == "constant" and self.replacing_rate_end not in (None, self.replacing_rate):
            raise ValueError(
                f"replacing_rate_end={self.replacing_rate_end!r} does nothing while replacing_rate_schedule is constant; set it to linear"
            )
        for name in ("replacing_rate", "replacing_rate_end"):
            if name == "replacing_rate_end" and self.replacing_rate_end is None:
                continue
            check_finite(name, getattr(self, name))
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)!r}")
        if self.plans_per_step is not None and (not is_integer(self.plans_per_step) or self.plans_per_step < 1):
            raise ValueError(f"plans_per_step must be an integer of at least 1, got {self.plans_per_step!r}")
        if self.teacher_fed_ratio is not None:
            check_finite("teacher_fed_ratio", self.teacher_fed_ratio)
            if not 0 <= self.teacher_fed_ratio <= 1:
                raise ValueError(f"teacher_fed_ratio must be a number from 0 to 1, got {self.teacher_fed_ratio!r}")
            if self.teacher_fed_ratio and not self.hidden_weight:
                raise ValueError(
                    f"teacher_fed_ratio={self.teacher_fed_ratio!r}: below the top, modules that are fed learn from hidden states "
                    "alone; set hidden_weight above 0, or this to 0"
                )
        if self.plan_sampling not in SAMPLINGS:
            raise ValueError(f"unknown plan_sampling {self.plan_sampling!r}; choose one of {', '.join(SAMPLINGS)}")
        if self.curriculum not in CURRICULA:
            raise ValueError(
                f"unknown curriculum {self.curriculum!r}; choose one of {', '.join(CURRICULA)}, or pass a function of your own as "
                "ModularTrainer(..., curriculum=function)"
            )
        if self.train_head and not self.task_weight and not self.logit_weight:
            raise ValueError("train_head does nothing without a loss of the predictions; set task_weight or logit_weight above 0")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha does nothing here: the embeddings that it would add noise to are the teacher's; leave it out"
            )
        if isinstance(self.eval_plans, str):
            self.eval_plans = [self.eval_plans]
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the older and the newer name
            if (getattr(self, name, None) or {}).get("use_reentrant"):
                raise ValueError(f"{name}: use_reentrant=True would cut the gradients of distillation; leave it False")
        if self.torch_compile and self.attention_weight:
            raise ValueError("attention_weight needs what compiled blocks hide; set it to 0 or torch_compile to False")
        if self.ddp_find_unused_parameters is False:
            raise ValueError("ddp_find_unused_parameters=False fails: every step leaves the modules unused that are not in its plan")
        # The Trainer's own default is True too, but for gradient checkpointing.
        self.ddp_find_unused_parameters = True

    @property
    def fed_ratio(self) -> float:
        """`teacher_fed_ratio`, or its default."""
        return (0.2 if self.hidden_weight else 0.0) if self.teacher_fed_ratio is None else self.teacher_fed_ratio

    def replacing_rate_at(self, progress: float) -> float:
        """The replacing rate at a progress from 0 to 1."""
        end = 1.0 if self.replacing_rate_end is None else self.replacing_rate_end
        return SCHEDULES[self.replacing_rate_schedule].rate(self.replacing_rate, end, progress)
