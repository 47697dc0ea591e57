"""Train once against train-per-size: every method from the same teacher, on the same data, with the same number of steps a run.

A run is one training; its models are scored as soon as it ends, and what it leaves is one file, `run.json`. A comparison that is started
again does what is missing, and what began in the middle continues from its last checkpoint. A step of Modular T5 runs several plans, so
that equal steps are not equal work: passes of a student and seconds are counted too.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, T5ForConditionalGeneration

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .choosing_modular_t5 import BankShape
from .comparison_methods import ABLATIONS, METHODS, ROWS, Run, Spent, Workshop, arguments_of, folder_name
from .comparison_results import plot, scored, tables
from .measuring import environment, generate_texts, measure_speed, write_json
from .pairs import Pairs, sacrebleu
from .presenting import figure_class
from .training_args import ModularTrainingArguments


DECODINGS = {"greedy": 1, "beam 4": 4}  # name -> num_beams

# In the folder of a run, what it is and what it left; in that of the comparison, what the teacher makes of a split, and what came out.
SETTINGS_FILE, RUN_FILE = "settings.json", "run.json"
TEACHER_FILES, RESULTS_FILE = {"train": "teacher-beams.json", "test": "teacher-texts.json"}, "results.json"
TABLE_FILE, PICTURE_FILE = "table.md", "picture.png"

# A row that says what is so anyway is no row of its own.
_MODULAR_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ModularTrainingArguments)
    if isinstance(field.default, str | float | int | None)
}

# Of the package, what the outcome of a run does not depend on.
_ELSEWHERE = ("cli.py", "model_card.py", "rebuilding.py", "comparison_results.py", "significance.py")


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
        metadata={"help": "Sizes, such as 1x6/2x3, each with one span a side; by default six from the whole encoder to the smallest."},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Rows of the table; by default all methods. `ablations` alone stands for those of ours."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of batches, dropout and plans; a run of everything each."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps of every run."})
    batch_size: int = field(default=64, metadata={"help": "Examples a step."})
    decodings: list[str] = field(
        default_factory=lambda: list(DECODINGS), metadata={"help": f"Ways to decode test texts, of {', '.join(DECODINGS)}."}
    )
    bf16: bool = field(default=False, metadata={"help": "Matrix products of training in bfloat16, with eager attention."})
    method_arguments: dict[str, dict] = field(
        default_factory=dict, metadata={"help": "By method, its arguments where they are to be others than in `METHODS`, as JSON."}
    )
    output_dir: str = field(default="out/compare", metadata={"help": "Where runs and results go."})

    def __post_init__(self) -> None:
        self.methods = list(METHODS) if self.methods is None else self.methods
        for name in [*(self.methods if self.methods != ["ablations"] else ()), *self.method_arguments]:
            if name not in ROWS:
                raise ValueError(f"unknown method {name!r}; choose of {', '.join(ROWS)}")
        if not self.decodings or not set(self.decodings) <= set(DECODINGS) or "greedy" not in self.decodings:
            raise ValueError(f"decodings must be greedy, or all of {', '.join(DECODINGS)}, got {self.decodings}")
        for name in ("max_steps", "batch_size", "max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one, and different, got {self.seeds}")


class Comparison:
    """Runs methods and collects what they reached."""

    def __init__(self, args: ComparisonArguments):
        sacrebleu()  # what is not installed had better be missed now
        figure_class("a comparison")
        if torch.cuda.device_count() > 1:
            raise ValueError("a comparison runs on one GPU, and several are in sight; set CUDA_VISIBLE_DEVICES to one of them")
        self.args = args
        self.folder = Path(args.output_dir)
        self.teacher = AutoModelForSeq2SeqLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
        self.teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        self.train, test = (
            Pairs.read(file, args.source_lang, args.target_lang, prefix=args.source_prefix) for file in (args.train_file, args.test_file)
        )
        self.test = test.head(args.max_test_examples)
        training = {
            "max_steps": args.max_steps,
            "per_device_train_batch_size": args.batch_size,
            "train_sampling_strategy": "group_by_length",
            "warmup_steps": args.max_steps // 20,
            "save_steps": max(1, args.max_steps // 5),
            "save_total_limit": 2,  # the newer may be torn
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": args.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        self.workshop = Workshop(self.teacher, self.tokenizer, args.granularities, cache(self.examples), training)
        self.shape = self.workshop.shape
        self.plans = tuple(default_plans(self.shape) if args.plans is None else map(self._checked_plan, args.plans))
        self.methods = self._ablations() if args.methods == ["ablations"] else args.methods

    def _checked_plan(self, name: str) -> AssemblyPlan:
        plan = self.shape.check(AssemblyPlan.from_any(name))
        if any(len(set(plan.spans(side))) > 1 for side in SIDES):
            raise ValueError(
                f"the plan {plan} mixes spans on a side, which BERT-of-Theseus cannot replace one by one; take one span a side"
            )
        return plan

    # -- data --------------------------------------------------------------------------------------------------------------

    def examples(self, targets: str) -> Dataset:
        """The training split: with its `labels`, with the teacher's `beams` in their place, or `both`, one after the other."""
        parts = [pairs() for name, pairs in (("labels", lambda: self.train), ("beams", lambda: self.taught)) if targets in (name, "both")]
        pairs = Pairs([source for part in parts for source in part.sources], [target for part in parts for target in part.targets])
        return self._tokenized(pairs)

    def _tokenized(self, pairs: Pairs) -> Dataset:
        return pairs.tokenized(self.tokenizer, self.args.max_source_length, self.args.max_target_length)

    @cached_property
    def taught(self) -> Pairs:
        """The sources with what the teacher makes of them by beam search."""
        return Pairs(self.train.sources, self.of_teacher("train", "beam 4")["texts"]["beam 4"])

    def of_teacher(self, split: str, *decodings: str) -> dict[str, Any]:
        """What the teacher makes of `train` or `test`: `texts`, by decoding, and the `seconds` it took; made once and kept."""
        file, sources = self.folder / TEACHER_FILES[split], getattr(self, split).sources
        lengths = {name: getattr(self.args, name) for name in ("max_source_length", "max_target_length")}
        of_all = ("teacher_sha256", "tokenizer_sha256", "generation_sha256", f"{split}_sha256")
        settings = {**{name: self._fingerprints[name] for name in of_all}, **lengths, "decodings": list(decodings)}
        if not file.exists():
            started = time.perf_counter()
            texts = {each: self.texts_of(self.teacher, sources, DECODINGS[each], f"teacher, {split}, {each}") for each in decodings}
            seconds = time.perf_counter() - started
            write_json(file, {**environment(), "settings": settings, "seconds": seconds, "texts": texts})
        stored = _read(file, ("settings", "texts", "seconds"))
        _check_same(file, stored["settings"], settings)
        return stored

    def texts_of(self, model: Any, sources: Sequence[str], num_beams: int, description: str) -> list[str]:
        """What a model makes of sources."""
        lengths = {"max_new_tokens": self.args.max_target_length, "max_source_length": self.args.max_source_length}
        return generate_texts(model.eval(), self.tokenizer, sources, num_beams=num_beams, description=description, **lengths)

    @torch.inference_mode()
    def loss_of(self, model: T5ForConditionalGeneration) -> float:
        """Mean cross-entropy of a token of the test targets, in nats."""
        collate, total, tokens = DataCollatorForSeq2Seq(self.tokenizer), 0.0, 0
        for first in range(0, len(self._test_examples), 64):
            batch = collate(self._test_examples[first : first + 64]).to(model.device)
            batch_tokens = int((batch["labels"] != -100).sum())
            total += float(model.eval()(**batch).loss) * batch_tokens
            tokens += batch_tokens
        return total / tokens

    @cached_property
    def _test_examples(self) -> list[dict[str, Any]]:
        """By length."""
        examples = self._tokenized(self.test)
        return sorted(examples.remove_columns("length"), key=lambda example: len(example["labels"]))

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """SHA-256 of teacher, tokenizer and texts."""
        teacher = hashlib.sha256()
        for name, tensor in sorted(self.teacher.state_dict().items()):
            teacher.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        described = {
            "tokenizer": [self.tokenizer.get_vocab(), self.tokenizer.special_tokens_map],
            "generation": self.teacher.generation_config.to_dict(),
            "train": self.train,
            "test": self.test,
        }
        hashes = {name: hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()) for name, of in described.items()}
        return {f"{name}_sha256": digest.hexdigest() for name, digest in {"teacher": teacher, **hashes}.items()}

    # -- running -----------------------------------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> list[Run]:
        """Every run of the table, methods in their order."""
        runs = []
        for seed in self.args.seeds:
            for name in self.methods:
                arguments = arguments_of(name, self.args.method_arguments)
                plans = self.plans_of(arguments)
                for of_run in [(plan,) for plan in plans] if ROWS[name].per_size else [plans]:
                    size = "-".join(map(str, of_run[0].depths)) if ROWS[name].per_size else "all"
                    runs.append(Run.of(name, of_run, seed, arguments, self.folder / "runs" / folder_name(name) / size / f"seed-{seed}"))
        return runs

    def _ablations(self) -> list[str]:
        """Our method and what it is without one thing or the other; but those that make no size, or the same as one before."""
        rows: dict[str, str] = {}
        for name in ("modular", *ABLATIONS):
            arguments = {**_MODULAR_DEFAULTS, **arguments_of(name, self.args.method_arguments)}
            granularities = self.workshop.granularities_of(arguments)
            if self._plans_with(granularities):
                rows.setdefault(json.dumps([str(ROWS[name].models), {**arguments, "granularities": granularities}], sort_keys=True), name)
        return list(rows.values())

    def _plans_with(self, granularities: Mapping[str, Sequence[int]]) -> tuple[AssemblyPlan, ...]:
        return tuple(plan for plan in self.plans if all({*plan.spans(side)} <= {1, *granularities[side]} for side in SIDES))

    def plans_of(self, arguments: Mapping[str, Any]) -> tuple[AssemblyPlan, ...]:
        """The sizes that a bank of a method's granularities has too.

        Raises:
            ValueError: it has none of them.
        """
        plans = self._plans_with(self.workshop.granularities_of(arguments))
        if not plans:
            raise ValueError(f"granularities {arguments['granularities']} make none of the sizes {', '.join(map(str, self.plans))}")
        return plans

    def run(self) -> dict[str, Any]:
        """Do what is missing; returns the results, which are also in the folder, with a table and a picture."""
        self.do_missing()
        results = self.results()
        write_json(self.folder / RESULTS_FILE, results)
        (self.folder / TABLE_FILE).write_text(tables(results) + "\n", encoding="utf-8")
        plot(results, self.folder / PICTURE_FILE, title=f"{self.args.max_steps} steps a training")
        return results

    def missing(self) -> list[Run]:
        """Runs that are not there; a `ValueError` if one of them, or of those that are, does not fit."""
        missing = [run for run in self.runs if not self.is_done(run)]
        for run in missing:
            self.workshop.arguments_of(run)
        return missing

    def do_missing(self) -> None:
        """What does not fit is said before anything is trained."""
        missing = self.missing()
        for number, run in enumerate(missing, start=1):
            sizes = ", ".join("-".join(map(str, plan.depths)) for plan in run.plans)
            print(f"run {number} of {len(missing)}: {run.method}, {sizes}, seed {run.seed}", file=sys.stderr, flush=True)
            self.do(run)

    def is_done(self, run: Run) -> bool:
        """Whether a run is there.

        Raises:
            ValueError: it is, or began, with other settings, teacher, data, versions or code: a table must not be half old, half new.
        """
        began = run.folder / SETTINGS_FILE
        if began.exists():
            _check_same(run.folder, _read(began, ()), self.settings_of(run))
        return (run.folder / RUN_FILE).exists()

    def stored(self, run: Run) -> dict[str, Any]:
        """What a run left."""
        return _read(run.folder / RUN_FILE, ("spent", "hardware", "losses", "texts"))

    def settings_of(self, run: Run) -> dict[str, Any]:
        """All that a run's outcome depends on."""
        of_all = ("max_source_length", "max_target_length", "max_test_examples", "granularities", "decodings")
        arguments = self.workshop.arguments_of(run)
        settings = {
            "method": run.method,
            "plans": list(map(str, run.plans)),
            "seed": run.seed,
            "own": dict(run.own),
            "arguments": dict(run.arguments) if arguments is None else arguments.to_dict() | {"output_dir": None, "logging_dir": None},
            **{name: getattr(self.args, name) for name in of_all},
            **self._fingerprints,
            "code_sha256": _code_sha256(),
            "versions": {**environment()["versions"], **{name: version(name) for name in ("accelerate", "sacrebleu")}},
        }
        return json.loads(json.dumps(settings, default=str))

    def do(self, run: Run) -> None:
        """Train, score every size, and leave `run.json`."""
        write_json(run.folder / SETTINGS_FILE, self.settings_of(run))
        models, spent = ROWS[run.method].models(self.workshop, run)
        losses = {str(plan): self.loss_of(model) for plan, model in models.items()}
        texts = {
            str(plan): {
                decoding: self.texts_of(model, self.test.sources, DECODINGS[decoding], f"{run.method}, {plan}, {decoding}")
                for decoding in self.args.decodings
            }
            for plan, model in models.items()
        }
        write_json(run.folder / RUN_FILE, {**environment(), "spent": dataclasses.asdict(spent), "losses": losses, "texts": texts})
        for checkpoint in run.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    # -- what came out -----------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Scores, costs and speeds of every row."""
        rows = {}
        for name in self.methods:
            runs = [run for run in self.runs if run.method == name]
            stored = [self.stored(run) for run in runs]
            seeds, (first, *_) = len(self.args.seeds), runs
            spent = [Spent(**each["spent"]) for each in stored]
            taught = ROWS[name].arguments_class is not None and first.own.get("targets", "labels") != "labels"
            beams = self.of_teacher("train", "beam 4")["seconds"] if taught else 0.0
            rows[name] = {
                "description": ROWS[name].description,
                "arguments": {**first.own, **first.arguments},
                "per_size": ROWS[name].per_size,
                "runs": len(runs) // seeds,
                "steps": sum(each.steps for each in spent) / seeds,
                "passes": sum(each.passes for each in spent) / seeds,
                "seconds": sum(each.seconds for each in spent) / seeds + beams,
                "of_which_teachers_beams": beams,
                "hardware": sorted({each["hardware"] for each in stored}),
                "test_loss": {
                    str(plan): mean(each["losses"][str(plan)] for each in stored if str(plan) in each["losses"])
                    for plan in self.plans_of(first.own)
                },
                "texts": {
                    str(plan): [each["texts"][str(plan)] for each in stored if str(plan) in each["texts"]]
                    for plan in self.plans_of(first.own)
                },
            }
        return {
            **environment(),
            "settings": {**dataclasses.asdict(self.args), **self._fingerprints},
            "costs": self.costs(),
            "teacher_test_loss": self.loss_of(self.teacher),
            **scored(rows, self.of_teacher("test", *self.args.decodings)["texts"], self.test.targets),
        }

    def costs(self) -> dict[str, dict[str, Any]]:
        """Of the teacher and every size: parameters, MB, ratio of layers, greedy tokens/s at batches of 1 and 32."""
        plans = (self.shape.teacher, *self.plans)
        models = [self.teacher, *(self.workshop.bank_for(plan).assemble(plan) for plan in self.plans)]
        speeds = {}
        for batch_size in (1, 32):
            inputs = self.tokenizer(
                self.test.sources[:batch_size], return_tensors="pt", padding=True, truncation=True, max_length=self.args.max_source_length
            ).to(self.teacher.device)
            speeds[batch_size] = measure_speed(models, inputs, new_tokens=16, description=f"Timing, batch {batch_size}")
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


@cache
def _code_sha256() -> str:
    """Of the package's files that the outcome of a run depends on."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.name not in _ELSEWHERE:
            code.update(file.read_bytes())
    return code.hexdigest()


def _read(file: Path, needed: Sequence[str]) -> dict[str, Any]:
    """A file that a comparison wrote; a `ValueError` if it is not whole."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        for name in needed:
            document[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not what a comparison leaves ({error!r}); remove its folder, or the file if it is not a run's"
        ) from error
    return document


def _check_same(what: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    different = {name for name in {*stored, *settings} if stored.get(name) != settings.get(name)}
    if "arguments" in different and isinstance(stored.get("arguments"), Mapping):
        different.remove("arguments")
        its, ours = stored["arguments"], settings["arguments"]
        different |= {name for name in {*its, *ours} if its.get(name) != ours.get(name)}
    if different:
        raise ValueError(
            f"{what} was made with other {', '.join(sorted(different))}; take another output_dir, or remove it to have it made anew"
        )
