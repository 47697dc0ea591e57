"""Training one size by itself: fine-tuning, distillation, LayerDrop."""

import copy
from itertools import chain, repeat

import pytest
import torch
from conftest import make_bank, make_teacher, same
from training import collate, make_dataset, make_trainer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

import modular_t5.baselines
from modular_t5 import AssemblyPlan
from modular_t5.baselines import DistillationTrainer, LayerDropTrainer, layers_left_out, set_dropout
from modular_t5.recording import eager_attention
from modular_t5.training_args import DistillationArguments


PLAN = AssemblyPlan.from_any("2x3/3x2")


def distilling(folder, teacher, student, plan=PLAN, **changes):
    given = {} if teacher is None else {"teacher": teacher, "plan": plan}
    if teacher is None:
        changes = {"logit_weight": 0.0, "hidden_weight": 0.0, **changes}
    return make_trainer(
        folder, bank=student, arguments=DistillationArguments, trainer=DistillationTrainer, trainer_arguments=given, **changes
    )


def dropping(folder, model, drop_rate, **changes):
    given = {"drop_rate": drop_rate}
    return make_trainer(
        folder, bank=model, arguments=Seq2SeqTrainingArguments, trainer=LayerDropTrainer, trainer_arguments=given, **changes
    )


@pytest.mark.parametrize("span", [1, 3])
def test_its_loss_is_that_of_a_bank_that_runs_the_same_size(span, tmp_path, monkeypatch):
    bank = make_bank(granularities={"encoder": [2], "decoder": [3]}, dropout_rate=0.0)
    student, batch = bank.assemble(PLAN), collate(list(make_dataset(8)))
    weights = {"task_weight": 0.5, "logit_weight": 2.0, "hidden_weight": 3.0, "attention_weight": 4.0, "attention_min_span": span}
    weights |= {"temperature": 2.0, "label_smoothing_factor": 0.1}
    teacher = bank.assemble("1x6/1x6")
    trainer = distilling(tmp_path, teacher, student, **weights)
    modular = make_trainer(tmp_path, bank=bank, teacher_fed_ratio=0.0, **weights)
    monkeypatch.setattr(modular, "plans_of_step", lambda step: (PLAN,))
    student.train()
    bank.train()
    with eager_attention(teacher, student, bank):
        torch.testing.assert_close(trainer.compute_loss(student, batch), modular.compute_loss(bank, batch))


@pytest.mark.parametrize(
    ("plan", "span", "compared"),
    [
        (PLAN, 1, 3 + 2 * 2),  # the encoder's own; the decoder's own and across
        (PLAN, 3, 2 * 2),
        (PLAN, 4, 0),
        ("1x6/1x4-2x1", 1, 6 + 5 * 2),
        ("1x6/1x4-2x1", None, 1 * 2),
        ("1x3-3x1/2x3", None, 1 + 3 * 2),
    ],
)
def test_attention_is_compared_of_blocks_that_stand_for_enough_layers(plan, span, compared, tmp_path, monkeypatch):
    bank, seen, plan = make_bank(), [], AssemblyPlan.from_any(plan)
    monkeypatch.setattr(modular_t5.baselines, "attention_loss", lambda *maps: seen.append(maps) or maps[0].sum())
    dials = {"attention_weight": 1.0, "attention_min_span": span, "max_steps": 1}
    distilling(tmp_path, bank.assemble("1x6/1x6"), bank.assemble(plan), plan, **dials).train()
    assert len(seen) == compared


def test_what_has_nothing_to_learn_from_is_refused(tmp_path):
    bank = make_bank()
    alone = {"task_weight": 0.0, "logit_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 1.0, "attention_min_span": 4}
    with pytest.raises(ValueError, match=f"attention_weight alone leaves a student of plan {PLAN} nothing to learn from"):
        distilling(tmp_path, bank.assemble("1x6/1x6"), bank.assemble(PLAN), **alone)


def test_attention_maps_of_the_student_are_compared_without_dropout(tmp_path, monkeypatch):
    bank, seen = make_bank(dropout_rate=0.9), []

    def note(student, teacher, mask):
        seen.append(student)
        return (student - teacher).sum()

    monkeypatch.setattr(modular_t5.baselines, "attention_loss", note)
    distilling(tmp_path, bank.assemble("1x6/1x6"), bank.assemble(PLAN), attention_weight=1.0, max_steps=1).train()
    assert len(seen) == 3 + 2 * 2
    for maps in seen:
        assert torch.allclose(maps.sum(-1), torch.ones(()))


def test_it_trains_all_of_the_student_and_nothing_of_the_teacher(tmp_path):
    bank = make_bank(dropout_rate=0.1)
    teacher, student = bank.assemble("1x6/1x6"), bank.assemble(PLAN)
    before, unharmed = copy.deepcopy(student).state_dict(), copy.deepcopy(teacher)
    distilling(tmp_path, teacher, student).train()
    assert same(teacher, unharmed)
    assert not [name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])]


def test_without_a_teacher_it_fine_tunes_as_transformers_does(tmp_path):
    start = make_teacher(dropout_rate=0.0)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    distilling(tmp_path, None, ours, label_smoothing_factor=0.1).train()
    stock = {
        "arguments": Seq2SeqTrainingArguments,
        "trainer": Seq2SeqTrainer,
        "trainer_arguments": {"data_collator": _with_decoder_inputs(theirs)},
    }
    make_trainer(tmp_path, bank=theirs, label_smoothing_factor=0.1, **stock).train()
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-4)


def _with_decoder_inputs(model):
    def with_them(examples):
        batch = collate(examples)
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}

    return with_them


def test_evaluation_is_the_cross_entropy_without_label_smoothing(tmp_path):
    model = make_teacher(dropout_rate=0.0)
    trainer = distilling(tmp_path, None, model, label_smoothing_factor=0.1, per_device_eval_batch_size=8)
    batch = collate(list(make_dataset(8)))
    with torch.no_grad():
        assert trainer.evaluate(make_dataset(8))["eval_loss"] == pytest.approx(model(**batch).loss.item())


def test_a_teacher_needs_a_plan(tmp_path):
    with pytest.raises(ValueError, match="compared where the plan says"):
        make_trainer(
            tmp_path,
            bank=make_teacher(),
            arguments=DistillationArguments,
            trainer=DistillationTrainer,
            trainer_arguments={"teacher": make_teacher()},
        )


def test_weights_need_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="do nothing without a teacher"):
        distilling(tmp_path, None, make_teacher(), hidden_weight=1.0)


def test_layers_are_left_out_and_come_back():
    model, inputs = make_teacher(), collate(list(make_dataset(4)))
    whole = model(**inputs, use_cache=False).logits
    drawn = chain([True, False, True, True, True], repeat(False))  # of the encoder's, then of the decoder's
    with layers_left_out(model, lambda: next(drawn)):
        dropped = model(**inputs, use_cache=False).logits
    expected = copy.deepcopy(model)
    expected.encoder.block = torch.nn.ModuleList([expected.encoder.block[0], expected.encoder.block[2]])
    torch.testing.assert_close(dropped, expected(**inputs, use_cache=False).logits)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, whole)


def test_layerdrop_trains_every_layer_and_never_drops_the_first(tmp_path):
    model = make_teacher(dropout_rate=0.0)
    ran = []
    for side in ("encoder", "decoder"):
        for number, block in enumerate(getattr(model, side).block):
            block.register_forward_pre_hook(lambda *_, which=(side, number): ran.append(which))
    before = copy.deepcopy(model).state_dict()
    dropping(tmp_path, model, 0.5, max_steps=12).train()
    assert ran.count(("encoder", 0)) == ran.count(("decoder", 0)) == 12
    assert 0 < ran.count(("encoder", 3)) < 12
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    with pytest.raises(ValueError, match="drop_rate must lie between 0 and 1, got 1"):
        dropping(tmp_path, model, 1)


def test_dropout_of_residuals_and_of_what_is_inside():
    model = make_teacher(dropout_rate=0.3)
    set_dropout(model, 0.2, inner=0.0)
    block = next(module for module in model.modules() if isinstance(module, T5Block))
    assert {module.dropout for module in model.modules() if isinstance(module, T5Attention)} == {0.0}
    assert block.layer[0].dropout.p == model.encoder.dropout.p == 0.2
    assert block.layer[1].DenseReluDense.dropout.p == 0.0
    assert block.layer[1].dropout.p == 0.2
