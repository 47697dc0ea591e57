"""`ModularTrainer` trains the modules, nothing but the modules, and behaves as a `Seq2SeqTrainer` otherwise."""

import pytest
import torch
from conftest import VOCAB_SIZE, make_teacher
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import Seq2SeqLMOutput

import modular_t5.trainer
from modular_t5 import ModularT5ForConditionalGeneration, ModularTrainer, ModularTrainingArguments


def pad(rows, value):
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def collate(examples):
    source = pad([example["input_ids"] for example in examples], 0)
    return {"input_ids": source, "attention_mask": (source != 0).long(), "labels": pad([e["labels"] for e in examples], -100)}


def make_dataset(examples=32):
    """Copy the source, backwards."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (3 + i % 5 for i in range(examples))]
    return Dataset.from_dict({"input_ids": rows, "labels": [[*reversed(row), 1] for row in rows]})


def make_trainer(folder, *, bank=None, arguments=ModularTrainingArguments, **changes):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1)) if bank is None else bank
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = arguments(str(folder), **{**defaults, **changes})
    return ModularTrainer(model=bank, args=args, train_dataset=make_dataset(), eval_dataset=make_dataset(8), data_collator=collate)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_training_changes_the_modules_and_never_the_teacher(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".bank." in name for name in changed)
    for side in ("encoder", "decoder"):
        for s in (2, 3, 6):
            for j in range(6 // s):
                assert any(name.startswith(f"{side}.bank.{s}.{j}.") for name in changed), (side, s, j)


def test_training_brings_every_size_nearer_to_the_teacher(tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
    trainer = make_trainer(tmp_path, bank=bank, max_steps=120, learning_rate=5e-3, logging_steps=50)
    inputs = collate(list(make_dataset(8)))

    def distances():
        distance = {}
        trainer.model.eval()
        with torch.no_grad():
            teacher = trainer.model(**inputs).logits
            for plan in ("1x2-2x2/1x2-2x2", "2x3/2x3", "1x6/3x2", "6x1/6x1"):
                with trainer.model.using(plan):
                    distance[plan] = (trainer.model(**inputs).logits - teacher).square().mean().item()
        return distance

    before = distances()
    trainer.train()
    after = distances()
    assert all(after[plan] < before[plan] for plan in before), (before, after)
    assert sum(after.values()) < 0.8 * sum(before.values())


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(tmp_path):
    trainer = make_trainer(tmp_path, task_weight=0.5, logit_weight=2.0, hidden_weight=3.0, temperature=2.0)
    trainer.train()
    terms = {name: logged(trainer, name) for name in ("task_loss", "logit_loss", "hidden_loss")}
    for step, loss in enumerate(logged(trainer, "loss")):
        assert loss == pytest.approx(
            0.5 * terms["task_loss"][step] + 2 * terms["logit_loss"][step] + 3 * terms["hidden_loss"][step], rel=1e-4
        )
        assert min(values[step] for values in terms.values()) > 0


def test_a_term_of_no_weight_is_not_computed(tmp_path):
    trainer = make_trainer(tmp_path, task_weight=0.0, logit_weight=0.0)
    trainer.train()
    assert logged(trainer, "hidden_loss")
    assert not logged(trainer, "task_loss") + logged(trainer, "logit_loss")


def test_the_teacher_runs_without_dropout_and_the_modules_with(tmp_path, monkeypatch):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.5))
    trainer = make_trainer(tmp_path, bank=bank, max_steps=1)
    batch = collate(list(make_dataset(8)))
    bank.eval()
    with torch.no_grad():
        wanted = bank(**batch).logits

    dropping, teacher_logits = [], []  # of each pass: the names of what drops out; of the loss: what it compares with

    def note_modes(model, *_):
        dropping.append([name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training])

    def note_teacher(student, teacher, *rest, loss=modular_t5.trainer.logit_loss):
        teacher_logits.append(teacher)
        return loss(student, teacher, *rest)

    monkeypatch.setattr(modular_t5.trainer, "logit_loss", note_teacher)
    bank.register_forward_pre_hook(note_modes)
    bank.train()
    trainer.compute_loss(bank, batch)
    of_teacher, of_student = dropping
    assert not of_teacher
    assert of_student
    assert all(".bank." in name for name in of_student)
    assert torch.equal(teacher_logits[0], wanted)


def test_plans_are_drawn_by_seed_and_step_alone(tmp_path):
    trainers = [make_trainer(tmp_path, seed=seed) for seed in (0, 0, 1)]
    plans = [[trainer.plan_of_step(step) for step in range(20)] for trainer in trainers]
    assert plans[0] == plans[1] != plans[2]


def test_each_step_runs_its_plan_and_the_banks_own_returns(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=3)
    ran = []
    monkeypatch.setattr(
        ModularT5ForConditionalGeneration,
        "using",
        lambda bank, plan, using=ModularT5ForConditionalGeneration.using: ran.append(str(plan)) or using(bank, plan),
    )
    trainer.model.set_plan("2x3/2x3")
    trainer.train()
    assert ran == [text for step in range(3) for text in ("1x6/1x6", str(trainer.plan_of_step(step)))]
    assert str(trainer.model.plan) == "2x3/2x3"


def test_an_untouched_encoder_is_not_run_again_and_nothing_changes(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, bank=ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0)))
    bank, batch = trainer.model, collate(list(make_dataset(8)))
    plan = bank.choose_plan("1x6/3x2")
    monkeypatch.setattr(trainer, "plan_of_step", lambda step: plan)
    passes = []
    bank.encoder.register_forward_hook(lambda *_: passes.append(1))
    bank.train()
    loss, student = trainer.compute_loss(bank, batch, return_outputs=True)
    assert len(passes) == 1
    with bank.using(plan), torch.no_grad():
        assert torch.equal(student.logits, bank(**batch).logits)
    assert loss.requires_grad
    assert isinstance(student, Seq2SeqLMOutput)


def test_accumulated_steps_have_the_loss_of_one_large_step(tmp_path):
    losses, norms = [], []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
        trainer = make_trainer(
            tmp_path,
            bank=bank,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            hidden_weight=0.0,
        )
        trainer.train_dataset = Dataset.from_list([{**row} for row in list(make_dataset())[:1] * 32])  # all alike, so means agree
        trainer.train()
        losses += logged(trainer, "loss")
        norms += logged(trainer, "grad_norm")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_label_smoothing_changes_the_task_loss(tmp_path):
    losses = []
    for smoothing in (0.0, 0.3):
        trainer = make_trainer(tmp_path, max_steps=1, label_smoothing_factor=smoothing)
        trainer.train()
        losses += logged(trainer, "task_loss")
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("plan", ["1x6/1x6", "2x3/6x1"])
def test_evaluation_is_that_of_a_seq2seq_trainer_on_the_assembled_model(plan, tmp_path):
    ours = make_trainer(tmp_path, predict_with_generate=True, generation_max_length=6, generation_num_beams=2)
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=6, generation_num_beams=2, report_to="none", use_cpu=True
    )
    stock = Seq2SeqTrainer(model=ours.model.assemble(plan), args=args, data_collator=collate)
    ours.model.set_plan(plan)
    mine, theirs = ours.predict(make_dataset(8)), stock.predict(make_dataset(8))
    assert mine.metrics["test_loss"] == theirs.metrics["test_loss"]
    assert (mine.predictions == theirs.predictions).all()


def test_saved_checkpoints_load_as_banks_and_resume(tmp_path):
    whole = make_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    make_trainer(tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(tmp_path / "parts", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())
    again = ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "parts" / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replacing_rate": 0.0}, "replacing_rate must be above 0 and at most 1, got 0.0"),
        ({"replacing_rate": 1.5}, "replacing_rate .* got 1.5"),
        ({"curriculum": "hardest"}, "'hardest'; choose one of coarse-to-fine"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": "1"}, "temperature must be a finite number, got '1'"),
        ({"replacing_rate": True}, "replacing_rate must be a finite number, got True"),
        ({"task_weight": None}, "task_weight must be a finite number, got None"),
        ({"hidden_weight": -1.0}, "hidden_weight .* got -1.0"),
        ({"logit_weight": float("nan")}, "logit_weight must be a finite number, got nan"),
        ({"task_weight": 0.0, "logit_weight": 0.0, "hidden_weight": 0.0}, "at least one of"),
    ],
)
def test_bad_arguments_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ModularTrainingArguments(str(tmp_path), **changes)


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got T5ForConditionalGeneration; build one with .*from_t5"):
        make_trainer(tmp_path, bank=make_teacher())
    with pytest.raises(ValueError, match="takes ModularTrainingArguments, got Seq2SeqTrainingArguments"):
        make_trainer(tmp_path, arguments=Seq2SeqTrainingArguments)


def test_what_it_does_not_take_is_refused(tmp_path, monkeypatch):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    args = ModularTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for name in ("compute_loss_func", "model_init"):
        with pytest.raises(ValueError, match=f"does not take {name}"):
            ModularTrainer(bank, args, **{name: print})
    monkeypatch.setattr(args, "_n_gpu", 2)
    with pytest.raises(ValueError, match="start it with torchrun"):
        ModularTrainer(bank, args)


def test_arguments_by_position_as_in_seq2seq_trainer(tmp_path):
    args = ModularTrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, dataloader_pin_memory=False)
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    bank.config.return_dict = False
    trainer = ModularTrainer(bank, args, collate, make_dataset(), make_dataset(8))
    trainer.train()
    assert trainer.eval_dataset is not None


def test_a_bank_is_left_as_a_trainer_leaves_a_model(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.model.training
    assert all(module.training for module in trainer.model.modules())


def test_sources_without_a_mask_or_ids(tmp_path):
    trainer = make_trainer(tmp_path, bank=ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0)))
    batch = collate(list(make_dataset(1)))
    embedded = {"inputs_embeds": trainer.model.shared(batch["input_ids"]), "labels": batch["labels"]}
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, embedded).item() == pytest.approx(
        trainer.compute_loss(trainer.model, batch).item(), rel=1e-5
    )


def test_a_dataset_without_labels_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.data_collator = lambda examples: {k: v for k, v in collate(examples).items() if k != "labels"}
    with pytest.raises(ValueError, match="training needs labels"):
        trainer.train()
