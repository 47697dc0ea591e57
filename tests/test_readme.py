"""The README's code runs and its commands are the ones that CI runs."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from conftest import make_bank, make_teacher
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, T5ForConditionalGeneration

import modular_t5
from modular_t5 import cli
from modular_t5.comparison_results import agreement_table, ahead_table, costs_table, table
from modular_t5.training_args import DistillationArguments


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Fenced code; fences come in pairs."""
    return [code for of, code in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if of == language]


@pytest.mark.slow
def test_the_ten_lines_run(hub, tmp_path, monkeypatch, pico_tokenizer):
    ten_lines, budgets, exports, compacting, sharing, dials = blocks("python")
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    folder = tmp_path / "google-t5" / "t5-base"
    teacher = make_teacher(vocab_size=len(tokenizer), num_layers=12, num_decoder_layers=12)
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    teacher.push_to_hub("google-t5/t5-base")
    tokenizer.push_to_hub("google-t5/t5-base")
    monkeypatch.chdir(tmp_path)
    texts = ["one tree", "two trees and a book", "three"]
    train_dataset = Dataset.from_dict({"input_ids": tokenizer(texts).input_ids, "labels": tokenizer(texts[::-1]).input_ids})
    names = {
        "train_dataset": train_dataset,
        "validation_dataset": train_dataset,
        "teacher": teacher,
        "sources": texts,
        "targets": texts,
        "answers": texts,
    }
    names["scores"] = lambda texts, references: {"BLEU": float(1 + sum(map(len, texts)))}  # random weights score nothing
    quick = "max_steps=2, report_to='none', disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False"
    short = "compute_scores=scores, max_new_tokens=4"
    budgets = budgets.replace("tokenizer, file=", f"tokenizer, {short}, file=").replace("tokenizer, few", f"tokenizer, few, {short}")
    for code in (ten_lines, budgets, exports, compacting, sharing, dials):
        assert "max_steps=10_000" in code or code in (budgets, exports, compacting, sharing)
        exec(compile(code.replace("max_steps=10_000", quick), "README.md", "exec"), names)
    assert names["quick"].config.modular_t5["achieved"]["latency_ms"] <= 400
    assert {"frontier.json", "frontier.png", "latency.json"} <= {path.name for path in tmp_path.iterdir()}
    assert type(names["fast"]) is type(names["small"]) is type(names["best"]) is type(names["light"]) is T5ForConditionalGeneration
    assert ModelCard.load("org/my-fast-t5").data.base_model == "org/my-bank"
    modules, adapters = (sum(path.stat().st_size for path in (tmp_path / f).glob("*.safetensors")) for f in ("modules", "lora-bank"))
    whole = sum(len(content) for path, content in hub.files("org/my-bank").items() if path.endswith(".safetensors"))
    assert 0 < adapters < whole
    assert 0 < modules < whole
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert again.num_parameters() == names["small"].num_parameters()


def test_the_commands_run(tmp_path, monkeypatch, pico_tokenizer, capsys):
    bank = make_bank(num_layers=12, num_decoder_layers=12)
    bank.push_to_hub("org/my-bank")
    AutoTokenizer.from_pretrained(pico_tokenizer).push_to_hub("org/my-bank")
    monkeypatch.chdir(tmp_path)
    lines = next(block for block in blocks("bash") if block.startswith("modular-t5 info")).splitlines()
    assert {line.split()[1] for line in lines} == {"info", "plan", "assemble", "rebuild", "push"}
    for line in lines:
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_by_budget_run(pico_translation, pico_tokenizer, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    make_bank(num_layers=12, num_decoder_layers=12, vocab_size=len(tokenizer)).save_pretrained(pico_translation / "bank")
    tokenizer.save_pretrained(pico_translation / "bank")
    (pico_translation / "test.jsonl").rename(pico_translation / "validation.jsonl")
    (pico_translation / "train.jsonl").rename(pico_translation / "test.jsonl")
    monkeypatch.chdir(pico_translation)
    lines = next(block for block in blocks("bash") if block.startswith("modular-t5 calibrate")).splitlines()
    assert [line.split()[1] for line in lines] == ["calibrate", "plan", "assemble", "frontier"]
    for line in lines:
        short = ["--max-target-length", "4"] if line.split()[1] in ("calibrate", "frontier") else []
        assert cli.main([*shlex.split(line)[1:], *short]) == 0, capsys.readouterr().err


def test_the_command_that_compares_has_the_options_that_it_is_given(capsys):
    (command,) = (block for block in blocks("bash") if block.startswith("modular-t5 compare"))
    assert cli.main(shlex.split(command.replace("\\\n", ""))[1:]) == 2
    assert "DIR_OR_HUB_ID" in capsys.readouterr().err


def test_the_calls_of_the_table_of_sizes_work():
    bank = modular_t5.ModularT5ForConditionalGeneration.from_t5(make_teacher(num_layers=12, num_decoder_layers=12))
    cells = re.findall(r"^\| (`(?:bank\.|with bank).*?) \|", README, re.MULTILINE)
    calls = [call for cell in cells for call in re.findall(r"`(.*?)`", cell)]
    assert len(calls) == 10
    for call in calls:
        code = call.replace("...", "'size-first', 2")
        exec(code + " pass" if code.startswith("with") else code, {"bank": bank, "plan": "2x6/2x6"})


def result_of(pattern):
    """The result file that the README links by this name."""
    (name,) = set(re.findall(rf"\(benchmarks/results/([\d-]*{pattern}\.json)\)", README))
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def test_the_tables_of_choices_and_engines_are_those_of_the_files():
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    choosing, exports, latency = (runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")) for name in ("choosing", "exports", "latency"))
    assert choosing["quality_table"](result_of("choosing")) in README
    assert latency["latency_table"](result_of("latency")["latency"]) in BENCHMARKS
    compact, offline = (runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")) for name in ("compact", "offline"))
    assert compact["table"](result_of("compact")) in README
    assert offline["table"](result_of("offline")["rows"]) in README
    for name in ("exports", "exports-base"):
        assert exports["summary"](result_of(name)["rows"]) in README


def test_ci_runs_the_readmes_test_command():
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first.endswith("python examples/quickstart.py")
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1] == second


def test_the_table_of_training_arguments_is_true():
    defaults = {name: value.default for name, value in modular_t5.ModularTrainingArguments.__dataclass_fields__.items()}
    added = {*modular_t5.ModularTrainingArguments.__annotations__, *DistillationArguments.__annotations__}
    rows = [
        row for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", README, re.MULTILINE) if set(re.findall(r"\w+", row[0])) & added
    ]
    assert {name for row in rows for name in re.findall(r"\w+", row[0])} == added - {"replacing_rate_end"}  # told with its schedule
    for row in rows:
        for name in re.findall(r"`(\w+)`", row[0]):
            assert str(defaults[name]).removesuffix(".0") == row[1].strip("`"), name


def test_the_file_tree_is_the_tree():
    tree = next(block for block in blocks("") if "modular_t5/" in block)
    named = {folder: set() for folder in ("modular_t5", "examples", "benchmarks")}
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split("/")[0]
        elif folder in named and (match := re.match(r"  (\w+\.py)", line)):
            named[folder].add(match[1])
    for folder, files in named.items():
        assert files == {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}


def test_the_tables_of_the_comparison_are_its_results():
    (name,) = set(re.findall(r"\]\(benchmarks/(results/[^)]*-compare-everyday\.json)\)", README))
    assert f"]({name})" in BENCHMARKS
    results = json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
    assert table(results) in README
    for of in (ahead_table, agreement_table, costs_table):
        assert of(results) in BENCHMARKS


@pytest.mark.parametrize(
    ("compared", "shown"),
    [
        ("three-seeds", (table, ahead_table, agreement_table)),
        ("ablations", (table,)),
        ("changes", (table, agreement_table)),
    ],
)
def test_the_other_tables_of_comparisons_are_their_results(compared, shown):
    (name,) = set(re.findall(rf"\]\((results/[^)]*-compare-{compared}\.json)\)", BENCHMARKS))
    results = json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
    for of in shown:
        assert of(results) in BENCHMARKS


def test_figures_come_from_result_files_that_exist():
    linked = re.findall(r"\]\((benchmarks/results/[^)]+)\)", README)
    assert linked
    for name in linked:
        assert (ROOT / name).exists(), name
        if name.endswith(".json"):
            assert {"command", "date", "hardware", "versions"} <= set(json.loads((ROOT / name).read_text()))
