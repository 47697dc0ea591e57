"""What methods of the compact wing cost in quality, and win back by a little training: alone, and one after the other.

    python benchmarks/compact.py benchmarks/compare/everyday.json --teacher DIR --bank DIR --validation_file validation.jsonl \
        --output_dir out/compact --output benchmarks/results/DATE-compact.json

The first file is the settings of a comparison (`modular-t5 compare`), for texts and lengths. Every row is made of the teacher, or of a size
of the bank, and then trained for `--max_steps` as a distillation: on the teacher's beams, and by its predictions; sizes of the bank as they
are have learned already. By the loss of the validation split are chosen the learning rate, with the first row that begins with the teacher
and the first that begins with a size, and the best of the ways to 6x, which are trained for `--longest_steps` besides. Rows
that are done are not done again, and a training that was stopped goes on: for another setting take another folder.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import T5ForConditionalGeneration

from modular_t5 import (
    ModularT5ForConditionalGeneration,
    compress_offline,
    drop_layers,
    factorize_embeddings,
    merge_feed_forwards,
    prune_heads,
    share_layers,
)
from modular_t5.assembly_modular_t5 import AssemblyPlan
from modular_t5.baselines import DistillationTrainer
from modular_t5.compacting import CompactReport, mean_loss
from modular_t5.comparison import Comparison, ComparisonArguments
from modular_t5.comparison_methods import Run
from modular_t5.embeddings import count_tokens
from modular_t5.measuring import environment, generate_texts, labelled_batches, write_json
from modular_t5.pairs import Pairs, scores_of, signatures
from modular_t5.presenting import markdown_table, picture


Made = tuple[T5ForConditionalGeneration, CompactReport]
Step = Callable[["Bench", T5ForConditionalGeneration], Made]


@dataclass(frozen=True, eq=False)
class Row:
    """A model to be measured.

    Args:
        group: the line of the picture that it is on.
        steps: what is done one after the other; by name, for the table.
        plan: the size of the bank that it begins with; the teacher without one.
    """

    group: str
    steps: Mapping[str, Step]
    plan: str | None = None

    @property
    def learns(self) -> bool:
        """A size of the bank as it is has learned already."""
        return bool(self.steps) or self.plan is None

    @property
    def name(self) -> str:
        return ", ".join([*([self.plan] if self.plan else []), *self.steps]) or "teacher"


def merge(run: int) -> dict[str, Step]:
    return {
        f"{run} feed-forwards a side in one": lambda bench, model: merge_feed_forwards(
            model, bench.calibration, bench.tokenizer, run, description=None
        )
    }


def prune(count: int) -> dict[str, Step]:
    return {
        f"{count} heads pruned": lambda bench, model: prune_heads(
            model, bench.calibration, bench.tokenizer, count, rounds=4, description=None
        )
    }


def factorize(rank: int) -> dict[str, Step]:
    return {f"embeddings of rank {rank}": lambda bench, model: factorize_embeddings(model, rank, token_counts=bench.token_counts)}


def decode(ratio: float) -> dict[str, Step]:
    return {
        f"embeddings decoded, {ratio:g}x": lambda bench, model: compress_offline(
            model, ratio, matrices=["embeddings"], dataset=bench.calibration, processing_class=bench.tokenizer, description=None
        )
    }


def share(run: int) -> dict[str, Step]:
    return {f"every {run} layers share": lambda bench, model: share_layers(model, run)}


def drop(encoder: int, decoder: int) -> dict[str, Step]:
    return {f"{encoder}+{decoder} layers dropped": lambda bench, model: bench.least_missed(model, encoder, decoder)}


TOGETHER = "assemble + merge + factorize"
LARGEST = "6x, by six ways"
ROWS = [
    Row("merge feed-forwards", merge(3)),
    Row("drop layers", {}),
    Row("merge feed-forwards", merge(6)),
    Row("drop layers", drop(0, 2)),
    Row("drop layers", drop(2, 3)),
    Row("prune heads", prune(36)),
    Row("factorize embeddings", factorize(64)),
    Row("factorize embeddings", factorize(32)),
    Row("share layers", share(2)),
    Row("share layers", share(3)),
    Row("assemble", {}, "2x3/2x3"),
    Row("assemble", {}, "3x2/3x2"),
    Row("assemble", {}, "6x1/6x1"),
    Row(LARGEST, {**merge(2), **prune(12), **factorize(20)}, "3x2/3x2"),
    Row(LARGEST, {**share(2), **factorize(20)}, "3x2/3x2"),
    Row(LARGEST, {**share(3), **factorize(20)}, "2x3/2x3"),
    Row(LARGEST, factorize(20), "6x1/6x1"),
    Row(LARGEST, {**merge(2), **prune(12), **decode(6.3)}, "3x2/3x2"),
    Row(LARGEST, decode(6.3), "6x1/6x1"),
    Row(TOGETHER, {**merge(2), **factorize(64)}, "2x3/2x3"),
    Row(TOGETHER, {**merge(3), **factorize(48)}, "2x3/2x3"),
    Row(TOGETHER, {**merge(2), **factorize(32)}, "3x2/3x2"),
]


class Bench:
    """The texts, the teacher, and what is measured of a model."""

    def __init__(self, args: argparse.Namespace):
        settings = json.loads(args.settings.read_text())
        given = {"teacher": args.teacher, "max_steps": args.max_steps, "output_dir": str(args.output_dir), "seeds": [args.seed]}
        self.args = args
        self.comparison = Comparison(ComparisonArguments(**{**settings, **given}))
        self.teacher, self.tokenizer = self.comparison.teacher, self.comparison.tokenizer
        self.bank = ModularT5ForConditionalGeneration.from_pretrained(args.bank)
        self.length = self.comparison.args.max_target_length
        langs = self.comparison.args.source_lang, self.comparison.args.target_lang
        self.validation = Pairs.read(args.validation_file, *langs)
        self.calibration = self._tokenized(self.validation.head(args.calibration_examples))
        self.plan = AssemblyPlan.from_any(str(self.bank.shape.teacher))

    def _tokenized(self, pairs: Pairs) -> Any:
        return pairs.tokenized(self.tokenizer, self.length, self.length)

    @cached_property
    def token_counts(self) -> torch.Tensor:
        return count_tokens(self.comparison.workshop.examples("beams"), self.teacher.config.vocab_size)

    @cached_property
    def _calibration_batches(self) -> list[dict[str, torch.Tensor]]:
        return labelled_batches(self.teacher, self.calibration, self.tokenizer, 64)

    @cached_property
    def _validation_batches(self) -> list[dict[str, torch.Tensor]]:
        return labelled_batches(self.teacher, self._tokenized(self.validation), self.tokenizer, 64)

    def least_missed(
        self, model: T5ForConditionalGeneration, encoder: int, decoder: int
    ) -> tuple[T5ForConditionalGeneration, CompactReport]:
        """Without so many layers of each side, those without which the loss of the calibration texts is the least."""
        sides = [
            min(
                combinations(range(len(getattr(model, side).block)), count),
                key=lambda layers, side=side: mean_loss(drop_layers(model, **{side: layers})[0], self._calibration_batches),
            )
            for side, count in (("encoder", encoder), ("decoder", decoder))
        ]
        return drop_layers(model, encoder=sides[0], decoder=sides[1])

    def made(self, row: Row) -> tuple[T5ForConditionalGeneration, dict[str, Any]]:
        """The model of a row, and what was chosen and lost in each step."""
        model = self.teacher if row.plan is None else self.bank.assemble(row.plan)
        told = {}
        for name, step in row.steps.items():
            model, report = step(self, model)
            told[name] = {"ratio": report.ratio, "error": report.error, "chosen": report.chosen}
        if model is self.teacher:
            model = T5ForConditionalGeneration.from_pretrained(self.args.teacher)
        return model, json.loads(json.dumps(told, default=lambda tensor: tensor.tolist()))

    def of_teacher(self) -> dict[str, Any]:
        return {"parameters": self.teacher.num_parameters(), **self.measured(self.teacher), "metrics": signatures()["BLEU"]}

    def measured(self, model: T5ForConditionalGeneration) -> dict[str, float]:
        """Loss of validation, in nats a token, and BLEU of the test split, greedily."""
        return {"validation_loss": mean_loss(model, self._validation_batches), "BLEU": self.bleu(model, self.comparison.test)}

    def bleu(self, model: T5ForConditionalGeneration, pairs: Pairs) -> float:
        texts = generate_texts(model.eval(), self.tokenizer, pairs.sources, max_new_tokens=self.length)
        return scores_of(texts, pairs.targets)["BLEU"]

    def tuned(self, model: T5ForConditionalGeneration, name: str, steps: int, learning_rate: float) -> dict[str, Any]:
        """What a training made of a model, and took."""
        arguments = {"learning_rate": learning_rate, "targets": "beams", "hidden_weight": 0.0}
        folder = self.args.output_dir / "runs" / f"{name}-{learning_rate:g}"
        run = Run.of("distillation", (self.plan,), self.args.seed, arguments, folder)
        warm_up = {"max_steps": steps, "warmup_steps": steps // 20, "save_steps": max(100, steps // 5)}
        workshop = dataclasses.replace(self.comparison.workshop, training={**self.comparison.workshop.training, **warm_up})
        spent = workshop.train(DistillationTrainer, model, run, teacher=self.teacher, plan=self.plan)
        return {"learning_rate": learning_rate, **dataclasses.asdict(spent), **self.measured(model)}

    def once(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in a file of that name, done where it is not there."""
        file = self.args.output_dir / "rows" / f"{name}.json"
        if not file.exists():
            write_json(file, do())
            print(name, file.read_text(), flush=True)
        return json.loads(file.read_text())

    def row(self, row: Row, steps: int, rate: float | None = None) -> dict[str, Any]:
        """Before and after a training; at a learning rate, or at the one that does best for the first row of its kind."""
        model, told = self.made(row)
        parameters = model.num_parameters()
        done = {"parameters": parameters, "total_ratio": self.teacher.num_parameters() / parameters, "methods": told}
        done |= {"group": row.group, "name": row.name, "before": self.measured(model), "after": None}
        if row.learns:
            kind = next(each for each in ROWS if each.learns and bool(each.plan) == bool(row.plan))
            trials = self.once(f"{file_name(kind, self.args.max_steps)}-rates", partial(self.trials, kind))
            rate = rate or min(self.args.learning_rates, key=lambda rate: trials[f"{rate:g}"]["validation_loss"])
            tried = row is kind and steps == self.args.max_steps
            done["after"] = trials[f"{rate:g}"] if tried else self.tuned(model, file_name(row, steps), steps, rate)
        return done

    def trials(self, row: Row) -> dict[str, Any]:
        """Of learning rates, what they come to."""
        steps = self.args.max_steps
        return {f"{rate:g}": self.tuned(self.made(row)[0], file_name(row, steps), steps, rate) for rate in self.args.learning_rates}


def file_name(row: Row, steps: int) -> str:
    return f"{row.name} {steps}".replace("/", "_").replace(", ", "-").replace(" ", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="of a comparison")
    parser.add_argument("--teacher", required=True, help="folder or Hub id of a T5 with its tokenizer")
    parser.add_argument("--bank", required=True, help="folder or Hub id of its bank")
    parser.add_argument("--validation_file", required=True, help="JSON lines in the Hub's translation format")
    parser.add_argument("--calibration_examples", type=int, default=400, help="of the validation file")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--longest_steps", type=int, default=6000)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.001, 0.003, 0.006])
    parser.add_argument("--longest_rows", type=int, default=2, help="how many of the ways to 6x are trained so long")
    parser.add_argument("--longest_rate", type=float, help="learning rate of the longest training; by default the one of all")
    parser.add_argument(
        "--groups",
        nargs="+",
        default=[*dict.fromkeys(row.group for row in ROWS)],
        help="those alone, for several processes to share the rows; results are written when all are there",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="of trainings and rows; the teacher's beams are kept there")
    parser.add_argument("--output", type=Path, required=True, help="the result file; the picture is beside it")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(args)
    rows = {
        row: bench.once(file_name(row, args.max_steps), partial(bench.row, row, args.max_steps)) for row in ROWS if row.group in args.groups
    }
    results: dict[str, Any] = {"teacher": bench.once("teacher", bench.of_teacher)}
    if LARGEST in args.groups:
        best = sorted((row for row in rows if row.group == LARGEST), key=lambda row: rows[row]["after"]["validation_loss"])
        longest = {
            file_name(row, args.longest_steps): partial(bench.row, row, args.longest_steps, args.longest_rate)
            for row in best[: args.longest_rows]
        }
        results["longest"] = [bench.once(name, do) for name, do in longest.items()]
    if len(rows) < len(ROWS):
        return
    told = {**environment(), "settings": {name: str(value) for name, value in vars(args).items()}}
    results = {**told, **results, "rows": [{**of_row, "group": row.group} for row, of_row in rows.items()]}
    write_json(args.output, results)
    plot(results, args.output.with_suffix(".png"))
    print(table(results))


def table(results: Mapping[str, Any]) -> str:
    """Markdown: per cent of the teacher's BLEU before and after the training."""
    whole = results["teacher"]["BLEU"]
    rows = [*results["rows"], *results["longest"]]
    cells = [
        [
            row["name"],
            f"{row['parameters']:,}",
            f"{row['total_ratio']:.2f}x",
            *(f"{row[when]['BLEU']:.2f} ({100 * row[when]['BLEU'] / whole:.1f} %)" if row[when] else "" for when in ("before", "after")),
            f"{row['after']['steps']:,}" if row["after"] else "",
        ]
        for row in rows
    ]
    return markdown_table(["", "parameters", "total ratio", "BLEU before", "BLEU after", "steps"], cells)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Per cent of the teacher's BLEU against its parameters over a model's."""
    figure, axes = picture("benchmarks/compact.py")
    whole = results["teacher"]["BLEU"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(row["group"], []).append(row)
    for (group, rows), colour in zip(groups.items(), (f"C{i}" for i in range(10)), strict=False):
        rows = sorted(rows, key=lambda row: row["total_ratio"])
        ratios = [row["total_ratio"] for row in rows]
        for when, style in (("after", "o-"), ("before", "x:")) if group != LARGEST else (("after", "o"), ("before", "x")):
            kept = [100 * (row[when] or row["before"])["BLEU"] / whole for row in rows]
            axes.plot(ratios, kept, style, color=colour, label=group if when == "after" else None)
    ratios, kept = zip(*((row["total_ratio"], 100 * row["after"]["BLEU"] / whole) for row in results["longest"]), strict=True)
    axes.plot(ratios, kept, "*", color="black", markersize=12, label=f"6x, {results['longest'][0]['after']['steps']:,} steps")
    axes.set_xscale("log")
    axes.set_xticks([1, 1.25, 1.5, 2, 3, 4, 6], ["1x", "1.25x", "1.5x", "2x", "3x", "4x", "6x"])
    axes.minorticks_off()
    axes.set_xlabel("total ratio: all parameters of the teacher / of the model")
    axes.set_ylabel("BLEU, % of the teacher (dotted: before training)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)


if __name__ == "__main__":
    main()
