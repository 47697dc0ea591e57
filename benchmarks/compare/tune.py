"""Try arguments of methods on the validation split, for those that a comparison then runs with.

    python benchmarks/compare/tune.py benchmarks/compare/everyday.json --trials benchmarks/compare/trials.json \
        --validation_file data/multi30k-en-de/validation.jsonl --max_steps 200 --output_dir out/tune --output results.json

A trial is a row of the comparison with arguments of its own; `trials.json` is a list of `{"method": ..., "arguments": {...}}`, with
`plans` where not all sizes are tried. Trials that are done are not done again. The result file tells validation loss (nats a token) and
greedy BLEU of each.
"""

import argparse
import hashlib
import json
from pathlib import Path

import transformers

from modular_t5.comparison import Comparison, ComparisonArguments
from modular_t5.frontier import environment, markdown_table, write_json
from modular_t5.pairs import scores_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="of the comparison that is tuned for")
    parser.add_argument("--trials", type=Path, required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("out/tune"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = json.loads(args.settings.read_text())
    given = {"test_file": args.validation_file, "max_steps": args.max_steps, "seeds": [args.seed], "decodings": ["greedy"]}
    trials = []
    for trial in json.loads(args.trials.read_text()):
        name = hashlib.sha256(json.dumps([trial, args.max_steps, args.seed]).encode()).hexdigest()[:12]
        method, own = trial["method"], {"output_dir": str(args.output_dir / name)}
        sizes = {"plans": trial["plans"]} if "plans" in trial else {}
        of_trial = {**settings, **given, **own, **sizes, "methods": [method], "method_arguments": {method: trial["arguments"]}}
        scores = scores_of_trial(Comparison(ComparisonArguments(**of_trial)))
        trials.append({**trial, "scores": scores})
        rows = [[size, *map("{:.3f}".format, of_size)] for size, of_size in scores.items()]
        print(json.dumps(trial), markdown_table(["size", "loss", "BLEU"], rows), sep="\n", flush=True)
        write_json(args.output, {**environment(), "settings": {**settings, **given}, "trials": trials})


def scores_of_trial(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """By size, loss and BLEU of every run of a comparison, after doing what is missing."""
    scores = {}
    for run in comparison.runs:
        if not comparison.is_done(run):
            comparison.do(run)
        stored = comparison.stored(run)
        for plan, texts in stored["texts"].items():
            scores[plan] = stored["losses"][plan], scores_of(texts["greedy"], comparison.test.targets)["BLEU"]
    return scores


if __name__ == "__main__":
    main()
