"""From a fine-tuned T5 to every size of it, in one run: train a bank once, assemble sizes, measure them, write it all out.

With nothing but the package, on a task that is made on the spot (a small teacher is trained first):

    python examples/quickstart.py

On your own T5 and data, JSON-lines in the Hub's translation format, `{"translation": {"en": "...", "de": "..."}}` a line:

    python examples/quickstart.py --teacher DIR_OR_HUB_ID --train_file train.jsonl --validation_file dev.jsonl --test_file test.jsonl \
        --source_lang en --target_lang de --max_steps 2000

or on a dataset of the Hub, with `--dataset_name wmt14 --dataset_config_name de-en` in place of the files.
"""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import written_numbers
from datasets import Dataset, load_dataset
from transformers import (
    Adafactor,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    set_seed,
)

from modular_t5 import (
    AssemblyPlan,
    ModularT5ForConditionalGeneration,
    ModularTrainer,
    ModularTrainingArguments,
    assembled_card,
    bank_card,
    calibrate,
)
from modular_t5.frontier import PICTURE_FILE, RESULTS_FILE, measure_frontier, standard_sizes
from modular_t5.measuring import generate_texts
from modular_t5.pairs import Pairs, scores_of
from modular_t5.presenting import plot_curves


NEXT = """
In {out}/: bank/ (every size, with the card, the figures and the picture that belong on the Hub) and assembled/ ({plan} as a stock T5).
What to type next:

    import modular_t5
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("{out}/bank")
    bank = AutoModelForSeq2SeqLM.from_pretrained("{out}/bank")
    fast = bank.assemble("{plan}")  # or any other size, by ratio: bank.assemble("speed-first", ratio=1.2)
    inputs = tokenizer("{source}", return_tensors="pt")
    print(tokenizer.decode(fast.generate(inputs.input_ids, max_new_tokens=64)[0], skip_special_tokens=True))

and in a shell:

    modular-t5 plan {out}/bank calibrated 1.4
    modular-t5 rebuild {out}/assembled
    modular-t5 push {out}/bank {name}
"""

CALIBRATION_EXAMPLES = 300  # of the validation split


@dataclass
class QuickstartArguments:
    """Without `--teacher` and data, the built-in task is run."""

    teacher: str | None = field(default=None, metadata={"help": "Folder or Hub id of a fine-tuned T5."})
    train_file: str | None = field(default=None, metadata={"help": "JSON-lines in the Hub's translation format."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The same, for the loss by plan after training, and to calibrate on."}
    )
    test_file: str | None = field(default=None, metadata={"help": "The same, for the table."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the Hub instead of the files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    source_lang: str = field(default=written_numbers.SOURCE_LANG, metadata={"help": "Key of the source in `translation`."})
    target_lang: str = field(default=written_numbers.TARGET_LANG, metadata={"help": "Key of the target in `translation`."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source, for T5s that were trained so."})
    max_source_length: int = field(default=128, metadata={"help": "In tokens."})
    max_target_length: int = field(default=128, metadata={"help": "In tokens."})
    max_test_examples: int = field(default=1000, metadata={"help": "Examples of the test split that the table uses."})
    targets: Literal["beams", "labels"] | None = field(
        default=None,
        metadata={
            "help": "What the bank is trained to say: labels, or beams, what the teacher makes of the training texts by beam search, "
            "first. By default beams, but labels on the built-in task, where the teacher says the same."
        },
    )
    max_steps: int = field(default=400, metadata={"help": "Training steps of the bank."})
    teacher_steps: int = field(default=1200, metadata={"help": "Training steps of the built-in task's teacher."})
    batch_size: int = field(default=64, metadata={"help": "Examples a training step."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak, for the bank. This suits d_model 64 and 128; wider models want less."}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Validation loss of every size each so many steps too, for a picture, curves.png."}
    )
    output_dir: str = field(default="out/quickstart", metadata={"help": "Where the bank, one assembled model and the results go."})
    namespace: str = field(default="org", metadata={"help": "Of the repositories that the cards name."})
    seed: int = field(default=0, metadata={"help": "Of the data, the teacher, the plans and the batches."})

    def __post_init__(self) -> None:
        files = [self.train_file, self.validation_file, self.test_file]
        has_data = self.dataset_name is not None or any(files)
        if self.dataset_name is None and any(files) and not all(files):
            raise ValueError("--train_file, --validation_file and --test_file go together")
        if self.dataset_name is not None and any(files):
            raise ValueError("give either --dataset_name or the three files, not both")
        if has_data != (self.teacher is not None):
            raise ValueError(
                "a --teacher needs data (--train_file, --validation_file, --test_file, or --dataset_name) and data needs a --teacher"
            )
        if self.targets is None:
            self.targets = "beams" if has_data else "labels"


def main() -> None:
    started = time.perf_counter()
    (args,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    set_seed(args.seed)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    say("Reading the data" if args.teacher else "Making the built-in task: amounts and dates in words, English to German")
    train, validation, test = load_pairs(args)
    sources, targets = test.head(args.max_test_examples)
    for source, target in zip(sources[:3], targets[:3], strict=True):
        print(f"    {source}  ->  {target}")

    say(f"Loading the teacher {args.teacher}" if args.teacher else f"Training a teacher: a T5 with 6+6 layers, {args.teacher_steps} steps")
    teacher, tokenizer = load_teacher(args) if args.teacher else train_teacher(train, args)
    bank = ModularT5ForConditionalGeneration.from_t5(teacher).to("cuda" if torch.cuda.is_available() else "cpu")

    if args.targets == "beams":
        say(f"Decoding {len(train.sources)} training texts with the teacher, four beams")
        train = Pairs(train.sources, texts_of(bank, tokenizer, train.sources, args, num_beams=4, description="Decoding"))

    say(f"Training the bank once, {args.max_steps} steps")
    plans = standard_sizes(bank.shape)
    trainer = train_bank(bank, tokenizer, train, validation, plans, args)
    record = trainer.training_record()
    record["arguments"]["targets"] = args.targets
    validation_loss = losses_by_plan(trainer, plans)
    print("Validation loss:", ", ".join(f"{name} {loss:.3f}" for name, loss in validation_loss.items()))

    say("Calibrating: what each module costs, for the strategy that chooses by that")
    calibrate(bank, tokenized(validation.head(CALIBRATION_EXAMPLES), tokenizer, args), tokenizer)
    bank.save_pretrained(out / "bank")
    example = bank.choose_plan("size-first", min(2, bank.shape.largest_ratio))
    small = bank.assemble(example)
    small.save_pretrained(out / "assembled")
    if args.eval_steps is not None:
        curves = {f"eval_{plan}_loss": f"{name} ({plan})" for name, plan in plans.items()}
        plot_curves(trainer.state.log_history, curves, out / "curves.png", title="One training", ylabel="validation loss")

    plans = standard_sizes(bank.shape)
    say(f"Evaluating {len(plans)} plans untrained: layers dropped, nothing learned")
    untrained, untrained_bank = {}, ModularT5ForConditionalGeneration.from_t5(teacher).to(bank.device)
    for name, plan in plans.items():
        with untrained_bank.using(plan):
            texts = texts_of(untrained_bank, tokenizer, sources, args, description=f"Evaluating {name}")
        untrained[str(plan)] = scores_of(texts, targets)

    say(f"Evaluating {len(plans)} sizes, and their speed")
    frontier = measure_frontier(
        bank,
        Pairs(sources, targets),
        tokenizer,
        plans,
        metric="BLEU" if args.teacher else "exact match",
        untrained_scores=untrained,
        max_new_tokens=args.max_target_length,
        max_source_length=args.max_source_length,
        description="Evaluating",
    )
    frontier.plot(out / "bank" / PICTURE_FILE, title="One training, every size")
    seconds = time.perf_counter() - started
    frontier.save(
        out / "bank" / RESULTS_FILE,
        seed=args.seed,
        seconds=round(seconds),
        peak_memory_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),  # Linux counts kilobytes
        targets=args.targets,
        validation_loss=validation_loss,
    )
    told = {
        "results": out / "bank" / RESULTS_FILE,
        "language": [args.source_lang, args.target_lang],
        "datasets": [args.dataset_name] if args.dataset_name else [],
        "dataset_name": args.dataset_name or (Path(args.test_file).name if args.test_file else "amounts and dates in words"),
        "pipeline_tag": "translation",
        "example": sources[0],
    }
    name = f"{args.namespace}/modular-t5-{out.name}"
    cards = {
        "bank": bank_card(bank, name, picture=PICTURE_FILE, training=record, **told),
        "assembled": assembled_card(small, f"{name}-{'-'.join(map(str, example.depths))}", **told),
    }
    for folder, card in cards.items():
        tokenizer.save_pretrained(out / folder)
        card.save(out / folder / "README.md")
    say(f"One training, {len(plans) - 1} sizes; {seconds:.0f} s in all")
    print(frontier.table())
    print(NEXT.format(out=out, name=name, plan=example, source=sources[0].replace('"', "'")))


def load_pairs(args: QuickstartArguments) -> tuple[Pairs, Pairs, Pairs]:
    """Train, validation and test; of one's own training examples, at random, as many as the steps take."""
    splits = dict(load_splits(args))
    taken = args.max_steps * args.batch_size
    if args.teacher and len(splits["train"]) > taken:
        splits["train"] = splits["train"].shuffle(args.seed).select(range(taken))
    languages = (args.source_lang, args.target_lang)
    train, validation, test = (Pairs.of(splits[name], *languages, prefix=args.source_prefix) for name in ("train", "validation", "test"))
    return train, validation, test


def load_splits(args: QuickstartArguments) -> Mapping[str, Dataset]:
    """Of the built-in task, of files, or of a dataset of the Hub."""
    if args.dataset_name:
        return load_dataset(args.dataset_name, args.dataset_config_name)
    if args.train_file:
        return load_dataset("json", data_files={"train": args.train_file, "validation": args.validation_file, "test": args.test_file})
    made = written_numbers.make_splits(train=40_000, validation=500, test=500, seed=args.seed)
    return {name: Dataset.from_list(examples) for name, examples in made.items()}


def tokenized(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, args: QuickstartArguments) -> Dataset:
    return pairs.tokenized(tokenizer, args.max_source_length, args.max_target_length)


def training_arguments(args: QuickstartArguments, steps: int) -> dict[str, Any]:
    """What the training of the teacher and of the bank have in common."""
    return {
        "output_dir": str(Path(args.output_dir) / "training"),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "train_sampling_strategy": "group_by_length",
        "warmup_steps": min(100, steps // 10),
        "logging_steps": max(1, steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": args.seed,
    }


def load_teacher(args: QuickstartArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The user's T5, in float32, which training wants whatever the checkpoint was saved in."""
    teacher = AutoModelForSeq2SeqLM.from_pretrained(args.teacher, dtype=torch.float32)
    return teacher, AutoTokenizer.from_pretrained(args.teacher)


def train_teacher(pairs: Pairs, args: QuickstartArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tokenizer and a T5 for the built-in task, from nothing."""
    english, german = pairs.head(4000)
    tokenizer = written_numbers.train_tokenizer(english + german)
    teacher = T5ForConditionalGeneration(written_numbers.teacher_config(len(tokenizer)))
    # Scaled by each matrix's own size: T5's embeddings start some ten times larger than its layers.
    optimizer = Adafactor(teacher.parameters(), lr=3e-2, scale_parameter=True, relative_step=False)
    Seq2SeqTrainer(
        model=teacher,
        args=Seq2SeqTrainingArguments(**training_arguments(args, args.teacher_steps)),
        train_dataset=tokenized(pairs, tokenizer, args),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=teacher),
        optimizers=(optimizer, None),
    ).train()
    return teacher, tokenizer


def train_bank(
    bank: ModularT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    train: Pairs,
    validation: Pairs,
    plans: Mapping[str, AssemblyPlan],
    args: QuickstartArguments,
) -> ModularTrainer:
    """The one training, with attention and embeddings as in `benchmarks/compare`."""
    trainer = ModularTrainer(
        model=bank,
        args=ModularTrainingArguments(
            **training_arguments(args, args.max_steps),
            learning_rate=args.learning_rate,
            attention_weight=3.0,
            train_embeddings=True,
            per_device_eval_batch_size=args.batch_size,
            eval_plans=[str(plan) for plan in plans.values()],
            eval_strategy="no" if args.eval_steps is None else "steps",
            eval_steps=args.eval_steps,
        ),
        train_dataset=tokenized(train, tokenizer, args),
        eval_dataset=tokenized(validation, tokenizer, args),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def losses_by_plan(trainer: ModularTrainer, plans: Mapping[str, AssemblyPlan]) -> dict[str, float]:
    """Cross-entropy of the validation split under every plan."""
    trainer.remove_callback(ProgressCallback)  # it would print them all
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{plan}_loss"] for name, plan in plans.items()}


def texts_of(
    bank: ModularT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    args: QuickstartArguments,
    *,
    description: str,
    num_beams: int = 1,
) -> list[str]:
    """What the plan that the bank runs makes of sources."""
    lengths = {"max_new_tokens": args.max_target_length, "max_source_length": args.max_source_length}
    return generate_texts(bank, tokenizer, sources, num_beams=num_beams, description=description, **lengths)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
