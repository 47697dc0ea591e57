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
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from modular_t5.comparison import TEACHER_FILES, Comparison, ComparisonArguments
from modular_t5.measuring import environment, write_json
from modular_t5.pairs import scores_of
from modular_t5.presenting import markdown_table


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
    trials = json.loads(args.trials.read_text())
    comparisons = []  # what does not fit is said before anything is trained
    for trial in trials:
        method, name = trial["method"], hashlib.sha256(json.dumps([trial, args.max_steps, args.seed]).encode()).hexdigest()[:12]
        own = {"methods": [method], "method_arguments": {**settings.get("method_arguments", {}), method: trial["arguments"]}}
        sizes = {"plans": trial["plans"]} if "plans" in trial else {}
        folder = {"output_dir": str(args.output_dir / name)}
        comparisons.append(Comparison(ComparisonArguments(**{**settings, **given, **own, **sizes, **folder})))
        comparisons[-1].missing()
    done = []
    for trial, comparison in zip(trials, comparisons, strict=True):
        with beams_of_all(args.output_dir, comparison):
            scores = scores_of_trial(comparison)
        done.append({**trial, "scores": scores})
        rows = [[size, *map("{:.3f}".format, of_size)] for size, of_size in scores.items()]
        print(json.dumps(trial), markdown_table(["size", "loss", "BLEU"], rows), sep="\n", flush=True)
        write_json(args.output, {**environment(), "settings": {**settings, **given}, "trials": done})


@contextmanager
def beams_of_all(folder: Path, comparison: Comparison) -> Iterator[None]:
    """The teacher's beams are the same for every trial."""
    beams = TEACHER_FILES["train"]
    if (folder / beams).exists():
        comparison.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / beams, comparison.folder)
    yield
    if (comparison.folder / beams).exists():
        shutil.copy(comparison.folder / beams, folder)


def scores_of_trial(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """By size, loss and BLEU of every run of a comparison, after doing what is missing."""
    comparison.do_missing()
    scores = {}
    for run in comparison.runs:
        stored = comparison.stored(run)
        for plan, texts in stored["texts"].items():
            scores[plan] = stored["losses"][plan], scores_of(texts["greedy"], comparison.test.targets)["BLEU"]
    return scores


if __name__ == "__main__":
    main()
