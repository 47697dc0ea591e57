"""What a step of `ModularTrainer` costs beside a plain distillation step of one model of half the depth, paired in one run.

    python benchmarks/training_step.py --shapes t5-small t5-base --output benchmarks/results/DATE-training-step.json
    python benchmarks/training_step.py --shapes multi30k --teacher DIR --train_file F --output ...     # a teacher and data of your own

The distillation: the teacher forward without gradients, a T5 with every second layer forward and backward, the same three losses
(task, logits, hidden states after every second layer), all of its weights trained. The steps of `ModularTrainer` are spread over a whole
training, so that its plans are those that a user's training draws. All step in turns on the same batches.

Rows between say what each saving brings to a step with one plan of the paper's kind: `everything trains` has gradients for all of the
bank; `frozen teacher` leaves those of the teacher's weights out; `reuse` replays the teacher where a plan begins with it too, as the
package does. The last row is what the package's defaults cost, which run several plans a step.

Memory is what a step allocates at its peak beyond weights, gradients and optimizer state, which are there before it begins: allocations
of torch's operators on the CPU, `torch.cuda.max_memory_allocated` on a GPU. The floor is the step's floating-point operations at the
speed of one large matrix product of the model's widths on the same machine.
"""

import argparse
import copy
import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
import transformers
from datasets import load_dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
)

from modular_t5 import AssemblyPlan, ModularT5ForConditionalGeneration, ModularTrainer, ModularTrainingArguments
from modular_t5.baselines import DistillationTrainer
from modular_t5.comparison_methods import ABLATIONS
from modular_t5.lessons import Lesson
from modular_t5.measuring import environment
from modular_t5.presenting import markdown_table
from modular_t5.training_args import DistillationArguments


SHAPES = {
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12},
}
WHOLE_TRAINING = 10_000  # steps
PAPER = ABLATIONS["modular, paper's sampling"].arguments  # one plan a step, and what else the paper does
GOALS = {"time": 0.9, "memory": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "multi30k"], default=list(SHAPES))
    parser.add_argument("--teacher", help="for multi30k: folder of a T5 and its tokenizer")
    parser.add_argument("--train_file", help="for multi30k: JSON-lines in the Hub's translation format")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--weigh_every", type=int, default=2, help="count memory and operations of each so many of the steps")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--source_length", type=int, default=64, help="longest of a batch; the shortest has a half")
    parser.add_argument("--target_length", type=int, default=32, help="the same")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()

    results = {}
    for shape in args.shapes:
        results[shape] = measured(shape, args)
        written = {**environment(), "seed": args.seed, "arguments": {**vars(args), "output": str(args.output)}, "goals": GOALS}
        args.output.write_text(json.dumps({**written, "finished": len(results) == len(args.shapes), "shapes": results}, indent=2) + "\n")
        print(f"\n{shape}: {results[shape]['batch']}\n{table(results[shape]['rows'])}")


@dataclass
class Stepper:
    """A trainer's steps one by one, as its training loop does them."""

    name: str
    trainer: Seq2SeqTrainer
    setting: Callable[[], Any] = nullcontext
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)

    def forward_and_backward(self, batch: dict[str, torch.Tensor], step: int) -> None:
        self.trainer.state.global_step = step
        self.trainer.current_gradient_accumulation_steps = 1
        items = (batch["labels"] != -100).sum()
        self.trainer.training_step(self.model, dict(batch), items)

    def update(self) -> None:
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.model.zero_grad()

    def time(self, batch: dict[str, torch.Tensor], step: int) -> None:
        synchronize()
        started = time.perf_counter()
        self.forward_and_backward(batch, step)
        self.update()
        synchronize()
        self.seconds.append(time.perf_counter() - started)

    def weigh(self, batch: dict[str, torch.Tensor], step: int) -> None:
        """Peak memory and operations of a step, in a pass of its own."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gc.collect()
        with FlopCounterMode(display=False) as counter, peak_memory() as peak:
            self.forward_and_backward(batch, step)
        self.peaks.append(peak())
        self.operations.append(counter.get_total_flops())
        self.model.zero_grad()


@contextmanager
def without_reuse(bank: ModularT5ForConditionalGeneration, everything_trains: bool) -> Iterator[None]:
    """Every plan from its bottom, and, if asked for, gradients for the teacher's weights too."""
    teachers = [parameter for name, parameter in bank.named_parameters() if ".bank." not in name and everything_trains]
    for parameter in teachers:
        parameter.requires_grad_(True)
    # As where the embeddings are the bank's own: nothing that a plan does is what the teacher did.
    with patch.object(Lesson, "_has_teachers_embeddings", False):
        try:
            yield
        finally:
            for parameter in teachers:
                parameter.requires_grad_(False)
                parameter.grad = None


class AllocationMode(TorchDispatchMode):
    """Bytes of the storages that operators make while it is on, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(torch.Tensor, lambda tensor: self.seen.setdefault(tensor.untyped_storage(), None), (args, kwargs))
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, made)
        return made

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = None
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage.nbytes())

    def freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with AllocationMode() as mode:
            yield lambda: mode.peak


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if shape == "multi30k":
        teacher = T5ForConditionalGeneration.from_pretrained(args.teacher, dtype=torch.float32)
        batches = batches_of_file(args)
    else:
        teacher = T5ForConditionalGeneration(T5Config(vocab_size=32128, decoder_start_token_id=0, **SHAPES[shape]))
        batches = random_batches(args)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    bank = ModularT5ForConditionalGeneration.from_t5(teacher).to(device)
    half = "/".join(f"2x{layers // 2}" for layers in (bank.config.num_layers, bank.config.num_decoder_layers))
    student = bank.assemble(half)

    arguments = {
        **{"output_dir": "out/training-step", "report_to": "none", "save_strategy": "no", "bf16": args.bf16, "learning_rate": 1e-6},
        **{"use_cpu": device == "cpu", "dataloader_pin_memory": False, "max_steps": WHOLE_TRAINING, "seed": args.seed},
    }
    dropping = {**arguments, "module_dropout": True}  # the distillation's student has it too
    ours = ModularTrainer(model=bank, args=ModularTrainingArguments(**dropping, **PAPER))
    defaults = ModularTrainer(model=copy.deepcopy(bank), args=ModularTrainingArguments(**dropping))
    plain = DistillationTrainer(student, DistillationArguments(**arguments), teacher=teacher, plan=AssemblyPlan.from_any(half))
    for trainer in (ours, defaults, plain):
        trainer.state.max_steps = WHOLE_TRAINING
        trainer.create_optimizer()
        for parameter in trainer.model.parameters():  # the optimizer's state, all of it
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trainer.optimizer.step()
        trainer.model.zero_grad()
    steppers = [
        Stepper("distillation", plain),
        Stepper("everything trains", ours, lambda: without_reuse(bank, True)),
        Stepper("frozen teacher", ours, lambda: without_reuse(bank, False)),
        Stepper("reuse", ours),
        Stepper(f"{len(defaults.plans_of_step(0))} plans", defaults),
    ]
    places = [round(index * (WHOLE_TRAINING - 1) / (args.steps - 1)) for index in range(args.steps)]
    for turn, step in enumerate(tqdm([places[0], places[-1], *places], desc=shape)):
        batch = batches[turn % len(batches)]
        for stepper in steppers[turn % len(steppers) :] + steppers[: turn % len(steppers)]:
            with stepper.setting():
                stepper.time(batch, step)
    for stepper in steppers:
        del stepper.seconds[:2]  # warming up
    for turn, step in enumerate(tqdm(places[:: args.weigh_every], desc=f"{shape}, memory and operations")):
        for stepper in steppers:
            with stepper.setting():
                stepper.weigh(batches[turn % len(batches)], step)

    speed = matrix_product_speed(teacher.config, batches[0], args.bf16)
    first = steppers[0]
    rows = [
        {
            "name": stepper.name,
            "ms a step": 1e3 * mean(stepper.seconds),
            "of the distillation's time": mean(stepper.seconds) / mean(first.seconds),
            "operations, GFLOP": mean(stepper.operations) / 1e9,
            "of the distillation's operations": mean(stepper.operations) / mean(first.operations),
            "floor, ms": 1e3 * mean(stepper.operations) / speed,
            "times the floor": mean(stepper.seconds) * speed / mean(stepper.operations),
            "peak memory, MB": mean(stepper.peaks) / 1e6,
            "of the distillation's memory": mean(stepper.peaks) / mean(first.peaks),
            "largest of the distillation's largest": max(stepper.peaks) / max(first.peaks),
            "weights, MB": size(stepper.model.parameters()) + (size(teacher.parameters()) if stepper is first else 0),
            "gradients at most, MB": size(p for p in stepper.model.parameters() if p.requires_grad),
            "optimizer state, MB": size(value for state in stepper.trainer.optimizer.state.values() for value in state.values()),
        }
        for stepper in steppers
    ]
    shapes = {name: list(tensor.shape) for name, tensor in batches[0].items()}
    return {
        "batch": shapes,
        "target tokens a batch": mean(int((batch["labels"] != -100).sum()) for batch in batches),
        "half": half,
        "matrix product, GFLOP/s": speed / 1e9,
        "plans": [str(ours.plans_of_step(step)[0]) for step in places],
        "seconds": {stepper.name: stepper.seconds for stepper in steppers},
        "rows": rows,
    }


def size(tensors: Any) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor)) / 1e6


def random_batches(args: argparse.Namespace, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Tokens at random, lengths from a half to the whole."""

    def ids(longest: int) -> torch.Tensor:
        tokens = torch.randint(2, 32100, (args.batch_size, longest))
        lengths = torch.linspace(longest // 2, longest, args.batch_size).long()
        return tokens.where(torch.arange(longest) < lengths[:, None], -100)

    batches = []
    for _ in range(count):
        sources = ids(args.source_length)
        mask = sources != -100
        batches.append({"input_ids": sources.where(mask, 0), "attention_mask": mask.long(), "labels": ids(args.target_length)})
    return batches


def batches_of_file(args: argparse.Namespace, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """The first sentence pairs, four times the batch size in a batch, for they are short."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    size = 4 * args.batch_size
    pairs = load_dataset("json", data_files=args.train_file, split="train")["translation"][: count * size]
    sources, targets = (list(texts) for texts in zip(*(pair.values() for pair in pairs), strict=True))
    encoded = zip(tokenizer(sources).input_ids, tokenizer(text_target=targets).input_ids, strict=True)
    examples = [{"input_ids": source, "labels": target} for source, target in encoded]
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [dict(collate(examples[start : start + size])) for start in range(0, len(examples), size)]


def matrix_product_speed(config: T5Config, batch: dict[str, torch.Tensor], bf16: bool) -> float:
    """Floating-point operations a second of one product of the widths of the feed-forward."""
    device = batch["input_ids"].device
    dtype = torch.bfloat16 if bf16 else torch.float32
    left = torch.randn(batch["input_ids"].numel(), config.d_model, device=device, dtype=dtype)
    right = torch.randn(config.d_model, config.d_ff, device=device, dtype=dtype)
    seconds = []
    for _ in range(50):
        synchronize()
        started = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * left.numel() * config.d_ff / median(seconds)


def table(rows: list[dict[str, Any]]) -> str:
    header = list(rows[0])
    return markdown_table(header, [[row["name"], *(f"{row[name]:,.2f}" for name in header[1:])] for row in rows])


if __name__ == "__main__":
    main()
