"""The methods of a comparison: what each makes of a teacher, as rows of two tables."""

import dataclasses
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)

from .assembly_modular_t5 import SIDES, AssemblyPlan, tilings
from .baselines import DistillationTrainer, LayerDropTrainer, set_dropout
from .choosing_modular_t5 import BankShape
from .measuring import write_json
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .trainer import ModularTrainer
from .training_args import DistillationArguments, ModularTrainingArguments


Models = Mapping[AssemblyPlan, T5ForConditionalGeneration]

BANK_FOLDER = "bank"  # in that of a run that made one

# Arguments of methods that are not their trainer's, and arguments of trainers that are the comparison's.
OWN_ARGUMENTS = ("targets", "dropout_rate", "drop_rate", "granularities")
_FIXED_ARGUMENTS = ("output_dir", "max_steps", "per_device_train_batch_size", "seed")
TARGETS = ("labels", "beams", "both")
PARTS_OF_GRANULARITIES = {"finest": slice(1), "coarsest": slice(-1, None), "without coarsest": slice(-1)}


@dataclass(frozen=True)
class Run:
    """One training of a method, or what stands in for one: for these sizes, with this seed, in this folder.

    Args:
        own: the method's own arguments, of `OWN_ARGUMENTS`.
        arguments: of its trainer.
    """

    method: str
    plans: tuple[AssemblyPlan, ...]
    seed: int
    own: Mapping[str, Any]
    arguments: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, method: str, plans: tuple[AssemblyPlan, ...], seed: int, arguments: Mapping[str, Any], folder: Path) -> "Run":
        """With the method's arguments and its trainer's, not told apart yet."""
        if fixed := sorted(set(arguments) & set(_FIXED_ARGUMENTS)):
            raise ValueError(f"{fixed[0]} is the same for all methods; {method!r} cannot have its own")
        own = {name: value for name, value in arguments.items() if name in OWN_ARGUMENTS}
        return cls(method, plans, seed, own, {name: value for name, value in arguments.items() if name not in own}, folder)


@dataclass
class Spent:
    """What a training took: optimizer steps, passes of a student forward and backward, seconds."""

    steps: int = 0
    passes: int = 0
    seconds: float = 0.0


class Stopwatch(TrainerCallback):
    """What a training takes over all its restarts, kept in its checkpoints: what is lost by a kill is not counted, as its steps are not."""

    _FILE = "spent.json"

    def __init__(self, model: torch.nn.Module, resumed_from: Path | None):
        before = json.loads((resumed_from / self._FILE).read_text(encoding="utf-8")) if resumed_from else {}
        self._before = Spent(**before)
        self._began, self._passes = 0.0, 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._passes += torch.is_grad_enabled()

    def spent(self, steps: int) -> Spent:
        return Spent(steps, self._before.passes + self._passes, self._before.seconds + time.perf_counter() - self._began)

    @classmethod
    def last_checkpoint(cls, folder: Path, before: int) -> Path | None:
        """The newest checkpoint of a run that is whole, which it is when the stopwatch's file is in it, with fewer steps than `before`."""
        steps = [int(path.parent.name.partition("-")[2]) for path in folder.glob(f"checkpoint-*/{cls._FILE}")]
        last = max((step for step in steps if step < before), default=None)
        return None if last is None else folder / f"checkpoint-{last}"

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if checkpoint.is_dir():
            write_json(checkpoint / self._FILE, dataclasses.asdict(self.spent(state.global_step)))


@dataclass(frozen=True)
class Workshop:
    """What methods are made of, alike for all.

    Args:
        teacher, tokenizer: of the comparison.
        granularities: of banks; None for the default.
        examples: of some `targets`, tokenized.
        training: arguments that all trainers have in common.
    """

    teacher: T5ForConditionalGeneration
    tokenizer: Any
    granularities: Sequence[int] | None
    examples: Callable[[str], Any]
    training: Mapping[str, Any]

    @cached_property
    def shape(self) -> BankShape:
        """Of a bank of all granularities."""
        return self.new_bank(self.granularities).shape

    def new_bank(self, granularities: Sequence[int] | Mapping[str, Sequence[int]] | None) -> ModularT5ForConditionalGeneration:
        """Around the teacher, modules untrained."""
        return ModularT5ForConditionalGeneration.from_t5(self.teacher, granularities).to(self.teacher.device)

    def granularities_of(self, own: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """By side, what a run's bank has: all, or those that the method says, by a name in `PARTS_OF_GRANULARITIES` or one by one.

        Raises:
            ValueError: there is no such name, or no such granularity.
        """
        given, known = own.get("granularities"), self.shape.granularities
        if isinstance(given, str):
            if given not in PARTS_OF_GRANULARITIES:
                raise ValueError(f"unknown granularities {given!r}; choose one of {', '.join(PARTS_OF_GRANULARITIES)}, or list them")
            return {side: of_side[PARTS_OF_GRANULARITIES[given]] for side, of_side in known.items()}
        if unknown := set(given or ()).difference(*known.values()):
            raise ValueError(f"granularities {given}: the bank has no {min(unknown)}, only {known}")
        return {side: tuple(s for s in of_side if given is None or s in given) for side, of_side in known.items()}

    def bank_for(self, plan: AssemblyPlan) -> ModularT5ForConditionalGeneration:
        """With the modules of one plan's granularities alone, untrained."""
        return self.new_bank({side: sorted({*plan.spans(side)} - {1}) for side in SIDES})

    def arguments_of(self, run: Run) -> Any:
        """The arguments of the run's trainer; None if nothing is trained.

        Raises:
            ValueError: they do not fit it.
        """
        arguments_class = ROWS[run.method].arguments_class
        if run.own.get("targets", "labels") not in TARGETS:
            raise ValueError(f"unknown targets {run.own['targets']!r}; choose one of {', '.join(TARGETS)}")
        if arguments_class is None:
            return None
        arguments = {**self.training, **run.arguments, "output_dir": str(run.folder), "seed": run.seed}
        if arguments.get("attention_weight"):
            # By default of the same spans for all methods: those that are the coarsest of a bank of all granularities.
            arguments.setdefault("attention_min_span", min(max(of_side) for of_side in self.shape.granularities.values() if of_side))
        try:
            return arguments_class(**arguments)
        except TypeError as error:
            raise ValueError(f"the arguments of {run.method!r} do not fit its trainer: {error}") from error

    def train(self, trainer_class: type, model: Any, run: Run, **kwargs: Any) -> Spent:
        """Train a model by a run's arguments, from the last checkpoint if there is one."""
        arguments = self.arguments_of(run)
        # None inside of attention and feed-forward, where it is costly and these small models gain nothing.
        set_dropout(model, run.own.get("dropout_rate", 0.0), inner=0.0)
        if arguments.bf16:
            model.set_attn_implementation("eager")  # the other's gradients are slow in bfloat16 on a CPU
        checkpoint = Stopwatch.last_checkpoint(run.folder, before=arguments.max_steps)
        stopwatch = Stopwatch(model, checkpoint)
        set_seed(run.seed)
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=self.examples(run.own.get("targets", "labels")),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, model=model),
            callbacks=[stopwatch],
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        spent = stopwatch.spent(trainer.state.global_step)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or a model trained in bfloat16 would be scored in it
        return spent


Outcome = tuple[Models, Spent]


class Method(NamedTuple):
    """A row of the table.

    Args:
        models: what a run makes: a stock T5 for each of its plans, and what that took.
        description: in a line.
        arguments_class: of its trainer; None if nothing is trained.
        arguments: of the method and of its trainer.
        per_size: whether every size takes a run of its own.
        varied: the row that this is a variation of; `arguments` are then what differs.
    """

    models: Callable[[Workshop, Run], Outcome]
    description: str
    arguments_class: type[Seq2SeqTrainingArguments] | None
    arguments: Mapping[str, Any] = {}
    per_size: bool = True
    varied: str | None = None


def _layers_dropped(workshop: Workshop, run: Run) -> Outcome:
    return {plan: workshop.bank_for(plan).assemble(plan) for plan in run.plans}, Spent()


def _distilled(workshop: Workshop, run: Run) -> Outcome:
    (plan,) = run.plans
    student, arguments = workshop.bank_for(plan).assemble(plan), workshop.arguments_of(run)
    taught = {"teacher": workshop.teacher, "plan": plan} if arguments.learns_from_teacher else {}
    return {plan: student}, workshop.train(DistillationTrainer, student, run, **taught)


def _theseus(workshop: Workshop, run: Run) -> Outcome:
    (plan,) = run.plans
    bank = workshop.bank_for(plan)
    spent = workshop.train(ModularTrainer, bank, run)
    return {plan: bank.assemble(plan)}, spent


def _layerdrop(workshop: Workshop, run: Run) -> Outcome:
    whole = workshop.new_bank(workshop.granularities).assemble(workshop.shape.teacher)
    spent = workshop.train(LayerDropTrainer, whole, run, drop_rate=run.own["drop_rate"])
    pruned = ModularT5ForConditionalGeneration.from_t5(whole, workshop.granularities_of(run.own))
    return {plan: pruned.assemble(plan) for plan in run.plans}, spent


def _modular(workshop: Workshop, run: Run) -> Outcome:
    bank = workshop.new_bank(workshop.granularities_of(run.own))
    spent = workshop.train(ModularTrainer, bank, run)
    bank.save_pretrained(run.folder / BANK_FOLDER)
    return {plan: bank.assemble(plan) for plan in run.plans}, spent


def _in_random_order(workshop: Workshop, run: Run) -> Outcome:
    """Of the bank that the row `modular` left: of the same depths, any legal tiling."""
    folder = run.folder.parents[2] / folder_name("modular") / run.folder.parent.name / run.folder.name / BANK_FOLDER
    if not folder.is_dir():
        raise ValueError(f"{run.method!r} assembles the bank of 'modular', which is not in {folder}; let 'modular' run before")
    bank = ModularT5ForConditionalGeneration.from_pretrained(folder)
    draw = random.Random(run.seed)
    return {plan: bank.assemble(_any_tiling(bank.shape, plan, draw)) for plan in run.plans}, Spent()


def _any_tiling(shape: BankShape, plan: AssemblyPlan, draw: random.Random) -> AssemblyPlan:
    sides = [
        [tiling for tiling in tilings(shape.num_layers[side], shape.granularities[side]) if len(tiling) == len(plan.spans(side))]
        for side in SIDES
    ]
    return AssemblyPlan(*map(draw.choice, sides))


def folder_name(method: str) -> str:
    return method.replace(" ", "-").replace(",", "").replace("'", "")


_LABELS_ALONE = {"logit_weight": 0.0, "hidden_weight": 0.0}

METHODS: dict[str, Method] = {
    "layer drop": Method(_layers_dropped, "layers of the teacher, nothing trained", None),
    "fine-tuning": Method(
        _distilled,
        "shrink and fine-tune: layers of the teacher, trained on the labels",
        DistillationArguments,
        {"learning_rate": 1e-3, "label_smoothing_factor": 0.1, **_LABELS_ALONE},
    ),
    "distillation": Method(
        _distilled,
        "layers of the teacher, trained on the teacher's beams, predictions, hidden states and, at the smallest size, attention",
        DistillationArguments,
        {"learning_rate": 1e-3, "targets": "beams", "attention_weight": 1.0},
    ),
    "sequence distillation": Method(
        _distilled,
        "layers of the teacher, trained on the teacher's beams",
        DistillationArguments,
        {"learning_rate": 1e-3, "targets": "beams", **_LABELS_ALONE},
    ),
    "BERT-of-Theseus": Method(
        _theseus,
        "modules of one size replace layers at random, ever more often until half-time, and learn from the labels",
        ModularTrainingArguments,
        {
            "learning_rate": 1e-3,
            "plan_sampling": "mixed",
            "plans_per_step": 1,
            "replacing_rate": 0.5,
            "replacing_rate_schedule": "ramp",
            **_LABELS_ALONE,
        },
    ),
    "LayerDrop": Method(
        _layerdrop,
        "the teacher fine-tuned with layers dropped at random, then without them; one training",
        Seq2SeqTrainingArguments,
        {"learning_rate": 1e-3, "drop_rate": 0.5, "label_smoothing_factor": 0.1},
        per_size=False,
    ),
    "modular": Method(
        _modular,
        "Modular T5; one training",
        ModularTrainingArguments,
        {"learning_rate": 2e-3, "targets": "beams", "attention_weight": 3.0, "train_embeddings": True},
        per_size=False,
    ),
}


def _modular_but(description: str, **arguments: Any) -> Method:
    return METHODS["modular"]._replace(description=description, arguments=arguments, varied="modular")


_PAPER = {"plan_sampling": "mixed", "plans_per_step": 1, "replacing_rate": 0.7, "teacher_fed_ratio": 0.0}

ABLATIONS: dict[str, Method] = {
    "modular, paper's sampling": _modular_but(
        "one plan a step, each module of a granularity of its own, coarse to fine", **_PAPER, curriculum="coarse-to-fine"
    ),
    "modular, paper's, uniform": _modular_but("the same without curriculum", **_PAPER),
    "modular, paper's, fine-to-coarse": _modular_but("the same with the curriculum turned round", **_PAPER, curriculum="fine-to-coarse"),
    "modular, coarse-to-fine": _modular_but("plans shared out by the paper's curriculum", curriculum="coarse-to-fine"),
    "modular, one plan a step": _modular_but("one plan a step, aligned", plans_per_step=1),
    "modular, mixed plans": _modular_but("as many plans a step, each module of a granularity of its own", plan_sampling="mixed"),
    "modular, never fed": _modular_but("modules never read the teacher's states", teacher_fed_ratio=0.0),
    "modular, replacing rate 0.7": _modular_but(
        "original layers in three of ten places", replacing_rate=0.7, replacing_rate_schedule="constant"
    ),
    "modular, dropout": _modular_but("modules with dropout", module_dropout=True, dropout_rate=0.1),
    "modular, no hidden states": _modular_but(
        "without the loss of hidden states, and so never fed", hidden_weight=0.0, teacher_fed_ratio=0.0
    ),
    "modular, no attention": _modular_but("without the loss of attention probabilities", attention_weight=0.0, attention_min_span=None),
    "modular, attention": _modular_but("with the loss of attention of all modules, weight 1", attention_weight=1.0, attention_min_span=1),
    "modular, labels": _modular_but("trained on the labels in place of the teacher's beams", targets="labels"),
    "modular, own embeddings": _modular_but("with embeddings of the bank's own", train_embeddings=True),
    "modular, teacher's embeddings": _modular_but("with the teacher's embeddings", train_embeddings=False),
    "modular, finest alone": _modular_but("the finest granularity alone", granularities="finest"),
    "modular, coarsest alone": _modular_but("the coarsest granularity alone", granularities="coarsest"),
    "modular, without coarsest": _modular_but("all granularities but the coarsest", granularities="without coarsest"),
    "modular, random order": Method(
        _in_random_order, "the same bank, other tilings of these depths", None, per_size=False, varied="modular"
    ),
}

ROWS = {**METHODS, **ABLATIONS}


def arguments_of(name: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a row, with those that are given by method; a variation starts from what it varies."""
    row = ROWS[name]
    varied = {} if row.varied is None else arguments_of(row.varied, given)
    return {**varied, **row.arguments, **given.get(name, {})}
