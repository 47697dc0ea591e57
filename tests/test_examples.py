"""The quickstart, from the command line as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_teacher
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block

import modular_t5
from modular_t5 import cli


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import written_numbers  # noqa: E402


def quickstart(folder, *arguments):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output_dir", str(folder / "out"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def check_output(folder, done, monkeypatch):
    assert done.returncode == 0, done.stderr
    out = folder / "out"
    assert (out / "bank" / "frontier.png").stat().st_size > 10_000
    results = json.loads((out / "bank" / "frontier.json").read_text())
    sizes = len(results["points"]) - 1
    assert done.stdout.count("| size-first") + done.stdout.count("| speed-first") == 10
    assert done.stdout.count("| calibrated") == sizes - 10 > 0
    bank = AutoModelForSeq2SeqLM.from_pretrained(out / "bank")
    assert type(bank) is modular_t5.ModularT5ForConditionalGeneration
    assert bank.config.calibration["plans"]
    assert type(T5ForConditionalGeneration.from_pretrained(out / "assembled")) is T5ForConditionalGeneration
    # What it prints to type next, typed.
    typed, shell = done.stdout.split("What to type next:")[1].split("and in a shell:")
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in typed.splitlines())],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    monkeypatch.chdir(folder)
    for line in shell.strip().splitlines():
        _, *command = line.split()
        assert cli.main(command) == 0
    for model, repo in (("bank", "org/modular-t5-out"), ("assembled", "org/modular-t5-out-3-3")):
        card = ModelCard.load(out / model / "README.md")
        card.validate()
        assert f'"{repo}' in card.text
        assert len(card.data.eval_results) == 3 * (sizes + 1 if model == "bank" else 1)
    return results


def test_the_built_in_task_is_reproducible_disjoint_and_readable():
    splits = written_numbers.make_splits(train=200, validation=20, test=20, seed=3)
    assert splits == written_numbers.make_splits(train=200, validation=20, test=20, seed=3)
    sources = [example["translation"]["en"] for split in splits.values() for example in split]
    assert len(set(sources)) == len(sources) == 240
    wanted = {"en": "fifty-three thousand and seventy-seven trees", "de": "dreiundfünfzigtausendsiebenundsiebzig Bäume"}
    rng = type("Rng", (), {"randint": lambda *_: 5, "randrange": lambda self, *bounds: 53_077 if len(bounds) == 2 else 4})()
    assert written_numbers._amount(rng) == wanted


SPLITS = ("train", "validation", "test")


@pytest.mark.slow
@pytest.mark.parametrize("given_as", ["files", "dataset"])
def test_on_a_teacher_and_data_of_ones_own(given_as, tmp_path, pico_tokenizer, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.save_pretrained(tmp_path / "teacher")
    make_teacher("v1.1", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    data = tmp_path / "data"
    data.mkdir()
    for name, examples in written_numbers.make_splits(train=60, validation=8, test=8).items():
        lines = [json.dumps({"translation": {"fr": e["translation"]["en"], "nl": e["translation"]["de"]}}) for e in examples]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    # `datasets` takes a folder where it takes a name on the Hub.
    as_files = [argument for name in SPLITS for argument in (f"--{name}_file", data / f"{name}.jsonl")]
    given = as_files if given_as == "files" else ["--dataset_name", data]
    languages = ["--source_lang", "fr", "--target_lang", "nl", "--source_prefix", "translate: "]
    done = quickstart(
        tmp_path, "--teacher", tmp_path / "teacher", *given, *languages, "--max_steps", 3, "--batch_size", 8, "--max_target_length", 8
    )
    results = check_output(tmp_path, done, monkeypatch)
    assert results["metric"] == "BLEU"
    assert results["test_examples"] == 8
    assert "Decoding 24 training texts with the teacher" in done.stdout  # as many as the steps take
    assert results["targets"] == "beams"
    assert "| `targets` | beams |" in (tmp_path / "out" / "bank" / "README.md").read_text()


@pytest.mark.slow
def test_with_nothing_but_the_package(tmp_path, monkeypatch):
    done = quickstart(tmp_path, "--max_steps", 20, "--teacher_steps", 20, "--max_test_examples", 50)
    results = check_output(tmp_path, done, monkeypatch)
    assert results["metric"] == "exact match"
    assert results["targets"] == "labels"
    assert "Decoding" not in done.stdout


def test_a_bank_is_trained_to_say_what_the_teacher_says(tmp_path, pico_translation, monkeypatch):
    import quickstart as module

    texts = [f"number {number}" for number in range(2)]
    trained = []

    def train_bank(bank, tokenizer, train, *rest):
        trained.append(train)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "scores_of", lambda *_: {})
    monkeypatch.setattr(module, "train_bank", train_bank)
    monkeypatch.setattr(module, "generate_texts", lambda model, tokenizer, sources, num_beams, **_: texts if num_beams == 4 else None)
    files = [word for name in SPLITS for word in (f"--{name}_file", str(pico_translation / "train.jsonl"))]
    given = ["--teacher", str(pico_translation / "teacher"), *files, "--max_steps", "1", "--batch_size", "2"]
    for targets in ([], ["--targets", "labels"]):
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *given, *targets, "--output_dir", str(tmp_path)])
        with pytest.raises(KeyboardInterrupt):
            module.main()
    of_beams, of_labels = trained
    assert of_beams.sources == of_labels.sources
    assert of_beams.targets == texts
    assert len(of_labels.targets) == 2
    assert not set(of_labels.targets) & set(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "x"], "a --teacher needs data"),
        (["--train_file", "x"], "go together"),
        (["--dataset_name", "x", "--train_file", "y"], "not both"),
        (["--dataset_name", "x"], "data needs a --teacher"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    import quickstart as module

    with pytest.raises(ValueError, match=message):
        HfArgumentParser(module.QuickstartArguments).parse_args_into_dataclasses(arguments)


def test_the_configurations_for_several_processes_are_ones_that_accelerate_reads():
    folder = ROOT / "examples" / "distributed"
    fsdp = load_config_from_file(str(folder / "fsdp.yaml"))
    assert (fsdp.distributed_type, fsdp.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]) == ("FSDP", T5Block.__name__)
    deepspeed = json.loads((folder / "deepspeed_zero2.json").read_text())
    assert deepspeed["zero_optimization"]["stage"] == 2
    # What the Trainer knows is filled in by the Trainer, so that the two cannot disagree.
    assert deepspeed["train_micro_batch_size_per_gpu"] == deepspeed["gradient_accumulation_steps"] == "auto"
