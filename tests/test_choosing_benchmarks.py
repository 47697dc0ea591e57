"""The scripts that measure choices, latency and exports run, on a pico bank."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import make_bank
from transformers import AutoTokenizer


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(pico_translation, pico_tokenizer, monkeypatch):
    """The results that a script writes of a pico bank and a few pairs of texts."""
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    make_bank(vocab_size=len(tokenizer)).save_pretrained(pico_translation / "bank")
    tokenizer.save_pretrained(pico_translation / "bank")

    def run(script, *arguments):
        command = [script, "--bank", pico_translation / "bank", "--output", pico_translation / "out.json", *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return json.loads((pico_translation / "out.json").read_text())

    run.folder = pico_translation
    run.texts = ["--test_file", pico_translation / "test.jsonl", "--source_lang", "en", "--target_lang", "de"]
    return run


@pytest.mark.slow
def test_choosing(run, capsys):
    told = run("choosing.py", *run.texts, "--calibration_file", run.folder / "train.jsonl", "--max_length", 4)
    assert [of["ratio"] for of in told["chosen"]] == [1.2, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0]
    assert {of[strategy] for of in told["chosen"] for strategy in ("size-first", "speed-first", "calibrated")} == set(told["plans"])
    assert "| 2.5x " in capsys.readouterr().out


@pytest.mark.slow
def test_latency(run, capsys):
    told = run("latency.py", "--rounds", 1)
    assert len(told["latency"]) == 3
    assert capsys.readouterr().out.count("| batch ") == 3


@pytest.mark.slow
def test_exports(run, capsys, monkeypatch):
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    monkeypatch.setattr("modular_t5.pairs.scores_of", lambda texts, references: {"BLEU": 1.0})  # random weights score nothing
    told = run("exports.py", *run.texts, "--examples", 6, "--timed", 4, "--rounds", 1, "--length", 4)
    assert [row["engine"] for row in told["rows"][:4]] == ["HF", "HF bf16", "CTranslate2", "CTranslate2 int8"]
    assert [row["differing"] for row in told["rows"] if row["engine"] == "CTranslate2"] == [0] * 5
    assert "| 3x2/3x2 | CTranslate2 int8 " in capsys.readouterr().out
