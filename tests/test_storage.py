"""A bank's files: shards along the bank's lines, saving that leaves an old bank or a new one whole, whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, TEACHERS, UNTIED, logits, make_bank, make_teacher
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
)

from modular_t5 import ModularT5Config, ModularT5ForConditionalGeneration
from modular_t5 import storage_modular_t5 as storage
from modular_t5.layout_modular_t5 import shard_of
from modular_t5.storage_modular_t5 import StoredTensors, staged_folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_bank_saves_and_loads_to_the_bit(name, dtype, inputs, tmp_path):
    bank = make_bank(name, dtype)
    plan = bank.set_plan(bank.shape.smallest)
    bank.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    again = ModularT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.plan == plan
    assert again.dtype == dtype
    assert again.config.granularities == bank.config.granularities
    state = again.state_dict()
    assert set(state) == set(bank.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in bank.state_dict().items())
    assert torch.equal(logits(again, inputs), logits(bank, inputs))
    assert (again.lm_head.weight is again.shared.weight) == (name not in UNTIED)


def test_the_auto_classes_give_the_same_class(tmp_path):
    make_bank().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ModularT5Config
    for auto in (AutoModel, AutoModelForSeq2SeqLM):
        assert type(auto.from_pretrained(tmp_path)) is ModularT5ForConditionalGeneration
        assert type(auto.from_config(AutoConfig.from_pretrained(tmp_path))) is ModularT5ForConditionalGeneration


# -- shards ----------------------------------------------------------------------------------------------------------------


def test_shards_are_cut_along_the_banks_lines(tmp_path):
    bank = make_bank("v1.1", granularities=(2, 3))
    bank.add_own_part("head")
    bank.save_pretrained(tmp_path)
    shards = {
        *("common", "own", "encoder-original", "decoder-original"),
        *(f"{side}-modules-{s}" for side in ("encoder", "decoder") for s in (2, 3)),
    }
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {f"model-{shard}.safetensors" for shard in shards}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == bank.num_parameters()
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in bank.parameters())
    for name, file in index["weight_map"].items():
        assert file == f"model-{shard_of(name)}.safetensors"
    common = {name for name, file in index["weight_map"].items() if file == "model-common.safetensors"}
    tables = {f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")}
    assert common == {"shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight", *tables}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_tensors_lie_in_their_files_as_torch_aligns_them(dtype, tmp_path):
    make_bank(dtype=dtype, d_model=32, d_ff=32).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).data_ptr() % 64 for name in file.keys()} == {0}  # noqa: SIM118


def test_a_shard_that_is_too_large_is_cut_further(tmp_path, inputs):
    bank = make_bank()
    bank.save_pretrained(tmp_path, max_shard_size="20KB")
    files = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert {"model-common.safetensors", "model-encoder-original-00001-of-00003.safetensors"} <= files
    assert torch.equal(logits(ModularT5ForConditionalGeneration.from_pretrained(tmp_path), inputs), logits(bank, inputs))
    (tmp_path / "model_card.safetensors").write_text("of another kind")
    bank.save_pretrained(tmp_path)
    assert not {name for name in os.listdir(tmp_path) if "-of-" in name}
    assert (tmp_path / "model_card.safetensors").exists()


def test_variants_lie_side_by_side(tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path)
    make_bank(dtype=torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    for variant, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        read = {tensor.dtype for tensor in StoredTensors(tmp_path, variant=variant).values()}
        assert read == {dtype}
        loaded = ModularT5ForConditionalGeneration.from_pretrained(tmp_path, variant=variant)
        lazily = ModularT5ForConditionalGeneration.assemble_from_pretrained(tmp_path, "2x3/2x3", variant=variant)
        assert loaded.dtype == lazily.dtype == torch.bfloat16  # the configuration is that of the last save
    before = {name for name in os.listdir(tmp_path) if "bf16" in name}
    bank.save_pretrained(tmp_path, max_shard_size="20KB")
    assert {name for name in os.listdir(tmp_path) if "bf16" in name} == before


def test_a_save_takes_the_place_of_an_older_format(tmp_path):
    T5ForConditionalGeneration.save_pretrained(make_bank(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert (tmp_path / "model.safetensors").exists()
    make_bank().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "README.md").read_text() == "mine"
    assert ModularT5ForConditionalGeneration.from_pretrained(tmp_path)


def test_a_plain_t5_loads_the_originals_out_of_a_bank(tmp_path, inputs):
    teacher = make_teacher()
    ModularT5ForConditionalGeneration.from_t5(teacher).save_pretrained(tmp_path)
    config = T5Config(**{**teacher.config.to_dict(), "architectures": None})
    again, info = T5ForConditionalGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(again, inputs), logits(teacher, inputs))


# -- saves that fail -------------------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError("No space left on device")


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "bank"
    bank = make_bank()
    bank.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    before = contents(folder)
    monkeypatch.setattr("modular_t5.storage_modular_t5.save_file", full_disk)
    bank.set_plan("2x3/2x3")
    with pytest.raises(OSError, match="No space left"):
        bank.save_pretrained(folder)
    assert contents(folder) == before
    with pytest.raises(OSError, match="No space left"):
        bank.save_pretrained(tmp_path / "new")
    assert os.listdir(tmp_path) == ["bank"]


def test_where_folders_cannot_be_exchanged_files_move_and_move_back(tmp_path, monkeypatch):
    folder = tmp_path / "bank"
    bank = make_bank()
    bank.save_pretrained(folder, max_shard_size="20KB")
    (folder / "logs").mkdir()  # a folder in it is not to be moved while others write there
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    moves = []

    def fails_at_the_last(source, target, replace=os.replace):
        moves.append(target)
        if str(source).endswith("/new/model.safetensors.index.json"):
            raise OSError("No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("modular_t5.storage_modular_t5.os.replace", fails_at_the_last)
        bank.set_plan("2x3/2x3")
        with pytest.raises(OSError, match="No space left"):
            bank.save_pretrained(folder)
    assert len(moves) > len(before)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    bank.save_pretrained(folder)
    assert str(ModularT5ForConditionalGeneration.from_pretrained(folder).plan) == "2x3/2x3"
    assert (folder / "logs").is_dir()


def test_saving_where_one_works_and_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "bank").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("bank")
    make_bank().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "bank").stat().st_mode & 0o777 == 0o750
    monkeypatch.chdir(tmp_path / "bank")
    make_bank().save_pretrained(".")
    assert ModularT5ForConditionalGeneration.from_pretrained(".")
    assert sorted(os.listdir(tmp_path)) == ["bank", "link"]


def test_a_failed_save_leaves_what_another_saved_meanwhile(tmp_path):
    def save_and_fail(folder, meanwhile):
        with staged_folder(folder):
            meanwhile(folder)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        save_and_fail(tmp_path / "a" / "b", make_bank().save_pretrained)
    assert ModularT5ForConditionalGeneration.from_pretrained(tmp_path / "a" / "b")
    with pytest.raises(RuntimeError, match="mine"):
        save_and_fail(tmp_path / "c" / "d", lambda folder: None)
    assert not (tmp_path / "c").exists()


def test_what_another_saved_meanwhile_stays(tmp_path, monkeypatch):
    (tmp_path / "bank").mkdir()
    for name in ("old", "replaced"):
        (tmp_path / "bank" / name).write_text("old")

    def exchange(one, other, original=storage._exchange):
        (tmp_path / "another's").write_text("of another")
        os.replace(tmp_path / "another's", tmp_path / "bank" / "replaced")
        return original(one, other)

    monkeypatch.setattr(storage, "_exchange", exchange)
    with staged_folder(tmp_path / "bank") as staging:
        (staging / "new").write_text("new")
        (tmp_path / "bank" / "of another").write_text("of another")
    assert sorted(os.listdir(tmp_path / "bank")) == ["new", "of another", "old", "replaced"]
    assert (tmp_path / "bank" / "replaced").read_text() == "of another"
    assert os.listdir(tmp_path) == ["bank"]


# Saves a bank that runs another plan, and dies when something was called for the n-th time.
KILLED = """
import os, signal, sys
folder, call, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5 import storage_modular_t5 as storage
bank = ModularT5ForConditionalGeneration.from_pretrained(folder)
bank.set_plan("6x1/6x1")
with __import__("torch").no_grad():
    for parameter in bank.parameters():
        parameter.zero_()
owner, calls = (storage, 0) if hasattr(storage, call) else (os, 0)
original = getattr(owner, call)
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, call, counted)
bank.save_pretrained(folder)
print(calls)
"""


def save_and_die(folder, call, n):
    command = [sys.executable, "-c", KILLED, str(folder), call, str(n)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("call", "n", "plan"),
    [
        pytest.param("save_file", 1, "1x6/1x6", marks=pytest.mark.slow),
        ("save_file", 5, "1x6/1x6"),
        pytest.param("link", 1, "1x6/1x6", marks=pytest.mark.slow),
        ("_exchange", 1, "1x6/1x6"),
        pytest.param("listdir", 10**6, "6x1/6x1", marks=pytest.mark.slow),  # never: the save is done
    ],
)
def test_a_killed_save_leaves_the_old_bank_whole(call, n, plan, tmp_path):
    folder = tmp_path / "bank"
    make_bank().save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    before = contents(folder)
    done = save_and_die(folder, call, n)
    killed = plan == "1x6/1x6"
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    assert (contents(folder) == before) == killed
    assert (folder / "README.md").read_text() == "mine"
    again = ModularT5ForConditionalGeneration.from_pretrained(folder)
    assert str(again.plan) == plan
    assert all((not parameter.any()) != killed for parameter in again.parameters())


@pytest.mark.slow
def test_a_save_that_is_killed_at_any_moment_leaves_a_whole_bank(tmp_path):
    folder = tmp_path / "bank"
    make_bank().save_pretrained(folder)
    code = "import sys; from modular_t5 import ModularT5ForConditionalGeneration as M\n"
    code += "bank = M.from_pretrained(sys.argv[1]); print(1, flush=True)\n"
    code += "while True:\n    bank.set_plan('6x1/6x1' if str(bank.plan) == '1x6/1x6' else '1x6/1x6')\n"
    code += "    for parameter in bank.parameters(): parameter.data.fill_(len(bank.plan.encoder))\n    bank.save_pretrained(sys.argv[1])"
    fills = set()
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(random.Random().uniform(0.05, 0.5))
        process.kill()
        process.wait()
        process.stdout.close()
        bank = ModularT5ForConditionalGeneration.from_pretrained(folder)
        fills.add((str(bank.plan), *{value for parameter in bank.parameters() for value in parameter.unique().tolist()}))
    assert fills <= {("1x6/1x6", 6.0), ("6x1/6x1", 1.0)}


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "bank").write_text("a file")
    with pytest.raises(NotADirectoryError, match="give a folder"):
        make_bank().save_pretrained(tmp_path / "bank")
    assert (tmp_path / "bank").read_text() == "a file"


def test_what_save_pretrained_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="without distributed_checkpoint"):
        make_bank().save_pretrained(tmp_path / "bank", distributed_checkpoint=True)
    make_bank().save_pretrained(tmp_path / "bank", is_main_process=False)
    assert not (tmp_path / "bank").exists()
