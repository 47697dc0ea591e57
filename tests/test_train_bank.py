"""The recipes: every task of the table runs end to end on files with its dataset's columns, and what a user may get wrong is told."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import sacrebleu
import torch
from conftest import make_teacher
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from modular_t5 import ModularT5ForConditionalGeneration


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import tasks  # noqa: E402
import train_bank  # noqa: E402


CONTEXT = "a book and a tree, and a book"

# task -> (rows of its dataset, the same without nesting, the source and target that they mean)
ROWS = {
    "cnn_dailymail": (
        {"article": "the tree, the book: NA", "highlights": "one tree -\none book", "id": "x"},
        {"article": "the tree, the book: NA", "highlights": "one tree -\none book", "id": "x"},
        ("summarize: the tree, the book: NA", "one tree -\none book"),
    ),
    "xsum": (
        {"document": "NA", "summary": "one tree", "id": "007"},
        {"document": "NA", "summary": "one tree", "id": "007"},
        ("summarize: NA", "one tree"),
    ),
    "squad_qg": (
        {
            "id": "x",
            "title": "y",
            "context": CONTEXT,
            "question": "what else, two times?",
            "answers": {"text": ["a book", "book"], "answer_start": [23, 25]},
        },
        {"context": CONTEXT, "question": "what else, two times?", "answer": "a book", "answer_start": "23"},
        ("generate question: a book and a tree, and <hl> a book <hl>", "what else, two times?"),
    ),
    "wmt14_en_de": (
        {"translation": {"de": "ein Baum", "en": "a tree"}},
        {"de": "ein Baum", "en": "a tree"},
        ("translate English to German: a tree", "ein Baum"),
    ),
}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, pico_tokenizer):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.save_pretrained(folder)
    make_teacher(vocab_size=len(tokenizer), dropout_rate=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _datasets_are_cached_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_file(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def write_files(folder, task, kind="jsonl"):
    """Arguments that name a file for every split."""
    row = ROWS[task][kind == "csv"]
    sizes = {"train": 8, "validation": 3, "test": 2}
    return {f"{name}_file": write_file(folder / f"{name}.{kind}", [row] * size) for name, size in sizes.items()}


QUICK = {
    "granularities": [2, 3],
    "eval_plans": ["1x6/1x6", "2x3/3x2"],
    "max_source_length": 24,
    "max_target_length": 8,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "predict_with_generate": True,
}


def arguments(folder, task, **changes):
    return {"task": task, "output_dir": folder / "out", **QUICK, **changes}


def command_line(given):
    argv = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    return argv


def run(given):
    return train_bank.main(command_line(given))


def results(folder, name):
    return json.loads((folder / "out" / f"{name}_results.json").read_text())


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_trains_evaluates_and_predicts(task, kind, tmp_path, teacher_folder, capsys):
    doing = dict.fromkeys(("do_train", "do_eval", "do_predict"), True)
    metrics = run(arguments(tmp_path, task, teacher=teacher_folder, **write_files(tmp_path, task, kind), **doing))

    scores = tasks.TASKS[task].scores
    train, evaluation, prediction = (results(tmp_path, name) for name in ("train", "eval", "predict"))
    assert {"train_loss", "train_samples"} <= set(train)
    assert train["train_samples"] == 8
    assert evaluation["eval_samples"] == 3
    assert prediction["predict_samples"] == 2
    for plan in QUICK["eval_plans"]:
        for score in ("loss", "gen_len", *scores):
            assert f"eval_{plan}_{score}" in evaluation
            assert f"predict_{plan}_{score}" in prediction
        assert all(0 <= evaluation[f"eval_{plan}_{score}"] <= 100 for score in scores)
    assert set(evaluation) | set(prediction) <= set(metrics)
    assert prediction["predict_1x6/1x6_layer_ratio"] == 1
    assert prediction["predict_2x3/3x2_layer_ratio"] > 2

    bank = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert type(bank) is ModularT5ForConditionalGeneration
    assert bank.config.granularities == {"encoder": [2, 3], "decoder": [2, 3]}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(QUICK["eval_plans"])
    assert all(name in table[0] for name in ("plan", "parameters", "ratio", *scores))
    assert f"{bank.report('2x3/3x2').total_parameters:,}" in table[3]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(line) for line in lines] == [QUICK["eval_plans"]] * 2


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_files_become_the_texts_that_they_mean(task, kind, tmp_path):
    nested, flat, (source, target) = ROWS[task]
    file = write_file(tmp_path / f"train.{kind}", [flat if kind == "csv" else nested])
    recipe = train_bank.RecipeArguments(task=task, train_file=str(file))
    split, where = train_bank.load_split(tasks.TASKS[task], "train", recipe)
    assert tasks.read_texts(tasks.TASKS[task], split, where, tasks.TASKS[task].prefix)[:] == {"source": [source], "target": [target]}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_without_files_the_dataset_of_the_task_is_read(task, tmp_path):
    folder = tmp_path / "dataset"  # `datasets` takes a folder where it takes a name on the Hub
    folder.mkdir()
    names = ["train", "validation", *(["test"] if tasks.TASKS[task].test_split == "test" else [])]
    for size, name in enumerate(names, start=1):
        write_file(folder / f"{name}.jsonl", [ROWS[task][0]] * size)
    local = dataclasses.replace(tasks.TASKS[task], dataset=str(folder), config=None)
    recipe = train_bank.RecipeArguments(task=task)
    for name, size in (("train", 1), ("validation", 2), ("test", len(names))):
        split, where = train_bank.load_split(local, name, recipe)
        assert len(split) == size
        assert str(folder) in where
    # The Hub's WMT14 has a feature type of its own.
    if task == "wmt14_en_de":
        split = split.cast_column("translation", datasets.Translation(["de", "en"]))
    assert tasks.read_texts(local, split, where, local.prefix)[0]["source"] == ROWS[task][2][0]


def test_an_answer_is_highlighted_where_the_dataset_says():
    assert tasks.highlight_answer(CONTEXT, "a book", 0) == "<hl> a book <hl> and a tree, and a book"
    # An index that is off by one or two, and blanks around the answer, both occur.
    assert tasks.highlight_answer(CONTEXT, " a book ", 21) == "a book and a tree, and <hl> a book <hl>"
    assert tasks.highlight_answer("1 + 1 (one)", "(one)", "6") == "1 + 1 <hl> (one) <hl>"
    for answer in ("a cat", ""):
        with pytest.raises(ValueError, match="is not in its context"):
            tasks.highlight_answer(CONTEXT, answer, 0)


def test_lengths_prefix_and_samples_override_the_task(tmp_path, pico_tokenizer):
    file = write_file(tmp_path / "train.jsonl", [ROWS["xsum"][0]] * 5)
    overrides = {"source_prefix": "", "max_source_length": 2, "max_target_length": 4, "max_train_samples": 3}
    recipe = train_bank.RecipeArguments(task="xsum", train_file=str(file), **overrides)
    args = train_bank.ModularTrainingArguments(str(tmp_path), use_cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    split = train_bank.tokenized(tasks.TASKS["xsum"], "train", tokenizer, recipe, args)
    assert len(split) == 3
    assert split[0]["input_ids"] == tokenizer("NA", max_length=2, truncation=True).input_ids
    assert len(split[0]["input_ids"]) == 2
    assert len(split[0]["labels"]) == 4


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("overrides", [{}, {"num_beams": 1}, {"max_target_length": 5, "num_beams": 2}])
def test_decoding_is_the_tasks_and_can_be_saved(task, overrides, tmp_path):
    generation = train_bank.decoding(tasks.TASKS[task], train_bank.RecipeArguments(task=task, **overrides))
    config = GenerationConfig(**generation)
    config.save_pretrained(tmp_path)
    assert generation["num_beams"] == overrides.get("num_beams", tasks.TASKS[task].generation["num_beams"])
    assert generation["max_length"] == overrides.get("max_target_length", tasks.TASKS[task].max_target_length)
    assert generation.get("min_length", 0) < generation["max_length"]


def test_the_same_command_continues_from_the_last_checkpoint(tmp_path, teacher_folder):
    given = arguments(tmp_path, "xsum", teacher=teacher_folder, do_train=True, **write_files(tmp_path, "xsum"))
    given |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(given)
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "out" / "checkpoint-2", resumed / "checkpoint-2")
    run({**given, "output_dir": resumed})
    history = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == 4
    again = AutoModelForSeq2SeqLM.from_pretrained(resumed).state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # A checkpoint may be named. This one is of the last step, so that nothing is left to train or to save on the way.
    named = tmp_path / "named"
    run({**given, "resume_from_checkpoint": resumed / "checkpoint-4", "output_dir": named})
    assert not list(named.glob("checkpoint-*"))
    again = AutoModelForSeq2SeqLM.from_pretrained(named).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_without_training_the_bank_in_the_folder_is_evaluated(tmp_path, teacher_folder):
    given = arguments(tmp_path, "wmt14_en_de", do_eval=True, **write_files(tmp_path, "wmt14_en_de"))
    trained = run({**given, "teacher": teacher_folder, "do_train": True})
    evaluated = run(given)
    names = [name for name in evaluated if name.endswith(("loss", "bleu", "gen_len"))]
    assert len(names) >= 3
    assert {name: evaluated[name] for name in names} == {name: trained[name] for name in names}


def test_low_rank_modules_train_and_are_evaluated_later(tmp_path, teacher_folder):
    given = arguments(tmp_path, "xsum", teacher=teacher_folder, do_eval=True, do_predict=True, **write_files(tmp_path, "xsum"))
    given |= {"lora_rank": 2, "learning_rate": 0.1}
    trained = run({**given, "do_train": True})
    evaluated = run(given)
    for name in ("eval_2x3/3x2_loss", "predict_2x3/3x2_loss"):
        assert evaluated[name] == pytest.approx(trained[name], rel=1e-4)


def test_low_rank_additions_reach_every_matrix_of_a_block():
    for family, feed_forward in (("v1.0", ["wi", "wo"]), ("v1.1", ["wi_0", "wi_1", "wo"])):
        config = train_bank.lora_config(ModularT5ForConditionalGeneration.from_t5(make_teacher(family)), rank=4)
        assert sorted(config.target_modules) == sorted(["q", "k", "v", "o", *feed_forward])
        assert (config.r, config.lora_alpha) == (4, 8)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_arguments_may_come_from_a_file(kind, tmp_path):
    given = {"task": "xsum", "teacher": "x", "output_dir": "y", "do_train": True, "granularities": [2, 3], "learning_rate": 1e-3}
    file = tmp_path / f"arguments.{kind}"
    file.write_text(json.dumps(given))  # YAML too
    recipe, args = train_bank.parse_arguments([str(file)])
    assert (recipe.task, recipe.granularities, args.learning_rate, args.do_train) == ("xsum", [2, 3], 1e-3, True)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_bank.main(["--help"])
    assert "wmt14_en_de" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "squad"}, "unknown task 'squad'; choose one of cnn_dailymail, xsum, squad_qg, wmt14_en_de"),
        ({"teacher": None}, "--do_train needs a --teacher"),
        ({"do_train": None}, "nothing to do; give --do_train, --do_eval or --do_predict"),
        ({"do_train": None, "do_eval": True}, "there is no bank in .*out to evaluate; add --do_train"),
        ({"do_predict": True, "predict_with_generate": None}, "add --predict_with_generate"),
        ({"train_file": "train.txt"}, "type of 'train.txt' .* use one of .json, .jsonl, .csv"),
        ({"train_file": None}, "--train_file is missing"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"max_train_samples": -1}, "max_train_samples must be at least 1, got -1"),
        ({"granularities": [5]}, "5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message, tmp_path, teacher_folder):
    given = arguments(tmp_path, "xsum", teacher=teacher_folder, do_train=True, **write_files(tmp_path, "xsum"))
    given = {name: value for name, value in {**given, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        run(given)


@pytest.mark.parametrize(
    ("task", "kind", "row", "message"),
    [
        ("xsum", "csv", {"text": "a", "summary": "b"}, r"train.csv has the columns text, summary; this task needs document, summary"),
        ("wmt14_en_de", "jsonl", {"translation": {"en": "a", "fr": "b"}}, "needs translation.en or en, translation.de or de"),
        ("squad_qg", "csv", {"context": "a", "question": "b", "answer": "a"}, "needs .* answers.answer_start or answer_start"),
        ("xsum", "jsonl", {"document": "a", "summary": None}, "train.jsonl has no summary in example 0"),
        ("squad_qg", "jsonl", {**ROWS["squad_qg"][0], "answers": {"text": [], "answer_start": []}}, "has no answers.text in example 0"),
    ],
)
def test_files_that_lack_something_are_refused(task, kind, row, message, tmp_path):
    recipe = train_bank.RecipeArguments(task=task, train_file=str(write_file(tmp_path / f"train.{kind}", [row])))
    split, where = train_bank.load_split(tasks.TASKS[task], "train", recipe)
    with pytest.raises(ValueError, match=message):
        tasks.read_texts(tasks.TASKS[task], split, where, "")


# -- metrics ---------------------------------------------------------------------------------------------------------------

PREDICTIONS = ["The cats sat on the mat. It rained!", "a completely different sentence of eight words here", ""]
REFERENCES = ["The cat sat on a mat. It was raining!", "a sentence that is completely different and has ten words", "nothing"]

# What `evaluate` would fetch from the Hub, reduced to what it computes; it looks for a script in the working directory first.
ROUGE_SCRIPT = """
import datasets
import evaluate
from rouge_score import rouge_scorer


class Rouge(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references, use_stemmer, use_aggregator):
        names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        scorer = rouge_scorer.RougeScorer(names, use_stemmer=use_stemmer)
        scores = [scorer.score(r, p) for r, p in zip(references, predictions)]
        return {name: [score[name].fmeasure for score in scores] for name in names}
"""
SACREBLEU_SCRIPT = """
import datasets
import evaluate
import sacrebleu


class Sacrebleu(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"score": sacrebleu.corpus_bleu(predictions, list(zip(*references))).score, "counts": []}
"""


@pytest.fixture
def _nothing_loaded():
    tasks.load_metric.cache_clear()
    yield
    tasks.load_metric.cache_clear()


def test_rouge_without_evaluate_is_what_rouge_score_says():
    scores = tasks.load_metric("rouge")(PREDICTIONS, REFERENCES)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    lines = [text.replace(". ", ".\n") for text in REFERENCES], [text.replace(". ", ".\n") for text in PREDICTIONS]
    wanted = [scorer.score(reference, prediction) for reference, prediction in zip(*lines, strict=True)]
    assert scores == {name: pytest.approx(100 * sum(score[name].fmeasure for score in wanted) / 3) for name in wanted[0]}
    # By hand: "the cat sat on a mat" against "the cats sat on the mat", stemmed: 5 of 6 words each way, "the" once.
    by_hand = tasks.load_metric("rouge")(["the cats sat on the mat"], ["the cat sat on a mat"])
    assert by_hand["rouge1"] == by_hand["rougeL"] == pytest.approx(100 * 5 / 6)
    assert by_hand["rouge2"] == pytest.approx(100 * 3 / 5)


def test_sentences_are_lines_for_rouge_lsum():
    assert tasks.a_line_a_sentence(" One tree. Two trees?  3.5 books! End") == "One tree.\nTwo trees?\n3.5 books!\nEnd"
    swapped = tasks.load_metric("rouge")(["It rained. The cat sat."], ["The cat sat. It rained."])
    assert swapped["rougeLsum"] == pytest.approx(100)
    assert swapped["rougeL"] < 100


def test_bleu_without_evaluate_is_what_sacrebleu_says():
    scores = tasks.load_metric("sacrebleu")(PREDICTIONS, REFERENCES)
    assert scores == {"bleu": sacrebleu.BLEU().corpus_score(PREDICTIONS, [REFERENCES]).score}
    assert tasks.load_metric("sacrebleu")(REFERENCES[:2], REFERENCES[:2]) == {"bleu": pytest.approx(100)}


@pytest.mark.usefixtures("_nothing_loaded")
def test_a_metric_that_evaluate_cannot_load_is_said_once(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        tasks.load_metric("sacrebleu")
    (message,) = [record.message for record in caplog.records if record.name == "tasks"]
    assert message.startswith("evaluate cannot load 'sacrebleu', so it is computed without evaluate. FileNotFoundError")


@pytest.mark.slow
def test_evaluate_gives_the_same_where_it_loads(tmp_path):
    # In a process and a cache of its own: `evaluate` keeps what it has loaded in both.
    for name, script in (("rouge", ROUGE_SCRIPT), ("sacrebleu", SACREBLEU_SCRIPT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(script)
    code = f"import json, tasks; print(json.dumps([tasks.load_metric(n)({PREDICTIONS}, {REFERENCES}) for n in tasks.METRICS]))"
    paths = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot load" not in done.stderr
    assert json.loads(done.stdout) == [tasks.load_metric(name)(PREDICTIONS, REFERENCES) for name in tasks.METRICS]


def test_an_unknown_metric_lists_the_choices():
    with pytest.raises(ValueError, match="unknown metric 'meteor'; choose one of rouge, sacrebleu"):
        tasks.load_metric("meteor")
