"""Is an auto-encoder nearer to a T5's matrices than a decomposition of as many numbers, and what it generates better, untrained?

    python benchmarks/offline.py --teacher DIR --validation_file validation.jsonl --test_file test.jsonl --source_lang en --target_lang de \
        --output benchmarks/results/DATE-offline.json

Embeddings, or all matrices of attention, are compressed by each method and ratio, those of the same place in all layers together or each
by itself, and all rows alike or weighed by what the loss of validation texts says of them. Told are the error of the matrices and greedy
BLEU of the test texts.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from modular_t5 import compress_offline
from modular_t5.measuring import environment, generate_texts, write_json
from modular_t5.pairs import Pairs, scores_of, signatures
from modular_t5.presenting import markdown_table


METHODS = {"svd": "SVD", "autoencoder": "auto-encoder"}
GROUPS = {"embeddings": (True,), "attention": (False, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--teacher", required=True, help="folder or Hub id of a T5 with its tokenizer")
    parser.add_argument("--validation_file", required=True, help="JSON lines in the Hub's translation format, to weigh rows by")
    parser.add_argument("--test_file", required=True, help="the same, to score on")
    parser.add_argument("--source_lang", required=True)
    parser.add_argument("--target_lang", required=True)
    parser.add_argument("--examples", type=int, default=400, help="of the validation file")
    parser.add_argument("--max_length", type=int, default=64, help="in tokens")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2, 3], help="of the compressed matrices' parameters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    teacher, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(args.teacher).eval(), AutoTokenizer.from_pretrained(args.teacher)
    validation, test = (Pairs.read(file, args.source_lang, args.target_lang) for file in (args.validation_file, args.test_file))
    examples = validation.head(args.examples).tokenized(tokenizer, args.max_length, args.max_length)

    def bleu(model: Any) -> float:
        return scores_of(generate_texts(model, tokenizer, test.sources, max_new_tokens=args.max_length), test.targets)["BLEU"]

    results: dict[str, Any] = {**environment(), "arguments": {name: str(value) for name, value in vars(args).items()}}
    results |= {"teacher": {"parameters": teacher.num_parameters(), "BLEU": bleu(teacher)}, "metrics": signatures()["BLEU"], "rows": []}
    for matrices, groups in GROUPS.items():
        for ratio, together, weighted, method in itertools.product(args.ratios, groups, (False, True), METHODS):
            if weighted and not together:
                continue
            weighing = {"dataset": examples, "processing_class": tokenizer} if weighted else {}
            started = time.perf_counter()
            compressed, report = compress_offline(
                teacher, ratio, matrices=[matrices], method=method, together=together, seed=args.seed, description=None, **weighing
            )
            row = {"matrices": matrices, "ratio": ratio, "method": method, "together": together, "weighted": weighted}
            row |= {"seconds": time.perf_counter() - started, "parameters": report.parameters_after, "error": report.error}
            shapes = [(group["rank"], group["hidden"]) for group in report.chosen["decoded"]]
            row |= {"rank": shapes[0][0], "hidden": shapes[0][1], "decoders": len(shapes), "BLEU": bleu(compressed)}
            results["rows"].append(row)
            write_json(args.output.with_suffix(".unfinished.json"), results)
            print(row, flush=True)
    write_json(args.output, results)
    args.output.with_suffix(".unfinished.json").unlink()
    print(table(results["rows"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: of every method error and, in brackets, BLEU, a column a ratio."""
    ratios = sorted({row["ratio"] for row in rows})
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        way = METHODS[row["method"]] + (", weighed" if row["weighted"] else "")
        if len(GROUPS[row["matrices"]]) > 1:
            way += ", together" if row["together"] else ", each by itself"
        cells.setdefault((row["matrices"], way), {})[row["ratio"]] = f"{row['error']:.3f} ({row['BLEU']:.2f})"
    return markdown_table(
        ["matrices", "method", *(f"{ratio:g}x" for ratio in ratios)],
        [[*name, *(of[ratio] for ratio in ratios)] for name, of in cells.items()],
        left=2,
    )


if __name__ == "__main__":
    main()
