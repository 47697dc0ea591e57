"""LoRA modules: low-rank differences that train, are saved alone, and are merged where a stock T5 is wanted."""

import pytest
import torch
from conftest import make_teacher, stored_tensors, tamper
from peft import IA3Config, LoraConfig
from training import DEFAULTS, collate, logged, make_dataset, make_trainer
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration


MATRICES = ["q", "k", "v", "o", "wi", "wo", "wi_0", "wi_1"]


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MATRICES, "init_lora_weights": True, **changes})


def lora_trainer(folder, *, bank=None, config=None, max_steps=8, **changes):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1)) if bank is None else bank
    return make_trainer(
        folder, bank=bank, max_steps=max_steps, trainer_arguments={"peft_config": config or lora()}, **{**DEFAULTS, **changes}
    )


@pytest.fixture(scope="module", params=["v1.0", "v1.1", "mt5"])
def trained(request, tmp_path_factory):
    """A teacher, and a bank with LoRA modules trained for some steps."""
    folder = tmp_path_factory.mktemp("lora")
    teacher = make_teacher(request.param, dropout_rate=0.1)
    teacher.save_pretrained(folder / "teacher")
    bank = ModularT5ForConditionalGeneration.from_t5(teacher)
    bank.config.teacher = {**bank.config.teacher, "name_or_path": str(folder / "teacher")}
    trainer = lora_trainer(folder / "out", bank=bank, learning_rate=3e-2)
    trainer.train()
    bank.eval()
    return folder, teacher, bank


def test_only_adapters_train_and_the_modules_start_as_layers(tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1))
    plain = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    batch = collate(list(make_dataset(4)))
    bank.set_plan("2x3/2x3")
    bank.eval()
    with torch.no_grad():
        before = bank(**batch).logits
    trainer = lora_trainer(tmp_path, bank=bank, max_steps=40, curriculum="uniform")
    bank.eval()
    with torch.no_grad():
        assert torch.equal(bank(**batch).logits, before)
    trainer.train()
    for name, tensor in bank.state_dict().items():
        if ".lora_" in name:
            continue
        assert torch.equal(tensor, plain[name.replace(".base_layer.", ".")]), name
    with_gradients = {name for name, parameter in bank.named_parameters() if parameter.requires_grad}
    assert with_gradients == {name for name in bank.state_dict() if ".lora_" in name}
    assert all(bank.get_parameter(name).abs().sum() > 0 for name in with_gradients if ".lora_B." in name)


@pytest.mark.slow
def test_training_brings_the_loss_down(tmp_path):
    trainer = lora_trainer(tmp_path, max_steps=80, learning_rate=1e-2, curriculum="uniform")
    trainer.train()
    losses = logged(trainer, "hidden_loss")
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize("plan", ["2x3/2x3", "1x2-2x2/6x1", "1x6/1x6"])
def test_assembling_merges(plan, trained, inputs, tmp_path):
    _, teacher, bank = trained
    stock = bank.assemble(plan)
    assert type(stock) is T5ForConditionalGeneration
    with torch.no_grad(), bank.using(plan):
        torch.testing.assert_close(stock(**inputs).logits, bank(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in stock.state_dict())
    assert sum(parameter.numel() for parameter in stock.parameters()) == bank.report(plan).total_parameters
    stock.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, stock(**inputs).logits)
        if plan == "1x6/1x6":
            assert torch.equal(stock(**inputs).logits, teacher(**inputs).logits)
    with pytest.raises(ValueError, match="call merge_and_unload"):
        bank.assemble(plan, share_weights=True)


def test_the_saved_bank_is_the_adapters_alone(trained, inputs, tmp_path):
    _, teacher, bank = trained
    bank.save_pretrained(tmp_path)
    saved = stored_tensors(tmp_path)
    assert saved.keys() == {name for name in bank.state_dict() if ".lora_" in name}
    modules = [module for *_, module in bank.modules_of_bank()]
    assert sum(tensor.numel() for tensor in saved.values()) < sum(p.numel() for module in modules for p in module.parameters()) / 2
    for again in (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path),
        ModularT5ForConditionalGeneration.from_pretrained(tmp_path, teacher=teacher),
    ):
        assert not again.config.lora
        for plan in ("2x3/2x3", "1x2-2x2/6x1"):
            torch.testing.assert_close(again.assemble(plan).state_dict(), bank.assemble(plan).state_dict())
        again.assemble("2x3/2x3", share_weights=True)
        again.save_pretrained(tmp_path / "whole")
        assert torch.equal(
            ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "whole").assemble("2x3/2x3")(**inputs).logits,
            again.assemble("2x3/2x3")(**inputs).logits,
        )


def test_merge_and_unload(trained, tmp_path):
    _, teacher, bank = trained
    fresh = ModularT5ForConditionalGeneration.from_t5(teacher)
    lora_trainer(tmp_path / "out", bank=fresh)
    fresh.load_state_dict(bank.state_dict())
    wanted = fresh.assemble("2x3/3x2").state_dict()
    merged = fresh.merge_and_unload()
    assert merged is fresh
    assert not any("lora" in name for name in merged.state_dict())
    for name, tensor in merged.assemble("2x3/3x2").state_dict().items():
        assert torch.equal(tensor, wanted[name])
    make_trainer(tmp_path / "out", bank=merged).train()


def test_a_resumed_training_is_the_same_training(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = lora_trainer(tmp_path / "whole", **saving)
    whole.train()
    resumed = lora_trainer(tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())
    checkpoint = stored_tensors(tmp_path / "whole" / "checkpoint-6")
    assert all(".lora_" in name for name in checkpoint)


def test_a_second_trainer_goes_on(tmp_path):
    bank = lora_trainer(tmp_path).model
    make_trainer(tmp_path, bank=bank, trainer_arguments={"peft_config": lora()}).train()
    before = bank.module_tensors()
    before = {name: tensor.clone() for name, tensor in before.items()}
    lora_trainer(tmp_path, bank=bank).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in bank.module_tensors().items())
    with pytest.raises(ValueError, match=r"the peft_config says {'rank': 4, 'scaling': 4.0}; merge_and_unload"):
        lora_trainer(tmp_path, bank=bank, config=lora(lora_alpha=16))


def test_a_checkpoint_of_another_scaling_is_refused(tmp_path):
    lora_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"of another bank: its lora is .*'scaling': 2.0}, this one's .*'scaling': 16.0}"):
        lora_trainer(tmp_path, config=lora(lora_alpha=64)).train(resume_from_checkpoint=True)


def test_with_norms_and_head_of_its_own(tmp_path):
    teacher = make_teacher()
    bank = ModularT5ForConditionalGeneration.from_t5(teacher)
    trainer = lora_trainer(tmp_path / "out", bank=bank, train_head=True, train_final_norms=True)
    trainer.train()
    bank.save_pretrained(tmp_path / "bank")
    again = ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "bank", teacher=teacher)
    wanted = bank.assemble("2x3/2x3").state_dict()
    for name, tensor in again.assemble("2x3/2x3").state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])
    assert torch.equal(again.decoder.bank["lm_head"].weight, bank.decoder.bank["lm_head"].weight)


def test_the_default_targets_are_pefts_for_t5(tmp_path):
    trainer = lora_trainer(tmp_path, config=LoraConfig(r=2))
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in trainer.model.state_dict() if ".lora_" in name}
    assert adapted == {"q", "v"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(target_modules=["nowhere"]), "no adapter fits into a module"),
        (lora(use_dora=True), "use_dora=True does not fit"),
        (lora(rank_pattern={"q": 2}), "rank_pattern={'q': 2} does not fit"),
        (lora(bias="all"), "bias='all' does not fit"),
        (lora(lora_bias=True), "lora_bias=True does not fit"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the layers of the teacher"),
        (lora(target_modules=r"layer\.1\.DenseReluDense\.wi"), "no adapter fits into a module"),  # of the encoder only
        (IA3Config(), "must be a LoraConfig, got IA3Config"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config, message, tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    names = set(bank.state_dict())
    with pytest.raises(ValueError, match=message):
        lora_trainer(tmp_path, bank=bank, config=config)
    assert set(bank.state_dict()) == names
    assert not bank.config.lora


def test_a_trained_bank_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="this bank is trained already; build one by from_t5"):
        lora_trainer(tmp_path, bank=trainer.model)


def test_lora_modules_without_their_configuration_are_refused(tmp_path):
    bank = lora_trainer(tmp_path).model
    with pytest.raises(ValueError, match=r"pass their peft_config, or bank\.merge_and_unload"):
        make_trainer(tmp_path, bank=bank)


def test_adapters_that_are_torn_are_refused(trained, tmp_path):
    _, teacher, bank = trained
    name = next(name for name in bank.module_tensors() if ".lora_A." in name)
    unknown = "encoder.bank.2.7.layer.0.SelfAttention.q"
    for change, message in (
        (lambda tensors: tensors.pop(name), f"it lacks 1, the first of them {name}"),
        (lambda tensors: tensors.update({name: tensors[name][:1]}), f"{name} in .* has shape"),
        (lambda tensors: tensors.update({f"{unknown}.lora_{m}.default.weight": torch.ones(2, 2) for m in "AB"}), "has beside those 2"),
        (lambda tensors: tensors.clear(), "it lacks"),
    ):
        bank.save_pretrained(tmp_path)
        tamper(tmp_path, change)
        with pytest.raises(ValueError, match=message):
            ModularT5ForConditionalGeneration.from_pretrained(tmp_path, teacher=teacher)
