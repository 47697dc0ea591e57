"""Checkpoints: the modules alone, whole or not there, and a training that goes on from one as if nothing had happened."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_teacher, stored_tensors, tamper
from training import Noting, logged, make_trainer
from transformers import AutoModelForSeq2SeqLM
from transformers.trainer_utils import get_last_checkpoint

from modular_t5 import ModularT5ForConditionalGeneration


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def state_of(bank):
    return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def history(entries):
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


@pytest.mark.parametrize("changes", [{}, {"logging_steps": 3}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
def test_a_resumed_training_is_the_same_training(changes, tmp_path):
    whole = make_trainer(tmp_path / "whole", **SAVING, **changes)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "parts", **SAVING, **changes)
    result = resumed.train(resume_from_checkpoint=True)
    assert equal(state_of(whole.model), state_of(resumed.model))
    assert history(whole.state.log_history) == history(resumed.state.log_history)
    assert result.training_loss == result.metrics["train_loss"] == logged(resumed, "train_loss")[0]


def test_a_checkpoint_holds_the_modules_alone(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    saved = stored_tensors(tmp_path / "checkpoint-6")
    assert saved.keys() == {name for name in trainer.model.state_dict() if ".bank." in name}
    assert not list(tmp_path.glob(".writing*"))
    trainer.save_model(tmp_path / "bank")
    whole = ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "bank")
    assert equal(state_of(whole), state_of(trainer.model))


def test_a_checkpoint_and_its_teacher_are_a_bank(tmp_path):
    teacher = make_teacher("v1.1", dropout_rate=0.1)
    teacher.save_pretrained(tmp_path / "teacher")
    bank = ModularT5ForConditionalGeneration.from_t5(tmp_path / "teacher")
    bank.generation_config.num_beams = 3
    trainer = make_trainer(tmp_path / "out", bank=bank, **SAVING)
    trainer.train()
    bank.set_plan("2x3/6x1")
    checkpoint = tmp_path / "out" / "checkpoint-6"
    by_name = ModularT5ForConditionalGeneration.from_pretrained(checkpoint)
    given = ModularT5ForConditionalGeneration.from_pretrained(checkpoint, teacher=teacher)
    assert equal(state_of(by_name), state_of(trainer.model))
    assert equal(state_of(given), state_of(trainer.model))
    assert not by_name.training
    assert by_name.generation_config.num_beams == 3
    assert AutoModelForSeq2SeqLM.from_pretrained(checkpoint, plan="3x2/3x2").plan == bank.choose_plan("3x2/3x2")
    half, info = ModularT5ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16, output_loading_info=True)
    assert half.dtype == torch.bfloat16
    assert not info["missing_keys"]
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher', which is no Hub id: pass it as"):
        ModularT5ForConditionalGeneration.from_pretrained(checkpoint)
    other = make_teacher("v1.1")
    with torch.no_grad():
        other.shared.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"were trained for another teacher .*: the weights that they came with have SHA-256"):
        ModularT5ForConditionalGeneration.from_pretrained(checkpoint, teacher=other)
    mapped = ModularT5ForConditionalGeneration.from_pretrained(checkpoint, teacher=teacher, device_map="cpu", attn_implementation="eager")
    assert equal(state_of(mapped), state_of(trainer.model))
    assert mapped.encoder.config._attn_implementation == "eager"


def test_modules_alone_by_hand(tmp_path):
    teacher = make_teacher()
    bank = ModularT5ForConditionalGeneration.from_t5(teacher)
    bank.save_pretrained(tmp_path, modules_only=True)
    whole = sum(parameter.numel() for parameter in bank.parameters())
    saved = sum(tensor.numel() for tensor in stored_tensors(tmp_path).values())
    assert saved == whole - sum(parameter.numel() for parameter in teacher.parameters())
    assert not bank.config.modules_only
    again = ModularT5ForConditionalGeneration.from_pretrained(tmp_path, teacher=teacher)
    again.save_pretrained(tmp_path)
    assert equal(state_of(ModularT5ForConditionalGeneration.from_pretrained(tmp_path)), state_of(bank))
    with pytest.raises(ValueError, match="holds its own teacher; leave teacher= out"):
        ModularT5ForConditionalGeneration.from_pretrained(tmp_path, teacher=teacher)


def test_sharded_modules(tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    bank.save_pretrained(tmp_path, modules_only=True, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = ModularT5ForConditionalGeneration.from_pretrained(tmp_path, teacher=make_teacher())
    assert equal(state_of(again), state_of(bank))


def test_a_checkpoint_of_another_bank_is_refused(tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    other_teacher = ModularT5ForConditionalGeneration.from_t5(make_teacher("v1.1"))
    with pytest.raises(ValueError, match="was trained for another teacher: its weights have SHA-256"):
        make_trainer(tmp_path, bank=other_teacher).train(resume_from_checkpoint=True)
    more = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1))
    more.add_own_part("head")
    with pytest.raises(ValueError, match=r"of another bank: its own_parts is \[\], this one's \['head'\]"):
        make_trainer(tmp_path, bank=more).train(resume_from_checkpoint=True)
    fewer = ModularT5ForConditionalGeneration.from_t5(make_teacher(dropout_rate=0.1), granularities=(2, 3))
    with pytest.raises(ValueError, match=r"of another bank: its granularities is .*, this one's "):
        make_trainer(tmp_path, bank=fewer).train(resume_from_checkpoint=True)
    tamper(tmp_path / "checkpoint-6", lambda tensors: tensors.update({"encoder.bank.9.0.norm": tensors.pop(next(iter(tensors)))}))
    with pytest.raises(ValueError, match=r"1 of this one's tensors are missing there .* 1 are unknown here"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_torn_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-6"
    shard = checkpoint / "model-encoder-modules-2.safetensors"
    whole = shard.read_bytes()
    tamper(checkpoint, lambda tensors: tensors.update({"encoder.bank.2.0.layer.0.SelfAttention.q.weight": torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match="checkpoint-6 is torn or of another bank"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    shard.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"model-encoder-modules-2.safetensors of .*checkpoint-6 is torn"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"model-encoder-modules-2.safetensors of .*checkpoint-6 is torn"):
        ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-6", teacher=make_teacher())


@pytest.mark.parametrize("torn", ["", '{"last_log": 1'])
def test_torn_sums_are_named(torn, tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-6" / "loss_sums.json").write_text(torn)
    with pytest.raises(ValueError, match=r"loss_sums.json is torn .*; resume from an earlier checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resuming_takes_the_last_that_is_whole(tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-8").mkdir()
    resumed = make_trainer(tmp_path, **{**SAVING, "max_steps": 8})
    steps = []
    resumed.add_callback(Noting(lambda: steps.append(resumed.state.global_step)))
    resumed.train(resume_from_checkpoint=True)
    assert steps == [7, 8]
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*none to resume from"):
        make_trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_kill_between_the_two_moves_of_a_checkpoint_is_mended(tmp_path):
    """Where one of the same name was there before: it was moved aside, and the new one had not got its name yet."""
    make_trainer(tmp_path, **SAVING).train()
    final, staging = tmp_path / "checkpoint-6", tmp_path / ".writing-checkpoint-6"
    shutil.copytree(final, staging / "checkpoint-6")
    (staging / "checkpoint-6" / "new").touch()
    final.rename(staging / "replaced")
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert (final / "new").exists()
    assert not staging.exists()


def test_what_a_kill_left_is_cleared_whatever_is_saved_next(tmp_path):
    (tmp_path / ".writing-checkpoint-5" / "checkpoint-5").mkdir(parents=True)
    make_trainer(tmp_path, **SAVING).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **{**SAVING, "max_steps": 10},
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = f"checkpoint-{2 * losses.index(min(losses)) + 2}"
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {best, "checkpoint-10"} or (best == "checkpoint-10" and len(left) == 2)
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / best)


def run(folder, *arguments):
    """`training.py` in a process of its own."""
    script = Path(__file__).with_name("training.py")
    return subprocess.Popen([sys.executable, str(script), str(folder), *arguments], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    """SIGKILL at a random step, then in the middle of writing a checkpoint."""
    step = random.Random().randint(4, 11)  # anew each time: any step must do
    print(f"killed at step {step}")
    # Both at once: they are two independent processes, and most of their time is starting.
    unharmed, killed = run(tmp_path / "unharmed"), run(tmp_path / "killed", "--kill-at-step", str(step))
    assert unharmed.wait() == 0
    assert killed.wait() == -signal.SIGKILL
    assert get_last_checkpoint(tmp_path / "killed").endswith(f"checkpoint-{3 * ((step - 1) // 3)}")

    killed = run(tmp_path / "killed", "--kill-in-checkpoint", "12")
    assert killed.wait() == -signal.SIGKILL
    assert get_last_checkpoint(tmp_path / "killed").endswith("checkpoint-9")
    assert (tmp_path / "killed" / ".writing-checkpoint-12").exists()

    assert run(tmp_path / "killed").wait() == 0
    assert not (tmp_path / "killed" / ".writing-checkpoint-12").exists()
    ends = [tmp_path / name / "checkpoint-15" for name in ("unharmed", "killed")]
    assert equal(*(stored_tensors(end) for end in ends))
    logs = [history(json.loads((end / "trainer_state.json").read_text())["log_history"]) for end in ends]
    assert len(logs[0]) > 5
    assert logs[0] == logs[1]
    finals = [json.loads((tmp_path / name / "result-0.json").read_text()) for name in ("unharmed", "killed")]
    assert finals[0]["train_loss"] == finals[1]["train_loss"]
    assert finals[0]["weights"] == finals[1]["weights"]
    assert finals[1]["plans"] == finals[0]["plans"][2 * 9 :]  # two a step
