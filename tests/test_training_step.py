"""`benchmarks/training_step.py` at pico size."""

import json
import runpy
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training_step.py"


@pytest.mark.slow
def test_what_a_step_saves(pico_translation, monkeypatch):
    monkeypatch.chdir(pico_translation)
    given = {"shapes": "multi30k", "teacher": "teacher", "train_file": "train.jsonl", "output": "result.json"}
    given |= {"steps": 3, "weigh_every": 2, "batch_size": 2, "seed": 1}  # a seed whose first plan begins with original layers
    options = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads((pico_translation / "result.json").read_text())
    assert result["finished"]
    operations = {row["name"]: row["operations, GFLOP"] for row in result["shapes"]["multi30k"]["rows"]}
    assert list(operations) == ["distillation", "everything trains", "frozen teacher", "reuse", "6 plans"]
    assert operations["everything trains"] > operations["frozen teacher"] > operations["reuse"]
    assert operations["6 plans"] > operations["reuse"]
