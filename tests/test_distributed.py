"""Two processes train what one would, from the same plans, and go on after a kill. gloo on the CPU, by torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import stored_tensors
from test_checkpoints import equal, history
from training import CHECKPOINTING
from transformers.trainer_utils import get_last_checkpoint


HERE = Path(__file__).parent


def run(folder, *arguments, processes=2):
    """`training.py` under torchrun; returns its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(HERE / "training.py"), str(folder), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result-*.json"))]


def log_of(folder):
    return history(json.loads((Path(folder) / "checkpoint-15" / "trainer_state.json").read_text())["log_history"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    status, errors = run(folder)
    assert status == 0, errors
    return folder


def test_every_process_ran_the_same_plans_and_has_the_same_weights(two):
    first, second = results(two)
    assert first["processes"] == second["processes"] == 2
    assert first["kind"] == "DistributedType.MULTI_CPU"
    assert len(set(first["plans"])) > 10
    assert first["plans"] == second["plans"]
    assert first["weights"] == second["weights"]


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(tmp_path):
    """But for dropout, which differs by process, and the encoder's states, of which a batch counts by its target tokens."""
    # Wide enough for several buckets, of which a step leaves some out.
    teacher = json.dumps({"dropout_rate": 0.0, "d_model": 64, "d_ff": 2048})
    several = {"plans_per_step": 3, "plan_sampling": "aligned"}
    comparable = {
        **several,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 6,
        "hidden_weight": 0.0,
        "ddp_bucket_cap_mb": 1,
        "learning_rate": 1e-3,
    }
    logs = []
    for processes, batch_size in ((2, 4), (1, 8)):
        folder = tmp_path / str(processes)
        arguments = json.dumps({**comparable, "per_device_train_batch_size": batch_size})
        status, errors = run(folder, "--teacher", teacher, "--arguments", arguments, processes=processes)
        assert status == 0, errors
        logs.append(json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"])
    for two_entry, one_entry in zip(*logs, strict=True):
        for name in ("loss", "task_loss", "logit_loss", "grad_norm", "learning_rate"):
            if name in one_entry:  # rounding differs, and AdamW makes steps of gradients that are nothing else
                assert two_entry[name] == pytest.approx(one_entry[name], rel=1e-6 if one_entry["step"] <= 2 else 1e-3), name
    tensors = [stored_tensors(tmp_path / str(processes) / "checkpoint-6") for processes in (2, 1)]
    apart = {name: (tensor - tensors[1][name]).abs() for name, tensor in tensors[0].items()}
    assert max(difference.max() for difference in apart.values()) < 2e-3  # a step of AdamW is 1e-3
    assert max(difference.mean() for difference in apart.values()) < 1e-5
    for result in results(tmp_path / "2"):
        sent, left_out = result["bytes"]
        assert sent > 0
        assert left_out > 0


@pytest.mark.slow
def test_a_killed_process_stops_all_and_they_go_on_bit_for_bit(two, tmp_path):
    status, _ = run(tmp_path, "--kill-at-step", "8")
    assert status != 0
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-6")
    status, errors = run(tmp_path)
    assert status == 0, errors
    assert equal(*(stored_tensors(folder / "checkpoint-15") for folder in (two, tmp_path)))
    assert log_of(two) == log_of(tmp_path)
    assert [result["weights"] for result in results(two)] == [result["weights"] for result in results(tmp_path)]
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {CHECKPOINTING: True},  # where the Trainer itself would stop looking for unused parameters
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "train_head": True, "train_final_norms": True},
        {"plans_per_step": None, "plan_sampling": "aligned", "train_embeddings": True},
        # No loss reads the logits, which are all that DDP sees of a pass.
        {
            "task_weight": 0,
            "logit_weight": 0,
            "hidden_weight": 0,
            "attention_weight": 1,
            "attention_min_span": 1,
            "train_final_norms": True,
        },
    ],
)
def test_other_ways_of_training_under_several_processes(arguments, tmp_path):
    status, errors = run(tmp_path, "--arguments", json.dumps({**arguments, "max_steps": 6, "save_steps": 6}))
    assert status == 0, errors
    first, second = results(tmp_path)
    assert first["weights"] == second["weights"]
