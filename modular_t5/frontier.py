"""What the sizes of a bank are worth: quality, size and speed of each plan, as a table, a picture and a file."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .assembly_modular_t5 import AssemblyPlan, PlanLike
from .choosing_modular_t5 import LIMITS, STRATEGIES, BankShape, Limit, PlanReport, the_one_budget
from .measuring import environment, evaluating, generate_texts, measure_speed, write_json
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .pairs import Pairs, scores_of, signatures
from .presenting import markdown_table, picture
from .storage_modular_t5 import fingerprint


# What a bank's folder calls the file of `Frontier.save` and the picture of `Frontier.plot`.
RESULTS_FILE, PICTURE_FILE = "frontier.json", "frontier.png"

# Layer ratios that are asked of each strategy where nobody says which.
STANDARD_RATIOS = {
    "size-first": (1.2, 1.5, 2, 3, 4, 6),
    "speed-first": (1.2, 1.4, 1.6, 1.9),
    "calibrated": (1.2, 1.5, 2, 2.5, 3, 4),
}


def standard_sizes(shape: BankShape) -> dict[str, AssemblyPlan]:
    """By name, the teacher and every distinct plan of `STANDARD_RATIOS` that a bank reaches."""
    plans = {"teacher": shape.teacher}
    for strategy in shape.strategies:
        for ratio in STANDARD_RATIOS[strategy]:
            if ratio <= shape.largest_ratio and (plan := shape.choose(strategy, ratio)) not in plans.values():
                plans[f"{strategy} {ratio:g}x"] = plan
    return plans


@dataclass(frozen=True)
class FrontierPoint:
    """One size of a bank, as measured.

    Args:
        name: what was asked for, such as `size-first 2x`.
        plan: what was assembled, in plan notation.
        depths: blocks of the encoder and of the decoder.
        layer_ratio: layer parameters of the teacher / of this size.
        parameters: all of them, embeddings included.
        bytes: of those parameters.
        scores: of the metrics, higher is better.
        untrained_scores: of the same plan before the bank was trained: original layers dropped, nothing learned. Empty if not measured.
        tokens_per_second: as `measure_speed` gives it.
    """

    name: str
    plan: str
    depths: tuple[int, int]
    layer_ratio: float
    parameters: int
    bytes: int
    scores: dict[str, float]
    untrained_scores: dict[str, float]
    tokens_per_second: float

    @classmethod
    def of(
        cls, name: str, report: PlanReport, scores: dict[str, float], untrained_scores: dict[str, float], tokens_per_second: float
    ) -> "FrontierPoint":
        """The point of a plan whose counts are in `report`."""
        counts = (report.plan.depths, report.layer_ratio, report.total_parameters, report.bytes)
        return cls(name, str(report.plan), *counts, scores, untrained_scores, tokens_per_second)

    @property
    def ms_per_token(self) -> float:
        """Milliseconds for each token of the batch that was timed."""
        return 1000 / self.tokens_per_second


# The budgets that measured sizes can be held against: the unit that a picture has its figure in, and how it is called there.
BUDGETS = {
    "ratio": (1, "layer ratio"),
    "max_parameters": (1e6, "million parameters"),
    "max_bytes": (1e6, "MB"),
    "min_speedup": (1, "times the teacher's speed"),
    "max_ms_per_token": (1, "ms a token"),
    "min_kept": (1, "per cent of the teacher"),
}


@dataclass(frozen=True)
class Frontier:
    """The measured sizes of a bank, the teacher first, the metric that quality is read by, and where and how they were measured."""

    points: tuple[FrontierPoint, ...]
    metric: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def teacher(self) -> FrontierPoint:
        return self.points[0]

    def kept(self, point: FrontierPoint) -> float:
        """Per cent of the teacher's score that a size keeps; not a number where the teacher scores nothing."""
        return self._of_teacher(point.scores)

    def speedup(self, point: FrontierPoint) -> float:
        """Tokens a second, relative to the teacher's."""
        return point.tokens_per_second / self.teacher.tokens_per_second

    def _of_teacher(self, scores: dict[str, float]) -> float:
        whole = self.teacher.scores[self.metric]
        return 100 * scores[self.metric] / whole if whole else math.nan

    @property
    def _knows_untrained(self) -> bool:
        return all(self.metric in point.untrained_scores for point in self.points)

    def optimal(self, point: FrontierPoint) -> list[str]:
        """In what a size is Pareto-optimal: `size` and `speed`, if no other has as much quality for fewer bytes, or in less time."""
        costs = {"size": lambda each: each.bytes, "speed": lambda each: each.ms_per_token}
        return [name for name, cost in costs.items() if not any(self._beats(other, point, cost) for other in self.points)]

    def _beats(self, other: FrontierPoint, point: FrontierPoint, cost: Callable[[FrontierPoint], float]) -> bool:
        others, its = (other.scores[self.metric], -cost(other)), (point.scores[self.metric], -cost(point))
        return others != its and all(a >= b for a, b in zip(others, its, strict=True))

    @property
    def limits(self) -> dict[str, Limit]:
        """What each of `BUDGETS` bounds."""
        return {
            "ratio": Limit(lambda point: point.layer_ratio, True, LIMITS["ratio"].said),
            "max_parameters": Limit(lambda point: point.parameters, False, LIMITS["max_parameters"].said),
            "max_bytes": Limit(lambda point: point.bytes, False, LIMITS["max_bytes"].said),
            "min_speedup": Limit(self.speedup, True, LIMITS["min_speedup"].said),
            "max_ms_per_token": Limit(lambda point: point.ms_per_token, False, "{:.12g} ms a token"),
            "min_kept": Limit(self.kept, True, "{:.12g} % of the teacher"),
        }

    def best(self, **budget: float) -> FrontierPoint:
        """The measured size of the best quality within a budget, one of `BUDGETS`; of `min_kept`, in per cent, the smallest size.

        Raises:
            ValueError: none or several budgets, or one that no size is within; the message names the nearest.
        """
        name, bound = the_one_budget(budget, BUDGETS)
        within = self.limits[name].within(self.points, name, bound)
        if name == "min_kept":
            return min(within, key=lambda point: (point.bytes, -point.scores[self.metric]))
        return max(within, key=lambda point: (point.scores[self.metric], -point.bytes))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Frontier":
        """What `save` wrote.

        Raises:
            ValueError: it did not write that.
        """
        names = [each.name for each in fields(FrontierPoint)]
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            points = [FrontierPoint(**{name: point[name] for name in names}) for point in document["points"]]
            provenance = {name: value for name, value in document.items() if name not in ("points", "metric")}
            frontier = cls(tuple(replace(point, depths=tuple(point.depths)) for point in points), document["metric"], provenance)
            for point in [frontier.teacher, *points]:
                frontier.kept(point)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not what Frontier.save writes ({error!r})") from error
        return frontier

    def table(self, points: Sequence[FrontierPoint] | None = None) -> str:
        """A Markdown table, aligned for reading as plain text, of all points or of these."""
        metrics, drop = list(self.teacher.scores), self._knows_untrained
        header = ["size", "plan", "layers", "ratio", "parameters", "MB", *metrics, "kept", "ms/token", "speed-up", "Pareto"]
        header += [f"untrained drop, {self.metric}"] if drop else []
        rows = [
            [
                point.name,
                point.plan,
                "+".join(map(str, point.depths)),
                f"{point.layer_ratio:.2f}x",
                f"{point.parameters:,}",
                f"{point.bytes / 1e6:.2f}",
                *(f"{point.scores[metric]:.1f}" for metric in metrics),
                "n/a" if math.isnan(self.kept(point)) else f"{self.kept(point):.1f} %",
                f"{point.ms_per_token:.3g}",
                f"{self.speedup(point):.2f}x",
                ", ".join(self.optimal(point)),
                *([f"{point.untrained_scores[self.metric]:.1f}"] if drop else []),
            ]
            for point in (self.points if points is None else points)
        ]
        return markdown_table(header, rows, left=2)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Every figure of every size, flat: what `pandas.DataFrame` takes. None stands for what is not a number."""
        rows = []
        for point in self.points:
            row = asdict(point) | {"encoder_layers": point.depths[0], "decoder_layers": point.depths[1]}
            del row["depths"], row["scores"], row["untrained_scores"]
            row |= point.scores | {f"untrained {metric}": score for metric, score in point.untrained_scores.items()}
            row |= {"ms_per_token": point.ms_per_token, **self._relative(point)}
            rows.append(row | {"pareto": " ".join(self.optimal(point))})
        return rows

    def _relative(self, point: FrontierPoint) -> dict[str, float | None]:
        """What is relative to the teacher; JSON has no NaN."""
        kept = self.kept(point)
        return {"kept_percent": None if math.isnan(kept) else kept, "speedup": self.speedup(point)}

    def to_csv(self, path: str | os.PathLike) -> None:
        """The same as a file of comma-separated values."""
        rows = self.to_dicts()
        names = list(dict.fromkeys(name for row in rows for name in row))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def save(self, path: str | os.PathLike, **provenance: Any) -> None:
        """Write every figure, and where it comes from, as JSON, with more of `provenance` if there is."""
        points = [{**asdict(point), **self._relative(point)} for point in self.points]
        write_json(path, {**self.provenance, **provenance, "metric": self.metric, "points": points})

    def plot(self, path: str | os.PathLike, title: str = "", **budget: float) -> None:
        """Quality kept against layer ratio, a line a strategy, beside the same plans before training where they were measured.

        Args:
            budget: one of `BUDGETS`: a line is drawn at it, quality is against what it bounds, and the best size within it is ringed.

        Raises:
            ValueError: several budgets, or one that is none or that no size is within.
            ImportError: matplotlib is not installed.
        """
        name, bound = the_one_budget(budget, BUDGETS) if budget else ("ratio", None)
        figure, axes = picture("Frontier.plot")
        shown = "ratio" if name == "min_kept" else name
        (unit, axis), limit = BUDGETS[shown], self.limits[shown]

        def across(points: Sequence[FrontierPoint]) -> list[float]:
            return [limit.figure(point) / unit for point in points]

        sizes: dict[str, list[FrontierPoint]] = {}
        for point in self.points[1:]:
            strategy = point.name.split()[0]
            sizes.setdefault(strategy if strategy in STRATEGIES else "other sizes", []).append(point)
        for (strategy, points), colour in zip(sizes.items(), ("C0", "C1", "C2", "C4"), strict=False):
            line = [self.teacher, *points]
            axes.plot(across(line), [self.kept(p) for p in line], "o-" if strategy in STRATEGIES else "o", color=colour, label=strategy)
            if self._knows_untrained:
                untrained = [self._of_teacher(point.untrained_scores) for point in line]
                axes.plot(across(line), untrained, "x:", color=colour, alpha=0.6, label=f"{strategy}, untrained layer drop")
            above = strategy == next(iter(sizes))
            for point, x in zip(line[1:], across(line[1:]), strict=True):
                axes.annotate(
                    "+".join(map(str, point.depths)),
                    (x, self.kept(point)),
                    xytext=(4, 5 if above else -12),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        axes.plot(across([self.teacher]), [100], "*", color="black", markersize=12, label="teacher")
        if bound is not None:
            style = {"color": "C3", "linestyle": "--", "label": f"{name}={bound:,}"}
            axes.axhline(bound, **style) if name == "min_kept" else axes.axvline(bound / unit, **style)
            best = self.best(**budget)
            ring = {"markersize": 18, "color": "C3", "fillstyle": "none", "label": f"the best within it: {best.plan}"}
            axes.plot(across([best]), [self.kept(best)], "o", **ring)
        if limit.at_least:
            axes.set_xscale("log")
            ticks = [ratio for ratio in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12) if ratio <= 1.1 * max(across(self.points))]
            axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
            axes.minorticks_off()
        axes.set_xlabel(f"{axis} (labels: encoder+decoder layers)")
        axes.set_ylabel(f"{self.metric}, % of the teacher")
        axes.set_ylim(-3, 109)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path)


def measure_frontier(
    bank: ModularT5ForConditionalGeneration,
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, PlanLike] | Iterable[PlanLike] | None = None,
    *,
    metric: str = "BLEU",
    compute_scores: Callable[[Sequence[str], Sequence[str]], dict[str, float]] = scores_of,
    untrained_scores: Mapping[str, dict[str, float]] | None = None,
    max_new_tokens: int = 128,
    max_source_length: int = 512,
    batch_size: int = 64,
    speed_batch_size: int = 32,
    speed_new_tokens: int = 16,
    file: str | os.PathLike | None = None,
    description: str | None = "Measuring",
    **generate_arguments: Any,
) -> Frontier:
    """Quality and speed of sizes of a bank, each run in place, and the speeds in turns.

    Args:
        pairs: what is generated from, and the references.
        plans: by name, or as they are; by default `standard_sizes`, with those of `calibrated` where the bank is. The teacher comes first.
        metric: of the scores, the one that quality is read by.
        compute_scores: texts and references -> scores, higher is better.
        untrained_scores: by plan, as of `FrontierPoint`, of all that are measured.
        max_new_tokens, max_source_length: in tokens.
        speed_batch_size, speed_new_tokens: sources that are timed, and tokens generated for each, greedily.
        file: where the result is saved. Scores are kept beside it until all are there, and the same call takes up from there; of a
            result that is there it takes the scores, and times anew.
        description: of the progress bars; none without it.
        generate_arguments: for `generate`, such as `num_beams`; greedy search by default.

    Raises:
        ValueError: there are no pairs, or no such metric, a plan that the bank cannot run, another teacher than the bank's, or scores
            before training of some plans alone.
    """
    if not pairs.sources:
        raise ValueError("measuring quality needs pairs of texts; there are none")
    named = _named_plans(bank, plans)
    decoding = {"max_new_tokens": max_new_tokens, "max_source_length": max_source_length, **generate_arguments}
    untrained = {AssemblyPlan.from_any(plan): dict(of) for plan, of in (untrained_scores or {}).items()}
    if untrained and (missing := set(named.values()) - untrained.keys()):
        raise ValueError(f"untrained_scores are of all plans that are measured, or of none; {min(missing, key=str)} is not there")
    begun = _Begun(file, lambda: _what_decides(bank, tokenizer, pairs, decoding, compute_scores))
    scores = begun.scores
    for name, plan in tqdm(named.items(), desc=description, disable=description is None, leave=False):
        if str(plan) in scores:
            _check_metric(metric, scores[str(plan)])
            continue
        with evaluating(bank), bank.using(plan):
            texts = generate_texts(
                bank, tokenizer, pairs.sources, batch_size=batch_size, description=description and f"{description} {name}", **decoding
            )
        scores[str(plan)] = compute_scores(texts, pairs.targets)
        begun.keep()
        _check_metric(metric, scores[str(plan)])
    batch = tokenizer(pairs.sources[:speed_batch_size], return_tensors="pt", padding=True, truncation=True, max_length=max_source_length)
    inputs = {name: batch[name].to(bank.device) for name in ("input_ids", "attention_mask")}
    sizes = [bank.assemble(plan, share_weights=not bank.config.lora) for plan in named.values()]
    speeds = measure_speed(sizes, inputs, new_tokens=speed_new_tokens, description=description and f"{description} speed")
    points = [
        FrontierPoint.of(name, bank.report(plan), scores[str(plan)], untrained.get(plan, {}), speed)
        for (name, plan), speed in zip(named.items(), speeds, strict=True)
    ]
    told = {
        "test_examples": len(pairs.sources),
        "decoding": ", ".join(f"{name}={value}" for name, value in generate_arguments.items()) or "greedy",
        "speed": f"greedy, batch {len(batch.input_ids)}, {speed_new_tokens} new tokens each, median of 5 interleaved rounds",
        **({"metrics": signatures()} if compute_scores is scores_of else {}),
    }
    frontier = Frontier(tuple(points), metric, {**environment(), **told})
    if file is not None:
        frontier.save(file, key=begun.key)
    begun.forget()
    return frontier


def _named_plans(
    bank: ModularT5ForConditionalGeneration, plans: Mapping[str, PlanLike] | Iterable[PlanLike] | None
) -> dict[str, AssemblyPlan]:
    """The teacher first, and no plan twice."""
    shape = bank.shape
    if plans is None:
        plans = standard_sizes(shape)
    elif isinstance(plans, str | AssemblyPlan):
        plans = {str(plans): plans}
    elif not isinstance(plans, Mapping):
        plans = {str(AssemblyPlan.from_any(plan)): plan for plan in plans}
    named = {"teacher": shape.teacher}
    for name, plan in plans.items():
        plan = bank.choose_plan(plan)
        if name == "teacher" and plan != shape.teacher:
            raise ValueError(f"the teacher is {shape.teacher}; call {plan} by another name")
        if plan not in named.values():
            named[name] = plan
    return named


def _check_metric(metric: str, scores: Mapping[str, float]) -> None:
    if metric not in scores:
        raise ValueError(f"there is no metric {metric!r}; the scores are {', '.join(scores)}")


def _what_decides(
    bank: ModularT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    decoding: Mapping[str, Any],
    compute_scores: Callable[..., Any],
) -> list[Any]:
    """All that scores depend on."""
    config = {name: value for name, value in bank.config.to_dict().items() if name not in ("calibration", "plan", "_name_or_path")}
    told = [fingerprint(bank.state_dict()), config, bank.generation_config.to_dict(), pairs, decoding]
    return [*told, tokenizer(pairs.sources).input_ids, getattr(compute_scores, "__qualname__", repr(compute_scores))]


class _Begun:
    """The scores of a measurement that was interrupted, kept beside the file that holds all in the end; nowhere without a file."""

    def __init__(self, file: str | os.PathLike | None, decides: Callable[[], Any]):
        self._path = None if file is None else Path(f"{os.fspath(file)}.begun")
        self.key: str | None = None
        self.scores: dict[str, dict[str, float]] = {}
        if self._path is None:
            return
        self.key = hashlib.sha256(json.dumps(decides(), default=repr).encode()).hexdigest()
        for path in (Path(file), self._path):
            kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if kept.get("key") == self.key:
                self.scores |= kept["scores"] if "scores" in kept else {point["plan"]: point["scores"] for point in kept["points"]}

    def keep(self) -> None:
        if self._path is not None:
            write_json(self._path, {"key": self.key, "scores": self.scores})

    def forget(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
