"""Is the latency that is foreseen of a size the one that is measured?

    python benchmarks/latency.py --bank DIR --output benchmarks/results/DATE-latency.json

Five plans are timed, and foresee what others take: timed in turns with them, so that only the split into parts can be wrong, and timed
before them, as a user does, so that whatever the machine does meanwhile counts too. Others are the plans of size-first and speed-first, and
as many of any tilings, at random.
"""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from modular_t5 import AssemblyPlan, Latency, ModularT5ForConditionalGeneration, measure_latency
from modular_t5.assembly_modular_t5 import SIDES, tilings
from modular_t5.latency import fitted, timed_plans
from modular_t5.measuring import environment, lower_quartile, measure_seconds, write_json
from modular_t5.presenting import markdown_table


REQUESTS = ({"batch_size": 1}, {"batch_size": 16}, {"batch_size": 1, "num_beams": 4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--bank", required=True, help="folder or Hub id of a bank")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    bank = ModularT5ForConditionalGeneration.from_pretrained(args.bank)
    results: dict[str, Any] = {**environment(), "arguments": {name: str(value) for name, value in vars(args).items()}}
    results["latency"] = [latencies(bank, request, args.rounds) for request in REQUESTS]
    write_json(args.output, results)
    print(latency_table(results["latency"]))


def latencies(bank: ModularT5ForConditionalGeneration, request: dict[str, int], rounds: int) -> dict[str, Any]:
    """What is foreseen of plans, and what they take: by a latency that was measured before, and by one of the same rounds."""
    latency = measure_latency(bank, **request, rounds=rounds, description="Timing")
    told = latency.request
    shape = bank.shape
    timed = timed_plans(bank)
    plans = [plan for plan in dict.fromkeys([*shape.plans("size-first"), *shape.plans("speed-first")]) if plan not in timed]
    # And as many others, of any tilings.
    sides = [list(tilings(shape.num_layers[side], shape.granularities[side])) for side in SIDES]
    plans += [AssemblyPlan(*map(random.Random(number).choice, sides)) for number in range(len(plans))]
    ids = torch.randint(3, bank.config.vocab_size, (told["batch_size"], told["source_length"]), generator=torch.Generator().manual_seed(1))
    length = {"min_new_tokens": told["target_length"], "max_new_tokens": told["target_length"]}
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "num_beams": told["num_beams"], **length}
    tasks = [partial(bank.assemble(plan, share_weights=True).generate, **arguments) for plan in [*timed, *plans]]
    with torch.inference_mode():
        seconds = measure_seconds(tasks, rounds=rounds, counts=lower_quartile, description="Checking")
    base_ms, *block_ms = fitted(timed, seconds[: len(timed)])
    paired = Latency(base_ms, dict(zip(SIDES, block_ms, strict=True)))
    rows = []
    for plan, measured in zip(plans, seconds[len(timed) :], strict=True):
        row = {"plan": str(plan), "measured_ms": 1000 * measured}
        for name, foreseen in (("paired", paired.of(plan)), ("before", latency.of(plan))):
            row |= {f"{name}_ms": foreseen, f"{name}_error_percent": 100 * (foreseen / row["measured_ms"] - 1)}
        rows.append(row)
    parts = {name: {"base_ms": of.base_ms, "block_ms": dict(of.block_ms)} for name, of in (("paired", paired), ("before", latency))}
    return {"request": told, **parts, "plans": rows}


def latency_table(latencies: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = []
    for of in latencies:
        cells = [f"batch {of['request']['batch_size']}, {of['request']['num_beams']} beams", str(len(of["plans"]))]
        for name in ("paired", "before"):
            errors = sorted(abs(row[f"{name}_error_percent"]) for row in of["plans"])
            cells += [f"{errors[len(errors) // 2]:.1f} %", f"{errors[-1]:.1f} %"]
        rows.append(cells)
    return markdown_table(["request", "plans", "same rounds, median error", "largest", "measured before, median error", "largest"], rows)


if __name__ == "__main__":
    main()
