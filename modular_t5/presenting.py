"""Tables and pictures that results are shown in, on a card and on a terminal."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns line up; the first `left` columns are aligned to the left, the rest to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


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


def heat_maps(of: str, maps: Mapping[str, Any], path: str | os.PathLike, *, axes: tuple[str, str], measure: str, title: str) -> None:
    """Matrices of numbers of at least 0 side by side, in the same colours.

    Args:
        of: what draws them, for the error's message.
        maps: by what stands above each.
        axes: what columns and rows are.
        measure: what the numbers are.

    Raises:
        ValueError: there is none.
        ImportError: matplotlib is not installed.
    """
    if not maps:
        raise ValueError(f"{of} has nothing to draw")
    figure = figure_class(of)(figsize=(8, 4.5), dpi=150, layout="constrained")
    most = max(float(each.max()) for each in maps.values())
    for each, (name, numbers) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        shown = each.imshow(numbers.numpy(), vmin=0, vmax=most, aspect="auto")
        each.set_title(name, fontsize=9)
        each.set_xlabel(axes[0])
        each.set_ylabel(axes[1])
    figure.colorbar(shown, ax=figure.axes, label=measure)
    figure.suptitle(title)
    figure.savefig(path)
