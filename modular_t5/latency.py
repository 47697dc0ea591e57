"""What generating takes on this machine: a few sizes of a bank are timed, and predict every plan."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .assembly_modular_t5 import SIDES, AssemblyPlan, is_integer, is_number
from .choosing_modular_t5 import Latency
from .measuring import environment, lower_quartile, measure_seconds, write_json
from .modeling_modular_t5 import ModularT5ForConditionalGeneration


@torch.inference_mode()
def measure_latency(
    bank: ModularT5ForConditionalGeneration,
    *,
    batch_size: int = 1,
    source_length: int = 32,
    target_length: int = 32,
    num_beams: int = 1,
    rounds: int = 5,
    file: str | os.PathLike | None = None,
    description: str | None = None,
) -> Latency:
    """Time what `generate` takes for one batch, and split it into a part for each block of a side and the rest.

    Five plans are timed in turns: both sides at their deepest and at their shallowest, in all combinations, and one between. Least squares
    of relative errors give the three parts; blocks of a side cost alike, whatever they stand for.

    Args:
        batch_size: sources at a time.
        source_length, target_length: in tokens; every source is so long, and so many tokens are generated for each.
        num_beams: of beam search; 1 is greedy search.
        rounds: of which the lower quartile counts, what is taken where the machine does little else.
        file: where measurements are kept. One of the same request, model, hardware and versions is taken from there, a new one added.
        description: of a progress bar; none without it.

    Raises:
        ValueError: a number is not a positive integer, or the file holds something else.
    """
    request = {"batch_size": batch_size, "source_length": source_length, "target_length": target_length, "num_beams": num_beams}
    for name, value in {**request, "rounds": rounds}.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    told = environment()
    config = bank.config
    made = {
        "hardware": told["hardware"],
        "versions": told["versions"],
        "counts": lower_quartile.__name__,
        "request": {**request, "dtype": str(bank.dtype).removeprefix("torch."), "device": bank.device.type},
        "model": {name: getattr(config, name) for name in _DIMENSIONS} | {"attention": bank.encoder.config._attn_implementation},
        "generation": bank.generation_config.to_diff_dict(),
    }
    kept = _read(file) if file is not None else []
    for entry in kept:
        if made.items() <= entry.items():
            return Latency(entry["base_ms"], entry["block_ms"], entry["hardware"], entry["request"])
    plans = timed_plans(bank)
    models = [bank.assemble(plan, share_weights=not config.lora) for plan in plans]
    torch_random = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, config.vocab_size, (batch_size, source_length), generator=torch_random).to(bank.device)
    arguments = {"do_sample": False, "num_beams": num_beams, "min_new_tokens": target_length, "max_new_tokens": target_length}
    arguments |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    tasks = [partial(model.generate, **arguments) for model in models]
    seconds = measure_seconds(tasks, rounds=rounds, counts=lower_quartile, description=description)
    base, *blocks = fitted(plans, seconds)
    latency = Latency(base, dict(zip(SIDES, blocks, strict=True)), told["hardware"], made["request"])
    if file is not None:
        entry = {
            **made,
            "date": told["date"],
            **asdict(latency),
            "measured_ms": {str(p): 1000 * s for p, s in zip(plans, seconds, strict=True)},
        }
        write_json(file, [*kept, entry])
    return latency


# Of a T5, what the cost of a block and of the rest depends on.
_DIMENSIONS = ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size", "feed_forward_proj")


def timed_plans(bank: ModularT5ForConditionalGeneration) -> list[AssemblyPlan]:
    """The plans that `measure_latency` times."""
    depths = {}
    for side, tilings in bank.shape.canonical.items():
        of_side = list(tilings.values())
        depths[side] = [of_side[0], of_side[-1], of_side[len(of_side) // 2]]
    (deep, shallow, middle), (decoder_deep, decoder_shallow, decoder_middle) = (depths[side] for side in SIDES)
    pairs = [(deep, decoder_deep), (deep, decoder_shallow), (shallow, decoder_deep), (shallow, decoder_shallow), (middle, decoder_middle)]
    return [AssemblyPlan(encoder, decoder) for encoder, decoder in pairs]


def fitted(plans: list[AssemblyPlan], seconds: list[float]) -> list[float]:
    """Milliseconds of the rest, of an encoder block and of a decoder block, none below zero; least squares of relative errors."""
    measured = 1000 * torch.tensor(seconds, dtype=torch.float64)
    counts = torch.tensor([[1, *plan.depths] for plan in plans], dtype=torch.float64)
    rows = counts / measured[:, None]
    parts = list(range(3))
    while True:
        fit = torch.linalg.lstsq(rows[:, parts], torch.ones(len(plans), 1, dtype=torch.float64)).solution.flatten()
        if fit.min() >= 0:
            break
        parts.remove(parts[int(fit.argmin())])  # what is nothing but noise explains nothing; the others do, without it
    solution = torch.zeros(3, dtype=torch.float64)
    solution[parts] = fit
    return solution.tolist()


def _read(file: str | os.PathLike) -> list[Mapping[str, Any]]:
    """The measurements in a file; none if there is none."""
    if not Path(file).exists():
        return []
    try:
        kept = json.loads(Path(file).read_text(encoding="utf-8"))
        for entry in kept if isinstance(kept, list) else [None]:
            numbers = [entry["base_ms"], *(entry["block_ms"][side] for side in SIDES)]
            if not all(map(is_number, numbers)) or not {"hardware", "request"} <= entry.keys():
                raise ValueError("a measurement lacks a part")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not what measure_latency keeps ({error!r})") from error
    return kept
