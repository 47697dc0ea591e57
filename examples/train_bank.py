"""Train, evaluate and run a module bank on one of the paper's tasks; `tasks.py` holds the tasks.

With a T5-base, one command a task. A teacher must be fine-tuned on the task: T5's pretraining included CNN/DailyMail and WMT14, the Hub has
T5s for question generation, and for XSum give your own.

    python examples/train_bank.py --task cnn_dailymail --teacher google-t5/t5-base --output_dir out/cnn_dailymail \
        --do_train --do_eval --do_predict --predict_with_generate --max_eval_samples 1000 --bf16 \
        --learning_rate 3e-4 --num_train_epochs 3 --per_device_train_batch_size 16 --gradient_accumulation_steps 2

    python examples/train_bank.py --task xsum --teacher DIR_OR_HUB_ID --output_dir out/xsum \
        --do_train --do_eval --do_predict --predict_with_generate --max_eval_samples 1000 --bf16 \
        --learning_rate 3e-4 --num_train_epochs 3 --per_device_train_batch_size 16 --gradient_accumulation_steps 2

    python examples/train_bank.py --task squad_qg --teacher lmqg/t5-base-squad-qg --output_dir out/squad_qg \
        --do_train --do_eval --do_predict --predict_with_generate --max_eval_samples 1000 --bf16 \
        --learning_rate 3e-4 --num_train_epochs 5 --per_device_train_batch_size 32

    python examples/train_bank.py --task wmt14_en_de --teacher google-t5/t5-base --output_dir out/wmt14_en_de \
        --do_train --do_eval --do_predict --predict_with_generate --max_eval_samples 1000 --bf16 \
        --learning_rate 3e-4 --max_steps 50000 --per_device_train_batch_size 64

For a T5-large change the teacher (`google-t5/t5-large`, `lmqg/t5-large-squad-qg`), `--learning_rate 1e-4`, and a quarter of the batch with
four times the `--gradient_accumulation_steps`.

These were run on small files and small models only, never on the full datasets: learning rates, steps and batches are starting points,
not tuned. Scores are of the labels as the model sees them, cut to the task's length, as in transformers' own example scripts.

- Files take the dataset's place: `--train_file`, `--validation_file`, `--test_file`, each JSON (a line an example) or CSV, with the
  dataset's columns. A CSV cannot nest: there it is `en,de` for `translation` and `answer,answer_start` for `answers`.
- `--eval_plans 1x12/1x12 2x6/2x6 ...` says which sizes are evaluated; `--help` lists the rest. All arguments may be in a JSON or YAML file
  instead: `python examples/train_bank.py arguments.json`.
- The same command again continues from the last checkpoint in `--output_dir`. Without `--do_train` it evaluates the bank that is there.
"""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value, load_dataset
from peft import LoraConfig
from tasks import TASKS, Task, load_metric, read_texts
from torch import nn
from transformers import AutoTokenizer, EvalPrediction, HfArgumentParser, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modular_t5 import ModularT5ForConditionalGeneration, ModularTrainer, ModularTrainingArguments
from modular_t5.presenting import markdown_table


FILE_TYPES = (".json", ".jsonl", ".csv")


@dataclass
class RecipeArguments:
    """What to train on what. An argument of None is the task's."""

    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    teacher: str | None = field(default=None, metadata={"help": "Folder or Hub id of a T5 fine-tuned on the task; to train."})
    granularities: list[int] | None = field(
        default=None, metadata={"help": "How many layers a module may stand in for; those of 2, 3, 4, 6 that fit by default."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train low-rank additions to the modules, of this rank, by PEFT."})
    train_file: str | None = field(default=None, metadata={"help": "JSON or CSV with the dataset's columns, in its place."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for --do_eval."})
    test_file: str | None = field(default=None, metadata={"help": "The same, for --do_predict."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Only the first so many; all by default."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Only the first so many; all by default."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Only the first so many; all by default."})
    max_source_length: int | None = field(default=None, metadata={"help": "In tokens; longer sources are cut."})
    max_target_length: int | None = field(default=None, metadata={"help": "In tokens; longer targets are cut, and generation stops."})
    source_prefix: str | None = field(default=None, metadata={"help": "Put before every source; '' for none."})
    num_beams: int | None = field(default=None, metadata={"help": "For generation."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that read and tokenize."})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; choose one of {', '.join(TASKS)}")
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for file in filter(None, self.files.values()):
            if Path(file).suffix not in FILE_TYPES:
                raise ValueError(f"cannot tell the type of {file!r} from its ending; use one of {', '.join(FILE_TYPES)}")

    @property
    def files(self) -> dict[str, str | None]:
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}

    @property
    def max_samples(self) -> dict[str, int | None]:
        return {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Do what the arguments ask, those of the command line by default; returns all metrics."""
    recipe, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    task = TASKS[recipe.task]
    set_seed(args.seed)
    bank, tokenizer = load_bank(recipe, args)
    bank.generation_config.update(**decoding(task, recipe))
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = {name: tokenized(task, name, tokenizer, recipe, args) for name, is_wanted in wanted.items() if is_wanted}

    trainer = ModularTrainer(
        model=bank,
        args=args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        compute_metrics=scoring(task, tokenizer) if args.predict_with_generate else None,
        peft_config=lora_config(bank, recipe.lora_rank) if args.do_train and recipe.lora_rank is not None else None,
    )
    metrics = {}
    if args.do_train:
        metrics |= train(trainer)
    if args.do_eval:
        metrics |= evaluate(trainer)
    if args.do_predict:
        metrics |= predict(trainer, splits["test"], tokenizer, task)
    return metrics


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, ModularTrainingArguments]:
    """From the command line, or from the one JSON or YAML file that it names.

    Raises:
        ValueError: nothing to do, or something that what is to be done needs is missing.
    """
    parser = HfArgumentParser((RecipeArguments, ModularTrainingArguments))
    if len(argv) == 1 and argv[0].endswith(".json"):
        recipe, args = parser.parse_json_file(argv[0])
    elif len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        recipe, args = parser.parse_yaml_file(argv[0])
    else:
        recipe, args = parser.parse_args_into_dataclasses(argv)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do; give --do_train, --do_eval or --do_predict")
    if args.do_train and recipe.teacher is None:
        raise ValueError("--do_train needs a --teacher: the folder or Hub id of a T5 fine-tuned on the task")
    if args.do_predict and not args.predict_with_generate:
        raise ValueError("--do_predict writes out what the bank generates; add --predict_with_generate")
    return recipe, args


def load_bank(recipe: RecipeArguments, args: ModularTrainingArguments) -> tuple[ModularT5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """To train, a new bank around the teacher; else the one that a training left. In float32, which training wants."""
    if args.do_train:
        bank = ModularT5ForConditionalGeneration.from_t5(recipe.teacher, recipe.granularities, dtype=torch.float32)
        return bank, AutoTokenizer.from_pretrained(recipe.teacher)
    if not (Path(args.output_dir) / "config.json").exists():
        raise ValueError(f"there is no bank in {args.output_dir} to evaluate; add --do_train, or give the --output_dir of a training")
    return ModularT5ForConditionalGeneration.from_pretrained(args.output_dir), AutoTokenizer.from_pretrained(args.output_dir)


def decoding(task: Task, recipe: RecipeArguments) -> dict[str, Any]:
    """The task's arguments of `generate`, under what the recipe overrides."""
    generation = {**task.generation, "max_length": recipe.max_target_length or task.max_target_length}
    if "min_length" in generation:
        generation["min_length"] = min(generation["min_length"], generation["max_length"] - 1)
    if recipe.num_beams is not None:
        generation["num_beams"] = recipe.num_beams
    if generation["num_beams"] == 1:
        # They mean something to beams only, and a configuration that has them without is refused when it is saved.
        generation |= {"length_penalty": 1.0, "early_stopping": False}
    return generation


def load_split(task: Task, name: str, recipe: RecipeArguments) -> tuple[Dataset, str]:
    """A split of the user's files, or, if there are none, of the Hub; and what to call it in messages.

    Raises:
        ValueError: files are given, but not for this split.
    """
    if not any(recipe.files.values()):
        split = task.test_split if name == "test" else name
        return load_dataset(task.dataset, task.config, split=split), f"split {split} of {task.dataset}"
    file = recipe.files[name]
    if file is None:
        raise ValueError(f"--{name}_file is missing; a split that is used needs a file where another has one")
    if Path(file).suffix != ".csv":
        return load_dataset("json", data_files=file, split="train"), file
    # All text, as it stands: pandas would read 007 as a number and NA as nothing.
    with open(file, newline="", encoding="utf-8-sig") as lines:
        features = Features(dict.fromkeys(next(csv.reader(lines), []), Value("string")))
    return load_dataset("csv", data_files=file, split="train", features=features, keep_default_na=False), file


def tokenized(
    task: Task, name: str, tokenizer: PreTrainedTokenizerBase, recipe: RecipeArguments, args: ModularTrainingArguments
) -> Dataset:
    """A split as the trainer takes it."""
    max_source_length = recipe.max_source_length or task.max_source_length
    max_target_length = recipe.max_target_length or task.max_target_length
    num_proc = recipe.preprocessing_num_workers

    def tokenize(texts: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sources = tokenizer(texts["source"], max_length=max_source_length, truncation=True)
        targets = tokenizer(text_target=texts["target"], max_length=max_target_length, truncation=True)
        return {"input_ids": sources.input_ids, "labels": targets.input_ids}

    with args.main_process_first(desc=f"reading {name}"):
        split, where = load_split(task, name, recipe)
        if (most := recipe.max_samples[name]) is not None:
            split = split.select(range(min(most, len(split))))
        prefix = task.prefix if recipe.source_prefix is None else recipe.source_prefix
        texts = read_texts(task, split, where, prefix, num_proc)
        return texts.map(tokenize, batched=True, num_proc=num_proc, remove_columns=texts.column_names, desc=f"Tokenizing {where}")


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of generated ids or labels, in which -100 is padding."""
    ids = np.where(ids != -100, ids, tokenizer.pad_token_id)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def scoring(task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """The trainer's `compute_metrics`: the task's scores, and how many tokens were generated a text."""
    metrics = {load_metric(name): scores for name, scores in task.metrics.items()}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions, references = decode(prediction.predictions, tokenizer), decode(prediction.label_ids, tokenizer)
        computed = {}
        for metric, scores in metrics.items():
            values = metric(predictions, references)
            computed |= {score: values[score] for score in scores}
        is_token = (prediction.predictions != -100) & (prediction.predictions != tokenizer.pad_token_id)
        return {**computed, "gen_len": float(is_token.sum(axis=1).mean())}

    return compute_metrics


def lora_config(bank: ModularT5ForConditionalGeneration, rank: int) -> LoraConfig:
    """LoRA on every matrix of a block: attention's q, k, v and o, and the feed-forward's, whatever its kind calls them."""
    matrices = {name.rpartition(".")[2] for name, module in bank.encoder.named_modules() if isinstance(module, nn.Linear)}
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(matrices))


def train(trainer: ModularTrainer) -> dict[str, float]:
    """Train, from the last checkpoint if there is one, and leave bank, tokenizer and metrics in the output folder."""
    args = trainer.args
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and Path(args.output_dir).is_dir():
        checkpoint = get_last_checkpoint(args.output_dir)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    return metrics


def evaluate(trainer: ModularTrainer) -> dict[str, float]:
    """Loss and scores of the validation split."""
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(trainer.eval_dataset)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def predict(trainer: ModularTrainer, split: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, float]:
    """Loss, scores and texts of the test split under every plan that `evaluate` runs; the table is printed."""
    bank = trainer.bank
    metrics, texts, rows = {"predict_samples": len(split)}, {}, []
    for plan in trainer.eval_plans or (bank.plan,):
        prefix = f"predict_{plan}"
        with bank.using(plan):
            output = trainer.predict(split, metric_key_prefix=prefix)
        report = bank.report(plan)
        metrics |= {**output.metrics, f"{prefix}_parameters": report.total_parameters, f"{prefix}_layer_ratio": report.layer_ratio}
        # Several processes fill up their last batches with examples from the start, which come back at the end.
        texts[str(plan)] = decode(output.predictions[: len(split)], tokenizer)
        scores = [f"{output.metrics[f'{prefix}_{score}']:.2f}" for score in task.scores]
        rows.append([str(plan), f"{report.total_parameters:,}", f"{report.layer_ratio:.2f}x", *scores])
    trainer.save_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        print(markdown_table(["plan", "parameters", "ratio", *task.scores], rows))
        write_predictions(Path(trainer.args.output_dir) / "predictions.jsonl", texts)
    return metrics


def write_predictions(path: Path, texts: dict[str, list[str]]) -> None:
    """A line a test example: `{plan: text}`."""
    with path.open("w", encoding="utf-8") as file:
        for example in zip(*texts.values(), strict=True):
            file.write(json.dumps(dict(zip(texts, example, strict=True)), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
