"""Measuring plans: texts in order, figures as defined, files that can be read again."""

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import make_bank, make_teacher
from matplotlib.axes import Axes
from transformers import AutoTokenizer

from modular_t5 import AssemblyPlan, ModularT5ForConditionalGeneration
from modular_t5.frontier import Frontier, FrontierPoint, measure_frontier, standard_sizes
from modular_t5.measuring import environment, generate_texts
from modular_t5.pairs import Pairs


def point(name, ratio, score, speed, untrained=0.0):
    return FrontierPoint(name, "2x3/2x3", (3, 3), ratio, 1000, 4000, {"BLEU": score, "chrF": score}, {"BLEU": untrained}, speed)


FRONTIER = Frontier(
    (point("teacher", 1.0, 40.0, 100.0, 40.0), point("size-first 2x", 2.0, 38.0, 180.0, 4.0), point("speed-first 1.5x", 1.5, 36.0, 200.0)),
    metric="BLEU",
)


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


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


# -- choosing among measured sizes ------------------------------------------------------------------------------------------------


def test_what_nothing_beats_is_pareto_optimal():
    slow = point("calibrated 2x", 2.0, 36.0, 150.0)
    frontier = replace(FRONTIER, points=(*FRONTIER.points, slow))
    frontier = replace(frontier, points=tuple(replace(p, bytes=int(4000 / p.layer_ratio)) for p in frontier.points))
    assert [frontier.optimal(each) for each in frontier.points] == [["size", "speed"], ["size", "speed"], ["speed"], []]
    assert [line.split("|")[-3].strip() for line in frontier.table().splitlines()[2:]] == ["size, speed", "size, speed", "speed", ""]


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ({"ratio": 1.2}, "size-first 2x"),
        ({"max_parameters": 1000}, "teacher"),
        ({"max_bytes": 4000}, "teacher"),
        ({"min_speedup": 1.9}, "speed-first 1.5x"),
        ({"max_ms_per_token": 6}, "size-first 2x"),
        ({"min_kept": 94.9}, "size-first 2x"),
    ],
)
def test_the_best_within_a_budget(budget, name):
    smaller = replace(FRONTIER.points[1], bytes=3000)
    frontier = replace(FRONTIER, points=(FRONTIER.points[0], smaller, FRONTIER.points[2]))
    assert frontier.best(**budget).name == name


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_bytes": 10}, "max_bytes=10: none of 3 sizes is within it; the nearest is 2x3/2x3 with 4,000 bytes"),
        ({"min_speedup": 3}, "the nearest is 2x3/2x3 with 2 times the teacher's speed"),
        ({}, "give exactly one of ratio, max_parameters, max_bytes, min_speedup, max_ms_per_token, min_kept; got none"),
        ({"ratio": 2, "min_kept": 90}, "got ratio, min_kept"),
        ({"latency": 2}, "there is no argument or budget 'latency'"),
        ({"min_kept": -1}, "min_kept must be a positive number, got -1"),
    ],
)
def test_a_budget_that_nothing_measured_meets_says_so(budget, message):
    with pytest.raises(ValueError, match=message):
        FRONTIER.best(**budget)


def test_figures_as_rows(tmp_path):
    rows = FRONTIER.to_dicts()
    assert rows[1]["kept_percent"] == pytest.approx(95)
    assert rows[1]["ms_per_token"] == pytest.approx(1000 / 180)
    assert rows[1]["untrained BLEU"] == 4.0
    FRONTIER.to_csv(tmp_path / "frontier.csv")
    with (tmp_path / "frontier.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == read


def test_the_picture_shows_every_size(tmp_path, monkeypatch):
    drawn = []
    real = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, **kw: drawn.extend(zip(x, y, strict=True)) or real(self, x, y, *args, **kw))
    names = [f"plan {i}" for i in range(7)] + ["calibrated 2x", "speed-first 2x"]
    points = [point(name, 1 + i / 10, 30.0 + i, 100.0) for i, name in enumerate(names)]
    frontier = Frontier((FRONTIER.teacher, *points), "BLEU")
    frontier.plot(tmp_path / "frontier.png")
    assert {(p.layer_ratio, frontier.kept(p)) for p in frontier.points} <= set(drawn)


@pytest.mark.parametrize(
    "budget",
    [{"max_bytes": 5000}, {"max_parameters": 2000}, {"min_speedup": 1.5}, {"max_ms_per_token": 6}, {"ratio": 1.7}, {"min_kept": 92}],
)
def test_a_picture_shows_the_budget(budget, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: lines.append((x, style["label"])))
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: lines.append((y, style["label"])))
    FRONTIER.plot(tmp_path / "frontier.png", **budget)
    ((name, bound),) = budget.items()
    unit = {"max_bytes": 1e6, "max_parameters": 1e6}.get(name, 1)
    assert lines == [(bound / unit, f"{name}={bound:,}")]


# -- measuring --------------------------------------------------------------------------------------------------------------------


PAIRS = Pairs(["ein Hund", "a", "ein Mann am Haus"], ["Hund", "b", "Mann"])


def scores(texts, references):
    """So many letters: enough to tell plans apart."""
    return {"letters": float(sum(map(len, texts))), "references": float(len(references))}


@pytest.fixture
def bank(tokenizer):
    return make_bank(vocab_size=len(tokenizer))


def measured(bank, tokenizer, **arguments):
    told = {"metric": "letters", "compute_scores": scores, "max_new_tokens": 7, "speed_new_tokens": 2, "description": None}
    return measure_frontier(bank, PAIRS, tokenizer, **{**told, **arguments})


def test_every_plan_is_scored_in_place_as_it_would_be_assembled(bank, tokenizer):
    bank.set_plan("6x1/6x1")
    frontier = measured(bank, tokenizer, plans=["2x3/3x2", "1x6/6x1", "2x3/3x2"], num_beams=2)
    assert [p.plan for p in frontier.points] == ["1x6/1x6", "2x3/3x2", "1x6/6x1"]
    assert frontier.points[0].name == "teacher"
    for each in frontier.points:
        model = bank.assemble(each.plan)
        texts = generate_texts(model, tokenizer, PAIRS.sources, max_new_tokens=7, num_beams=2)
        assert each.scores == scores(texts, PAIRS.targets)
        assert each.parameters == model.num_parameters()
        assert each.tokens_per_second > 0
    assert str(bank.plan) == "6x1/6x1"
    assert frontier.provenance["decoding"] == "num_beams=2"
    assert frontier.provenance["test_examples"] == 3
    assert "untrained" not in frontier.table()


def test_the_top_few_of_a_strategy_are_told_apart_by_generating(bank, tokenizer):
    plans = bank.choose_plans("size-first", 2, count=3)
    assert plans[0] == bank.choose_plan("size-first", 2)
    assert [bank.report(plan).layer_ratio >= 2 for plan in plans] == [True] * 3
    best = measured(bank, tokenizer, plans=plans).best(ratio=2)
    assert best.plan in map(str, plans)


def test_without_plans_it_is_the_standard_sizes_and_the_calibrated_ones(bank, tokenizer):
    standard = standard_sizes(bank.shape)
    assert {p.name: p.plan for p in measured(bank, tokenizer).points} == {name: str(plan) for name, plan in standard.items()}
    modules = {side: {"2": [5, 1, 5], "3": [4, 9], "6": [50]} for side in ("encoder", "decoder")}
    bank.config.calibration = {"modules": modules, "plans": {}}
    assert any(name.startswith("calibrated") for name in standard_sizes(bank.shape))


def test_a_measurement_that_was_killed_goes_on_where_it_was(bank, tokenizer, tmp_path, monkeypatch):
    file, calls = tmp_path / "frontier.json", []

    def dying(texts, references):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(texts)
        return scores(texts, references)

    dying.__qualname__ = scores.__qualname__
    plans = ["2x3/3x2", "1x6/6x1", "6x1/6x1"]
    with pytest.raises(KeyboardInterrupt):
        measured(bank, tokenizer, plans=plans, file=file, compute_scores=dying)
    assert not file.exists()
    counted = []
    monkeypatch.setattr("modular_t5.frontier.generate_texts", lambda *args, **kw: counted.append(1) or generate_texts(*args, **kw))
    whole = measured(bank, tokenizer, plans=plans, file=file)
    assert len(counted) == 2
    assert [p.scores for p in whole.points] == [p.scores for p in measured(bank, tokenizer, plans=plans).points]
    assert Frontier.load(file).points == whole.points
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.json"]


def test_what_is_measured_is_not_measured_again(bank, tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "frontier.json"
    first = measured(bank, tokenizer, plans=["6x1/6x1"], file=file)
    generated = []
    monkeypatch.setattr("modular_t5.frontier.generate_texts", lambda *args, **kw: generated.append(1) or generate_texts(*args, **kw))
    more = measured(bank, tokenizer, plans=["6x1/6x1", "2x3/2x3"], file=file)
    assert len(generated) == 1
    assert [p.scores for p in more.points[:2]] == [p.scores for p in first.points]
    bank.generation_config.repetition_penalty = 1.5
    measured(bank, tokenizer, plans=["6x1/6x1"], file=file)
    assert len(generated) == 3


def test_a_bank_in_training_is_measured_without_dropout(tokenizer):
    bank = make_bank(vocab_size=len(tokenizer), dropout_rate=0.5)
    still = measured(bank, tokenizer, plans=["6x1/6x1"])
    bank.train()
    assert [p.scores for p in measured(bank, tokenizer, plans=["6x1/6x1"]).points] == [p.scores for p in still.points]
    assert bank.training


def test_scores_before_training_are_of_all_plans_or_none(bank, tokenizer):
    before = {plan: {"letters": 1.0, "references": 3.0} for plan in ("1x6/1x6", "6x1/6x1")}
    told = measured(bank, tokenizer, plans=["6x1/6x1"], untrained_scores=before)
    assert "untrained drop, letters" in told.table()
    with pytest.raises(ValueError, match="of all plans that are measured, or of none; 2x3/2x3 is not there"):
        measured(bank, tokenizer, plans=["6x1/6x1", "2x3/2x3"], untrained_scores=before)


def test_one_plan_alone_may_be_measured(bank, tokenizer):
    assert [p.plan for p in measured(bank, tokenizer, plans="6x1/6x1").points] == ["1x6/1x6", "6x1/6x1"]


def test_what_was_begun_on_another_bank_is_not_taken_up(bank, tokenizer, tmp_path):
    file = tmp_path / "frontier.json"
    (tmp_path / "frontier.json.begun").write_text(json.dumps({"key": "another", "scores": {"1x6/1x6": {"letters": -1.0}}}))
    assert measured(bank, tokenizer, plans=["6x1/6x1"], file=file).teacher.scores["letters"] >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "BLEU"}, "there is no metric 'BLEU'; the scores are letters, references"),
        ({"plans": ["4x1/6x1"]}, "granularity 4"),
        ({"plans": {"teacher": "6x1/6x1"}}, "the teacher is 1x6/1x6; call 6x1/6x1 by another"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message, bank, tokenizer):
    with pytest.raises(ValueError, match=message):
        measured(bank, tokenizer, **changes)
    with pytest.raises(ValueError, match="needs pairs of texts"):
        measure_frontier(bank, Pairs([], []), tokenizer)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        FRONTIER.plot(tmp_path / "frontier.png")
