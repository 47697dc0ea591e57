"""`ModularTrainer`: a `Seq2SeqTrainer` that trains a bank by module replacing and distillation."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import CommitInfo
from peft import LoraConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, set_seed
from transformers.models.t5.modeling_t5 import T5Block
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .adapters import add_adapters
from .assembly_modular_t5 import SIDES, AssemblyPlan
from .checkpoints import CheckpointingTrainer
from .choosing_modular_t5 import BankShape
from .configuration_modular_t5 import OWN_PARTS, ModularT5Config
from .distillation import weighed
from .layout_modular_t5 import own_part_of, running_own_parts
from .lessons import Lesson, difference_of_depths, with_decoder_inputs
from .measuring import environment
from .model_card import bank_card, measured_in
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .recording import eager_attention
from .reducing import RunningParameters, trained_ids, watch_running
from .replacing import CURRICULA, Odds, draw_plans
from .training_args import LOSS_WEIGHTS, ModularTrainingArguments


logger = logging.get_logger(__name__)


# What a card does not tell of the arguments: places, names and secrets of the one who trained, and what changes no weight.
_UNTOLD = (
    *("output_dir", "logging_dir", "hub_model_id", "hub_token", "push_to_hub_token", "run_name", "project", "trackio_space_id"),
    *("accelerator_config", "dataloader_pin_memory", "ddp_find_unused_parameters", "debug", "disable_tqdm", "report_to", "use_cpu"),
)

_REFUSED = {
    "compute_loss_func": f"its loss is the task's cross-entropy and distillation, weighed by {', '.join(LOSS_WEIGHTS)}",
    "model_init": "build the bank with ModularT5ForConditionalGeneration.from_t5 and pass it as model",
}


class _Turn(NamedTuple):
    """A plan of a step, its share of the loss, and what it learns from."""

    plan: AssemblyPlan
    share: float
    lesson: Lesson


class ModularTrainer(CheckpointingTrainer):
    """Trains the modules of a bank; everything else of the bank is the teacher, frozen and without dropout.

    Each step runs random plans in place of the original layers, one after the other. At first every module reads the teacher's states
    of its side, and so learns by itself what its layers do; later it reads what the modules below make of them. What an encoder puts
    out is read by all plans of a step that have it: it runs and learns, and embeddings through it, in the one whose sides are most alike,
    with what is taught there.

    The loss of a plan is the weighted sum of the task's cross-entropy (`task_loss` in the log), the KL divergence from the teacher's
    predictions (`logit_loss`), the error of the hidden state at the end of every span whose module learns (`hidden_loss`) and, if asked
    for, that of the attention probabilities of the coarsest modules (`attention_loss`). All are means over the tokens of the whole step,
    however it is cut into batches and processes; but of the encoder's states and attention a batch counts by its target tokens.

    `evaluate` runs `eval_plans`: `eval_<plan>_loss` and metrics of each, and `eval_loss` and metrics that are means over the plans.
    `predict` runs the bank's own plan. Checkpoints hold the modules without the teacher, and appear whole or not at all;
    `save_model` and `push_to_hub` write the whole bank, or the adapters of LoRA modules.

    Args:
        model: a `ModularT5ForConditionalGeneration`. The parameters outside its modules are set not to require gradients.
        args: `ModularTrainingArguments`.
        peft_config: a `LoraConfig`: every module is trained as the frozen copy of an original layer that it starts as, plus a
            low-rank difference. The saved bank holds the adapters only.
        curriculum: a function of the granularities (ascending) and the progress of training (0 to 1) that returns the odds of each,
            in place of a named curriculum.
        kwargs: those of `Seq2SeqTrainer` but `model_init` and `compute_loss_func`. With a tokenizer as `processing_class` and no
            `data_collator`, batches are padded by `DataCollatorForSeq2Seq`.

    Raises:
        ValueError: something does not fit: model, arguments, tokenizer, plans to evaluate, adapters; or an argument that is not
            taken is given.
    """

    def __init__(
        self,
        model: ModularT5ForConditionalGeneration | None = None,
        args: ModularTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: LoraConfig | None = None,
        curriculum: Odds | None = None,
        **kwargs: Any,
    ):
        for name, reason in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"ModularTrainer does not take {name}: {reason}")
        if not isinstance(model, ModularT5ForConditionalGeneration):
            raise ValueError(
                f"ModularTrainer trains a ModularT5ForConditionalGeneration, got {type(model).__name__}; "
                "build one with ModularT5ForConditionalGeneration.from_t5(model)"
            )
        if not isinstance(args, ModularTrainingArguments):
            raise ValueError(f"ModularTrainer takes ModularTrainingArguments, got {type(args).__name__}")
        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError("a checkpoint holds modules without their teacher and stays at home; set hub_strategy to every_save or end")
        if args.deepspeed_plugin is not None and args.plans_per_step != 1:
            raise ValueError("DeepSpeed takes one backward pass a batch; set plans_per_step to 1, and more gradient_accumulation_steps")
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError("one process would drive several GPUs by DataParallel, which a bank cannot; start it with torchrun")
        if isinstance(processing_class, PreTrainedTokenizerBase):
            _check_tokenizer(processing_class, model.config)
            if data_collator is None:
                data_collator = DataCollatorForSeq2Seq(processing_class, model=model)
        self._shape = model.shape
        self.eval_plans = _checked_eval_plans(args, self._shape)
        self._odds = CURRICULA[args.curriculum].odds if curriculum is None else curriculum
        if curriculum is not None and args.curriculum != ModularTrainingArguments.curriculum:
            raise ValueError(f"two curricula are given, the function {curriculum!r} and args.curriculum={args.curriculum!r}; leave one out")
        for progress in (0.0, 0.5, 1.0):  # a curriculum that does not work had better fail here
            self._draw_plans(args, 0, progress)
        _check_attention(args, self._shape)
        uses_cache = model.config.use_cache
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        model.config.use_cache = uses_cache  # the Trainer turns it off, for good, and for what is assembled too

        # From here on nothing is refused but adapters, which leave the bank alone then.
        if peft_config is not None:
            if getattr(peft_config, "lora_dropout", 0) and not args.module_dropout:
                raise ValueError(
                    f"lora_dropout={peft_config.lora_dropout!r} does nothing without module_dropout; set it to True, or this to 0"
                )
            set_seed(args.seed)  # adapters start at random
            add_adapters(model, peft_config)
        elif model.config.lora:
            raise ValueError("the bank has LoRA modules; pass their peft_config, or bank.merge_and_unload() first to train all of them")
        model.requires_grad_(False)
        trained_parts = [part for part in OWN_PARTS if getattr(args, f"train_{part}")]
        for part in trained_parts:
            model.add_own_part(part)
        for name, parameter in model.module_tensors(dict(model.named_parameters())).items():
            # A part that an earlier training made and this one is not to touch stays as it is.
            parameter.requires_grad_(own_part_of(name) in (None, *trained_parts))
        # The losses here count tokens over the whole step, as those of models do that accept `num_items_in_batch`.
        self.model_accepts_loss_kwargs = True
        self._checked = False  # whether a batch was seen to fit
        self._evaluating = False
        self._running: tuple[DistributedDataParallel, RunningParameters] | None = None
        self._turn: _Turn | None = None  # while a step runs

    def training_record(self) -> dict[str, Any]:
        """What a card tells of a training: command, date, hardware, versions, steps, seconds, and every argument that is not its default.

        Without paths and tokens.
        """
        arguments = {}
        for field in dataclasses.fields(self.args):
            value = getattr(self.args, field.name, None)
            is_told = field.init and field.default is not dataclasses.MISSING and field.name not in _UNTOLD
            if is_told and value != field.default and (value or field.default or isinstance(value, float)):
                arguments[field.name] = str(getattr(value, "value", value))
        logged = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return {
            **environment(),
            "arguments": arguments,
            "steps": self.state.global_step,
            "seconds": round(logged[-1]) if logged else None,
        }

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> None:
        """Write `bank_card` to the output folder, with the results and the picture if they are there as frontier.json and frontier.png.

        Arguments are `Trainer.create_model_card`'s; `finetuned_from` and `dataset_args` have no place in it and are refused.
        """
        if finetuned_from or dataset_args:
            raise ValueError("the card names the bank's own teacher, and datasets by dataset_tags and dataset; leave the others out")
        if not self.is_world_process_zero():
            return
        output, named = Path(self.args.output_dir), _listed(dataset)
        told = {
            "training": self.training_record(),
            "language": language,
            "license": license,
            "datasets": _listed(dataset_tags),
            "dataset_name": named[0] if named else None,
            "tags": _listed(tags),
            **({"pipeline_tag": _listed(tasks)[0]} if tasks else {}),
        }
        repo_id = self.hub_model_id or self.args.hub_model_id or model_name or output.name
        try:
            card = bank_card(self.bank, repo_id, **measured_in(output), **told)
        except ValueError as error:  # a training is not to fail at its end
            logger.warning("The card tells of no results: %s", error)
            card = bank_card(self.bank, repo_id, **told)
        card.save(output / "README.md")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`: the whole bank, or of LoRA modules the adapters, with `create_model_card`'s card.

        Raises:
            ValueError: of LoRA modules, whose teacher is not named by Hub id and commit.
        """
        if self.bank.config.lora:
            self.bank.check_teacher_is_on_hub()
        pushed = super().push_to_hub(*args, **kwargs)
        if isinstance(pushed, CommitInfo):
            self.bank.origin = {"bank": self.hub_model_id, "revision": pushed.oid}
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # What is uploaded in between is a whole bank too. transformers takes the files from where it is told, here from nowhere.
        if self._staging is None and self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self.save_model(_internal_call=True)
            self.create_model_card()
            with tempfile.TemporaryDirectory() as nothing:
                super()._push_from_checkpoint(nothing)

    # -- a step ------------------------------------------------------------------------------------------------------------

    def plans_of_step(self, step: int) -> tuple[AssemblyPlan, ...]:
        """The plans that run in an optimizer step, counted from 0.

        Raises:
            ValueError: the length of the training is not known yet: before `train()`, without `max_steps`.
        """
        return self._draw_plans(self.args, step, min(step / max(self._steps() - 1, 1), 1.0))

    def _steps(self) -> int:
        steps = self.state.max_steps or self.args.max_steps
        if steps <= 0:
            raise ValueError("plans depend on the length of the training, which is not known before train(); set max_steps")
        return steps

    def _draw_plans(self, args: ModularTrainingArguments, step: int, progress: float) -> tuple[AssemblyPlan, ...]:
        of_sides = [len(granularities) for granularities in self._shape.granularities.values() if granularities]
        count = max(of_sides) * len(of_sides) if args.plans_per_step is None else args.plans_per_step
        drawn = {"sampling": args.plan_sampling, "count": count, "replacing_rate": args.replacing_rate_at(progress)}
        return draw_plans(self._shape, seed=args.seed, step=step, progress=progress, odds=self._odds, **drawn)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that is whole. A calibration is forgotten."""
        self._checked = False
        self.bank.config.calibration = None  # of modules that are other ones from now on
        if self.args.attention_weight:
            logger.warning(
                "attention_weight is not 0: attention runs in eager mode during training, for other modes hide its probabilities"
            )
        with eager_attention(self.bank) if self.args.attention_weight else nullcontext(), self._compiled_by_block():
            try:
                output = super().train(*args, **kwargs)
                return output._replace(training_loss=output.metrics["train_loss"])  # of all steps, also those before a restart
            finally:
                self.bank.train()  # all of it, as a Trainer leaves a model

    @contextmanager
    def _compiled_by_block(self) -> Iterator[None]:
        """With `torch_compile`, compile what all plans are made of: a graph of the whole model would serve one plan only."""
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend == DynamoBackend.NO:
            yield
            return
        blocks = [module for module in self.bank.modules() if isinstance(module, T5Block)]
        for block in blocks:
            block.compile(**plugin.to_kwargs())
        backend, plugin.backend = plugin.backend, DynamoBackend.NO  # or the Trainer compiles the model around them
        try:
            # A block of either side as teacher, below a module, as module, at the bottom, of static and then of varying length.
            with torch._dynamo.config.patch(recompile_limit=64):
                yield
        finally:
            plugin.backend = backend
            for block in blocks:
                block._compiled_call_impl = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """As `Trainer.training_step`, with every plan of the step in turn; gradients add up."""
        inputs = self._prepare_inputs(inputs)
        plans = self.plans_of_step(self.state.global_step)
        loss: Any = 0.0
        try:
            for number, turn in enumerate(self._turns(model, plans, inputs), start=1):
                self._turn = turn
                # Processes need not exchange gradients before the last plan.
                with self.accelerator.no_sync(model) if number < len(plans) else nullcontext():
                    loss = loss + super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._turn = None
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """In training the loss of the plan whose turn it is, on the batch that `training_step` got, or else of the step's first plan; in
        evaluation the task's, of the bank's own."""
        if not model.training:
            if self.label_smoother is not None and "labels" in inputs:  # which the Trainer will then not pass on
                inputs = with_decoder_inputs(self.bank, inputs)
            return super().compute_loss(model, inputs, return_outputs)
        turn = self._turn or self._turns(model, self.plans_of_step(self.state.global_step)[:1], inputs)[0]
        plan, share = turn.plan, turn.share
        terms, outputs = turn.lesson.loss_terms(plan)

        if num_items_in_batch is not None:
            of_all = self.args.average_tokens_across_devices or self.accelerator.num_processes == 1
            if of_all and num_items_in_batch == 0:
                raise ValueError(f"step {self.state.global_step}: its labels are all padding; take such examples out of the data")
            share = share * (inputs["labels"] != -100).sum() / max(num_items_in_batch, 1)
            if of_all:
                share = share * self.accelerator.num_processes  # the tokens of all, and gradients are averaged
        terms = {name: term * share for name, term in terms.items()}
        loss = weighed(self.args, terms)
        self.loss_sums.add(self.state.global_step, {"loss": loss, **terms})
        if isinstance(model, DistributedDataParallel) and not {"task_loss", "logit_loss"} & terms.keys():
            # DDP waits for the gradient of all that its output was made of, the logits among it.
            loss = loss + 0 * outputs.logits.sum()
        if not torch.isfinite(loss):
            broken = {name: term.item() for name, term in terms.items() if not torch.isfinite(term)} or {"loss": loss.item()}
            raise FloatingPointError(
                f"step {self.state.global_step}, plan {plan}: {', '.join(f'{name} is {value}' for name, value in broken.items())}. "
                "Training stopped before this step changed anything; a lower learning rate, bf16 in place of fp16, or float32 often helps"
            )
        return (loss, outputs) if return_outputs else loss

    def _turns(self, model: nn.Module, plans: Sequence[AssemblyPlan], inputs: Mapping[str, Any]) -> list[_Turn]:
        """Of plans that learn from the same examples, those first whose sides are most alike."""
        step = self.state.global_step
        if not self._checked:
            _check_batch(inputs, self.bank.config)
            self._checked = True
        if isinstance(model, DistributedDataParallel):
            self._watch_running(model, plans)
        fed = step < self.args.fed_ratio * self._steps()
        lesson = Lesson(self.args, self.bank, model, self._shape.teacher, plans, inputs, fed=fed)
        return [_Turn(plan, 1 / len(plans), lesson) for plan in sorted(plans, key=difference_of_depths)]

    def _watch_running(self, model: DistributedDataParallel, plans: Sequence[AssemblyPlan]) -> None:
        """Tell the averaging of gradients what runs in a step."""
        if self._running is None or self._running[0] is not model:
            self._running = model, watch_running(model)
        parts = [module for plan in plans for side in SIDES for module in self.bank.blocks_of(plan, side)]
        own = [getattr(self.bank, side).bank[name] for plan in plans for side, name in running_own_parts(plan, self.bank.config)]
        self._running[1].ids = trained_ids([*parts, *own])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the mean of every loss term since the last training log."""
        # The Trainer's own sums do not survive a restart between two logs.
        if {"loss", "learning_rate"} <= logs.keys():
            logs.update(self.loss_sums.log(self.state.global_step, self._mean_of_processes))
        elif "train_loss" in logs and self.state.global_step:
            logs["train_loss"] = self.loss_sums.mean_of_all(self.state.global_step, self._mean_of_processes)
        super().log(logs, *args, **kwargs)

    def _mean_of_processes(self, total: torch.Tensor) -> float:
        return self.accelerator.gather(total).mean().item()

    # -- evaluation --------------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Seq2SeqTrainer.evaluate`, under each of `eval_plans`."""
        self._evaluating = True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._evaluating = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; in `evaluate`, one loop a plan, with all metrics in one output."""
        with self._compiled_by_block():
            if self._evaluating and self.eval_plans:
                return self._evaluation_loops(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def _evaluation_loops(self, *args: Any) -> EvalLoopOutput:
        prefix = args[-1]
        metrics: dict[str, float] = {}
        by_name: dict[str, list[float]] = {}
        samples = 0
        for plan in self.eval_plans:
            with self.bank.using(plan):
                output = super().evaluation_loop(*args)
            samples += output.num_samples
            for name, value in output.metrics.items():
                name = name.removeprefix(f"{prefix}_")
                metrics[f"{prefix}_{plan}_{name}"] = value
                by_name.setdefault(name, []).append(value)
        for name, values in by_name.items():
            if all(isinstance(value, Real) for value in values):
                metrics[f"{prefix}_{name}"] = sum(values) / len(values)
        return EvalLoopOutput(output.predictions, output.label_ids, metrics, samples)


def _listed(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: ModularT5Config) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the bank's teacher {config.vocab_size}: they do not belong together")
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"the tokenizer pads with token {tokenizer.pad_token_id}, the bank's teacher with {config.pad_token_id}: "
            "they do not belong together"
        )


def _check_batch(inputs: Mapping[str, Any], config: ModularT5Config) -> None:
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(f"training needs labels; the batch has {sorted(inputs)}")
    if not ((labels != -100) & (labels != config.pad_token_id)).any():
        raise ValueError("the labels of the first batch are all padding; nothing can be learned from them")
    for name in ("input_ids", "labels"):
        ids = inputs.get(name)
        if ids is None:
            continue
        for token in (ids[ids != -100].max().item(), ids[ids != -100].min().item()):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} hold the token {token}, the bank's teacher knows 0 to {config.vocab_size - 1}: "
                    "the data was made with another tokenizer, or padded with another number than -100"
                )


def _check_attention(args: ModularTrainingArguments, shape: BankShape) -> None:
    """Warn, or raise a `ValueError`, where modules have no attention to learn from."""
    known = {side: granularities for side, granularities in shape.granularities.items() if granularities}
    if args.attention_min_span is not None and args.attention_min_span > max(map(max, known.values())):
        logger.warning("attention_min_span=%d leaves no module of the bank to learn from attention", args.attention_min_span)
    if args.learns_from_attention_alone and any(args.attended_span(of_side) > min(of_side) for of_side in known.values()):
        raise ValueError(
            "attention_weight alone leaves modules below attention_min_span, by default all but the coarsest, nothing to learn from; "
            "set that to 1, or another weight above 0"
        )


def _checked_eval_plans(args: ModularTrainingArguments, shape: BankShape) -> tuple[AssemblyPlan, ...]:
    if args.eval_plans is None:
        largest = shape.largest_ratio
        chosen = [
            shape.teacher,
            shape.choose("size-first", min(2, largest)),
            shape.choose("speed-first", min(1.9, largest)),
            shape.choose("size-first", largest),
        ]
    else:
        chosen = [shape.check(AssemblyPlan.from_any(plan)) for plan in args.eval_plans]
    plans = tuple(dict.fromkeys(chosen))
    metric = args.metric_for_best_model
    if metric is not None and "/" in metric and not any(f"_{plan}_" in f"_{metric}" for plan in plans):
        raise ValueError(
            f"metric_for_best_model={metric!r} names a plan that is not evaluated; eval_plans are {', '.join(map(str, plans))}"
        )
    return plans
