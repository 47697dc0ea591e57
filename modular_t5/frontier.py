"""What the sizes of a bank are worth: quality, size and speed of each plan, as a table, a picture and a file."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .assembly_modular_t5 import AssemblyPlan
from .choosing_modular_t5 import BankShape, PlanReport
from .measuring import write_json


# What a bank's folder calls the file of `Frontier.save` and the picture of `Frontier.plot`.
RESULTS_FILE, PICTURE_FILE = "frontier.json", "frontier.png"

# Layer ratios that are asked of each strategy where nobody says which.
STANDARD_RATIOS = {"size-first": (1.2, 1.5, 2, 3, 4, 6), "speed-first": (1.2, 1.4, 1.6, 1.9)}


def standard_sizes(shape: BankShape) -> dict[str, AssemblyPlan]:
    """By name, the teacher and every distinct plan of `STANDARD_RATIOS` that a bank reaches."""
    plans = {"teacher": shape.teacher}
    for strategy, ratios in STANDARD_RATIOS.items():
        for ratio in ratios:
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
        untrained_scores: of the same plan before the bank was trained: original layers dropped, nothing learned.
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


@dataclass(frozen=True)
class Frontier:
    """The measured sizes of a bank, the teacher first, and the metric that quality is read by."""

    points: tuple[FrontierPoint, ...]
    metric: str

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

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Frontier":
        """What `save` wrote.

        Raises:
            ValueError: it did not write that.
        """
        names = [field.name for field in fields(FrontierPoint)]
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            points = [FrontierPoint(**{name: point[name] for name in names}) for point in document["points"]]
            frontier = cls(tuple(replace(point, depths=tuple(point.depths)) for point in points), document["metric"])
            for point in [frontier.teacher, *points]:
                frontier.kept(point)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not what Frontier.save writes ({error!r})") from error
        return frontier

    def table(self, points: Sequence[FrontierPoint] | None = None) -> str:
        """A Markdown table, aligned for reading as plain text, of all points or of these."""
        metrics = list(self.teacher.scores)
        header = [
            "size",
            "plan",
            "layers",
            "ratio",
            "parameters",
            "MB",
            *metrics,
            "kept",
            "tokens/s",
            "speed-up",
            f"untrained drop, {self.metric}",
        ]
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
                f"{point.tokens_per_second:,.0f}",
                f"{self.speedup(point):.2f}x",
                f"{point.untrained_scores[self.metric]:.1f}",
            ]
            for point in (self.points if points is None else points)
        ]
        return markdown_table(header, rows, left=2)

    def save(self, path: str | os.PathLike, **provenance: Any) -> None:
        """Write every figure, and where it comes from, as JSON."""
        points = []
        for point in self.points:
            kept = None if math.isnan(self.kept(point)) else self.kept(point)  # JSON has no NaN
            points.append({**asdict(point), "kept_percent": kept, "speedup": self.speedup(point)})
        write_json(path, {**provenance, "metric": self.metric, "points": points})

    def plot(self, path: str | os.PathLike, title: str = "") -> None:
        """Quality kept against layer ratio, a line a strategy, beside the same plans before training.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, axes = picture("Frontier.plot")
        sizes = self.points[1:]
        for strategy, colour in zip(dict.fromkeys(point.name.split()[0] for point in sizes), ("C0", "C1", "C2", "C4"), strict=False):
            line = [self.teacher, *(point for point in sizes if point.name.split()[0] == strategy)]
            axes.plot([p.layer_ratio for p in line], [self.kept(p) for p in line], "o-", color=colour, label=strategy)
            untrained = [self._of_teacher(point.untrained_scores) for point in line]
            axes.plot([p.layer_ratio for p in line], untrained, "x:", color=colour, alpha=0.6, label=f"{strategy}, untrained layer drop")
            above = strategy == sizes[0].name.split()[0]
            for point in line[1:]:
                axes.annotate(
                    "+".join(map(str, point.depths)),
                    (point.layer_ratio, self.kept(point)),
                    xytext=(4, 5 if above else -12),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        axes.plot([1], [100], "*", color="black", markersize=12, label="teacher")
        axes.set_xscale("log")
        ticks = [ratio for ratio in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12) if ratio <= 1.1 * max(p.layer_ratio for p in self.points)]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("layer ratio (labels: encoder+decoder layers)")
        axes.set_ylabel(f"{self.metric}, % of the teacher")
        axes.set_ylim(-3, 109)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path)


def plot_curves(
    log_history: Sequence[Mapping[str, float]], names: Mapping[str, str], path: str | os.PathLike, title: str = "", ylabel: str = "loss"
) -> None:
    """What a training logged, by step, a line a name.

    Args:
        log_history: a Trainer's `state.log_history`.
        names: what is logged (`"eval_2x3/2x3_loss"`) -> what to call it.

    Raises:
        ValueError: nothing of it was logged.
        ImportError: matplotlib is not installed.
    """
    figure, axes = picture("plot_curves")
    # matplotlib has ten colours; from the eleventh line on, the marks are others.
    for index, (name, label) in enumerate(names.items()):
        logged = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if not logged:
            raise ValueError(f"there is no {name} in the log; it has {', '.join(sorted({key for entry in log_history for key in entry}))}")
        axes.plot(*zip(*logged, strict=True), "o-" if index < 10 else "x--", markersize=3, color=f"C{index % 10}", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)


def figure_class(of: str) -> type:
    """Matplotlib's, which only pictures need.

    Raises:
        ImportError: it is not installed; the message says that `of` needs it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{of} needs matplotlib: pip install matplotlib") from error
    return Figure


def picture(of: str) -> tuple[Any, Any]:
    """A figure and its axes, of the size of a card; an `ImportError` as of `figure_class`."""
    figure = figure_class(of)(figsize=(8, 4.5), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns line up; the first `left` columns are aligned to the left, the rest to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
