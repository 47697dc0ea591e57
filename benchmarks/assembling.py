"""What choosing and assembling a size costs, and whether anything is lost in speed, on a randomly initialised T5-base-sized bank.

    python benchmarks/assembling.py --output benchmarks/results/DATE-assembling.json

Every ratio compares things that took turns within this one run; the median counts. Speeds are compared on the same tensors in memory,
for where tensors lie moves them by some per cent.
"""

import argparse
import gc
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

from modular_t5 import ModularT5Config, ModularT5ForConditionalGeneration
from modular_t5.measuring import environment, measure_seconds, measure_speed
from modular_t5.presenting import markdown_table


# T5-base
SHAPE = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "decoder_start_token_id": 0,
}
SIZES = {"12-12": "1x12/1x12", "12-6": "1x12/2x6", "6-6": "2x6/2x6", "12-3": "1x12/4x3", "3-3": "4x3/4x3", "2-2": "6x2/6x2"}
GOALS = {
    "set_plan, ms": (0, 1),
    "assemble(share_weights=True), ms": (0, 100),
    "assemble() / copying the same bytes": (0, 1.5),
    "tokens/s: bank under a plan / assembled": (0.97, 1.03),
    "tokens/s: assembled / built by hand": (0.97, 1.03),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--source_length", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)

    bank = ModularT5ForConditionalGeneration(ModularT5Config(**SHAPE)).eval()
    ids = torch.randint(2, SHAPE["vocab_size"], (args.batch_size, args.source_length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    figures: dict[str, float] = {}

    plans = list(SIZES.values())
    turns = cycle(plans)
    (figures["set_plan, ms"],) = medians_ms([lambda: bank.set_plan(next(turns))], rounds=100)
    (figures["assemble(share_weights=True), ms"],) = medians_ms([lambda: bank.assemble(next(turns), share_weights=True)], rounds=10)

    copying = {}
    for name, plan in tqdm(SIZES.items(), desc="assemble()"):
        tensors = list(bank.assemble(plan, share_weights=True).parameters())
        tasks = [lambda plan=plan: bank.assemble(plan), lambda tensors=tensors: [t.detach().clone() for t in tensors]]
        ours, plain = medians_ms(tasks, rounds=31)
        copying[name] = {"assemble_ms": ours, "copy_ms": plain, "ratio": ours / plain}
    figures["assemble() / copying the same bytes"] = max(size["ratio"] for size in copying.values())

    in_place, by_hand = {}, {}
    for name, plan in SIZES.items():
        bank.set_plan(plan)
        assembled = bank.assemble(plan, share_weights=True)
        encoder, decoder = bank.plan.depths
        hand = T5ForConditionalGeneration(T5Config(**{**SHAPE, "num_layers": encoder, "num_decoder_layers": decoder})).eval()
        hand.load_state_dict(assembled.state_dict(), assign=True)
        speeds = measure_speed([bank, assembled, hand], inputs, new_tokens=args.new_tokens, rounds=args.rounds, description=name)
        in_place[name], by_hand[name] = speeds[0] / speeds[1], speeds[1] / speeds[2]
    figures["tokens/s: bank under a plan / assembled"] = farthest_from_one(in_place)
    figures["tokens/s: assembled / built by hand"] = farthest_from_one(by_hand)

    models = [bank.assemble(plan, share_weights=True) for plan in plans]
    speeds = dict(
        zip(SIZES, measure_speed(models, inputs, new_tokens=args.new_tokens, rounds=args.rounds, description="sizes"), strict=True)
    )

    verdicts = {name: low <= figures[name] <= high for name, (low, high) in GOALS.items()}
    result = {
        **environment(),
        "seed": args.seed,
        "shape": {**SHAPE, "bank_parameters": bank.num_parameters()},
        "decoding": f"greedy, batch {args.batch_size}, source {args.source_length}, {args.new_tokens} new tokens",
        "figures": figures,
        "goals": GOALS,
        "goals_met": verdicts,
        "assemble_and_copy": copying,
        "in_place_over_assembled": in_place,
        "assembled_over_by_hand": by_hand,
        "tokens_per_second": speeds,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        [name, f"{figures[name]:.3f}", f"{low:g} to {high:g}", "met" if verdicts[name] else "MISSED"] for name, (low, high) in GOALS.items()
    ]
    print(markdown_table(["figure (of several sizes, the worst)", "measured", "goal", ""], rows))
    print(markdown_table(["size", "tokens/s", "speed-up"], [[n, f"{s:.1f}", f"{s / speeds['12-12']:.2f}x"] for n, s in speeds.items()]))


def medians_ms(tasks: list[Callable[[], object]], rounds: int) -> list[float]:
    # Freeing memory is not what is timed; a model is only freed by the collector, and till then its memory is missing.
    return [1000 * seconds for seconds in measure_seconds(tasks, rounds=rounds, between=gc.collect)]


def farthest_from_one(ratios: dict[str, float]) -> float:
    return max(ratios.values(), key=lambda ratio: abs(ratio - 1))


if __name__ == "__main__":
    main()
