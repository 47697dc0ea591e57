"""`modular-t5 compare`: the whole comparison at pico size, what it refuses, and that it goes on where it was stopped."""

import json

import pytest
import torch
from conftest import make_teacher
from transformers import AutoTokenizer

from modular_t5 import BankShape, cli
from modular_t5.comparison import ABLATIONS, METHODS, Comparison, ComparisonArguments, Stopwatch, default_plans


SIZES = ["1x6/2x3", "2x3/2x3", "1x6/3x2", "2x3/3x2", "3x2/3x2", "6x1/6x1"]


@pytest.fixture
def given(tmp_path, pico_tokenizer):
    """A file of arguments for a pico teacher and a few pairs of texts."""
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.save_pretrained(tmp_path / "teacher")
    make_teacher(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    words = ["ein", "Hund", "und", "ein", "Mann", "am", "Haus"]
    for name, count in (("train", 24), ("test", 6)):
        pairs = [{"en": " ".join(words[i % 5 :]), "de": " ".join(words[: i % 5 + 1])} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"translation": pair}) + "\n" for pair in pairs))
    arguments = {
        "teacher": str(tmp_path / "teacher"),
        "train_file": str(tmp_path / "train.jsonl"),
        "test_file": str(tmp_path / "test.jsonl"),
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


def test_the_whole_comparison(given, tmp_path, capsys):
    methods = [*METHODS, *ABLATIONS]
    file = str(tmp_path / "arguments.json")
    assert cli.main(["compare", file, "--methods", *methods]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [plan for plan in results["costs"] if plan != "1x6/1x6"] == SIZES
    assert list(results["rows"]) == methods
    for name, row in results["rows"].items():
        trains = name != "layer drop"
        assert row["runs"] == (6 if row["per_size"] else 1)
        assert row["steps"] == (2 * row["runs"] if trains else 0)
        assert (row["seconds"] > 0) is trains
        for of_plan in row["scores"].values():
            for score in of_plan.values():
                low, high = score["BLEU_interval"]
                assert low <= high
                assert len(score["BLEU_of_seeds"]) == 1
    assert set(results["rows"]["modular, without the coarsest"]["scores"]) == set(SIZES) - {"6x1/6x1"}
    assert set(results["rows"]["modular, granularity 2"]["scores"]) == {"1x6/2x3", "2x3/2x3"}
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text().strip() in printed
    assert (tmp_path / "out" / "picture.png").stat().st_size > 10_000
    assert printed.count("\n| modular") == 1 + len(ABLATIONS)


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


@pytest.mark.parametrize("method", ["distillation", "BERT-of-Theseus", "LayerDrop", "modular"])
def test_a_run_that_was_killed_goes_on_to_what_it_would_have_been(method, given, monkeypatch):
    changes = {"max_steps": 10, "methods": [method]}
    unharmed = comparison(given, **changes, output_dir=given["output_dir"] + "-unharmed")
    unharmed.run()
    killed = comparison(given, **changes)
    (run,) = killed.runs()

    class Kill(BaseException):
        pass

    def die(stopwatch, args, state, *rest, on_save=Stopwatch.on_save, **kwargs):
        on_save(stopwatch, args, state, *rest, **kwargs)
        if state.global_step == 6:
            raise Kill

    with monkeypatch.context() as patched:
        patched.setattr(Stopwatch, "on_save", die)
        with pytest.raises(Kill):
            killed.run()
    assert not killed.is_done(run)
    spent = json.loads((run.folder / "checkpoint-6" / "seconds.json").read_text())

    steps = []
    monkeypatch.setattr(Stopwatch, "on_step_end", lambda stopwatch, args, state, *_, **__: steps.append(state.global_step))
    comparison(given, **changes).run()
    assert steps == [7, 8, 9, 10]
    ours, its = (json.loads((of.runs()[0].folder / "run.json").read_text()) for of in (killed, unharmed))
    assert ours["seconds"] > spent > 0
    assert ours["texts"] == its["texts"]
    assert not list(run.folder.glob("checkpoint-*"))


def test_runs_of_other_settings_are_not_mixed(given):
    comparison(given).run()
    with pytest.raises(ValueError, match=r"holds a run with other max_steps; take another output_dir"):
        comparison(given, max_steps=3).run()
    with pytest.raises(ValueError, match=r"holds a run with other arguments"):
        comparison(given, method_arguments={"distillation": {"learning_rate": 0.5}}).run()
    teacher = make_teacher(vocab_size=len(AutoTokenizer.from_pretrained(given["teacher"])))
    with torch.no_grad():
        teacher.shared.weight[5] += 1
    teacher.save_pretrained(given["teacher"])
    with pytest.raises(ValueError, match=r"holds a run with other teacher_sha256"):
        comparison(given).run()


def test_a_torn_file_is_named(given):
    torn = comparison(given)
    torn.run()
    file = torn.runs()[0].folder / "run.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=rf"{file} is not what a run leaves"):
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
        ({"method_arguments": {"distillation": {"learnin_rate": 1}}}, "learnin_rate"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, given):
    with pytest.raises((ValueError, TypeError), match=message):
        comparison(given, **changes).run()


def test_arguments_from_file_and_command_line(given, tmp_path, capsys):
    file = str(tmp_path / "arguments.json")
    options = ["--methods", "layer drop", "--plans", "2x3/2x3", "--json"]
    assert cli.main(["compare", file, *options]) == 0
    printed = capsys.readouterr().out
    assert list(json.loads(printed[printed.index("{") :])["rows"]) == ["layer drop"]
    (tmp_path / "arguments.json").write_text(json.dumps({**given, "colour": "red"}))
    assert cli.main(["compare", file]) == 2
    assert "has 'colour', which is no argument" in capsys.readouterr().err
    assert cli.main(["compare"]) == 2
    assert "--source-lang is missing" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
