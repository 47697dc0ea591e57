"""`modular-t5`: every command, for people and for machines, and what it says when something is wrong."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import make_bank, make_teacher
from hub import HUB
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.cli import main


@pytest.fixture
def bank(tmp_path, pico_tokenizer):
    """A folder with a saved bank and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    make_bank(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "bank")
    tokenizer.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def run(capsys):
    """`(exit status, standard output, errors)` of a command."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def test_info(run, bank):
    status, out, _ = run("info", bank)
    assert status == 0
    assert re.search(r"^encoder +6 layers, modules for 2, 3, 6$", out, re.MULTILINE)
    told = json.loads(run("info", bank, "--json")[1])
    assert told["largest_ratio"] == 6.0
    assert told["depths"]["decoder"] == [6, 5, 4, 3, 2, 1]
    assert told["files"] == sorted(path.name for path in bank.glob("*.safetensors"))


def test_plan(run, bank):
    loaded = ModularT5ForConditionalGeneration.from_pretrained(bank)
    status, out, _ = run("plan", bank)
    assert status == 0
    assert "| size-first 2x " in out
    told = json.loads(run("plan", bank, "speed-first", 1.4, "--json")[1])
    report = loaded.report("speed-first", 1.4)
    assert (told["plan"], told["total_parameters"], told["bytes"]) == (str(report.plan), report.total_parameters, report.bytes)
    assert told["files"] == ["model-common.safetensors", "model-decoder-modules-2.safetensors", "model-encoder-original.safetensors"]
    assert "files: model-common.safetensors, model-decoder-modules-3" in run("plan", bank, "2x3/3x2")[1]
    told = json.loads(run("plan", bank, "size-first", 2, "--count", 3, "--json")[1])
    assert [told["plan"], *(each["plan"] for each in told["next"])] == list(map(str, loaded.choose_plans("size-first", 2, count=3)))
    assert len(json.loads(run("plan", bank, "--json")[1])["sizes"]) > 5


def test_sizes_by_budget(run, bank, tmp_path):
    loaded = ModularT5ForConditionalGeneration.from_pretrained(bank)
    limit = loaded.report("2x3/2x3", dtype="bfloat16").bytes
    status, out, _ = run("plan", bank, "size-first", "--max-bytes", limit, "--dtype", "bfloat16")
    assert status == 0
    assert f"| size-first max_bytes={limit:g} | 2x3/2x3 " in out
    kept = tmp_path / "latency.json"
    request = ("--batch-size", 2, "--source-length", 4, "--target-length", 3, "--num-beams", 2, "--latency-file", kept)
    status, out, _ = run("assemble", bank, "speed-first", "--max-latency-ms", 1e6, *request, "-o", tmp_path / "fast", "--json")
    told = json.loads(out)
    assert told["plan"] == "1x6/1x6"
    assert told["asked"] == {"strategy": "speed-first", "max_latency_ms": 1e6}
    assert told["request"].items() >= {"batch_size": 2, "source_length": 4, "target_length": 3, "num_beams": 2}.items()
    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "fast").config.modular_t5["achieved"] == told["achieved"]
    before = kept.read_text()
    status, out, _ = run("plan", bank, "speed-first", "--min-speedup", 1, *request)
    assert kept.read_text() == before
    assert re.search(r"ms foreseen on .* threads, 1.00x", out)


def test_calibrate(run, bank, pico_translation):
    assert json.loads(run("info", bank, "--json")[1])["calibrated"] is False
    before = sorted((path.name, path.stat().st_mtime_ns) for path in bank.glob("*.safetensors"))
    pairs = (pico_translation / "train.jsonl", "--source-lang", "en", "--target-lang", "de")
    status, out, _ = run("calibrate", bank, *pairs, "--max-examples", 5)
    assert status == 0
    assert re.search(r"\d+ plans measured on 5 examples; saved in .*config.json", out)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in bank.glob("*.safetensors")) == before
    assert json.loads(run("info", bank, "--json")[1])["calibrated"] is True
    loaded = ModularT5ForConditionalGeneration.from_pretrained(bank)
    assert json.loads(run("plan", bank, "calibrated", 2, "--json")[1])["plan"] == str(loaded.choose_plan("calibrated", 2))
    told = json.loads(run("calibrate", bank, *pairs, "--no-verify", "--json")[1])
    assert told["plans"] == {}


def test_frontier(run, bank, pico_translation, tmp_path):
    pairs = (pico_translation / "test.jsonl", "--source-lang", "en", "--target-lang", "de", "--max-target-length", 6)
    plans = ("--plans", "2x3/3x2", "6x1/6x1", "--metric", "chrF")
    status, out, _ = run("frontier", bank, *pairs, *plans, "--max-bytes", 10**9)
    assert status == 0
    assert "| 2x3/3x2 " in out
    assert re.search(r"within the budget: \S+ \(\S+\), \S+ % of the teacher", out)
    assert {"frontier.json", "frontier.csv", "frontier.png"} <= {path.name for path in bank.iterdir()}
    told = json.loads(run("frontier", bank, *pairs, *plans, "-o", tmp_path / "elsewhere", "--json")[1])
    assert [size["plan"] for size in told["sizes"]] == ["1x6/1x6", "2x3/3x2", "6x1/6x1"]
    assert told["best"] is None
    assert (tmp_path / "elsewhere" / "frontier.csv").read_text().count("\n") == 4


def test_assemble_and_rebuild(run, bank, tmp_path):
    output = tmp_path / "fast"
    status, out, _ = run("assemble", bank, "size-first", 2, "--output", output)
    assert status == 0
    assert "2x3/2x3" in out
    model = T5ForConditionalGeneration.from_pretrained(output)
    assert AutoTokenizer.from_pretrained(output)("one").input_ids
    assert {"bank": str(bank), "revision": None, "plan": "2x3/2x3"}.items() <= model.config.modular_t5.items()
    status, out, _ = run("rebuild", output)
    assert (status, out) == (0, f"{output} is 2x3/2x3 of {bank}, to the bit\n")
    assert json.loads(run("rebuild", output, "--json")[1])["equal"] is True

    with torch.no_grad():
        model.encoder.block[1].layer[0].SelfAttention.q.weight[0, 0] += 1e-6
    model.config.dropout_rate = 0.3
    model.generation_config.num_beams = 7
    model.save_pretrained(output)
    status, out, _ = run("rebuild", output)
    assert status == 1
    assert "encoder.block.1.layer.0.SelfAttention.q.weight\n  config.json: dropout_rate\n  generation_config.json: num_beams" in out
    assert len(json.loads(run("rebuild", output, "--json")[1])["differences"]) == 3
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(output)
    assert "  lm_head.weight\n" in run("rebuild", output)[1]


@pytest.mark.parametrize("name", ["v1.1", "mt5", "byt5"])
def test_what_a_bank_assembles_in_memory_is_rebuilt(name, run, tmp_path):
    bank = make_bank(name)
    bank.assemble("size-first", 1.5).save_pretrained(tmp_path / "unsaved")
    bank.save_pretrained(tmp_path / "bank")
    bank.assemble("size-first", 1.5).save_pretrained(tmp_path / "saved")
    bank.assemble("size-first", 1.5).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert run("rebuild", tmp_path / "saved")[0] == 0
    assert run("rebuild", tmp_path / "half")[0] == 0
    status, _, error = run("rebuild", tmp_path / "unsaved")
    assert status == 2
    assert "was assembled from a bank that had not been saved; name the bank" in error
    assert run("rebuild", tmp_path / "unsaved", "--bank", tmp_path / "bank")[0] == 0


def test_push_and_rebuild_from_the_hub(run, hub, bank, tmp_path):
    status, out, _ = run("push", bank, "org/cli-bank", "--language", "en", "--language", "de", "--pipeline-tag", "translation", "--json")
    assert status == 0
    commit = json.loads(out)["commit"]
    assert hub.sha("org/cli-bank") == commit
    card = ModelCard.load("org/cli-bank")
    assert (card.data.language, card.data.pipeline_tag) == (["en", "de"], "translation")
    assert 'repo = "org/cli-bank"' in card.text
    assert run("assemble", "org/cli-bank", "1x6/2x3", "-o", tmp_path / "fast", "--dtype", "bfloat16")[0] == 0
    assert run("push", tmp_path / "fast", "org/cli-fast", "--private")[0] == 0
    assert ModelCard.load("org/cli-fast").data.base_model == "org/cli-bank"
    make_bank("v1.1").push_to_hub("org/cli-bank")  # moves on; what was assembled remembers its commit
    assert run("rebuild", "org/cli-fast")[:2] == (0, "org/cli-fast is 1x6/2x3 of org/cli-bank, to the bit\n")
    assert run("rebuild", "org/cli-fast", "--revision", "main")[0] == 1
    assert run("plan", "org/cli-bank", "2x3/2x3", "--revision", commit)[0] == 0


def test_a_card_that_is_there_is_pushed_as_it_is(run, hub, bank):
    (bank / "README.md").write_text("---\nlicense: mit\n---\nBy hand.")
    assert "without license; or pass --new-card" in run("push", bank, "org/cli-by-hand", "--license", "mit")[2]
    (bank / "passwords.txt").write_text("secret")
    (bank / "folder").mkdir()
    status, _, error = run("push", bank, "org/cli-by-hand")
    assert (status, error) == (0, "modular-t5 push: left out folder\nmodular-t5 push: left out passwords.txt\n")
    assert {"passwords.txt", "folder"}.isdisjoint(HUB.files("org/cli-by-hand"))
    assert ModelCard.load("org/cli-by-hand").text.strip() == "By hand."
    assert run("push", bank, "org/cli-by-hand", "--new-card")[0] == 0
    assert "One repository, every size" in ModelCard.load("org/cli-by-hand").text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "BANK", "size-first", "99"), "ratio must be a number from 1"),
        (("plan", "BANK", "smallest", "2"), "unknown strategy 'smallest'; choose one of 'size-first'"),
        (("plan", "BANK", "size-first"), "exactly one of ratio, max_parameters"),
        (("plan", "BANK", "--max-bytes", "9"), "a budget goes with a strategy"),
        (("plan", "BANK", "size-first", "--max-bytes", "9"), "max_bytes=9: none of 11 sizes is within it; the nearest is 6x1/6x1 with"),
        (("plan", "BANK", "calibrated", "2"), "'calibrated' needs scores"),
        (("plan", "BANK", "calibrated", "--min-speedup", "2"), "'calibrated' needs scores"),
        (("plan", "BANK", "speed-first", "2", "--min-speedup", "2"), "got ratio, min_speedup"),
        (("frontier", "BANK", "BANK/x", "--source-lang", "a", "--target-lang", "b", "--ratio", "2", "--min-kept", "9"), "x|got ratio"),
        (("calibrate", "org/x", "F", "--source-lang", "a", "--target-lang", "b"), "org/x is no folder with a bank"),
        (("frontier", "BANK", "nowhere.jsonl", "--source-lang", "a", "--target-lang", "b"), "Unable to find .*nowhere.jsonl"),
        (("assemble", "BANK", "2x3/2x3", "3", "-o", "OUT"), "ratio=3.0 goes with a strategy"),
        (("assemble", "BANK", "2x3/2x3", "-o", "OUT", "--dtype", "int99"), "dtype must be a floating-point type"),
        (("assemble", "BANK", "2x3/2x3", "-o", "BANK"), "holds a bank, which would be overwritten"),
        (("assemble", "BANK", "2x3/2x3", "-o", ""), "not an empty name"),
        (("push", "OUT", "org/x"), "is no folder with a model"),
        (("info", "TEACHER"), "it is no bank"),
        (("info", "org/nowhere"), "is not a valid model identifier"),
        (("info", "OUT"), "OUT|does not appear|not a local folder|Repo id"),
        (("rebuild", "TEACHER"), "does not remember a bank"),
        (("push", "TEACHER", "org/x"), "does not remember a bank"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, message, run, bank, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    places = {"BANK": bank, "TEACHER": tmp_path / "teacher", "OUT": tmp_path / "out"}
    status, out, error = run(*(places.get(argument, argument) for argument in arguments))
    assert (status, out) == (2, "")
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_bank_is_asked_for(run, hub, bank, tmp_path):
    assert run("push", bank, "org/cli-evil")[0] == 0
    tokenizer = {"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.E", None]}}
    evil = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass E: pass"
    hub.commit("org/cli-evil", {"tokenizer_config.json": json.dumps(tokenizer).encode(), "evil.py": evil.encode()})
    hub.forget_traffic()
    status, out, _ = run("assemble", "org/cli-evil", "2x3/2x3", "-o", tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(out)["plan"] == "2x3/2x3"
    assert not [asked for asked in hub.asked if asked.endswith(".py")]
    assert not (tmp_path / "sprung").exists()


def test_no_folder_of_this_machine_is_published(run, hub, bank, tmp_path):
    loaded = ModularT5ForConditionalGeneration.from_pretrained(bank)
    loaded.config.teacher = {"name_or_path": str(tmp_path / "teacher"), "revision": None, "sha256": None}
    loaded.save_pretrained(bank)
    loaded.assemble("2x3/2x3").save_pretrained(tmp_path / "fast")
    loaded.push_to_hub("org/cli-private")
    for folder in (bank, tmp_path / "fast"):
        assert run("push", folder, f"org/cli-private-{folder.name}")[0] == 0
    for repo in ("org/cli-private", "org/cli-private-bank", "org/cli-private-fast"):
        for path, content in hub.files(repo).items():
            assert str(tmp_path).encode() not in content, (repo, path)
    assert json.loads(hub.files("org/cli-private")["config.json"])["teacher"]["name_or_path"] == "teacher"


def test_help_has_an_example_of_each(capsys):
    for command in ("info", "plan", "assemble", "rebuild", "push"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"example:\n  modular-t5 {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])


@pytest.mark.slow
def test_as_a_process(bank):
    done = subprocess.run(
        [sys.executable, "-m", "modular_t5.cli", "info", str(bank), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == {"encoder": 6, "decoder": 6}
