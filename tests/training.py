"""What the tests of training share: a pico task, its trainer, and runs of it in processes of their own."""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from conftest import VOCAB_SIZE, make_teacher
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modular_t5 import ModularT5ForConditionalGeneration, ModularTrainer, ModularTrainingArguments
from modular_t5.lessons import Lesson
from modular_t5.storage_modular_t5 import fingerprint


# Its name until transformers 5.22 or so, and its name since.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in ModularTrainingArguments.__dataclass_fields__
)


def pad(rows, value):
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def collate(examples):
    source = pad([example["input_ids"] for example in examples], 0)
    return {"input_ids": source, "attention_mask": (source != 0).long(), "labels": pad([e["labels"] for e in examples], -100)}


def make_dataset(examples=32):
    """Copy the source, backwards."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (3 + i % 5 for i in range(examples))]
    return Dataset.from_dict({"input_ids": rows, "labels": [[*reversed(row), 1] for row in rows]})


# What `make_trainer` leaves aside for tests of one plan, with the dropout that they look at.
DEFAULTS = {"plans_per_step": None, "plan_sampling": "aligned", "replacing_rate": 1.0, "module_dropout": False}


def make_trainer(folder, *, bank=None, arguments=ModularTrainingArguments, trainer=ModularTrainer, trainer_arguments=None, **changes):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1)) if bank is None else bank
    defaults = {
        "max_steps": 4,
        "plans_per_step": 1,
        "plan_sampling": "mixed",
        "replacing_rate": 0.7,
        "module_dropout": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    defaults = {name: value for name, value in defaults.items() if name in arguments.__dataclass_fields__}
    args = arguments(str(folder), **{**defaults, **changes})
    data = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(8), "data_collator": collate}
    return trainer(**{"model": bank, "args": args, **data, **(trainer_arguments or {})})


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Noting(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, note):
        self.note = note

    def on_step_end(self, *args, **kwargs):
        self.note()


def main():
    """Train for 15 steps with a checkpoint every 3, from the last one if there is one; SIGKILL where told.

    Every process leaves a `result-RANK.json`: the mean loss, the plans that ran, and a digest of the weights.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at-step", type=int)
    parser.add_argument("--kill-in-checkpoint", type=int)
    parser.add_argument("--teacher", type=json.loads, default={}, help="changes of its configuration, as JSON")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of the trainer, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Killing(TrainerCallback):
        def on_step_end(self, training_args, state, *rest, **kwargs):
            is_last_process = training_args.process_index == training_args.world_size - 1
            if state.global_step == args.kill_at_step and is_last_process:
                die()

    class KilledTrainer(ModularTrainer):
        def _save_rng_state(self, output_dir):
            if self.state.global_step == args.kill_in_checkpoint:
                die()
            super()._save_rng_state(output_dir)

    changes = {
        "plans_per_step": 2,
        "plan_sampling": "aligned",
        "max_steps": 15,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        **args.arguments,
    }
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(**{"dropout_rate": 0.1, **args.teacher}))
    trainer = make_trainer(args.folder, bank=bank, trainer=KilledTrainer, trainer_arguments={"callbacks": [Killing]}, **changes)
    args.folder.mkdir(parents=True, exist_ok=True)
    plans, loss_terms = [], Lesson.loss_terms
    Lesson.loss_terms = lambda lesson, plan: plans.append(str(plan)) or loss_terms(lesson, plan)
    trained = trainer.train(resume_from_checkpoint=get_last_checkpoint(args.folder))
    result = {
        "train_loss": trained.training_loss,
        "plans": plans,
        "processes": trainer.accelerator.num_processes,
        "kind": str(trainer.accelerator.distributed_type),
        "bytes": None if trainer._running is None else [trainer._running[1].sent, trainer._running[1].left_out],
        "weights": fingerprint(dict(trainer.bank.named_parameters())),
    }
    (args.folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
