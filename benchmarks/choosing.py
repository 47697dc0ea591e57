"""Does a calibrated choice hold on texts that it was not made on, and is the latency that is foreseen the one that is measured?

    python benchmarks/choosing.py --bank DIR --calibration_file validation.jsonl --test_file test.jsonl --source_lang en --target_lang de \
        --output benchmarks/results/DATE-choosing.json

Quality: the bank is calibrated on one file; under each of ten budgets every strategy chooses, and what it chose is measured on the other
file: divergence from the teacher, in nats a token, and BLEU, greedily. Speed: a few plans are timed, and foresee what others take: timed in
turns with them, so that only the split into parts can be wrong, and timed before them, as a user does, so that whatever the machine does
meanwhile counts too.
"""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from modular_t5 import AssemblyPlan, Latency, ModularT5ForConditionalGeneration, calibrate, measure_latency
from modular_t5.assembly_modular_t5 import SIDES, tilings
from modular_t5.calibration import divergences
from modular_t5.choosing_modular_t5 import STRATEGIES
from modular_t5.latency import fitted, timed_plans
from modular_t5.measuring import environment, generate_texts, median_seconds, write_json
from modular_t5.pairs import Pairs, scores_of, signatures
from modular_t5.presenting import markdown_table


RATIOS = (1.2, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0)
REQUESTS = ({"batch_size": 1}, {"batch_size": 16}, {"batch_size": 1, "num_beams": 4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--bank", required=True, help="folder or Hub id of a bank with its tokenizer")
    parser.add_argument("--calibration_file", required=True, help="JSON lines in the Hub's translation format")
    parser.add_argument("--test_file", required=True, help="the same")
    parser.add_argument("--source_lang", required=True)
    parser.add_argument("--target_lang", required=True)
    parser.add_argument("--examples", type=int, default=400, help="to calibrate on")
    parser.add_argument("--max_length", type=int, default=64, help="in tokens")
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    bank, tokenizer = ModularT5ForConditionalGeneration.from_pretrained(args.bank), AutoTokenizer.from_pretrained(args.bank)
    calibration, test = (Pairs.read(file, args.source_lang, args.target_lang) for file in (args.calibration_file, args.test_file))
    results: dict[str, Any] = {**environment(), "arguments": {name: str(value) for name, value in vars(args).items()}}

    results["latency"] = [latencies(bank, request, args.rounds) for request in REQUESTS]
    print(latency_table(results["latency"]), flush=True)
    rows = calibration.head(args.examples).tokenized(tokenizer, args.max_length, args.max_length)
    scores = calibrate(bank, rows, tokenizer)
    chosen = {ratio: {strategy: bank.choose_plan(strategy, ratio) for strategy in STRATEGIES} for ratio in RATIOS}
    plans = sorted({plan for of_ratio in chosen.values() for plan in of_ratio.values()}, key=str)
    held_out = divergences(bank, test.tokenized(tokenizer, args.max_length, args.max_length), tokenizer, plans)
    measured = {}
    for plan in plans:
        with bank.using(plan):
            texts = generate_texts(bank, tokenizer, test.sources, max_new_tokens=args.max_length, description=str(plan))
        measured[str(plan)] = {"divergence": held_out[plan], "BLEU": scores_of(texts, test.targets)["BLEU"]}
    results |= {
        "plans_measured_to_calibrate": len(scores.plans),
        "metrics": signatures()["BLEU"],
        "chosen": [{"ratio": ratio, **{strategy: str(plan) for strategy, plan in of.items()}} for ratio, of in chosen.items()],
        "plans": measured,
    }
    write_json(args.output, results)
    print(quality_table(results))


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
        seconds = median_seconds(tasks, rounds=rounds, description="Checking")
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


def quality_table(results: dict[str, Any]) -> str:
    """Markdown: of each strategy the plan, its divergence on the test file in thousandths of a nat, and its BLEU."""
    strategies = list(STRATEGIES)
    rows = []
    for of in results["chosen"]:
        cells = [f"{of['ratio']:g}x"]
        for strategy in strategies:
            measured = results["plans"][of[strategy]]
            cells.append(f"{of[strategy]}: {1000 * measured['divergence']:.1f}, {measured['BLEU']:.2f}")
        rows.append(cells)
    return markdown_table(["budget", *strategies], rows)


if __name__ == "__main__":
    main()
