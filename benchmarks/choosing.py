"""Does a calibrated choice hold on texts that it was not made on?

    python benchmarks/choosing.py --bank DIR --calibration_file validation.jsonl --test_file test.jsonl --source_lang en --target_lang de \
        --output benchmarks/results/DATE-choosing.json

The bank is calibrated on one file; under each of ten budgets every strategy chooses, and what it chose is measured on the other file:
divergence from the teacher, in nats a token, and BLEU, greedily.
"""

import argparse
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from modular_t5 import ModularT5ForConditionalGeneration, calibrate
from modular_t5.calibration import divergences
from modular_t5.choosing_modular_t5 import STRATEGIES
from modular_t5.measuring import environment, generate_texts, write_json
from modular_t5.pairs import Pairs, scores_of, signatures
from modular_t5.presenting import markdown_table


RATIOS = (1.2, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0)


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
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    bank, tokenizer = ModularT5ForConditionalGeneration.from_pretrained(args.bank), AutoTokenizer.from_pretrained(args.bank)
    calibration, test = (Pairs.read(file, args.source_lang, args.target_lang) for file in (args.calibration_file, args.test_file))
    results: dict[str, Any] = {**environment(), "arguments": {name: str(value) for name, value in vars(args).items()}}

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
