"""Measuring models: what they say, how long that takes, and what a measurement must say of where it was made."""

import datetime
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase


_SECRET = re.compile("token|secret|password|key", re.IGNORECASE)


def _command() -> str:
    """The command line, without folders of this machine and secrets."""
    words, secret = ["python"], False
    for word in sys.argv:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if value and (secret or (equals and _SECRET.search(option))):
            value = "***"
        elif os.path.isabs(value):
            value = os.path.basename(value)
        words.append(option + equals + value)
        secret = bool(_SECRET.search(option)) and not equals
    return shlex.join(words)


def environment() -> dict[str, Any]:
    """What a measurement must say of where it was made: command, date, hardware and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), processor
        )
    hardware = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    return {
        "command": _command(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("modular_t5", "torch", "transformers")}},
    }


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, a model is in evaluation mode; afterwards every part is in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# Of an example, what a T5 reads.
_COLUMNS = ("input_ids", "attention_mask", "labels")


def labelled_batches(
    model: PreTrainedModel, dataset: Sequence[Mapping[str, Any]], processing_class: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Padded, of examples of like length, on the CPU; a `ValueError` if there are none, or one has no labels or other tokens."""
    rows = [{name: row[name] for name in _COLUMNS if name in row} for row in dataset]
    if not rows or not all("input_ids" in row and any(label != -100 for label in row.get("labels") or ()) for row in rows):
        told = "one has no input_ids or no labels" if rows else "there are none"
        raise ValueError(f"tokenized examples are needed, each with labels; {told}")
    largest = max(max((*row["input_ids"], *row["labels"]), default=0) for row in rows)
    if largest >= model.config.vocab_size:
        raise ValueError(f"an example has token {largest}, the model {model.config.vocab_size} tokens: tokenize with the model's tokenizer")
    rows.sort(key=lambda row: len(row["labels"]))
    collator = DataCollatorForSeq2Seq(processing_class, model=model)
    return [{**batch} for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator)]


def on_device(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The batch where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.inference_mode()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_source_length: int = 512,
    description: str | None = None,
    **generate_arguments: Any,
) -> list[str]:
    """What the model makes of every source, in their order; batches hold sources of like length.

    Args:
        max_new_tokens, max_source_length: in tokens.
        description: of the progress bar; none without it.
        generate_arguments: for `model.generate`; greedy search by default.
    """
    generate_arguments = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **generate_arguments}
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    texts = [""] * len(sources)
    with tqdm(total=len(sources), desc=description, disable=description is None, leave=False) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            inputs = tokenizer(
                [sources[i] for i in batch], return_tensors="pt", padding=True, truncation=True, max_length=max_source_length
            ).to(model.device)
            outputs = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **generate_arguments)
            for i, text in zip(batch, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
                texts[i] = text
            bar.update(len(batch))
    return texts


def lower_quartile(times: Sequence[float]) -> float:
    """Of nine times the third, of five the second: what a task takes where little else goes on, for that only adds."""
    return sorted(times)[(len(times) - 1) // 4]


def measure_seconds(
    tasks: Sequence[Callable[[], Any]],
    *,
    rounds: int,
    counts: Callable[[Sequence[float]], float] = median,
    between: Callable[[], Any] | None = None,
    description: str | None = None,
) -> list[float]:
    """What each of the tasks takes.

    They take turns within every round, each round begun by the next of them, so that what else the machine does meets all alike. One
    round more warms up.

    Args:
        counts: of the times of a task's rounds, the one that counts.
        between: run after every task, when what the task returned is gone; not timed.
        description: of the progress bar; none without it.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    for repetition in tqdm(range(rounds + 1), desc=description, disable=description is None, leave=False):
        for turn in range(len(tasks)):
            i = (turn + repetition) % len(tasks)
            start = time.perf_counter()
            result = tasks[i]()
            elapsed = time.perf_counter() - start
            del result
            if between is not None:
                between()
            if repetition:
                seconds[i].append(elapsed)
    return [counts(times) for times in seconds]


@torch.inference_mode()
def measure_speed(
    models: Sequence[PreTrainedModel], inputs: dict[str, torch.Tensor], *, new_tokens: int, rounds: int = 5, description: str | None = None
) -> list[float]:
    """Greedy tokens a second of each model (`measure_seconds`), target tokens of the whole batch counted, all forced to the same length."""
    arguments = {"do_sample": False, "num_beams": 1, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    tasks = [partial(model.generate, **inputs, **arguments) for model in models]
    seconds = measure_seconds(tasks, rounds=rounds, description=description)
    return [new_tokens * len(inputs["input_ids"]) / of_one for of_one in seconds]
