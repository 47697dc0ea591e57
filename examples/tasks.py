"""The paper's tasks as data: where the texts are, how a T5 is asked for them, how it decodes, and what is measured."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Any

import evaluate
import sacrebleu
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import logging


logger = logging.get_logger(__name__)


# -- texts -----------------------------------------------------------------------------------------------------------------


def same(source: str) -> str:
    return source


def highlight_answer(context: str, answer: str, answer_start: int | str) -> str:
    """The context with its answer between `<hl>` marks, at the occurrence nearest to where the dataset says it is."""
    answer = answer.strip()
    starts = [match.start() for match in re.finditer(re.escape(answer), context)] if answer else []
    if not starts:
        raise ValueError(f"the answer {answer!r} is not in its context {context[:60]!r}...; take such examples out")
    start = min(starts, key=lambda found: abs(found - int(answer_start)))
    return f"{context[:start]}<hl> {answer} <hl>{context[start + len(answer) :]}"


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Args:
        dataset, config: on the Hub.
        columns: what `write_source` takes, and `target`, each with the columns that may hold it: that of the dataset, where
            `answers.text` is field `text` of column `answers`, and a plain one for files that cannot nest.
        prefix: put before every source.
        max_source_length, max_target_length: in tokens. Longer ones are cut, and generation stops at the latter.
        generation: arguments of `generate`; they are saved with the bank.
        metrics: names for `load_metric`, each with those of its scores that the task reports.
        write_source: from the columns to the source.
        test_split: on the Hub.
    """

    dataset: str
    config: str | None
    columns: Mapping[str, tuple[str, ...]]
    prefix: str
    max_source_length: int
    max_target_length: int
    generation: Mapping[str, Any]
    metrics: Mapping[str, tuple[str, ...]]
    write_source: Callable[..., str] = same
    test_split: str = "test"

    @property
    def scores(self) -> tuple[str, ...]:
        return tuple(score for scores in self.metrics.values() for score in scores)


ROUGE = {"rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum")}

TASKS = {
    # Decoding and prefix: `task_specific_params["summarization"]` in the configuration of T5-base and T5-large.
    "cnn_dailymail": Task(
        dataset="abisee/cnn_dailymail",
        config="3.0.0",
        columns={"source": ("article",), "target": ("highlights",)},
        prefix="summarize: ",
        max_source_length=512,
        max_target_length=200,
        generation={"num_beams": 4, "length_penalty": 2.0, "min_length": 30, "no_repeat_ngram_size": 3, "early_stopping": True},
        metrics=ROUGE,
    ),
    # One sentence, for which T5's own decoding is too long: this is that of facebook/bart-large-xsum.
    "xsum": Task(
        dataset="EdinburghNLP/xsum",
        config=None,
        columns={"source": ("document",), "target": ("summary",)},
        prefix="summarize: ",
        max_source_length=512,
        max_target_length=62,
        generation={"num_beams": 6, "min_length": 11, "no_repeat_ngram_size": 3, "early_stopping": True},
        metrics=ROUGE,
    ),
    # Answer-aware, in the form of the T5s that the Hub has for it, lmqg/t5-{base,large}-squad-qg and valhalla/t5-base-qg-hl, whose
    # tokenizers know `<hl>`; lengths and beams are valhalla's. SQuAD's test answers are not public, so the test is the validation split.
    # Their published BLEU-4 is not sacreBLEU (valhalla used nlg-eval): do not compare the two.
    "squad_qg": Task(
        dataset="rajpurkar/squad",
        config=None,
        columns={
            "context": ("context",),
            "answer": ("answers.text", "answer"),
            "answer_start": ("answers.answer_start", "answer_start"),
            "target": ("question",),
        },
        prefix="generate question: ",
        max_source_length=512,
        max_target_length=32,
        generation={"num_beams": 4},
        metrics={"rouge": ("rougeL",), "sacrebleu": ("bleu",)},
        write_source=highlight_answer,
        test_split="validation",
    ),
    # Decoding and prefix: `task_specific_params["translation_en_to_de"]` in the configuration of T5-base and T5-large.
    "wmt14_en_de": Task(
        dataset="wmt/wmt14",
        config="de-en",
        columns={"source": ("translation.en", "en"), "target": ("translation.de", "de")},
        prefix="translate English to German: ",
        max_source_length=300,
        max_target_length=300,
        generation={"num_beams": 4, "early_stopping": True},
        metrics={"sacrebleu": ("bleu",)},
    ),
}


def find_columns(task: Task, available: list[str], where: str) -> dict[str, str]:
    """`{what the task takes: the column that holds it}`.

    Raises:
        ValueError: a column is missing.
    """
    found = {role: next((name for name in names if name in available), None) for role, names in task.columns.items()}
    if None in found.values():
        needed = ", ".join(" or ".join(names) for names in task.columns.values())
        raise ValueError(f"{where} has the columns {', '.join(available)}; this task needs {needed}, so rename or add them")
    return found


def read_texts(task: Task, split: Dataset, where: str, prefix: str, num_proc: int | None = None) -> Dataset:
    """A split of the task's dataset as two columns, `source`, with the prefix, and `target`.

    Raises:
        ValueError: a column or a value is missing.
    """
    split = split.flatten()
    columns = find_columns(task, split.column_names, where)

    def read(example: dict[str, Any], index: int) -> dict[str, str]:
        values = {role: example[column] for role, column in columns.items()}
        # SQuAD gives every annotator's answer; the first is the one that the question was written for.
        values = {role: next(iter(value), None) if isinstance(value, list) else value for role, value in values.items()}
        for role, value in values.items():
            if value is None:
                raise ValueError(f"{where} has no {columns[role]} in example {index}, counted from 0; fill it in or take the example out")
        target = values.pop("target")
        return {"source": prefix + task.write_source(**values), "target": target}

    return split.map(read, with_indices=True, num_proc=num_proc, remove_columns=split.column_names, desc=f"Reading {where}")


# -- metrics ---------------------------------------------------------------------------------------------------------------


def rouge(compute: Callable[..., Any], predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures, 0 to 100, stemmed; a mean without bootstrapping, which would draw from numpy's generator."""
    scores = compute(
        predictions=[a_line_a_sentence(text) for text in predictions],
        references=[a_line_a_sentence(text) for text in references],
        use_stemmer=True,
        use_aggregator=False,
    )
    return {name: 100 * fmean(values) for name, values in scores.items()}


def bleu(compute: Callable[..., Any], predictions: list[str], references: list[str]) -> dict[str, float]:
    """SacreBLEU, 0 to 100, with its default tokenization (13a)."""
    return {"bleu": compute(predictions=predictions, references=[[text] for text in references])["score"]}


def a_line_a_sentence(text: str) -> str:
    """The form that ROUGE-Lsum reads; T5's tokenizers keep no line breaks."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def compute_rouge(*, predictions: list[str], references: list[str], use_stemmer: bool, use_aggregator: bool) -> dict[str, list[float]]:
    """`evaluate`'s "rouge" without `evaluate`: every example's F-measures."""
    assert not use_aggregator
    names = ROUGE["rouge"]
    scorer = RougeScorer(names, use_stemmer=use_stemmer)
    scores = [scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)]
    return {name: [score[name].fmeasure for score in scores] for name in names}


def compute_sacrebleu(*, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """`evaluate`'s "sacrebleu" without `evaluate`, for one reference each."""
    return {"score": sacrebleu.corpus_bleu(predictions, [[reference for (reference,) in references]]).score}


METRICS = {"rouge": (rouge, compute_rouge), "sacrebleu": (bleu, compute_sacrebleu)}


@cache
def load_metric(name: str) -> Callable[[list[str], list[str]], dict[str, float]]:
    """`metric(predictions, references)` gives scores by name, 0 to 100, the same from `evaluate` and from the package behind it.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; choose one of {', '.join(METRICS)}")
    score, compute = METRICS[name]
    try:
        compute = evaluate.load(name).compute
    except (OSError, ImportError) as error:
        # `evaluate` fetches a script from the Hub. Offline that is a FileNotFoundError or a ConnectionError, both OSErrors; an ImportError
        # is a script that wants a package which is not installed.
        logger.warning(f"evaluate cannot load {name!r}, so it is computed without evaluate. {type(error).__name__}: {error}")
    return partial(score, compute)
