"""What a comparison found: scores with intervals, who is ahead, the table and the picture."""

import os
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from .pairs import scores_of, signatures
from .presenting import markdown_table, picture
from .significance import BleuSamples


def scored(rows: Mapping[str, Any], teacher: Mapping[str, list[str]], references: Sequence[str]) -> dict[str, Any]:
    """Scores in place of texts.

    Args:
        rows: by method, among others `texts`: by plan, a list with a mapping of decoding -> texts for each seed; and `per_size`.
        teacher: decoding -> texts.

    Returns:
        `metrics`, the scores' signatures; `teacher`, its scores by decoding; `rows`, with `scores` by plan and decoding; `ahead`, of every
        method of one training for all sizes, by plan and decoding: how far it is ahead of the best of those of a training a size.
    """
    of_teacher = {decoding: scores_of(texts, references) for decoding, texts in teacher.items()}
    samples = {
        (name, plan, decoding): BleuSamples([of[decoding] for of in of_seeds], references)
        for name, row in rows.items()
        for plan, of_seeds in row["texts"].items()
        for decoding in teacher
    }
    scored_rows = {}
    for name, row in rows.items():
        scores = {
            plan: {
                decoding: {
                    "BLEU": samples[name, plan, decoding].mean,
                    "BLEU_of_seeds": samples[name, plan, decoding].of_seeds,
                    "BLEU_interval": samples[name, plan, decoding].interval,
                    "chrF": mean(scores_of(of[decoding], references)["chrF"] for of in of_seeds),
                    "BLEU_with_teacher": mean(scores_of(of[decoding], teacher[decoding])["BLEU"] for of in of_seeds),
                    "kept_percent": _share(samples[name, plan, decoding].mean, of_teacher[decoding]["BLEU"]),
                }
                for decoding in teacher
            }
            for plan, of_seeds in row["texts"].items()
        }
        scored_rows[name] = {**{key: value for key, value in row.items() if key != "texts"}, "scores": scores}
    ahead: dict[str, Any] = {}
    for (name, plan, decoding), ours in samples.items():
        rivals = [other for other, row in rows.items() if row["per_size"] and (other, plan, decoding) in samples]
        if rows[name]["per_size"] or not rivals:
            continue
        best = max(rivals, key=lambda other: samples[other, plan, decoding].mean)
        by, interval = ours.ahead_of(samples[best, plan, decoding])
        ahead.setdefault(name, {}).setdefault(plan, {})[decoding] = {
            "of": best,
            "BLEU": by,
            "interval": interval,
        }
    return {"metrics": signatures(), "teacher": of_teacher, "rows": scored_rows, "ahead": ahead}


def _share(score: float, of_teacher: float) -> float | None:
    return 100 * score / of_teacher if of_teacher else None  # JSON has no NaN


def _printed(score: Mapping[str, Any]) -> str:
    kept = "n/a" if score["kept_percent"] is None else f"{score['kept_percent']:.1f} %"
    return f"{score['BLEU']:.2f} ({kept})"


def tables(results: Mapping[str, Any]) -> str:
    """All of them, in Markdown."""
    return "\n\n".join(of(results) for of in (table, ahead_table, agreement_table, costs_table))


def table(results: Mapping[str, Any], decoding: str = "greedy") -> str:
    """BLEU of every method at every size, and in brackets per cent of the teacher's; what all sizes together took, a seed.

    A pass is one of a student, forward and backward; a step of Modular T5 has several.
    """
    plans = _scored_plans(results)
    header = ["method", *plans.values(), "runs", "steps", "passes", "minutes"]
    rows = [
        [
            name,
            *(_printed(row["scores"][plan][decoding]) if plan in row["scores"] else "" for plan in plans),
            str(row["runs"] if row["steps"] else 0),
            f"{row['steps']:,.0f}",
            f"{row['passes']:,.0f}",
            f"{row['seconds'] / 60:.1f}",
        ]
        for name, row in results["rows"].items()
    ]
    return markdown_table(header, rows)


def _scored_plans(results: Mapping[str, Any]) -> dict[str, str]:
    """The plans that some method has a model of, and their depths."""
    scored_by_some = {plan for row in results["rows"].values() for plan in row["scores"]}
    return {plan: "-".join(map(str, of["depths"])) for plan, of in results["costs"].items() if plan in scored_by_some}


def agreement_table(results: Mapping[str, Any], decoding: str = "greedy") -> str:
    """BLEU of every method at every size with what the teacher says in the references' place: chance has less of a say in it."""
    plans = _scored_plans(results)
    rows = [
        [name, *(f"{row['scores'][plan][decoding]['BLEU_with_teacher']:.1f}" if plan in row["scores"] else "" for plan in plans)]
        for name, row in results["rows"].items()
    ]
    return markdown_table(["BLEU with the teacher", *plans.values()], rows)


def ahead_table(results: Mapping[str, Any], decoding: str = "greedy") -> str:
    """How far methods of one training are ahead of the best of those of one a size, with 95 % intervals over the test sentences, and below
    the mean, where there are several, each seed."""
    plans = _scored_plans(results)
    best = {plan: of[decoding]["of"] for of_method in results["ahead"].values() for plan, of in of_method.items()}
    rows = [["*best of one training a size*", *(f"*{best[plan]}*" if plan in best else "" for plan in plans)]] if best else []
    for name, of_method in results["ahead"].items():
        means, of_seeds = {}, {}
        for plan, of in of_method.items():
            means[plan] = "{:+.2f} ({:+.2f} to {:+.2f})".format(of[decoding]["BLEU"], *of[decoding]["interval"])
            ours, best_ones = (results["rows"][method]["scores"][plan][decoding]["BLEU_of_seeds"] for method in (name, of[decoding]["of"]))
            of_seeds[plan] = ", ".join(f"{its - that:+.2f}" for its, that in zip(ours, best_ones, strict=True))
        rows.append([name, *(means.get(plan, "") for plan in plans)])
        if any("," in differences for differences in of_seeds.values()):
            rows.append([f"{name}, each seed", *(of_seeds.get(plan, "") for plan in plans)])
    return markdown_table(["ahead by, BLEU", *plans.values()], rows)


def costs_table(results: Mapping[str, Any]) -> str:
    """What the teacher and every size weigh, and how fast they are."""
    rows = [
        [
            "-".join(map(str, of["depths"])),
            plan,
            f"{of['layer_ratio']:.2f}x",
            f"{of['parameters']:,}",
            f"{of['bytes'] / 1e6:.2f}",
            *(f"{of[f'tokens_per_second_batch_{size}']:,.0f}" for size in (1, 32)),
        ]
        for plan, of in results["costs"].items()
    ]
    return markdown_table(["size", "plan", "ratio", "parameters", "MB", "tokens/s, batch 1", "batch 32"], rows, left=2)


def plot(results: Mapping[str, Any], path: str | os.PathLike, decoding: str = "greedy", title: str = "") -> None:
    """BLEU against parameters, a line a method; bars are 95 % intervals of the bootstrap over test sentences.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = picture("comparison_results.plot")
    teacher = results["teacher"][decoding]["BLEU"]
    for number, (name, row) in enumerate(results["rows"].items()):
        points = sorted((results["costs"][plan]["parameters"], of[decoding]) for plan, of in row["scores"].items())
        sizes, values = [size / 1e6 for size, _ in points], [score["BLEU"] for _, score in points]
        bars = [[abs(score["BLEU"] - score["BLEU_interval"][end]) for _, score in points] for end in (0, 1)]
        style = {"linewidth": 1.2} if row["per_size"] else {"linewidth": 2.2}
        axes.errorbar(
            sizes,
            values,
            yerr=bars,
            fmt="o-" if number < 10 else "x--",
            markersize=4,
            capsize=2,
            color=f"C{number % 10}",
            label=name,
            **style,
        )
    axes.axhline(teacher, color="black", linestyle=":", label="teacher")
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel(f"BLEU, {decoding}")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)
