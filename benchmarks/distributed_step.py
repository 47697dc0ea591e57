"""What averaging gradients over processes costs a step of `ModularTrainer`, paired in one run, on a T5-small-like bank.

    torchrun --nproc_per_node 2 benchmarks/distributed_step.py --output benchmarks/results/DATE-distributed-step.json

DDP all-reduces every parameter of the bank, also those of modules that a step leaves out; the package's hook sends the buckets of running
modules only. `everything` is the same without the hook. `touched` has no search for unused parameters either, and to that end gives each
a gradient of zero (which AdamW, unlike the other two, then acts on). All step in turns on the same batches; on one machine,
gloo copies through its memory, so this is the least that sending can cost.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from training_step import PAPER, SHAPES, WHOLE_TRAINING, random_batches
from transformers import T5Config, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration, ModularTrainer, ModularTrainingArguments
from modular_t5.measuring import environment
from modular_t5.presenting import markdown_table


class SendingEverything(ModularTrainer):
    def _watch_running(self, model: Any, plans: Any) -> None:
        pass


class Touching(SendingEverything):
    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        return loss + sum(0 * parameter.sum() for parameter in model.parameters() if parameter.requires_grad)


TRAINERS = {"running only": ModularTrainer, "everything": SendingEverything, "touched": Touching}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--source_length", type=int, default=64)
    parser.add_argument("--target_length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    teacher = T5ForConditionalGeneration(T5Config(vocab_size=32128, decoder_start_token_id=0, **SHAPES["t5-small"]))
    batches = random_batches(args)
    steppers = {}
    for name, trainer_class in TRAINERS.items():
        arguments = {"output_dir": "out/distributed-step", "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False}
        arguments |= {"max_steps": WHOLE_TRAINING, "learning_rate": 1e-6, "seed": args.seed}
        arguments |= PAPER
        bank = ModularT5ForConditionalGeneration.from_t5(teacher)
        trainer = trainer_class(model=bank, args=ModularTrainingArguments(**arguments))
        trainer.state.max_steps = WHOLE_TRAINING
        trainer.create_optimizer()
        model = DistributedDataParallel(bank, find_unused_parameters=name != "touched")
        steppers[name] = trainer, model, []
    places = [round(index * (WHOLE_TRAINING - 1) / (args.steps - 1)) for index in range(args.steps)]
    for turn, step in enumerate([places[0], places[-1], *places]):
        names = list(steppers)
        for name in names[turn % 3 :] + names[: turn % 3]:
            trainer, model, seconds = steppers[name]
            trainer.state.global_step = step
            trainer.current_gradient_accumulation_steps = 1
            batch = batches[turn % len(batches)]
            torch.distributed.barrier()
            started = time.perf_counter()
            trainer.training_step(model, dict(batch), 2 * (batch["labels"] != -100).sum())
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            trainer.optimizer.step()
            model.zero_grad()
            seconds.append(time.perf_counter() - started)

    if int(os.environ["RANK"]) == 0:
        running = steppers["running only"][0]._running[1]
        rows = [
            {
                "name": name,
                "ms a step": 1e3 * mean(seconds[2:]),
                "of everything's": mean(seconds[2:]) / mean(steppers["everything"][2][2:]),
            }
            for name, (*_, seconds) in steppers.items()
        ]
        sent = running.sent / (running.sent + running.left_out)
        written = {**environment(), "processes": int(os.environ["WORLD_SIZE"]), "arguments": {**vars(args), "output": str(args.output)}}
        args.output.write_text(json.dumps({**written, "seed": args.seed, "share of bytes sent": sent, "rows": rows}, indent=2) + "\n")
        print(markdown_table(list(rows[0]), [[row["name"], *(f"{row[key]:.2f}" for key in list(row)[1:])] for row in rows]))
        print(f"of all bytes, {100 * sent:.0f} % are sent")


if __name__ == "__main__":
    main()
