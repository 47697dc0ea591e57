"""Cards: metadata that the Hub's own classes take, figures from result files alone, and code that runs."""

import re
from pathlib import Path

import pytest
from conftest import make_bank, make_teacher
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from training import make_trainer
from transformers import AutoTokenizer, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration, assembled_card, bank_card
from modular_t5.frontier import Frontier, FrontierPoint, standard_sizes
from modular_t5.loading_modular_t5 import SavedBank
from modular_t5.measuring import environment


ROOT = Path(__file__).parents[1]
DETAILS = {"language": ["en", "de"], "license": "apache-2.0", "datasets": ["bentrevett/multi30k"], "pipeline_tag": "translation"}


def results_of(bank, folder, factor=1):
    """A result file with a point for every standard size."""
    points = []
    for i, (name, plan) in enumerate(standard_sizes(bank.shape).items()):
        report = bank.report(plan)
        report = report._replace(total_parameters=report.total_parameters * factor)
        points.append(FrontierPoint.of(name, report, {"BLEU": 40.0 - i, "exact match": 9.5}, {"BLEU": 1.0, "exact match": 0.0}, 100.0 + i))
    provenance = {"date": "2026-11-21", "hardware": "an abacus", "seed": 7, "test_examples": 12, "metrics": {"BLEU": "tok:13a"}}
    Frontier(tuple(points), "BLEU").save(folder / "frontier.json", **provenance)
    return folder / "frontier.json"


def code_of(card):
    return re.findall(r"^```python\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)


def test_metadata_of_a_bank(hub, tmp_path):
    make_teacher().push_to_hub("org/card-teacher")
    bank = ModularT5ForConditionalGeneration.from_t5("org/card-teacher")
    card = bank_card(bank, "org/card-bank", results=results_of(bank, tmp_path), picture="frontier.png", **DETAILS)
    card.validate()
    assert "POST /api/validate-yaml" in hub.asked
    again = ModelCard(str(card)).data.to_dict()
    assert again["base_model"] == "org/card-teacher"
    assert again["base_model_relation"] == "finetune"
    assert again["library_name"] == "transformers"
    assert again["metrics"] == ["bleu", "exact_match"]
    assert {name: again[name] for name in DETAILS} == DETAILS
    name, evaluations = model_index_to_eval_results(again["model-index"])
    assert name == "card-bank"
    assert len(evaluations) == 2 * len(standard_sizes(bank.shape))
    by_name = {evaluation.metric_name: evaluation.metric_value for evaluation in evaluations}
    assert by_name["BLEU, teacher (1x6/1x6)"] == 40.0
    assert by_name["BLEU, size-first 2x (2x3/2x3)"] == 37.0
    assert {evaluation.dataset_type for evaluation in evaluations} == {"bentrevett/multi30k"}
    assert f"(https://huggingface.co/org/card-teacher/tree/{hub.sha('org/card-teacher')})" in card.text


def test_what_a_bank_card_tells(tmp_path):
    bank = make_bank()
    card = bank_card(bank, "org/x", results=results_of(bank, tmp_path), picture="frontier.png", training=None)
    for told in ("![Quality kept against layer ratio](frontier.png)", "an abacus", "BLEU (tok:13a)", "92.5 %", "2x3/2x3", "seed 7"):
        assert told in card.text, told
    assert "a fine-tuned T5 that is not on the Hub" in card.text
    not_measured = card.text.split("## Not measured")[1]
    for told in ("other hardware than an abacus", "Other seeds than 7", "How the bank was trained was not recorded", "names no dataset"):
        assert told.lower() in not_measured.lower(), told
    assert "model-index" not in card.data.to_dict()


def test_without_results_nothing_is_claimed():
    bank = make_bank()
    card = bank_card(bank, "org/x")
    assert "- Quality and speed, of any size." in card.text
    assert "BLEU" not in card.text
    assert f"{bank.report('2x3/2x3').total_parameters:,}" in card.text
    assert "metrics" not in card.data.to_dict()


def test_results_of_another_bank_or_of_none_are_refused(tmp_path):
    bank = make_bank()
    with pytest.raises(ValueError, match="was measured on another bank: its 1x6/1x6 has"):
        bank_card(bank, "org/x", results=results_of(bank, tmp_path, factor=2))
    for text in ("", "{}", '{"points": [{}], "metric": "BLEU"}', '{"points": [], "metric": "BLEU"}'):
        (tmp_path / "torn.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not what Frontier\.save writes"):
            bank_card(bank, "org/x", results=tmp_path / "torn.json")


def test_the_files_that_a_card_names_are_those_of_the_bank(tmp_path):
    bank = make_bank("v1.1")
    bank.add_own_part("head")
    for modules_only in (False, True):
        bank.save_pretrained(tmp_path / str(modules_only), modules_only=modules_only)
        card = bank_card(SavedBank(tmp_path / str(modules_only), teacher=make_teacher("v1.1") if modules_only else None), "org/x")
        named = set(re.findall(r"`(model-[\w-]+\.safetensors)`", card.text))
        assert named == {path.name for path in (tmp_path / str(modules_only)).glob("*.safetensors")}
        assert (bank.teacher_sha256() in card.text) == modules_only


def test_the_code_of_a_banks_card_runs(hub, pico_tokenizer, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    bank = make_bank(vocab_size=len(tokenizer))
    card = bank_card(bank, "org/card-code", results=results_of(bank, tmp_path), example='one "tree"')
    bank.push_to_hub("org/card-code")
    tokenizer.push_to_hub("org/card-code")
    names = {}
    for code in code_of(card):
        exec(compile(code, "README.md", "exec"), names)
    assert len(code_of(card)) == 2
    assert capsys.readouterr().out
    assert type(names["model"]) is T5ForConditionalGeneration
    assert code_of(card)[0].count("load(repo") == 1 + len(standard_sizes(bank.shape))


def test_an_assembled_models_card(hub, pico_tokenizer, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    bank = make_bank(vocab_size=len(tokenizer))
    bank.push_to_hub("org/card-of")
    model = bank.assemble("2x3/2x3")
    card = assembled_card(model, "org/card-assembled", results=results_of(bank, tmp_path), **DETAILS)
    card.validate()
    model.push_to_hub("org/card-assembled")
    tokenizer.push_to_hub("org/card-assembled")
    card.push_to_hub("org/card-assembled")
    pushed = ModelCard.load("org/card-assembled")
    assert pushed.data.base_model == "org/card-of"
    assert [evaluation.metric_value for evaluation in pushed.data.eval_results] == [37.0, 9.5]
    assert f"`{hub.sha('org/card-of')}`" in pushed.text
    (code,) = code_of(pushed)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert "Nothing." in assembled_card(bank.assemble("1x6/2x3"), "org/x").text
    with pytest.raises(ValueError, match="does not remember a bank"):
        assembled_card(make_teacher(), "org/x")


def test_no_place_on_this_machine_is_told(tmp_path):
    make_bank().save_pretrained(tmp_path / "bank")
    bank = ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "bank")
    assert str(tmp_path) not in str(bank_card(bank, "org/x"))
    assert str(tmp_path) not in str(assembled_card(bank.assemble("2x3/2x3"), "org/x"))


def test_a_trainers_card_tells_of_the_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, replacing_rate=0.5, hub_token="hf_secret", weight_decay=0.25)
    trainer.train()
    trainer.create_model_card(language="en", dataset_tags="org/data", dataset="Data", tasks=["summarization"], tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "summarization"
    assert card.data.datasets == ["org/data"]
    assert "mine" in card.data.tags
    assert "| `replacing_rate` | 0.5 |" in card.text
    assert "| `weight_decay` | 0.25 |" in card.text
    assert "2 steps in " in card.text
    assert "hf_secret" not in str(card)
    assert str(tmp_path) not in card.text
    with pytest.raises(ValueError, match="the card names the bank's own teacher"):
        trainer.create_model_card(finetuned_from="org/t5")


def test_commands_are_told_without_folders_and_secrets(monkeypatch):
    words = [
        "/home/alice/train.py",
        "--hub_token",
        "hf_secret",
        "--api_key=hf_secret",
        "--output_dir",
        "/home/alice/out",
        "--lr=0.1",
        "data/x",
    ]
    monkeypatch.setattr("sys.argv", words)
    assert environment()["command"] == "python train.py --hub_token '***' '--api_key=***' --output_dir out --lr=0.1 data/x"


def test_results_of_another_bank_do_not_end_a_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    results_of(make_bank(num_layers=12), tmp_path)
    trainer.train()
    trainer.create_model_card()
    assert "Quality and speed, of any size." in ModelCard.load(tmp_path / "README.md").text


def test_what_is_pushed_in_between_is_a_whole_bank(hub, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "org/in-between"}
    trainer = make_trainer(tmp_path / "out", max_steps=2, **saving)
    trainer.train()
    trainer._finish_current_push()
    assert not [path for path in hub.files("org/in-between") if "checkpoint" in path]
    state = ModularT5ForConditionalGeneration.from_pretrained("org/in-between").state_dict()
    assert set(state) == set(trainer.bank.state_dict())
    assert "### Training" not in ModelCard.load("org/in-between").text
    with pytest.raises(ValueError, match="set hub_strategy to every_save or end"):
        make_trainer(tmp_path / "out", hub_strategy="checkpoint", **saving)


def test_a_trainer_pushes_bank_tokenizer_and_card(hub, tmp_path):
    trainer = make_trainer(tmp_path / "out", max_steps=1, hub_model_id="org/trained")
    trainer.train()
    trainer.push_to_hub(language="de")
    assert {"README.md", "config.json", "model-common.safetensors", "modeling_modular_t5.py"} <= set(hub.files("org/trained"))
    assert 'repo = "org/trained"' in ModelCard.load("org/trained").text
    assert ModularT5ForConditionalGeneration.from_pretrained("org/trained").plan == trainer.bank.plan
    assert trainer.bank.origin == {"bank": "org/trained", "revision": hub.sha("org/trained")}


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda path: path.name)
def test_the_cards_in_the_repository_are_valid(path):
    card = ModelCard.load(path)
    card.validate()
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert {"pipeline_tag", "language", "metrics", "model-index"} <= data.keys()
    for code in code_of(card):
        compile(code, path.name, "exec")
    assert "## Not measured" in card.text


def test_the_card_of_a_calibrated_bank_says_so():
    bank = make_bank()
    assert "calibrated" not in str(bank_card(bank, "org/x"))
    modules = {side: {"2": [1, 1, 1], "3": [1, 1], "6": [1]} for side in ("encoder", "decoder")}
    bank.config.calibration = {"modules": modules, "plans": {}}
    assert 'model = load(repo, "calibrated", ratio=2)' in str(bank_card(bank, "org/x"))
