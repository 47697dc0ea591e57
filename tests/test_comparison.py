"""`modular-t5 compare`: the whole comparison at pico size, what it refuses, and that it goes on where it was stopped."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_teacher
from transformers import AutoTokenizer

from modular_t5 import BankShape, cli
from modular_t5.comparison import Comparison, ComparisonArguments, default_plans
from modular_t5.comparison_methods import ABLATIONS, METHODS, ROWS, Stopwatch
from modular_t5.comparison_results import agreement_table, ahead_table, scored


COMPARE = Path(__file__).parents[1] / "benchmarks" / "compare"
SIZES = ["1x6/2x3", "2x3/2x3", "1x6/3x2", "2x3/3x2", "3x2/3x2", "6x1/6x1"]
DEFAULTS = {"modular, own embeddings"}  # variations that say what is so unless arguments are given


@pytest.fixture
def given(tmp_path, pico_translation):
    """A file of arguments."""
    arguments = {
        "teacher": str(pico_translation / "teacher"),
        "train_file": str(pico_translation / "train.jsonl"),
        "test_file": str(pico_translation / "test.jsonl"),
        "source_lang": "en",
        "target_lang": "de",
        "max_source_length": 16,
        "max_target_length": 8,
        "max_steps": 2,
        "batch_size": 4,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    return arguments


def test_what_says_the_same_as_the_teacher_agrees_with_it():
    said, other = (
        ["ein Baum steht im Garten", "zwei Bücher liegen auf dem Tisch"],
        ["nichts davon ist so gesagt", "gar nichts davon ist wahr"],
    )
    rows = {name: {"texts": {"2x3/2x3": [{"greedy": texts}]}, "per_size": True} for name, texts in {"a": said, "b": other}.items()}
    results = scored(rows, {"greedy": said}, references=other)
    agreement = {name: row["scores"]["2x3/2x3"]["greedy"]["BLEU_with_teacher"] for name, row in results["rows"].items()}
    assert agreement["a"] == pytest.approx(100)
    assert agreement["b"] < 5
    results["costs"] = {"2x3/2x3": {"depths": [3, 3]}}
    assert re.search(r"^\| a +\| +100.0 \|$", agreement_table(results), re.MULTILINE)


def test_who_is_ahead_is_told_as_a_mean_and_for_each_seed():
    right, wrong = ["ein Baum steht im Garten"], ["nichts davon ist so gesagt"]
    texts = {"ours": [right, wrong, wrong], "its": [wrong, wrong, right], "worse": [wrong, wrong, wrong]}
    rows = {
        name: {"texts": {"2x3/2x3": [{"greedy": said} for said in of_seeds]}, "per_size": name != "ours"}
        for name, of_seeds in texts.items()
    }
    results = {**scored(rows, {"greedy": right}, references=right), "costs": {"2x3/2x3": {"depths": [3, 3]}}}
    first, zero, last = re.search(r"ours, each seed +\| +(\S+), (\S+), (\S+) \|", ahead_table(results)).groups()
    assert float(first) == -float(last) > 90
    assert float(zero) == 0
    assert re.search(r"\| ours +\| +\+0.00 \(\+0.00 to \+0.00\) \|", ahead_table(results))


@pytest.mark.slow
def test_the_whole_comparison(given, tmp_path, capsys):
    methods = [*METHODS, *ABLATIONS]
    file = str(tmp_path / "arguments.json")
    assert cli.main(["compare", file, "--methods", *methods]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [plan for plan in results["costs"] if plan != "1x6/1x6"] == SIZES
    assert list(results["rows"]) == methods
    for name, row in results["rows"].items():
        trains = name not in ("layer drop", "modular, random order")
        assert row["runs"] == (6 if row["per_size"] else 1)
        assert row["steps"] == (2 * row["runs"] if trains else 0)
        if name in (passes := {"modular": 6, "modular, one plan a step": 1, "distillation": 1, "LayerDrop": 1}):
            assert row["passes"] == row["steps"] * passes[name]
        assert (row["passes"] > 0) is (row["seconds"] > 0) is trains
        learns_from_labels = name in ("fine-tuning", "BERT-of-Theseus", "LayerDrop", "modular, labels")
        assert (row["of_which_teachers_beams"] > 0) is (trains and not learns_from_labels)
        for of_plan in row["scores"].values():
            for score in of_plan.values():
                low, high = score["BLEU_interval"]
                assert low <= high
                assert len(score["BLEU_of_seeds"]) == 1
    assert set(results["rows"]["modular, without coarsest"]["scores"]) == set(SIZES) - {"6x1/6x1"}
    assert set(results["rows"]["modular, finest alone"]["scores"]) == {"1x6/2x3", "2x3/2x3"}
    assert set(results["rows"]["modular, coarsest alone"]["scores"]) == {"6x1/6x1"}
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text().strip() in printed
    assert (tmp_path / "out" / "picture.png").stat().st_size > 10_000
    scores, ahead, agreement, costs = printed.strip().split("\n\n")
    assert scores.count("\n") == agreement.count("\n") == 1 + len(methods)
    assert ahead.count("\n") == 2 + sum(not row["per_size"] for row in results["rows"].values())
    assert len(re.findall(r"[+-]\d+\.\d\d \(", ahead)) == sum(len(row["scores"]) for row in results["rows"].values() if not row["per_size"])
    assert costs.count("\n") == 1 + len(results["costs"])


def comparison(given, **changes):
    return Comparison(ComparisonArguments(**{**given, "plans": ["2x3/2x3"], "methods": ["distillation", "modular"], **changes}))


def test_sizes_that_nobody_names():
    def shape(layers, granularities):
        return BankShape(layers, granularities, {"encoder": 1, "decoder": 1}, 0)

    twelve = shape({"encoder": 12, "decoder": 12}, dict.fromkeys(("encoder", "decoder"), (2, 3, 4, 6)))
    assert list(map(str, default_plans(twelve))) == ["1x12/2x6", "2x6/2x6", "1x12/4x3", "2x6/4x3", "4x3/4x3", "6x2/6x2"]
    uneven = shape({"encoder": 6, "decoder": 2}, {"encoder": (2, 3, 6), "decoder": (2,)})
    assert list(map(str, default_plans(uneven))) == ["1x6/2x1", "2x3/2x1", "3x2/2x1", "6x1/2x1"]
    one_side = shape({"encoder": 6, "decoder": 5}, {"encoder": (2, 3, 6), "decoder": ()})
    assert list(map(str, default_plans(one_side))) == ["2x3/1x5", "3x2/1x5", "6x1/1x5"]


def test_what_is_done_is_not_done_again(given, monkeypatch):
    first = comparison(given)
    first.run()
    again = comparison(given)
    monkeypatch.setattr(again, "do", lambda run: pytest.fail(f"{run} again"))
    again.run()
    more = comparison(given, seeds=[0, 1])
    done = []
    monkeypatch.setattr(more, "do", lambda run, do=more.do: (done.append((run.method, run.seed)), do(run)))
    results = more.run()
    assert done == [("distillation", 1), ("modular", 1)]
    assert len(results["rows"]["modular"]["scores"]["2x3/2x3"]["greedy"]["BLEU_of_seeds"]) == 2


@pytest.mark.parametrize(
    "method", ["distillation", "modular", *(pytest.param(name, marks=pytest.mark.slow) for name in ("BERT-of-Theseus", "LayerDrop"))]
)
def test_a_run_that_was_killed_goes_on_to_what_it_would_have_been(method, given, monkeypatch):
    changes = {"max_steps": 10, "methods": [method]}
    unharmed = comparison(given, **changes, output_dir=given["output_dir"] + "-unharmed")
    unharmed.run()
    killed = comparison(given, **changes)
    (run,) = killed.runs

    class Kill(BaseException):
        pass

    def die(stopwatch, args, state, *rest, on_save=Stopwatch.on_save, **kwargs):
        if state.global_step == 8:  # in the middle of a checkpoint, of which the stopwatch's is the last file
            raise Kill
        on_save(stopwatch, args, state, *rest, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Stopwatch, "on_save", die)
        with pytest.raises(Kill):
            killed.run()
    assert not killed.is_done(run)
    spent = json.loads((run.folder / "checkpoint-6" / "spent.json").read_text())

    steps = []
    monkeypatch.setattr(Stopwatch, "on_step_end", lambda stopwatch, args, state, *_, **__: steps.append(state.global_step))
    comparison(given, **changes).run()
    assert steps == [7, 8, 9, 10]
    ours, its = (json.loads((of.runs[0].folder / "run.json").read_text()) for of in (killed, unharmed))
    assert ours["spent"]["seconds"] > spent["seconds"] > 0
    assert ours["spent"]["passes"] == its["spent"]["passes"]
    assert ours["texts"] == its["texts"]
    assert not list(run.folder.glob("checkpoint-*"))


def test_runs_of_other_settings_are_not_mixed(given):
    comparison(given).run()
    with pytest.raises(ValueError, match=r"was made with other .*max_steps.*; take another output_dir"):
        comparison(given, max_steps=3).run()
    with pytest.raises(ValueError, match=r"was made with other learning_rate; take"):
        comparison(given, method_arguments={"distillation": {"learning_rate": 0.5}}).run()
    teacher = make_teacher(vocab_size=len(AutoTokenizer.from_pretrained(given["teacher"])))
    with torch.no_grad():
        teacher.shared.weight[5] += 1
    teacher.save_pretrained(given["teacher"])
    with pytest.raises(ValueError, match=r"was made with other teacher_sha256;"):
        comparison(given).run()


def test_a_torn_file_is_named(given):
    torn = comparison(given)
    torn.run()
    file = torn.runs[0].folder / "run.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=rf"{file} is not what a comparison leaves"):
        comparison(given).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["magic"]}, "unknown method 'magic'; choose of layer drop, fine-tuning"),
        ({"method_arguments": {"magic": {}}}, "unknown method 'magic'"),
        ({"seeds": [1, 1]}, r"seeds must be at least one, and different, got \[1, 1\]"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"plans": ["1x2-2x2/2x3"]}, "mixes spans on a side"),
        ({"plans": ["4x3/4x3"]}, "uses granularity 4 in the encoder"),
        ({"method_arguments": {"modular": {"targets": "guesses"}}}, "unknown targets 'guesses'; choose one of labels, beams, both"),
        ({"method_arguments": {"modular": {"learnin_rate": 1}}}, "arguments of 'modular' do not fit its trainer: .*learnin_rate"),
        ({"method_arguments": {"modular": {"max_steps": 9}}}, "max_steps is the same for all methods; 'modular' cannot have its own"),
        ({"method_arguments": {"modular": {"granularities": "fine"}}}, "unknown granularities 'fine'; choose one of finest, coarsest"),
        ({"method_arguments": {"modular": {"granularities": [2, 5]}}}, r"granularities \[2, 5\]: the bank has no 5"),
        ({"methods": ["ablations"], "method_arguments": {"magic": {}}}, "unknown method 'magic'"),
        ({"method_arguments": {"modular": {"granularities": [3]}}}, r"granularities \[3\] make none of the sizes 2x3/2x3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(changes, message, given, monkeypatch):
    monkeypatch.setattr(Comparison, "do", lambda comparison, run: pytest.fail(f"{run} was begun"))
    with pytest.raises(ValueError, match=message):
        comparison(given, **changes).run()


def test_what_is_trained_in_bfloat16_is_scored_in_float32(given):
    trained = comparison(given, bf16=True, methods=["distillation", "LayerDrop", "modular"])
    for run in trained.runs:
        models, _ = ROWS[run.method].models(trained.workshop, run)
        (model,) = models.values()
        assert (
            model(**trained.tokenizer("ein Hund", return_tensors="pt"), decoder_input_ids=torch.tensor([[0]])).logits.dtype == torch.float32
        )
        assert not hasattr(model, "_original_forward")


def test_rows_differ_from_each_other(given):
    every = comparison(given, methods=list(ROWS), plans=None)
    resolved = {
        run.method: json.dumps([run.own, every.settings_of(run)["arguments"] | {"output_dir": None, "run_name": None}])
        for run in every.runs
    }
    trained = [name for name, row in ROWS.items() if row.arguments_class is not None and name not in DEFAULTS]
    assert len({resolved[name] for name in trained}) == len(trained)


def test_ablations_are_those_that_the_sizes_have_each_once(given):
    whole = comparison(given, methods=["ablations"], plans=None).methods
    assert whole == ["modular", *(name for name in ABLATIONS if name not in DEFAULTS)]
    finest = comparison(given, methods=["ablations"], plans=["2x3/2x3"]).methods
    assert [name for name in whole if name not in finest] == ["modular, coarsest alone"]
    two = comparison(given, methods=["ablations"], granularities=[2, 6], plans=["2x3/2x3", "6x1/6x1"]).methods
    assert [name for name in whole if name not in two] == ["modular, without coarsest"]  # which is the finest alone


def test_variations_start_from_the_arguments_that_are_given(given):
    arguments = {"modular": {"learning_rate": 0.5, "hidden_weight": 0.1}, "modular, attention": {"learning_rate": 0.25}}
    every = comparison(given, methods=["modular", *ABLATIONS], plans=None, method_arguments=arguments)
    found = {run.method: run.arguments for run in every.runs}
    assert found["modular, never fed"]["learning_rate"] == 0.5
    assert found["modular, no hidden states"]["hidden_weight"] == 0
    trained = {"hidden_weight": 0.1, "learning_rate": 0.25, "train_embeddings": True}
    assert found["modular, attention"] == {**trained, "attention_weight": 1.0, "attention_min_span": 1}


def test_banks_without_the_modules_that_learn_from_attention_are_trained_too(given):
    arguments = {"modular": {"attention_min_span": 6}}
    rows = ["modular", "modular, finest alone", "modular, without coarsest"]
    results = comparison(given, methods=rows, plans=None, method_arguments=arguments, max_steps=1).run()
    assert list(results["rows"]) == rows


def test_attention_is_compared_of_the_same_spans_in_all_methods(given):
    rows = ["distillation", "modular", "modular, finest alone", "modular, attention", "modular, no attention"]
    every = comparison(given, methods=rows, plans=None)
    spans = {run.method: every.workshop.arguments_of(run).attention_min_span for run in every.runs}
    assert list(spans.values()) == [6, 6, 6, 1, None]


def test_beams_of_another_teacher_are_not_taken(given):
    comparison(given, methods=["sequence distillation"]).taught  # noqa: B018
    with pytest.raises(ValueError, match=r"teacher-beams.json was made with other max_target_length"):
        comparison(given, methods=["sequence distillation"], max_target_length=4).taught  # noqa: B018


def test_random_order_needs_the_bank(given):
    with pytest.raises(ValueError, match="let 'modular' run before"):
        comparison(given, methods=["modular, random order"]).run()


def test_arguments_from_file_and_command_line(given, tmp_path, capsys):
    file = str(tmp_path / "arguments.json")
    options = ["--methods", "layer drop", "--plans", "2x3/2x3", "--json"]
    assert cli.main(["compare", file, *options]) == 0
    assert list(json.loads(capsys.readouterr().out)["rows"]) == ["layer drop"]
    (tmp_path / "arguments.json").write_text(json.dumps({**given, "colour": "red"}))
    assert cli.main(["compare", file]) == 2
    assert "has 'colour', which is no argument" in capsys.readouterr().err
    assert cli.main(["compare"]) == 2
    assert "--source-lang is missing" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(COMPARE.glob("trials*.json")), ids=lambda file: file.name)
def test_trials_are_not_twice_the_same(file, given):
    resolved = set()
    trials = json.loads(file.read_text())
    for trial in trials:
        of_trial = comparison(given, methods=[trial["method"]], method_arguments={trial["method"]: trial["arguments"]})
        settings = of_trial.settings_of(of_trial.runs[0])
        told = [settings["method"], settings["own"], settings["arguments"], trial.get("plans")]
        resolved.add(json.dumps(told, sort_keys=True))
    assert len(resolved) == len(trials) > 1


def test_trials_of_arguments(given, tmp_path, monkeypatch):
    """`benchmarks/compare/tune.py`."""
    trials = [
        {"method": "distillation", "arguments": {"learning_rate": 1e-2}, "plans": ["2x3/2x3"]},
        {"method": "modular", "arguments": {"plans_per_step": 1}},
    ]
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    script = str(COMPARE / "tune.py")
    files = {"trials": "trials.json", "validation_file": "train.jsonl", "output_dir": "tune", "output": "tuned.json"}
    options = [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "arguments.json"), "--max_steps", "2", *options])

    def tuned():
        runpy.run_path(script, run_name="__main__")
        return json.loads((tmp_path / "tuned.json").read_text())

    first = tuned()
    assert [{name: trial[name] for name in given} for trial, given in zip(first["trials"], trials, strict=True)] == trials
    assert [list(trial["scores"]) for trial in first["trials"]] == [["2x3/2x3"], SIZES]
    assert all(loss > 0 and 0 <= bleu <= 100 for trial in first["trials"] for loss, bleu in trial["scores"].values())
    monkeypatch.setattr(Comparison, "do", None)  # nothing is done again
    assert tuned()["trials"] == first["trials"]
