"""Train once against train-per-size: every method from the same teacher, on the same data, with the same number of steps a run.

A run is one training; its models are scored as soon as it ends, and what it leaves is one file, `run.json`. A comparison that is started
again does what is missing, and what began in the middle continues from its last checkpoint.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .assembly_modular_t5 import SIDES, AssemblyPlan, BankShape, tilings
from .baselines import DistillationTrainer, LayerDropTrainer, set_dropout
from .comparison_results import plot, scored, table
from .frontier import environment, generate_texts, measure_speed, picture
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .pairs import Pairs, sacrebleu
from .trainer import ModularTrainer
from .training_args import DistillationArguments, ModularTrainingArguments


DECODINGS = {"greedy": 1, "beam 4": 4}  # name -> num_beams

# In the folder of a run, what it left; in that of the comparison, what the teacher makes of the training split, and the results.
RUN_FILE, BEAMS_FILE, RESULTS_FILE = "run.json", "teacher-beams.json", "results.json"

Models = Mapping[AssemblyPlan, T5ForConditionalGeneration]


@dataclass
class ComparisonArguments:
    """What is compared on what. Files are JSON lines in the Hub's translation format."""

    teacher: str = field(metadata={"help": "Folder or Hub id of a fine-tuned T5 with its tokenizer; trained to the end."})
    train_file: str = field(metadata={"help": "To train on."})
    test_file: str = field(metadata={"help": "To score on. While methods are tuned, the validation file."})
    source_lang: str = field(metadata={"help": "Key of the source in `translation`."})
    target_lang: str = field(metadata={"help": "Key of the target in `translation`."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source, for T5s that were trained so."})
    max_source_length: int = field(default=128, metadata={"help": "In tokens."})
    max_target_length: int = field(default=128, metadata={"help": "In tokens."})
    max_test_examples: int | None = field(default=None, metadata={"help": "Only the first so many; all by default."})
    granularities: list[int] | None = field(default=None, metadata={"help": "Of the bank; those of 2, 3, 4, 6 that fit by default."})
    plans: list[str] | None = field(
        default=None,
        metadata={"help": "Sizes, such as 1x6/2x3, each with one span a side; six from the whole encoder to the smallest by default."},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Rows of the table; by default all methods. `ablations` alone stands for those of ours."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of batches, dropout and plans; a run of everything each."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps of every run."})
    batch_size: int = field(default=64, metadata={"help": "Examples a step."})
    bf16: bool = field(default=False, metadata={"help": "Matrix products of training in bfloat16, with eager attention."})
    method_arguments: dict[str, dict] = field(
        default_factory=dict, metadata={"help": "By method, its arguments where they are to be others than in `METHODS`, as JSON."}
    )
    output_dir: str = field(default="out/compare", metadata={"help": "Where runs and results go."})

    def __post_init__(self) -> None:
        if self.methods in (None, ["ablations"]):
            self.methods = list(METHODS) if self.methods is None else ["modular", *ABLATIONS]
        for name in [*self.methods, *self.method_arguments]:
            if name not in ROWS:
                raise ValueError(f"unknown method {name!r}; choose of {', '.join(ROWS)}")
        for name in ("max_steps", "batch_size", "max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one, and different, got {self.seeds}")


class Stopwatch(TrainerCallback):
    """Seconds of a training over all its restarts: what is lost by a kill is not counted, as its steps are not."""

    _FILE = "seconds.json"

    def __init__(self, resumed_from: str | None):
        self._before = json.loads(Path(resumed_from, self._FILE).read_text()) if resumed_from else 0.0
        self._began = 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if checkpoint.is_dir():
            (checkpoint / self._FILE).write_text(json.dumps(self.seconds))


@dataclass(frozen=True)
class Run:
    """One training of a method: for these sizes, with this seed, in this folder."""

    method: str
    plans: tuple[AssemblyPlan, ...]
    seed: int
    arguments: Mapping[str, Any]
    folder: Path


class Method(NamedTuple):
    """A row of the table.

    Args:
        models: what a run makes: a stock T5 for each of its plans, and the seconds that the training took.
        arguments: of the method (`own`) and of its trainer.
        per_size: whether every size takes a run of its own.
        own: names of arguments that are not the trainer's.
    """

    models: Callable[["Comparison", Run], tuple[Models, float]]
    description: str
    arguments: Mapping[str, Any] = {}
    per_size: bool = True


class Comparison:
    """Runs methods and collects what they reached."""

    def __init__(self, args: ComparisonArguments):
        sacrebleu()  # what is not installed had better be missed now
        picture("a comparison")
        self.args = args
        self.folder = Path(args.output_dir)
        self.teacher = AutoModelForSeq2SeqLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
        self.teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        self.train, test = (
            Pairs.read(file, args.source_lang, args.target_lang, prefix=args.source_prefix) for file in (args.train_file, args.test_file)
        )
        self.test = test.head(args.max_test_examples)
        self.shape: BankShape = self.new_bank(args.granularities).shape
        self.plans = tuple(default_plans(self.shape) if args.plans is None else map(self._checked_plan, args.plans))

    def _checked_plan(self, name: str) -> AssemblyPlan:
        plan = self.shape.check(AssemblyPlan.from_any(name))
        if any(len(set(plan.spans(side))) > 1 for side in SIDES):
            raise ValueError(
                f"the plan {plan} mixes spans on a side, which BERT-of-Theseus cannot replace one by one; take one span a side"
            )
        return plan

    # -- what methods are made of ------------------------------------------------------------------------------------------

    def new_bank(self, granularities: Sequence[int] | Mapping[str, Sequence[int]] | None) -> ModularT5ForConditionalGeneration:
        """Around the teacher, modules untrained."""
        return ModularT5ForConditionalGeneration.from_t5(self.teacher, granularities).to(self.teacher.device)

    def student(self, plan: AssemblyPlan) -> T5ForConditionalGeneration:
        """A stock T5 made of the layers of the teacher that the modules of the plan start as."""
        return self.new_bank({side: sorted({*plan.spans(side)} - {1}) for side in SIDES}).assemble(plan)

    def fitted(self, trainer_class: type, model: Any, run: Run, arguments_class: type, **kwargs: Any) -> float:
        """Train a model by a run's arguments, from the last checkpoint if there is one; returns the seconds it took in all."""
        args, given = self.args, dict(run.arguments)
        targets, dropout = given.pop("targets", "labels"), given.pop("dropout_rate", 0.0)
        set_dropout(model, dropout, inner=0.0)
        if args.bf16:
            model.set_attn_implementation("eager")  # the other's gradients are slow in bfloat16 on a CPU
        checkpoint = get_last_checkpoint(run.folder) if run.folder.is_dir() else None
        stopwatch = Stopwatch(checkpoint)
        set_seed(run.seed)
        trainer = trainer_class(
            model=model,
            args=arguments_class(
                **{
                    "output_dir": str(run.folder),
                    "max_steps": args.max_steps,
                    "per_device_train_batch_size": args.batch_size,
                    "train_sampling_strategy": "group_by_length",
                    "warmup_steps": args.max_steps // 20,
                    "logging_steps": max(1, args.max_steps // 20),
                    "save_steps": max(1, args.max_steps // 5),
                    "save_total_limit": 1,
                    "report_to": "none",
                    "disable_tqdm": True,
                    "bf16": args.bf16,
                    "use_cpu": not torch.cuda.is_available(),
                    "dataloader_pin_memory": torch.cuda.is_available(),
                    "seed": run.seed,
                    **given,
                }
            ),
            train_dataset=self.examples(targets),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, model=model),
            callbacks=[stopwatch],
            **kwargs,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return stopwatch.seconds

    def examples(self, targets: str) -> Any:
        """The training split: with its `labels`, with the teacher's `beams` in their place, or `both`, one after the other."""
        of = {"labels": lambda: [self.train], "beams": lambda: [self.taught], "both": lambda: [self.train, self.taught]}
        if targets not in of:
            raise ValueError(f"unknown targets {targets!r}; choose one of {', '.join(of)}")
        parts = of[targets]()
        pairs = Pairs([source for part in parts for source in part.sources], [target for part in parts for target in part.targets])
        return pairs.tokenized(self.tokenizer, self.args.max_source_length, self.args.max_target_length)

    @cached_property
    def taught(self) -> Pairs:
        """The sources with what the teacher makes of them by beam search; made once and kept."""
        file = self.folder / BEAMS_FILE
        if not file.exists():
            started = time.perf_counter()
            texts = self.texts_of(self.teacher, self.train.sources, DECODINGS["beam 4"], "Teacher's beams")
            write_json(file, {**environment(), "seconds": time.perf_counter() - started, "texts": texts})
        return Pairs(self.train.sources, json.loads(file.read_text(encoding="utf-8"))["texts"])

    def texts_of(self, model: Any, sources: Sequence[str], num_beams: int, description: str) -> list[str]:
        """What a model makes of sources."""
        lengths = {"max_new_tokens": self.args.max_target_length, "max_source_length": self.args.max_source_length}
        return generate_texts(model.eval(), self.tokenizer, sources, num_beams=num_beams, description=description, **lengths)

    # -- running -----------------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Every training of the table, methods in their order."""
        runs = []
        for seed in self.args.seeds:
            for name in self.args.methods:
                row = ROWS[name]
                arguments = {**row.arguments, **self.args.method_arguments.get(name, {})}
                plans = self.plans_of(arguments)
                for of_run in [(plan,) for plan in plans] if row.per_size else [plans]:
                    size = "-".join(map(str, of_run[0].depths)) if row.per_size else "all"
                    folder = self.folder / "runs" / name.replace(" ", "-").replace(",", "").replace("'", "") / size / f"seed-{seed}"
                    runs.append(Run(name, of_run, seed, arguments, folder))
        return runs

    def plans_of(self, arguments: Mapping[str, Any]) -> tuple[AssemblyPlan, ...]:
        """The sizes that a bank of fewer granularities has too."""
        known = {1, *(arguments.get("granularities") or sum(self.shape.granularities.values(), ()))}
        return tuple(plan for plan in self.plans if {*plan.encoder, *plan.decoder} <= known)

    def run(self) -> dict[str, Any]:
        """Do what is missing; returns the results, which are also in the folder, as results.json, table.md and picture.png."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for run in self.runs():
            if not self.is_done(run):
                print(f"== {run.method}, {', '.join('-'.join(map(str, plan.depths)) for plan in run.plans)}, seed {run.seed}", flush=True)
                self.do(run)
        results = self.results()
        write_json(self.folder / RESULTS_FILE, results)
        (self.folder / "table.md").write_text(table(results) + "\n", encoding="utf-8")
        plot(results, self.folder / "picture.png", title=f"One training of {self.args.max_steps} steps against one a size")
        return results

    def is_done(self, run: Run) -> bool:
        """Whether a run is there.

        Raises:
            ValueError: it is, but of other settings, teacher, data or versions: a table must not be half old, half new.
        """
        if not (run.folder / RUN_FILE).exists():
            return False
        stored = self.stored(run)["settings"]
        settings = json.loads(json.dumps(self.settings_of(run)))
        if different := sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name)):
            raise ValueError(
                f"{run.folder} holds a run with other {', '.join(different)}; take another output_dir, or remove it to run it anew"
            )
        return True

    def stored(self, run: Run) -> dict[str, Any]:
        """What a run left."""
        file = run.folder / RUN_FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return {name: stored[name] for name in ("settings", "steps", "seconds", "hardware", "texts")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not what a run leaves ({error!r}); remove it to run it anew") from error

    def settings_of(self, run: Run) -> dict[str, Any]:
        """All that a run's outcome depends on."""
        of_all = ("max_source_length", "max_target_length", "max_test_examples", "granularities", "max_steps", "batch_size", "bf16")
        return {
            "method": run.method,
            "plans": list(map(str, run.plans)),
            "seed": run.seed,
            "arguments": dict(run.arguments),
            **{name: getattr(self.args, name) for name in of_all},
            **self._fingerprints,
            "versions": environment()["versions"],
        }

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        teacher = hashlib.sha256()
        for name, tensor in sorted(self.teacher.state_dict().items()):
            teacher.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        texts = {"train": self.train, "test": self.test}
        return {
            "teacher_sha256": teacher.hexdigest(),
            **{f"{name}_sha256": hashlib.sha256(json.dumps(pairs).encode()).hexdigest() for name, pairs in texts.items()},
        }

    def do(self, run: Run) -> None:
        """Train, score every size, and leave `run.json`."""
        models, seconds = ROWS[run.method].models(self, run)
        texts = {
            str(plan): {
                decoding: self.texts_of(model, self.test.sources, beams, f"{run.method}, {plan}, {decoding}")
                for decoding, beams in DECODINGS.items()
            }
            for plan, model in models.items()
        }
        steps = self.args.max_steps if seconds else 0
        written = {**environment(), "settings": self.settings_of(run), "steps": steps, "seconds": seconds, "texts": texts}
        write_json(run.folder / RUN_FILE, written)
        for checkpoint in run.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    # -- what came out -----------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Scores, costs and speeds of every row whose runs are all there."""
        texts_of_teacher = {
            name: self.texts_of(self.teacher, self.test.sources, beams, f"teacher, {name}") for name, beams in DECODINGS.items()
        }
        rows = {}
        for name in self.args.methods:
            runs = [run for run in self.runs() if run.method == name]
            stored = [self.stored(run) for run in runs]
            seeds = len(self.args.seeds)
            rows[name] = {
                "description": ROWS[name].description,
                "arguments": dict(runs[0].arguments),
                "per_size": ROWS[name].per_size,
                "runs": len(runs) // seeds,
                "steps": sum(each["steps"] for each in stored) / seeds,
                "seconds": sum(each["seconds"] for each in stored) / seeds,
                "hardware": sorted({each["hardware"] for each in stored}),
                "texts": {
                    str(plan): [each["texts"][str(plan)] for each in stored if str(plan) in each["texts"]]
                    for plan in self.plans_of(runs[0].arguments)
                },
            }
        taught = self.folder / BEAMS_FILE
        return {
            **environment(),
            "settings": {**dataclasses.asdict(self.args), **self._fingerprints},
            "teacher_beams_seconds": json.loads(taught.read_text(encoding="utf-8"))["seconds"] if taught.exists() else None,
            "costs": self.costs(),
            **scored(rows, texts_of_teacher, self.test.targets),
        }

    def costs(self) -> dict[str, dict[str, Any]]:
        """Of the teacher and every size: parameters, MB, ratio of layers, greedy tokens/s at batches of 1 and 32."""
        plans = (self.shape.teacher, *self.plans)
        models = [self.teacher, *map(self.student, self.plans)]
        speeds = {}
        for batch_size in (1, 32):
            inputs = self.tokenizer(
                self.test.sources[:batch_size], return_tensors="pt", padding=True, truncation=True, max_length=self.args.max_source_length
            )
            speeds[batch_size] = measure_speed(
                models, inputs.to(self.teacher.device), new_tokens=16, description=f"Timing, batch {batch_size}"
            )
        costs = {}
        for number, plan in enumerate(plans):
            report = self.shape.report(plan)
            costs[str(plan)] = {
                "depths": list(plan.depths),
                "layer_ratio": report.layer_ratio,
                "parameters": report.total_parameters,
                "bytes": report.bytes,
                **{f"tokens_per_second_batch_{size}": of_all[number] for size, of_all in speeds.items()},
            }
        return costs


def default_plans(shape: BankShape) -> list[AssemblyPlan]:
    """Sizes of one span a side: the decoder at the finest granularity, then both sides, the decoder further, and so on to the smallest."""

    def spans_of(side: str) -> tuple[int, int, int, int]:
        """An original layer, the finest granularity, the coarsest but one, the coarsest."""
        known = shape.granularities[side] or (1,)
        return 1, known[0], known[max(len(known) - 2, 0)], known[-1]

    encoder, decoder = ([(span,) * (shape.num_layers[side] // span) for span in spans_of(side)] for side in SIDES)
    pairs = [(0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (3, 3)]
    plans = [AssemblyPlan(encoder[of_encoder], decoder[of_decoder]) for of_encoder, of_decoder in pairs]
    return [plan for plan in dict.fromkeys(plans) if plan != shape.teacher]


def write_json(path: Path, document: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


# -- methods -----------------------------------------------------------------------------------------------------------


def _layers_dropped(comparison: Comparison, run: Run) -> tuple[Models, float]:
    return {plan: comparison.student(plan) for plan in run.plans}, 0.0


def _distilled(comparison: Comparison, run: Run) -> tuple[Models, float]:
    (plan,) = run.plans
    student = comparison.student(plan)
    seconds = comparison.fitted(DistillationTrainer, student, run, DistillationArguments, teacher=comparison.teacher, plan=plan)
    return {plan: student}, seconds


def _theseus(comparison: Comparison, run: Run) -> tuple[Models, float]:
    (plan,) = run.plans
    bank = comparison.new_bank({side: sorted({*plan.spans(side)} - {1}) for side in SIDES})
    seconds = comparison.fitted(ModularTrainer, bank, run, ModularTrainingArguments)
    return {plan: bank.assemble(plan)}, seconds


def _layerdrop(comparison: Comparison, run: Run) -> tuple[Models, float]:
    own = dict(run.arguments)
    bank = comparison.new_bank(comparison.args.granularities)
    whole = bank.assemble(comparison.shape.teacher)
    trained = dataclasses.replace(run, arguments=own)
    seconds = comparison.fitted(LayerDropTrainer, whole, trained, DistillationArguments, drop_rate=own.pop("drop_rate"))
    pruned = ModularT5ForConditionalGeneration.from_t5(whole, comparison.args.granularities)
    return {plan: pruned.assemble(plan) for plan in run.plans}, seconds


def _modular(comparison: Comparison, run: Run) -> tuple[Models, float]:
    own = dict(run.arguments)
    bank = comparison.new_bank(own.pop("granularities", comparison.args.granularities))
    shuffled = own.pop("random_order", False)
    seconds = comparison.fitted(ModularTrainer, bank, dataclasses.replace(run, arguments=own), ModularTrainingArguments)
    bank.save_pretrained(run.folder / "bank")
    draw = random.Random(run.seed)
    assembled = {plan: _random_order(bank.shape, plan, draw) if shuffled else plan for plan in run.plans}
    return {plan: bank.assemble(actual) for plan, actual in assembled.items()}, seconds


def _random_order(shape: BankShape, plan: AssemblyPlan, draw: random.Random) -> AssemblyPlan:
    """Of the same depths, any legal tiling."""
    sides = [
        [tiling for tiling in tilings(shape.num_layers[side], shape.granularities[side]) if len(tiling) == len(plan.spans(side))]
        for side in SIDES
    ]
    return AssemblyPlan(*map(draw.choice, sides))


# name -> method. Learning rates and the like were chosen on the validation split (benchmarks/README.md).
METHODS: dict[str, Method] = {
    "layer drop": Method(_layers_dropped, "layers of the teacher, nothing trained"),
    "fine-tuning": Method(
        _distilled,
        "shrink and fine-tune: layers of the teacher, trained on the labels",
        {"learning_rate": 1e-3, "logit_weight": 0.0, "hidden_weight": 0.0, "label_smoothing_factor": 0.1},
    ),
    "distillation": Method(
        _distilled, "layers of the teacher, trained on labels, the teacher's predictions and hidden states", {"learning_rate": 1e-3}
    ),
    "sequence distillation": Method(
        _distilled,
        "layers of the teacher, trained on the teacher's beams",
        {"learning_rate": 1e-3, "targets": "beams", "logit_weight": 0.0, "hidden_weight": 0.0},
    ),
    "BERT-of-Theseus": Method(
        _theseus,
        "modules of one size replace layers at random, ever more often until half-time, and learn from the labels",
        {
            "learning_rate": 1e-3,
            "logit_weight": 0.0,
            "hidden_weight": 0.0,
            "plan_sampling": "mixed",
            "plans_per_step": 1,
            "replacing_rate": 0.5,
            "replacing_rate_schedule": "ramp",
        },
    ),
    "LayerDrop": Method(
        _layerdrop,
        "the teacher fine-tuned with layers dropped at random, then without them; one training",
        {"learning_rate": 1e-3, "drop_rate": 0.5, "logit_weight": 0.0, "hidden_weight": 0.0, "label_smoothing_factor": 0.1},
        per_size=False,
    ),
    "modular": Method(_modular, "Modular T5; one training", {"learning_rate": 2e-3}, per_size=False),
}


def _without(description: str, **arguments: Any) -> Method:
    modular = METHODS["modular"]
    return modular._replace(description=description, arguments={**modular.arguments, **arguments})


_PAPER = {"plan_sampling": "mixed", "plans_per_step": 1, "replacing_rate": 0.7}

ABLATIONS: dict[str, Method] = {
    "modular, paper's sampling": _without("one plan a step, each module of a granularity of its own, coarse to fine", **_PAPER),
    "modular, paper's, uniform": _without("the same without curriculum", **_PAPER, curriculum="uniform"),
    "modular, paper's, fine-to-coarse": _without("the same with the curriculum turned round", **_PAPER, curriculum="fine-to-coarse"),
    "modular, one plan a step": _without("one plan a step, aligned", plans_per_step=1),
    "modular, mixed plans": _without("as many plans a step, each module of a granularity of its own", plan_sampling="mixed"),
    "modular, replacing rate 0.7": _without("original layers in three of ten places", replacing_rate=0.7),
    "modular, dropout": _without("modules with dropout", module_dropout=True, dropout_rate=0.1),
    "modular, no hidden states": _without("without the loss of hidden states", hidden_weight=0.0),
    "modular, attention": _without("with the loss of attention probabilities", attention_weight=1.0),
    "modular, granularity 2": _without("one granularity", granularities=[2]),
    "modular, granularity 3": _without("one granularity", granularities=[3]),
    "modular, without the coarsest": _without("without the coarsest granularity", granularities=[2, 3]),
    "modular, random order": _without("other tilings of the same depths", random_order=True),
}

ROWS = {**METHODS, **ABLATIONS}
