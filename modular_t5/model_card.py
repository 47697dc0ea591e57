"""What is known of a bank or of an assembled model -> its card on the Hub, metadata included.

The texts are in `model_cards/`; the figures come from a result file of `Frontier.save`, and what is not in one is said not to be known.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import T5Config, T5ForConditionalGeneration

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .choosing_modular_t5 import BankShape, PlanReport
from .configuration_modular_t5 import ModularT5Config
from .frontier import PICTURE_FILE, RESULTS_FILE, Frontier, FrontierPoint, standard_sizes
from .loading_modular_t5 import hub_teacher
from .presenting import markdown_table


# In a clone they lie beside the package, installed in it.
_TEMPLATES = next(folder / "model_cards" for folder in Path(__file__).parents[:2] if (folder / "model_cards").is_dir())

_TAGS = ["t5", "modular-t5", "compression", "distillation"]


class Described(Protocol):
    """A bank, in memory or saved."""

    config: ModularT5Config

    @property
    def shape(self) -> BankShape: ...


@dataclass(frozen=True)
class CardDetails:
    """What a card tells beside what the model itself does.

    Args:
        results: a file that `Frontier.save` wrote. Without it, sizes are told and nothing else of them.
        picture: file name of `Frontier.plot` in the repository.
        language: ISO 639-1 codes.
        license: by the Hub's name for it.
        datasets: Hub ids.
        dataset_name: of what the results were measured on; by default the first of `datasets`.
        pipeline_tag: the Hub's name of the task, such as `translation` or `summarization`.
        tags: further ones.
        example: a text to try, as the task has them.
    """

    results: str | os.PathLike | None = None
    picture: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    dataset_name: str | None = None
    pipeline_tag: str = "text-generation"
    tags: Sequence[str] = ()
    example: str = "A text."

    @property
    def measured_on(self) -> str | None:
        """A name for what the results were measured on."""
        return self.dataset_name or (self.datasets[0] if self.datasets else None)


def bank_card(
    bank: Described, repo_id: str, *, training: Mapping[str, Any] | None = None, modules_only: bool | None = None, **details: Any
) -> ModelCard:
    """The card of a bank: how to load each size, what each is worth, how it was trained, what was not measured.

    Args:
        bank: a `ModularT5ForConditionalGeneration`, or a `SavedBank`.
        repo_id: where it will be, for the lines of code.
        training: what `ModularTrainer.training_record` returned.
        modules_only: whether the teacher is left out of the files; by default as the bank is saved.
        details: the fields of `CardDetails`.

    Raises:
        ValueError: the results are not a file of `Frontier.save`, or of another bank.
    """
    told = CardDetails(**details)
    config, shape = bank.config, bank.shape
    modules_only = bool(modules_only if modules_only is not None else config.modules_only or config.lora)
    measured = Frontier.load(told.results) if told.results is not None else None
    if measured is None:
        sizes = {name: shape.report(plan) for name, plan in standard_sizes(shape).items()}
        points = [FrontierPoint.of(name, report, {}, {}, 0.0) for name, report in sizes.items()]
        table = counts_table(sizes)
    else:
        points, table = list(measured.points), measured.table()
        for point in points:
            if shape.report(AssemblyPlan.parse(point.plan)).total_parameters != point.parameters:
                raise ValueError(f"{told.results} was measured on another bank: its {point.plan} has {point.parameters:,} parameters")
    try:
        teacher_id, commit = hub_teacher(config)
        teacher = f"[{teacher_id}](https://huggingface.co/{teacher_id}/tree/{commit})"
    except ValueError:
        teacher_id, teacher = None, "a fine-tuned T5 that is not on the Hub"
    not_measured = [] if training else ["How the bank was trained was not recorded."]
    return _rendered(
        "bank.md.jinja",
        repo_id,
        told,
        measured,
        points,
        base_model=teacher_id,
        teacher=teacher,
        sizes=points,
        ratio=f"{min(2, shape.largest_ratio):g}",
        calibrated=shape.calibration is not None,
        table=table,
        files=shard_table(config, modules_only),
        modules_only=modules_only,
        sha256=(config.teacher or {}).get("sha256"),
        training=training and {**training, "software": _software(training)},
        not_measured=[*_not_measured(measured, told), *not_measured],
    )


def assembled_card(model: T5ForConditionalGeneration, repo_id: str, **details: Any) -> ModelCard:
    """The card of an assembled model: how to load it, what it is worth, how to make it again.

    Args:
        model: what `assemble` or `assemble_from_pretrained` returned, or the same saved and loaded.
        repo_id, details: as in `bank_card`.

    Raises:
        ValueError: the model does not remember a bank, or the results are not a file of `Frontier.save`.
    """
    told = CardDetails(**details)
    origin = origin_of(model.config)
    measured = Frontier.load(told.results) if told.results is not None else None
    points = [point for point in measured.points if point.plan == origin["plan"]] if measured else []
    if not points:
        measured = None
    on_hub = origin["revision"] is not None
    url = f"https://huggingface.co/{origin['bank']}/tree/{origin['revision']}"
    return _rendered(
        "assembled.md.jinja",
        repo_id,
        told,
        measured,
        points,
        base_model=origin["bank"] if on_hub else None,
        plan=origin["plan"],
        depths=AssemblyPlan.parse(origin["plan"]).depths,
        parameters=f"{model.num_parameters():,}",
        bank=f"the module bank [{origin['bank']}]({url})" if on_hub else "a module bank that is not on the Hub",
        revision=f"`{origin['revision']}`" if on_hub else "none",
        table=measured and measured.table([measured.teacher, *points]),
        not_measured=_not_measured(measured, told),
    )


def measured_in(folder: str | os.PathLike) -> dict[str, Any]:
    """The arguments `results` and `picture` of a card, of files by their usual names in a folder."""
    results = Path(folder, RESULTS_FILE)
    picture = {"picture": PICTURE_FILE} if Path(folder, PICTURE_FILE).exists() else {}
    return {"results": results, **picture} if results.exists() else {}


def origin_of(config: T5Config) -> dict[str, str | None]:
    """`bank`, `revision` and `plan` that an assembled model remembers; a `ValueError` if it does not."""
    origin = getattr(config, "modular_t5", None)
    if not isinstance(origin, Mapping) or not {"bank", "revision", "plan"} <= origin.keys() or not isinstance(origin["plan"], str):
        raise ValueError(f"{config.name_or_path or 'this model'} does not remember a bank that it was assembled from")
    return dict(origin)


def counts_table(sizes: Mapping[str, PlanReport]) -> str:
    """A Markdown table of what sizes cost."""
    rows = [
        [
            name,
            str(report.plan),
            "+".join(map(str, report.plan.depths)),
            f"{report.layer_ratio:.2f}x",
            f"{report.total_ratio:.2f}x",
            f"{report.total_parameters:,}",
            f"{report.bytes / 1e6:.2f}",
        ]
        for name, report in sizes.items()
    ]
    return markdown_table(["size", "plan", "layers", "ratio", "ratio of all", "parameters", "MB"], rows, left=2)


def shard_table(config: ModularT5Config, modules_only: bool) -> list[tuple[str, str]]:
    """`(file, what it holds)` of the weights of a saved bank."""
    rows = []
    if not modules_only:
        rows.append(("model-common.safetensors", "embeddings, position biases, final norms, head: every size uses it"))
        rows += [(f"model-{side}-original.safetensors", f"the teacher's {side} layers") for side in SIDES]
    for side in SIDES:
        what = "low-rank differences of the modules" if config.lora else "modules"
        rows += [(f"model-{side}-modules-{s}.safetensors", f"{what}, each for {s} {side} layers") for s in config.granularities[side]]
    if config.own_parts:
        parts = ", ".join(part.replace("_", " ") for part in config.own_parts)
        rows.append(("model-own.safetensors", f"the bank's own {parts}, in place of the teacher's where there are modules"))
    return rows


def _legend(frontier: Frontier) -> str:
    """Where and how the figures were measured."""
    told = frontier.provenance
    parts = [
        f"Measured {told['date']} on {told['hardware']}" if {"date", "hardware"} <= told.keys() else "",
        f"{told['test_examples']} test examples" if "test_examples" in told else "",
        f"{told['decoding']} decoding" if "decoding" in told else "",
        f"speed: {told['speed']}" if "speed" in told else "",
        f"seed {told['seed']}" if "seed" in told else "",
        ", ".join(f"{name} ({signature})" for name, signature in told.get("metrics", {}).items()),
    ]
    kept = f'"kept" is {frontier.metric} in per cent of the teacher\'s'
    pareto = '"Pareto": no other of these sizes has as much quality for fewer bytes (size), or in less time (speed)'
    return "; ".join(part for part in [*parts, kept, pareto] if part) + "."


def _rendered(
    template: str,
    repo_id: str,
    told: CardDetails,
    measured: Frontier | None,
    points: Sequence[FrontierPoint],
    *,
    base_model: str | None,
    **texts: Any,
) -> ModelCard:
    """A card of either kind, with the metadata and texts that both have. The model index needs a name for what was measured on."""
    name = repo_id.split("/")[-1]
    evaluations = [
        EvalResult(
            task_type=told.pipeline_tag,
            dataset_type=told.datasets[0] if told.datasets else _identifier(told.measured_on),
            dataset_name=told.measured_on,
            metric_type=_identifier(metric),
            metric_name=f"{metric}, {point.name} ({point.plan})",
            metric_value=round(score, 2),
        )
        for point in points
        for metric, score in point.scores.items()
        if measured and told.measured_on
    ]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        language=told.language if isinstance(told.language, str | None) else list(told.language),
        license=told.license,
        library_name="transformers",
        pipeline_tag=told.pipeline_tag,
        datasets=list(told.datasets) or None,
        metrics=[_identifier(metric) for metric in measured.teacher.scores] if measured else None,
        tags=[*_TAGS, *told.tags],
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATES / template),
        name=name,
        repo_id=repo_id,
        results=measured,
        legend=measured and _legend(measured),
        picture=told.picture,
        example=_quoted(told.example),
        **texts,
    )


def _not_measured(measured: Frontier | None, told: CardDetails) -> list[str]:
    if measured is None:
        return ["Quality and speed, of any size."]
    items = ["Sizes that are not in the table."]
    if "hardware" in measured.provenance:
        items.append(f"Speed on other hardware than {measured.provenance['hardware']}, and for other batches and lengths.")
    if "seed" in measured.provenance:
        items.append(f"Other seeds than {measured.provenance['seed']}: there are no error bars.")
    items.append("Texts of another kind than the test examples.")
    if not told.measured_on:
        items.append("The metadata names no dataset, so the results are in the table alone.")
    return items


def _software(training: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in training["versions"].items()) + "."


def _identifier(text: str | None) -> str:
    return (text or "").strip().lower().replace(" ", "_")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
