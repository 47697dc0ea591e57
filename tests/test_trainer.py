"""`ModularTrainer` trains the modules, nothing but the modules, and behaves as a `Seq2SeqTrainer` otherwise."""

import copy
import json
import logging
import math
import re
from contextlib import contextmanager
from dataclasses import replace

import accelerate
import pytest
import torch
from conftest import VOCAB_SIZE, make_bank, make_teacher
from training import CHECKPOINTING, DEFAULTS, Noting, collate, logged, make_dataset, make_trainer
from transformers import AutoTokenizer, EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import modular_t5.lessons
from modular_t5 import AssemblyPlan, ModularT5ForConditionalGeneration, ModularTrainer, ModularTrainingArguments
from modular_t5.layout_modular_t5 import own_part_of
from modular_t5.lessons import Lesson
from modular_t5.recording import eager_attention


ATTENTION = {"attention_weight": 1.0, "attention_min_span": 1}  # of all modules


@contextmanager
def propagating(name):
    """transformers' loggers end below the root, where pytest listens."""
    logger = logging.getLogger(name)
    former, logger.propagate = logger.propagate, True
    try:
        yield
    finally:
        logger.propagate = former


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

    dropping, lessons = [], []  # of each pass: the names of what drops out; of the loss: what it compares with

    def note_modes(model, *_):
        dropping.append([name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training])

    def note_teacher(student, teacher, *rest, loss=modular_t5.distillation.logit_loss):
        lessons.append(teacher)
        return loss(student, teacher, *rest)

    monkeypatch.setattr(modular_t5.distillation, "logit_loss", note_teacher)
    bank.register_forward_pre_hook(note_modes)
    bank.train()
    trainer.compute_loss(bank, batch)
    of_teacher, of_student = dropping
    assert not of_teacher
    assert of_student
    assert all(".bank." in name for name in of_student)
    assert torch.equal(lessons[0].probabilities, wanted.log_softmax(-1).exp())


def test_by_default_nothing_drops_out(tmp_path):
    assert not ModularTrainingArguments(str(tmp_path), report_to="none").module_dropout
    trainer = make_trainer(tmp_path, module_dropout=False, bank=ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.5)))
    batch = collate(list(make_dataset(8)))
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == losses[1]


def test_plans_are_drawn_by_seed_and_step_alone(tmp_path):
    trainers = [make_trainer(tmp_path, seed=seed) for seed in (0, 0, 1)]
    plans = [[trainer.plans_of_step(step)[0] for step in range(20)] for trainer in trainers]
    assert plans[0] == plans[1] != plans[2]


def plans_that_run(monkeypatch):
    """A list that grows with every plan that runs in training, the teacher's among them."""
    ran, recording = [], modular_t5.lessons.recording
    monkeypatch.setattr(
        modular_t5.lessons, "recording", lambda bank, plan, *rest, **more: ran.append(str(plan)) or recording(bank, plan, *rest, **more)
    )
    return ran


def test_each_step_runs_its_plan_and_the_banks_own_returns(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=3)
    ran = plans_that_run(monkeypatch)
    trainer.model.set_plan("2x3/2x3")
    trainer.train()
    assert ran == [text for step in range(3) for text in ("1x6/1x6", str(trainer.plans_of_step(step)[0]))]
    assert str(trainer.model.plan) == "2x3/2x3"


def test_the_plans_of_a_step_share_a_teacher_and_its_loss_is_their_mean(tmp_path, monkeypatch):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
    dials = {"plans_per_step": 3, "plan_sampling": "aligned", "max_steps": 1, "max_grad_norm": 1e9}
    trainer = make_trainer(tmp_path, bank=bank, **dials)
    plans = trainer.plans_of_step(0)
    assert len(set(plans)) == 3
    batch = collate([trainer.train_dataset[i] for i in range(8)])
    by_plan = []
    for plan in plans:
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "plans_of_step", lambda step, plan=plan: (plan,))
            bank.train()
            by_plan.append(trainer.compute_loss(bank, batch))
    sum(by_plan).div(3).backward()
    expected = {name: parameter.grad.clone() for name, parameter in bank.named_parameters() if parameter.grad is not None}
    bank.zero_grad()

    trainer = make_trainer(tmp_path, bank=bank, **dials)
    ran = plans_that_run(monkeypatch)
    trainer.create_optimizer()
    loss = trainer.training_step(bank, batch, (batch["labels"] != -100).sum())
    assert ran == ["1x6/1x6", *map(str, plans)]
    assert loss.item() == pytest.approx(sum(each.item() for each in by_plan) / 3)
    gradients = {name: parameter.grad for name, parameter in bank.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_several_plans_and_deepspeed_are_refused(tmp_path, monkeypatch):
    args = ModularTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(args, "deepspeed_plugin", object())
    with pytest.raises(ValueError, match=r"DeepSpeed takes one backward pass a batch; set plans_per_step to 1"):
        ModularTrainer(ModularT5ForConditionalGeneration.from_t5(make_teacher()), args)


@pytest.mark.parametrize(("smoothing", "dials"), [(0.0, {}), (0.2, {}), (0.0, DEFAULTS)])
def test_a_step_in_parts_is_the_step(smoothing, dials, tmp_path):
    """Sentences of unlike lengths: a mean of means would differ."""
    losses, norms = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
        trainer = make_trainer(
            tmp_path,
            bank=bank,
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
            # Of the encoder's states a batch's share is that of its target tokens, which here are as many as the source's and one.
            hidden_weight=0.0,
            **dials,
        )
        trainer.train()
        losses += [logged(trainer, "loss"), logged(trainer, "logit_loss"), logged(trainer, "task_loss")]
        norms.append(logged(trainer, "grad_norm"))
    for whole, parts in zip(losses[:3], losses[3:], strict=True):
        assert whole == pytest.approx(parts, rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_label_smoothing_changes_the_task_loss(tmp_path):
    losses = []
    for smoothing in (0.0, 0.3):
        trainer = make_trainer(tmp_path, max_steps=1, label_smoothing_factor=smoothing)
        trainer.train()
        losses += logged(trainer, "task_loss")
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def of_seq2seq_trainer(folder, bank, plan, **changes):
    args = Seq2SeqTrainingArguments(str(folder), report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, **changes)
    return Seq2SeqTrainer(model=bank.assemble(plan), args=args, data_collator=collate, compute_metrics=share_of_tens)


def share_of_tens(prediction):
    return {"tens": float((prediction.predictions == 10).mean()), "labels": float(prediction.label_ids.sum())}


GENERATING = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2}


@pytest.mark.parametrize("plan", ["1x6/1x6", "2x3/6x1"])
def test_prediction_is_that_of_a_seq2seq_trainer_on_the_assembled_model(plan, tmp_path):
    ours = make_trainer(tmp_path, **GENERATING)
    stock = of_seq2seq_trainer(tmp_path, ours.model, plan, **GENERATING)
    ours.model.set_plan(plan)
    mine, theirs = ours.predict(make_dataset(8)), stock.predict(make_dataset(8))
    assert mine.metrics["test_loss"] == theirs.metrics["test_loss"]
    assert (mine.predictions == theirs.predictions).all()


def test_evaluation_of_each_plan_is_that_of_a_seq2seq_trainer_on_the_assembled_model(tmp_path):
    ours = make_trainer(tmp_path, trainer_arguments={"compute_metrics": share_of_tens}, **GENERATING)
    metrics = ours.evaluate()
    plans = list(map(str, ours.eval_plans))
    assert plans == ["1x6/1x6", "2x3/2x3", "1x6/6x1", "6x1/6x1"]
    for name in ("loss", "tens", "labels"):
        of_plans = []
        for plan in plans:
            of_plans.append(of_seq2seq_trainer(tmp_path, ours.model, plan, **GENERATING).evaluate(make_dataset(8))[f"eval_{name}"])
            assert metrics[f"eval_{plan}_{name}"] == pytest.approx(of_plans[-1], rel=1e-6)
        assert metrics[f"eval_{name}"] == pytest.approx(sum(of_plans) / 4)
    assert str(ours.model.plan) == "1x6/1x6"
    assert len([entry for entry in ours.state.log_history if "eval_loss" in entry]) == 1


def test_plans_to_evaluate(tmp_path):
    chosen = make_trainer(tmp_path, eval_plans=["2x3/3x2"]).evaluate()
    assert chosen["eval_2x3/3x2_loss"] == chosen["eval_loss"]
    own = make_trainer(tmp_path, eval_plans=[])
    own.model.set_plan("2x3/3x2")
    assert own.evaluate()["eval_loss"] == chosen["eval_loss"]
    named = make_trainer(tmp_path, eval_plans=["2x3/3x2", "1x6/1x6"])
    by_dataset = named.evaluate({"short": make_dataset(4), "long": make_dataset(8)})
    assert by_dataset["eval_long_2x3/3x2_loss"] == chosen["eval_loss"]
    assert {"eval_short_loss", "eval_short_1x6/1x6_loss"} <= set(by_dataset)
    with pytest.raises(ValueError, match="uses granularity 4"):
        make_trainer(tmp_path, eval_plans=["4x1-2x1/1x6"])


@pytest.mark.parametrize("metric", ["2x3/2x3_loss", "eval_2x3/2x3_loss", "loss"])
def test_the_best_model_by_one_plan(metric, tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        learning_rate=0.3,  # so that the last is not the best
        trainer_arguments={"callbacks": [EarlyStoppingCallback(5)]},
    )
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    losses = logged(trainer, name)
    assert len(losses) == 3
    best = min(losses)
    assert trainer.state.best_metric == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * losses.index(best) + 2}")
    assert trainer.evaluate()[name] == best


def test_a_metric_of_a_plan_that_is_not_evaluated_is_refused(tmp_path):
    for metric in ("3x2/3x2_loss", "12x3/2x3_loss"):
        with pytest.raises(ValueError, match="names a plan that is not evaluated; eval_plans are 1x6/1x6, 2x3/2x3"):
            make_trainer(tmp_path, metric_for_best_model=metric)


@pytest.mark.parametrize("own_embeddings", [False, True])
def test_a_prefix_that_is_the_teachers_is_not_run_again_and_nothing_changes(own_embeddings, tmp_path, monkeypatch):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
    trainer = make_trainer(tmp_path, bank=bank, teacher_fed_ratio=0.0, train_embeddings=own_embeddings, **ATTENTION)
    bank, batch = trainer.model, collate(list(make_dataset(8)))
    if own_embeddings:  # with which no prefix is the teacher's
        with torch.no_grad():
            bank.decoder.bank["embed_tokens"].weight.mul_(1.1)
    for side in ("encoder", "decoder"):
        getattr(bank, side).config._attn_implementation = "eager"
    for text in ("1x6/1x4-2x1", "1x4-2x1/1x2-2x2", "3x2/1x6", "6x1/6x1"):
        plan = bank.choose_plan(text)
        monkeypatch.setattr(trainer, "plans_of_step", lambda step, plan=plan: (plan,))
        ran = []
        handles = [
            block.register_forward_hook(lambda *_, name=name, ran=ran: ran.append(name))
            for name, block in bank.named_modules()
            if re.fullmatch(r"(en|de)coder\.block\.\d", name)
        ]
        bank.train()
        bank.zero_grad()
        loss, student = trainer.compute_loss(bank, batch, return_outputs=True)
        for handle in handles:
            handle.remove()
        again = [name for name in ran if ran.count(name) == 2]
        below = {side: next((start for start, span in plan.blocks(side) if span > 1), 6) for side in ("encoder", "decoder")}
        reused = {f"encoder.block.{layer}" for layer in range(below["encoder"])}
        if below["encoder"] == 6:
            reused |= {f"decoder.block.{layer}" for layer in range(below["decoder"])}
        assert reused <= set(again) if own_embeddings else not reused & set(again), text
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in bank.named_parameters() if parameter.grad is not None}
        with bank.using(plan):
            assert torch.equal(student.logits, bank(**batch).logits), text
            # The same without reuse, from one pass each.
            bank.zero_grad()
            wanted = written_out_loss(bank, plan, batch)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5), text
        wanted.backward()
        assert gradients.keys() == {name for name, parameter in bank.named_parameters() if parameter.grad is not None}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, bank.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "one_by_one"),
    [
        ("2x3/1x6", ["2x1-1x4/1x6", "1x2-2x1-1x2/1x6", "1x4-2x1/1x6"]),
        ("1x6/3x2", ["1x6/3x1-1x3", "1x6/1x3-3x1"]),
        ("1x6/2x1-1x1-1x1-2x1", ["1x6/2x1-1x4", "1x6/1x4-2x1"]),  # original layers between them
    ],
)
def test_modules_that_are_fed_learn_each_by_itself(tmp_path, monkeypatch, text, one_by_one):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
    trainer = make_trainer(tmp_path, bank=bank, teacher_fed_ratio=1.0, task_weight=0.0, logit_weight=0.0)
    batch = collate(list(make_dataset(8)))

    def loss(text):
        monkeypatch.setattr(trainer, "plans_of_step", lambda step: (bank.choose_plan(text),))
        return trainer.compute_loss(bank.train(), batch).item()

    alone = [loss(text) for text in one_by_one]
    assert loss(text) == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    trainer.args.teacher_fed_ratio = 0.0
    assert loss(text) != pytest.approx(sum(alone) / len(alone), rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "fed"), [({}, 2), ({"teacher_fed_ratio": 0.5}, 5), ({"teacher_fed_ratio": 1.0}, 10), ({"hidden_weight": 0.0}, 0)]
)
def test_modules_are_fed_in_the_first_steps(tmp_path, monkeypatch, arguments, fed):
    trainer = make_trainer(tmp_path, max_steps=10, **arguments)
    seen = {}

    def note(lesson, plan, read=Lesson._read):
        seen[trainer.state.global_step] = lesson._fed
        return read(lesson, plan)

    monkeypatch.setattr(Lesson, "_read", note)
    trainer.train()
    assert [seen[step] for step in range(10)] == [True] * fed + [False] * (10 - fed)


def test_of_a_bank_with_modules_on_one_side_no_plan_runs_twice(tmp_path):
    for granularities in ({"encoder": [2, 3], "decoder": []}, {"encoder": [], "decoder": [2, 3]}):
        bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(), granularities)
        plans = make_trainer(tmp_path, bank=bank, **DEFAULTS).plans_of_step(0)
        assert len(plans) == len(set(plans)) == 2


def test_a_card_is_told_of_a_dial_that_is_0(tmp_path):
    arguments = make_trainer(tmp_path, teacher_fed_ratio=0.0).training_record()["arguments"]
    assert arguments["teacher_fed_ratio"] == "0.0"
    assert "temperature" not in arguments


def test_plans_of_the_same_encoder_run_it_once_and_it_learns_where_the_sides_are_alike(tmp_path, monkeypatch):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.0))
    trainer = make_trainer(tmp_path, bank=bank, teacher_fed_ratio=0.0)
    trainer.current_gradient_accumulation_steps = 1  # as in train()
    batch = collate(list(make_dataset(8)))
    ran = []
    bank.encoder.bank["2"][0].register_forward_hook(lambda *_: ran.append("module"))

    def gradients(*texts):
        ran.clear()
        bank.zero_grad()
        monkeypatch.setattr(trainer, "plans_of_step", lambda step: tuple(map(bank.choose_plan, texts)))
        trainer.training_step(bank, batch)
        found = {name: parameter.grad.clone() for name, parameter in bank.named_parameters() if parameter.grad is not None}
        return {side: {name: of for name, of in found.items() if name.startswith(side)} for side in ("encoder", "decoder")}

    alike, unlike = gradients("2x3/2x3"), gradients("2x3/6x1")
    together = gradients("2x3/6x1", "2x3/2x3")
    assert len(ran) == 1
    for name, gradient in together["encoder"].items():
        torch.testing.assert_close(gradient, alike["encoder"][name] / 2)
    assert together["decoder"].keys() == alike["decoder"].keys() | unlike["decoder"].keys()
    name = "decoder.bank.2.0.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(together["decoder"][name], alike["decoder"][name] / 2)
    # Without modules in the decoder there is nothing but the encoder to learn.
    gradients("2x3/1x6", "2x3/1x6")
    assert len(ran) == 2


def written_out_loss(bank, plan, batch):
    """All four terms from what transformers puts out."""

    def passes(plan):
        with bank.using(plan):
            outputs = bank(**batch, output_hidden_states=True, output_attentions=True)
        return outputs, {side: outputs[f"{side}_hidden_states"][1:] for side in ("encoder", "decoder")}

    with torch.no_grad():
        teacher, its_states = passes(bank.shape.teacher)
    student, states = passes(plan)
    target, source = batch["labels"] != -100, batch["attention_mask"].bool()
    hidden, attention = [], []
    for side, mask in (("encoder", source), ("decoder", target)):
        kinds = ["encoder_attentions"] if side == "encoder" else ["decoder_attentions", "cross_attentions"]
        for block, (start, span) in enumerate(plan.blocks(side)):
            if span > 1:
                last = start + span - 1
                s, t = states[side][block][mask], its_states[side][last][mask]
                hidden.append(((s - t).square().sum(-1) / t.square().sum(-1)).mean())
                for kind in kinds:
                    a, b = (maps.transpose(1, 2)[mask] for maps in (student[kind][block], teacher[kind][last]))
                    attention.append((a - b).square().sum(-1).mean())
    log_s, log_t = (logits[target].log_softmax(-1) for logits in (student.logits, teacher.logits))
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return student.loss + divergence + torch.stack(hidden).mean() + torch.stack(attention).mean()


def test_gradients_reach_the_modules_of_the_plan_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = collate(list(make_dataset(8)))
    for step in range(8):
        trainer.state.global_step = step
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        running = {name for name in trainer.model.parameter_map(trainer.plans_of_step(step)[0]).values() if ".bank." in name}
        with_gradients = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
        assert with_gradients == running


def test_without_distillation_no_teacher_runs(tmp_path):
    trainer = make_trainer(tmp_path, logit_weight=0.0, hidden_weight=0.0)
    passes = []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(passes) == 4
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "task_loss"))


def test_attention_maps_are_learned_and_said_once_to_need_eager_attention(tmp_path, caplog):
    attention = {"attention_weight": 10.0, "attention_min_span": 1}
    trainer = make_trainer(tmp_path, max_steps=30, learning_rate=3e-3, teacher_fed_ratio=0.0, **attention)
    implementations = []
    trainer.add_callback(Noting(lambda: implementations.append(trainer.model.encoder.config._attn_implementation)))
    with caplog.at_level("WARNING"), propagating("modular_t5"):
        trainer.train()
    assert sum("eager" in record.message for record in caplog.records) == 1
    assert set(implementations) == {"eager"}
    assert trainer.model.encoder.config._attn_implementation == "sdpa"
    losses = logged(trainer, "attention_loss")
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_attention_of_modules_that_the_bank_does_not_have(tmp_path, caplog):
    with caplog.at_level("WARNING"), propagating("modular_t5"):
        trainer = make_trainer(tmp_path, attention_weight=1.0, attention_min_span=7, max_steps=2)
    assert "attention_min_span=7 leaves no module of the bank to learn from attention" in caplog.text
    trainer.train()
    assert set(logged(trainer, "attention_loss")) == {0.0}
    alone = {"task_weight": 0.0, "logit_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 1.0}
    for of_some in ({}, {"attention_min_span": 6}):
        with pytest.raises(ValueError, match="attention_weight alone leaves modules below attention_min_span, by default all but"):
            make_trainer(tmp_path, **alone, **of_some)
    trainer = make_trainer(tmp_path, **alone, attention_min_span=1, max_steps=1)
    trainer.train()
    (loss,) = logged(trainer, "loss")
    assert loss == pytest.approx(*logged(trainer, "attention_loss"))
    assert loss > 0


def test_by_default_the_coarsest_modules_of_each_side_learn_from_attention(tmp_path, monkeypatch):
    bank, seen = make_bank(granularities={"encoder": [2, 3], "decoder": [2]}), []
    trainer = make_trainer(tmp_path, bank=bank, attention_weight=1.0)
    monkeypatch.setattr(modular_t5.lessons, "attention_loss", lambda *maps: seen.append(maps) or maps[0].sum())
    for plan, compared in (("2x3/2x3", 3 * 2), ("3x2/2x3", 2 + 3 * 2), ("3x2/1x6", 2)):  # the decoder's own maps and those across
        monkeypatch.setattr(trainer, "plans_of_step", lambda step, plan=plan: (AssemblyPlan.from_any(plan),))
        with eager_attention(bank):
            bank.train()
            trainer.compute_loss(bank, collate(list(make_dataset(8))))
        assert len(seen) == compared
        seen.clear()


def test_attention_maps_are_compared_without_dropout(tmp_path, monkeypatch):
    """The modules are copies of what they are compared with, so that every map is equal but for dropout below it."""
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.9), initialization="first")
    trainer = make_trainer(tmp_path, bank=bank, **ATTENTION)
    plan = bank.choose_plan("1x6/1x4-2x1")
    seen = []

    def note(student, teacher, mask):
        seen.append(student)
        return (student - teacher).sum()

    monkeypatch.setattr(modular_t5.lessons, "attention_loss", note)
    monkeypatch.setattr(trainer, "plans_of_step", lambda step: (plan,))
    with eager_attention(bank):
        bank.train()
        trainer.compute_loss(bank, collate(list(make_dataset(8))))
    for maps in seen:
        assert torch.allclose(maps.sum(-1), torch.ones(()))


def test_the_rate_moves_by_its_schedule(tmp_path):
    trainer = make_trainer(tmp_path, replacing_rate=0.05, replacing_rate_schedule="linear", max_steps=200)
    trainer.state.max_steps = 200
    replaced = [
        sum(span > 1 for side in ("encoder", "decoder") for span in trainer.plans_of_step(step)[0].spans(side)) for step in range(200)
    ]
    originals = [
        sum(span == 1 for side in ("encoder", "decoder") for span in trainer.plans_of_step(step)[0].spans(side)) for step in range(200)
    ]
    assert sum(originals[:20]) > 150
    assert sum(originals[-5:]) == 0 < sum(replaced[-5:])


def test_a_curriculum_of_ones_own(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_arguments={"curriculum": lambda granularities, progress: [float(s == 6) for s in granularities]}
    )
    assert {str(trainer.plans_of_step(step)[0]) for step in range(50)} == {"6x1/6x1", "1x6/6x1", "6x1/1x6"}
    for wrong in ([1.0], {2: 1, 3: 1, 6: 1}, [1e308, 1e308, 1]):
        with pytest.raises(ValueError, match="each of the granularities"):
            make_trainer(tmp_path, trainer_arguments={"curriculum": lambda granularities, progress, wrong=wrong: wrong})
    with pytest.raises(ValueError, match="two curricula are given"):
        make_trainer(tmp_path, curriculum="coarse-to-fine", trainer_arguments={"curriculum": lambda granularities, progress: [1, 1, 1]})


def test_plans_before_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    before = [trainer.plans_of_step(step)[0] for step in range(6)]
    trainer.train()
    assert before == [trainer.plans_of_step(step)[0] for step in range(6)]
    by_epochs = make_trainer(tmp_path, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="not known before train"):
        by_epochs.plans_of_step(0)
    by_epochs.train()


def test_arguments_can_be_replaced_and_saved(tmp_path):
    args = ModularTrainingArguments(str(tmp_path), replacing_rate=0.6, report_to="none")
    assert replace(args, replacing_rate=0.5).replacing_rate_at(1.0) == 0.5
    assert replace(args, replacing_rate_schedule="linear").replacing_rate_at(1.0) == 1.0
    assert json.loads(args.to_json_string())["replacing_rate"] == 0.6


def test_a_batch_size_that_is_too_large_starts_the_log_anew(tmp_path):
    wanted = make_trainer(tmp_path, max_steps=3, per_device_train_batch_size=7)
    wanted.train()
    trainer = make_trainer(tmp_path, max_steps=3, auto_find_batch_size=True)
    steps = []

    def too_large():
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError("CUDA out of memory.")

    trainer.add_callback(Noting(too_large))
    trainer.train()
    assert len(steps) == 5
    losses = logged(trainer, "loss")[-3:]
    assert logged(trainer, "train_loss")[0] == pytest.approx(sum(losses) / 3)
    assert all(4 < loss < 8 for loss in losses)


def test_ones_own_logs_stay_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=4)
    trainer.log({"loss": 3.0})

    class Logging(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.log({"loss": 5.0})

    trainer.add_callback(Logging)
    trainer.train()
    assert logged(trainer, "loss").count(5.0) == 4
    assert 4 < next(entry["loss"] for entry in trainer.state.log_history if "task_loss" in entry) < 8


def test_label_smoothing_without_decoder_inputs(tmp_path):
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.1)
    smoothed = trainer.evaluate()["eval_loss"]
    assert smoothed != make_trainer(tmp_path).evaluate()["eval_loss"]


def test_what_fails_to_build_leaves_the_bank_alone(tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(tmp_path, bank=bank, train_head=True, eval_strategy="epoch", trainer_arguments={"eval_dataset": None})
    assert not bank.config.own_parts


def test_the_cache_is_on_in_what_is_assembled(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.model.assemble("2x3/2x3").config.use_cache


@pytest.mark.parametrize("part", ["embeddings", "head"])
def test_embeddings_and_a_head_of_its_own_are_not_resized(part, tmp_path):
    trainer = make_trainer(tmp_path, **{f"train_{part}": True})
    with pytest.raises(ValueError, match="resize the teacher before from_t5"):
        trainer.model.resize_token_embeddings(70)
    if part == "embeddings":
        with pytest.raises(ValueError, match="set those of the teacher before from_t5"):
            trainer.model.set_input_embeddings(torch.nn.Embedding(VOCAB_SIZE, 16))


def test_a_head_of_its_own_starts_as_the_embeddings_that_it_was_tied_to():
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher("v1.0")).eval()
    batch = collate(list(make_dataset(8)))
    bank.add_own_part("embeddings")
    with torch.no_grad(), bank.using("2x3/2x3"):
        bank.decoder.bank["embed_tokens"].weight.mul_(1.5)
        before = bank(**batch).logits
        bank.add_own_part("head")
        assert torch.equal(bank(**batch).logits, before)
    assert bank.config.own_parts == ["embeddings", "head"]


@pytest.mark.parametrize("family", ["v1.0", "v1.1"])
def test_parts_of_its_own_run_offloaded_too(family):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(family)).eval()
    batch = collate(list(make_dataset(8)))
    for part in ("embeddings", "head"):
        bank.add_own_part(part)
        offloaded = copy.deepcopy(bank)
        with torch.no_grad(), bank.using("2x3/2x3"), offloaded.using("2x3/2x3"):
            accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
            assert torch.equal(offloaded(**batch).logits, bank(**batch).logits)


@pytest.mark.parametrize("parts", [("final_norms", "head"), ("embeddings",), ("embeddings", "final_norms", "head")])
@pytest.mark.parametrize("family", ["v1.0", "v1.1"])
def test_parts_of_the_banks_own(family, parts, tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(family))
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    batch = collate(list(make_dataset(8)))
    bank.eval()
    with torch.no_grad():
        wanted = bank(**batch).logits
    trainer = make_trainer(tmp_path / "out", bank=bank, **{f"train_{part}": True for part in parts})
    trainer.train()
    after = bank.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".bank." not in name)
    own = [name for name in after if own_part_of(name)]
    assert {own_part_of(name) for name in own} == set(parts)
    for name in own:
        assert not torch.equal(after[name], after[name.replace("decoder.bank.lm_head", "lm_head").replace("bank.", "")])
    bank.eval()
    with torch.no_grad(), bank.using("2x3/1x6"):
        bank.save_pretrained(tmp_path / "bank")
        again = ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "bank")
        assert torch.equal(again(**batch).logits, bank(**batch).logits)  # under the plan that it was saved with
    with torch.no_grad():
        assert torch.equal(bank(**batch).logits, wanted)
        for plan in ("2x3/2x3", "2x3/1x6", "1x6/6x1"):
            assembled = bank.assemble(plan)
            assert sum(parameter.numel() for parameter in assembled.parameters()) == bank.report(plan).total_parameters
            assembled.save_pretrained(tmp_path / "assembled")
            reloaded = type(assembled).from_pretrained(tmp_path / "assembled")
            with bank.using(plan), again.using(plan):
                logits = bank(**batch).logits
                assert torch.equal(logits, assembled(**batch).logits)
                assert torch.equal(logits, again(**batch).logits)
                torch.testing.assert_close(logits, reloaded(**batch).logits)
    copied = copy.deepcopy(bank)
    with torch.no_grad(), bank.using("2x3/2x3"), copied.using("2x3/2x3"):
        wanted = bank(**batch).logits
        for name in own:
            copied.get_parameter(name).mul_(2)
        assert torch.equal(bank(**batch).logits, wanted)
        assert not torch.equal(copied(**batch).logits, wanted)
    # Trained on without the options, they stay as they are.
    after = {name: after[name].clone() for name in own}
    make_trainer(tmp_path / "out", bank=bank).train()
    assert all(torch.equal(bank.state_dict()[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("dials", [{}, ATTENTION, {**ATTENTION, **DEFAULTS}])
def test_gradient_checkpointing_changes_no_gradient(dials, tmp_path):
    results = []
    for checkpointing in (False, True):
        bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1))
        trainer = make_trainer(tmp_path, bank=bank, **{CHECKPOINTING: checkpointing}, **dials)
        trainer.train()
        results.append([logged(trainer, "loss"), logged(trainer, "grad_norm")])
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_gradient_checkpointing_runs_the_originals_again_too(tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    trainer = make_trainer(tmp_path, bank=bank, max_steps=1, **{CHECKPOINTING: True})
    plan = bank.choose_plan("3x2/1x6")
    trainer.plans_of_step = lambda step: (plan,)
    runs = []
    for layer, block in enumerate(bank.decoder.block._modules.values()):
        block.layer[-1].register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
    trainer.train()
    assert [runs.count(layer) for layer in range(6)] == [3] * 6  # the teacher, the plan, the plan again


@pytest.mark.parametrize("dials", [{}, DEFAULTS])
def test_bf16(dials, tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=30, learning_rate=3e-3, **dials)
    dtypes = set()
    trainer.model.encoder.bank["2"][0].layer[1].DenseReluDense.wi.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert sum(logged(trainer, "loss")[-5:]) < sum(logged(trainer, "loss")[:5])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it while tracing
def test_torch_compile_changes_no_loss_and_makes_no_graph_a_plan(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for compiled in (False, True):
        bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1))
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = make_trainer(tmp_path, bank=bank, max_steps=24, curriculum="uniform", **backend)
        trainer.train()
        losses.append([logged(trainer, "loss"), trainer.evaluate()["eval_loss"]])
        assert len({str(trainer.plans_of_step(step)[0]) for step in range(24)}) > 12
    assert losses[0] == losses[1]
    # Of blocks: were they of plans, there would be one a plan and then a give-up.
    frames = torch._dynamo.utils.counters["frames"]
    assert 4 < frames["ok"] == frames["total"] < 64
    assert not any("OptimizedModule" in type(module).__name__ for module in trainer.model.modules())
    torch._dynamo.reset()


def test_labels_by_their_name(tmp_path):
    """The Trainer's `label_names`: what `predict` returns as labels."""

    def with_decoder_inputs(examples):
        batch = collate(examples)
        return {**batch, "decoder_input_ids": batch["labels"].clamp(min=0).roll(1, dims=1)}

    batch = with_decoder_inputs(list(make_dataset(8)))
    trainer = make_trainer(tmp_path, label_names=["labels", "decoder_input_ids"], trainer_arguments={"data_collator": with_decoder_inputs})
    labels, decoder_inputs = trainer.predict(make_dataset(8)).label_ids
    assert (labels == batch["labels"].numpy()).all()
    assert (decoder_inputs == batch["decoder_input_ids"].numpy()).all()
    trainer.train()


def test_reports(tmp_path, monkeypatch):
    seen = []

    class Reporting(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append({**logs})

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "a_tracker", Reporting)
    trainer = make_trainer(tmp_path, report_to=["a_tracker"])
    trainer.train()
    assert [set(entry) for entry in seen[:-1]] == [
        {"loss", "task_loss", "logit_loss", "hidden_loss", "grad_norm", "learning_rate", "epoch"}
    ] * 4
    assert seen[-1]["train_loss"] == pytest.approx(sum(entry["loss"] for entry in seen[:-1]) / 4)


def test_a_loss_that_is_none_stops_with_what_broke(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=10)
    bank = trainer.model

    def break_it():
        if trainer.state.global_step == 3:
            with torch.no_grad():
                for *_, module in bank.modules_of_bank():
                    module.layer[-1].layer_norm.weight.fill_(float("inf"))

    trainer.add_callback(Noting(break_it))
    trainer.state.max_steps = 10
    plan_text = re.escape(str(trainer.plans_of_step(3)[0]))
    with pytest.raises(FloatingPointError, match=rf"step 3, plan {plan_text}: .*hidden_loss is (nan|inf)"):
        trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans_per_step": 0}, "plans_per_step must be an integer of at least 1, got 0"),
        ({"teacher_fed_ratio": 1.5}, "teacher_fed_ratio must be a number from 0 to 1, got 1.5"),
        ({"teacher_fed_ratio": 0.1, "hidden_weight": 0.0}, "teacher_fed_ratio=0.1: below the top"),
        ({"plan_sampling": "all"}, "unknown plan_sampling 'all'; choose one of aligned, mixed"),
        ({"replacing_rate": 0.0}, "replacing_rate must be above 0 and at most 1, got 0.0"),
        ({"replacing_rate": 1.5}, "replacing_rate .* got 1.5"),
        ({"curriculum": "hardest"}, "'hardest'; choose one of coarse-to-fine"),
        ({"replacing_rate_end": 0.9}, "replacing_rate_end=0.9 does nothing while replacing_rate_schedule is constant"),
        ({"replacing_rate_schedule": "linear", "replacing_rate_end": 0.0}, "replacing_rate_end must be above 0"),
        ({"replacing_rate_schedule": "steps"}, "unknown replacing_rate_schedule 'steps'; choose one of constant, linear"),
        ({"attention_weight": -1.0}, "attention_weight .* got -1.0"),
        ({"attention_min_span": 0}, "attention_min_span must be an integer of at least 1, got 0"),
        ({"attention_min_span": 1}, "attention_min_span=1 does nothing without attention_weight"),
        ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters=False fails"),
        ({f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, "use_reentrant=True would cut the gradients"),
        ({"torch_compile": True, "attention_weight": 1.0}, "attention_weight needs what compiled blocks hide"),
        ({"temperature": 2.0, "logit_weight": 0.0}, "temperature=2.0 does nothing without the loss"),
        ({"label_smoothing_factor": 0.1, "task_weight": 0.0}, "label_smoothing_factor=0.1 trains nothing"),
        ({"train_head": True, "task_weight": 0.0, "logit_weight": 0.0}, "train_head does nothing without a loss of the predictions"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha does nothing here"),
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda batch: batch.pop("labels"), "training needs labels; the batch has"),
        (lambda batch: batch["labels"].fill_(-100), "labels of the first batch are all padding"),
        (lambda batch: batch["labels"].fill_(0), "labels of the first batch are all padding"),
        (lambda batch: batch["input_ids"].fill_(VOCAB_SIZE), "input_ids hold the token 61, the bank's teacher knows 0 to 60"),
        (lambda batch: batch["labels"].fill_(99), "labels hold the token 99"),
        (lambda batch: batch["labels"].masked_fill_(batch["labels"] == -100, -1), "labels hold the token -1, .* another number than -100"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_first_step(spoil, message, tmp_path):
    def spoiled(examples):
        batch = collate(examples)
        spoil(batch)
        return batch

    trainer = make_trainer(tmp_path, trainer_arguments={"data_collator": spoiled})
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def third_without_labels():
    """A collator whose third batch has labels of padding alone."""
    batches = iter(range(100))

    def collate_but_the_third(examples):
        batch = collate(examples)
        if next(batches) == 2:
            batch["labels"].fill_(-100)
        return batch

    return collate_but_the_third


def test_a_step_of_padding_alone_stops_with_the_reason(tmp_path):
    trainer = make_trainer(tmp_path, trainer_arguments={"data_collator": third_without_labels()})
    with pytest.raises(ValueError, match="step 2: its labels are all padding"):
        trainer.train()


def test_a_batch_of_padding_in_between_teaches_nothing(tmp_path):
    trainer = make_trainer(tmp_path, trainer_arguments={"data_collator": third_without_labels()}, gradient_accumulation_steps=2)
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss")))


def test_a_tokenizer_of_another_model_is_refused(pico_tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    fitting = ModularT5ForConditionalGeneration.from_t5(make_teacher(vocab_size=len(tokenizer)))
    make_trainer(tmp_path, bank=fitting, trainer_arguments={"processing_class": tokenizer})
    small = ModularT5ForConditionalGeneration.from_t5(make_teacher(vocab_size=30))
    with pytest.raises(ValueError, match=rf"the tokenizer has {len(tokenizer)} tokens, the bank's teacher 30"):
        make_trainer(tmp_path, bank=small, trainer_arguments={"processing_class": tokenizer})
    tokenizer.pad_token = "a"
    with pytest.raises(ValueError, match=r"pads with token \d+, the bank's teacher with 0"):
        make_trainer(tmp_path, bank=fitting, trainer_arguments={"processing_class": tokenizer})
