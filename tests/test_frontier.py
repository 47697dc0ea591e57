"""Measuring plans: texts in order, figures as defined, files that can be read again."""

import json
import sys

import pytest
import torch
from conftest import make_teacher

from modular_t5 import AssemblyPlan, ModularT5ForConditionalGeneration
from modular_t5.frontier import Frontier, FrontierPoint, markdown_table, plot_curves
from modular_t5.measuring import environment


def point(name, ratio, score, speed, untrained=0.0):
    return FrontierPoint(name, "2x3/2x3", (3, 3), ratio, 1000, 4000, {"BLEU": score, "chrF": score}, {"BLEU": untrained}, speed)


FRONTIER = Frontier(
    (point("teacher", 1.0, 40.0, 100.0, 40.0), point("size-first 2x", 2.0, 38.0, 180.0, 4.0), point("speed-first 1.5x", 1.5, 36.0, 200.0)),
    metric="BLEU",
)


def test_kept_and_speedup_are_relative_to_the_teacher():
    _, half, fast = FRONTIER.points
    assert FRONTIER.kept(half) == pytest.approx(95)
    assert FRONTIER.speedup(fast) == 2


def test_a_point_takes_its_counts_from_the_report():
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    made = FrontierPoint.of("size-first 2x", bank.report("size-first", 2), {"BLEU": 1.0}, {"BLEU": 0.0}, 10.0)
    assert AssemblyPlan.parse(made.plan).depths == made.depths == (3, 3)
    assert made.parameters == bank.assemble(made.plan).num_parameters()


def test_the_table_has_a_row_a_size():
    lines = FRONTIER.table().splitlines()
    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines}) == 1
    assert "| size-first 2x " in lines[3]
    assert "95.0 %" in lines[3]
    assert "1.80x" in lines[3]


def test_a_markdown_table_lines_up():
    assert markdown_table(["a", "bb"], [["long", "1"]]) == "| a    | bb |\n|------|---:|\n| long |  1 |"


def test_saved_results_hold_figures_and_provenance(tmp_path):
    FRONTIER.save(tmp_path / "results.json", **environment(), seed=7)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["seed"] == 7
    assert saved["metric"] == "BLEU"
    assert {"command", "date", "hardware", "versions"} <= set(saved)
    assert saved["versions"]["torch"] == torch.__version__
    assert [p["kept_percent"] for p in saved["points"]] == pytest.approx([100, 95, 90])


def test_the_picture_is_a_picture(tmp_path):
    FRONTIER.plot(tmp_path / "frontier.png", title="A title")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_teacher_that_scores_nothing_is_reported_not_divided_by(tmp_path):
    frontier = Frontier((point("teacher", 1.0, 0.0, 100.0), point("size-first 2x", 2.0, 0.0, 150.0)), metric="BLEU")
    assert frontier.table().count("n/a") == 2
    frontier.save(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["points"][1]["kept_percent"] is None
    frontier.plot(tmp_path / "frontier.png")


def test_curves(tmp_path):
    log = [{"step": step, "eval_2x3/2x3_loss": 1 / step} for step in (1, 2, 3)] + [{"step": 3, "train_loss": 0.5}]
    plot_curves(log, {"eval_2x3/2x3_loss": "2x3/2x3"}, tmp_path / "curves.png", title="A title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there is no eval_3x2/3x2_loss in the log; it has eval_2x3/2x3_loss, step, train_loss"):
        plot_curves(log, {"eval_3x2/3x2_loss": "3x2/3x2"}, tmp_path / "curves.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        FRONTIER.plot(tmp_path / "frontier.png")
