"""`modular-t5 compare`: the whole comparison at pico size, what it refuses, and that it goes on where it was stopped."""

import json

import pytest
from conftest import make_teacher
from transformers import AutoTokenizer

from modular_t5 import cli
from modular_t5.comparison import ABLATIONS, METHODS


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
    assert cli.main(["compare", str(tmp_path / "arguments.json"), "--methods", *methods]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [plan for plan in results["costs"] if plan != "1x6/1x6"] == SIZES
    assert list(results["rows"]) == methods
    for name, row in results["rows"].items():
        known = [plan for plan in SIZES if {2: "3x" not in plan, 3: "2x" not in plan}.get(name[-1:].isdigit() and int(name[-1]), True)]
        assert set(row["scores"]) <= set(known)
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
    assert (tmp_path / "out" / "table.md").read_text() in printed
    assert printed.count("\n| modular") == 1 + len(ABLATIONS)
