"""Checkpoints of a bank's training: the modules without the teacher, whole or not there, refused where they do not belong."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Seq2SeqTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from .configuration_modular_t5 import ModularT5Config
from .loss_sums import LossSums
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .storage_modular_t5 import StoredTensors


# Beside the Trainer's own files in a checkpoint: sums of losses that no log has yet.
_SUMS_FILE = "loss_sums.json"


class CheckpointingTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` whose checkpoints hold what a bank adds to its teacher, and get their name when all is in them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_sums = LossSums()
        self._staging: Path | None = None  # where a checkpoint is being written

    @property
    def bank(self) -> ModularT5ForConditionalGeneration:
        """The model without what distributed training and compilation wrap it in."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises:
            ValueError: there is none, or it is torn, or of another bank or teacher.
        """
        run = Path(self.args.output_dir)
        self._clear_unfinished(run)
        self.bank.origin = {"bank": None, "revision": None}  # from here on it is another
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            named = {int(match[1]): path for path in run.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
            whole = {step: path for step, path in named.items() if (path / TRAINER_STATE_NAME).exists()}
            if not whole:
                raise ValueError(f"there is no checkpoint in {run} to resume from")
            resume_from_checkpoint = str(whole[max(whole)])
        if resume_from_checkpoint:
            self._check_bank_of(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.loss_sums = LossSums()  # here, for with auto_find_batch_size this is what starts anew
        return super()._inner_training_loop(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer._save_checkpoint`, into a folder that gets its name when all is in it."""
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        final, staging = run / name, run / f".writing-{name}"
        self._clear_unfinished(run)
        self.accelerator.wait_for_everyone()
        sums = self.loss_sums.state(self.state.global_step, lambda total: self.accelerator.gather(total.reshape(1)).tolist())
        former_best, self._staging = self.state.best_model_checkpoint, staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        best = run / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best == final or best.exists() else former_best
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            (staging / name / _SUMS_FILE).write_text(json.dumps(sums, indent=2))
            _rename(staging, name)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and (staging / name).exists():  # of another machine, on a disk of its own
            _rename(staging, name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _clear_unfinished(self, run: Path) -> None:
        """Take away what a process left that was killed while writing a checkpoint; finish the last move, if that was all that was left."""
        if self.args.should_save:
            for staging in run.glob(".writing-checkpoint-*"):
                name = staging.name.removeprefix(".writing-")
                if (staging / "replaced").exists() and (staging / name).exists():
                    _rename(staging, name)
                shutil.rmtree(staging, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it has not got its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # A checkpoint leaves the teacher out; what the user saves is whole.
        in_checkpoint, origin = self._staging is not None, self.bank.origin
        super()._save(output_dir, self.bank.module_tensors(state_dict) if in_checkpoint else state_dict)
        if in_checkpoint:
            self.bank.origin = origin

    def _check_bank_of(self, checkpoint: str) -> None:
        stored = StoredTensors(checkpoint)
        stored.fetch(stored)  # a torn shard had better be found before anything is loaded
        config, own = ModularT5Config.from_pretrained(checkpoint), self.bank.config
        for name in ("granularities", "initialization", "own_parts", "lora"):
            if getattr(config, name) != getattr(own, name):
                raise ValueError(f"{checkpoint} is of another bank: its {name} is {getattr(config, name)}, this one's {getattr(own, name)}")
        saved, ours = config.teacher["sha256"], self.bank.teacher_sha256()
        if config.modules_only and saved != ours:
            raise ValueError(f"{checkpoint} was trained for another teacher: its weights have SHA-256 {saved}, this bank's {ours}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{resume_from_checkpoint} is torn or of another bank: {error}") from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        own = self.bank.module_tensors()
        missing = [name for name in load_result.missing_keys if name in own]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint is of another bank: {len(missing)} of this one's tensors are missing there "
                f"{missing[:1]}, {len(load_result.unexpected_keys)} are unknown here {load_result.unexpected_keys[:1]}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint) / _SUMS_FILE if checkpoint else None
        if path is not None and path.exists():
            try:
                written = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is torn ({error}); resume from an earlier checkpoint") from error
            self.loss_sums = LossSums.of(written, self.args.process_index, self.args.world_size, self.args.device)


def _rename(staging: Path, name: str) -> None:
    """Move a finished folder to its place beside the folder that it was written in. A kill leaves an old or a new one, or none."""
    final, replaced = staging.parent / name, staging / "replaced"
    if final.exists():
        os.replace(final, replaced)
    os.replace(staging / name, final)
    shutil.rmtree(staging, ignore_errors=True)
