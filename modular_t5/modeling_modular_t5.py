"""A T5 that carries a bank of modularized layers and runs any plan of original layers and modules.

Stack, block and attention are T5's own, and so are their forwards: a plan only decides which blocks a stack runs over. Names stay
T5's for everything that a T5 has, so a plain T5 loads the original layers out of a bank; the modules are
`<side>.bank.<granularity>.<index>`.

Source: "Modular Transformers: Compressing Transformers into Modularized Layers for Flexible Efficient Inference", Zhou, Le Bras,
Choi, Findings of ACL 2023, arXiv 2306.02379.
"""

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from torch import nn
from transformers import MT5ForConditionalGeneration, PreTrainedConfig, T5Config, T5ForConditionalGeneration
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.t5.modeling_t5 import T5Block, T5Stack

from .assembly_modular_t5 import SIDES, AssemblyPlan, PlanLike, is_integer
from .building_modular_t5 import built, record_tie, run_like, torch_dtype
from .choosing_modular_t5 import BankShape, Budgets, PlanReport, assembly_record, resolve_plan, resolve_plans
from .configuration_modular_t5 import INITIALIZATIONS, ModularT5Config, stock_config, t5_fields
from .layout_modular_t5 import (
    initial_name,
    is_bank_tensor,
    own_part_of,
    parameter_map,
    tensor_names,
)
from .loading_modular_t5 import (
    SavedBank,
    check_is_teacher,
    hub_teacher,
    load_teacher,
    on_hub,
    shape_in,
    teacher_tensors,
)
from .own_parts_modular_t5 import OwnPartsMixin
from .storage_modular_t5 import HUB_ARGUMENTS, card_of, fingerprint, staged_folder, upload, write_shards


_PUSH_ARGUMENTS = ("commit_description", "commit_message", "create_pr", "private", "repo_id", "revision", "tags", "token")
# What the Auto classes add to a call of `from_pretrained`. What runs is the class that is called, and it fetches no other code.
_AUTO_ARGUMENTS = ("_commit_hash", "_from_auto", "adapter_kwargs", "code_revision", "trust_remote_code")


class PlannedBlocks(nn.ModuleList):
    """Named, counted and indexed as the original layers, but *iterated* as the blocks that run, which is all that a `T5Stack` does."""

    def __init__(self, originals: Iterable[T5Block]):
        super().__init__(originals)
        self.running = list(self._modules.values())

    def __iter__(self) -> Iterator[T5Block]:
        return iter(self.running)

    __repr__ = nn.Module.__repr__  # a ModuleList's would iterate

    def run(self, blocks: Sequence[T5Block]) -> None:
        """Iterate as these blocks from now on, and number the cache slots that their attention writes."""
        for position, block in enumerate(blocks):
            for sublayer in block.layer[:-1]:  # all but the feed-forward
                attention = sublayer.EncDecAttention if hasattr(sublayer, "EncDecAttention") else sublayer.SelfAttention
                attention.layer_idx = position
        self.running = list(blocks)


class ModularT5ForConditionalGeneration(OwnPartsMixin, T5ForConditionalGeneration):
    """A T5 with a module bank. It trains, generates, saves and loads as any T5, under whatever plan is set.

    `plan`, `set_plan` and `using` run a plan in place; `assemble` writes one out as a stock `T5ForConditionalGeneration`.
    Not thread-safe while plans change: give each thread an `assemble(..., share_weights=True)` of its own.
    """

    config_class = ModularT5Config
    # T5's forward computes a mean over the tokens and ignores `num_items_in_batch`; without this flag the Trainer would scale the
    # loss by accumulation steps and processes.
    accepts_loss_kwargs = False
    # A bank is saved with its code, for use where this package is not installed.
    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, config: ModularT5Config):
        super().__init__(config)
        # Folder or Hub id, and commit, that the bank was loaded from or saved to last; what it assembles remembers it.
        self.origin: dict[str, str | None] = {"bank": None, "revision": None}
        for side in SIDES:
            stack = getattr(self, side)
            stack.block = PlannedBlocks(stack.block)
            stack.bank = _module_bank(stack, config.granularities[side])
        for part in config.own_parts:
            self._register_own_part(part)
        self.set_plan(config.plan)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: every parameter is in one of transformers' own modules, which transformers then initialises as a T5's."""
        return False

    # -- building ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_t5(
        cls,
        teacher: T5ForConditionalGeneration | MT5ForConditionalGeneration | str | os.PathLike,
        granularities: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        *,
        initialization: str = "bottom-first",
        **kwargs: Any,
    ) -> "ModularT5ForConditionalGeneration":
        """A bank around a fine-tuned T5: its layers as the originals, and modules that start as copies of them.

        Args:
            teacher: a T5, FLAN-T5, T5 v1.1, mT5 or ByT5 with its head, or the folder or Hub id of one. A model given is left
                untouched and shares no memory with the bank.
            granularities: of both sides, or `{"encoder": ..., "decoder": ...}`; by default those of 2, 3, 4, 6 that divide a
                side's number of layers.
            initialization: which layer of its span a module starts as: `"first"`, `"middle"`, `"last"`, or `"bottom-first"`: the
                first at the bottom of a stack, else the last.
            kwargs: for the teacher's `from_pretrained` (`dtype`, `revision`, `token`, ...), where it is a folder or Hub id.

        Raises:
            ValueError: the teacher is no T5 with a head, or the granularities do not fit it.
        """
        if initialization not in INITIALIZATIONS:
            raise ValueError(f"unknown initialization {initialization!r}; choose one of {', '.join(INITIALIZATIONS)}")
        commit = None
        if isinstance(teacher, nn.Module):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} apply where a teacher is loaded; a model was given, so set them on it")
            check_is_teacher(teacher)
        else:
            if "output_loading_info" in kwargs:
                raise ValueError("from_t5 returns a bank alone; load the teacher yourself for its output_loading_info")
            teacher, commit = load_teacher(teacher, **kwargs)

        fields = t5_fields(teacher.config)
        named = {"name_or_path": teacher.config.name_or_path, "revision": commit}
        config = ModularT5Config(**fields, granularities=granularities, initialization=initialization, teacher=named)
        config.name_or_path = teacher.config.name_or_path

        for side, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
            originals = len(getattr(teacher, side).block)
            if originals != layers:
                raise ValueError(f"the teacher's {side} has {originals} layers, its configuration says {layers}; let them agree")
        sources: dict[str, torch.Tensor] = dict(teacher.named_parameters(remove_duplicate=False))
        for name in filter(is_bank_tensor, tensor_names(one_layer_of(teacher), config)):
            # A tensor object of its own: the module is a copy of the layer, not tied to it.
            sources[name] = sources[initial_name(name, config)].detach()
        return built(cls, run_like(teacher, config), sources, teacher.generation_config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, and a `ValueError` if the checkpoint lacks a part of the bank.

        With `output_loading_info=True` what is missing is in the returned report instead.

        A bank of modules alone (a checkpoint of `ModularTrainer`, a LoRA bank, `save_pretrained(..., modules_only=True)`) is put
        together with its teacher: the one that its configuration names, or `teacher=`, a model, a folder or a Hub id. Another
        teacher than it was made of is refused by the SHA-256 of its weights. Adapters are merged.

        Raises:
            ValueError: something of the bank is missing, torn, too much, or not of the shape that the configuration says; or the
                weights are no safetensors.
            OSError: there is no such bank, or it cannot be fetched.
        """
        path, wants_info = pretrained_model_name_or_path, kwargs.get("output_loading_info", False)
        if path is None or kwargs.get("state_dict") is not None:
            return _with_recorded_tie(super().from_pretrained(path, *model_args, **kwargs))
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False: a bank's weights are safetensors; nothing else is read")
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        hub_arguments |= {"revision": kwargs["_commit_hash"]} if kwargs.get("_commit_hash") else {}
        kwargs = {name: value for name, value in kwargs.items() if name not in _AUTO_ARGUMENTS}
        teacher, variant, config = (kwargs.pop(name, None) for name in ("teacher", "variant", "config"))
        saved = SavedBank(path, teacher=teacher, variant=variant, strict=not wants_info, **hub_arguments)
        if not isinstance(config, PreTrainedConfig):
            fields = set(ModularT5Config.__dataclass_fields__) - {"dtype"}
            changes = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
            given = saved.config if config is None else ModularT5Config.from_pretrained(config)
            config = ModularT5Config.from_dict({**given.to_dict(), **changes})
        config = copy.deepcopy(config)
        config.modules_only, config.lora, config.name_or_path = False, None, str(path)
        tensors = saved.read([name for name in saved.names if saved.has(name)], check=not kwargs.get("ignore_mismatched_sizes"))
        # The tensors that were checked are those that are loaded; transformers is not to look for files itself.
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=tensors, **kwargs)
        bank = loaded[0] if wants_info else loaded
        bank.generation_config, bank.origin = saved.generation_config, saved.origin
        return _with_recorded_tie(loaded)

    @classmethod
    def assemble_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        strategy: PlanLike,
        ratio: float | None = None,
        *,
        teacher: Any = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        attn_implementation: str | None = None,
        variant: str | None = None,
        **budget_and_hub: Any,
    ) -> T5ForConditionalGeneration:
        """What `from_pretrained(...).assemble(strategy, ratio)` gives, without fetching or reading more than that size needs.

        Of a bank saved whole, only the shards that hold something of the plan are downloaded, and of those only the plan's tensors
        are read. Of modules saved alone the teacher is fetched as well, and read to check its SHA-256.

        Args:
            pretrained_model_name_or_path, teacher, attn_implementation, variant: as in `from_pretrained`.
            strategy, ratio: as in `assemble`.
            dtype: of the result; by default, as in `from_pretrained`, the one that the configuration names.
            device: of the result; by default the CPU.
            budget_and_hub: a budget as in `assemble`, and `cache_dir`, `force_download`, `local_files_only`, `proxies`, `revision`,
                `subfolder`, `token`.

        Raises:
            ValueError: as in `assemble` and `from_pretrained`.
            OSError: there is no such bank, or it cannot be fetched.
        """
        hub_arguments = {name: value for name, value in budget_and_hub.items() if name in HUB_ARGUMENTS}
        budget = {name: value for name, value in budget_and_hub.items() if name in Budgets.__annotations__}
        if unknown := sorted(budget_and_hub.keys() - hub_arguments.keys() - budget.keys()):
            raise ValueError(f"assemble_from_pretrained does not take {', '.join(unknown)}")
        saved = SavedBank(pretrained_model_name_or_path, teacher=teacher, variant=variant, **hub_arguments)
        report = resolve_plan(saved.shape_in(torch_dtype(dtype)), strategy, ratio, **budget)
        config = _assembled_config(saved.config, report, {**saved.origin, **assembly_record(report, strategy, ratio, **budget)})
        config._attn_implementation = attn_implementation
        mapping = parameter_map(saved.one_layer, report.plan, saved.config)
        tensors = saved.read(mapping.values())
        sources = {name: tensors[bank_name] for name, bank_name in mapping.items()}
        generation_config = saved.generation_config
        dtype = saved.config.dtype if dtype in (None, "auto") else dtype
        return built(T5ForConditionalGeneration, config, sources, generation_config, dtype=dtype, device=device, share_weights=True)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        *,
        modules_only: bool = False,
        **hub_arguments: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, in shards cut so that a size of the bank can be fetched alone, and with its code.

        A save that fails or is killed leaves the folder as it was (`staged_folder` says where that cannot be). Uploading comes after.

        Args:
            modules_only: leave the teacher out. Its name and the SHA-256 of its weights are saved instead, and `from_pretrained`
                fetches it. So is a bank with LoRA modules always, and a `state_dict` without the teacher's tensors.
            hub_arguments: for `push_to_hub`.
        """
        if not is_main_process:
            return
        directory = os.path.abspath(os.fspath(save_directory))
        if unknown := sorted(hub_arguments.keys() - set(_PUSH_ARGUMENTS)):
            raise ValueError(f"a bank is saved in shards of its own, without {', '.join(unknown)}")
        modules_only = modules_only or bool(self.config.lora) or (state_dict is not None and all(map(is_bank_tensor, state_dict)))
        if modules_only:
            tensors = self.module_tensors(state_dict)
            self.config.teacher = {**self.config.teacher, "sha256": self.teacher_sha256()}
        else:
            tensors = self.state_dict() if state_dict is None else state_dict
            names = {name for name, _ in self.named_parameters(remove_duplicate=False)} - {name for name, _ in self.named_parameters()}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in names}  # a tied head once
        teacher = self.config.teacher
        if not modules_only and not on_hub(self.config):  # nobody's folders are told where they are of no use
            self.config.teacher = {**teacher, "name_or_path": os.path.basename(teacher["name_or_path"] or "") or None}
        self.config.modules_only = modules_only
        self.config.dtype, self.config.architectures = self.dtype, [type(self).__name__]
        try:
            with staged_folder(directory) as staging:
                custom_object_save(self, staging, config=self.config)
                self.config.save_pretrained(staging)
                self.generation_config.save_pretrained(staging)
                write_shards(staging, tensors, max_shard_size=max_shard_size, variant=variant)
        finally:
            self.config.modules_only, self.config.teacher = False, teacher
        self.origin = {"bank": str(save_directory), "revision": None}
        if push_to_hub:
            repo_id = hub_arguments.pop("repo_id", os.path.basename(directory))
            saving = {"max_shard_size": max_shard_size, "state_dict": state_dict, "variant": variant}
            self.push_to_hub(repo_id, modules_only=modules_only, **saving, **hub_arguments)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload bank",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        modules_only: bool = False,
        **saving: Any,
    ) -> CommitInfo:
        """As `PreTrainedModel.push_to_hub`; weights of an earlier upload make way. A card that is there stays, and gets the tags.

        Args:
            modules_only: as in `save_pretrained`.
            saving: `max_shard_size`, `state_dict` and `variant` of `save_pretrained`.

        Raises:
            ValueError: modules alone would be uploaded, and their teacher is not named by Hub id and commit.
        """
        modules_only = modules_only or bool(self.config.lora)
        if modules_only:
            self.check_teacher_is_on_hub()
        repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its namespace
        card, origin = card_of(repo_id, revision, token), self.origin
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, modules_only=modules_only, **saving)
            self.origin = origin
            card = self.new_card(repo_id, modules_only=modules_only) if card is None else card
            card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
            card.save(os.path.join(folder, "README.md"))
            commit = upload(
                folder,
                repo_id,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )
        self.origin = {"bank": repo_id, "revision": commit.oid}
        return commit

    def check_teacher_is_on_hub(self) -> None:
        """A `ValueError` if others could not fetch the teacher of modules that are uploaded alone."""
        try:
            hub_teacher(self.config)
        except ValueError as error:
            raise ValueError(
                f"modules alone are of use to others if their teacher can be fetched, but {error}: "
                'set bank.config.teacher = {"name_or_path": "org/teacher", "revision": "<commit>"}'
            ) from error

    def new_card(self, repo_id: str, *, modules_only: bool = False) -> ModelCard:
        """What a push writes where there is no card yet. Importing the package puts its own here."""
        return ModelCard.from_template(ModelCardData(library_name="transformers"), model_id=repo_id)

    def module_tensors(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What the bank adds to its teacher, out of its own or a given state: modules (of LoRA modules the adapters) and own parts."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {
            name: tensor
            for name, tensor in state_dict.items()
            if is_bank_tensor(name) and (not self.config.lora or ".lora_" in name or own_part_of(name))
        }

    def teacher_sha256(self) -> str:
        """SHA-256 of the teacher's weights: names, dtypes, shapes and bytes."""
        return fingerprint(teacher_tensors(self))

    # -- adapters ----------------------------------------------------------------------------------------------------------

    def merge_and_unload(self) -> "ModularT5ForConditionalGeneration":
        """Merge LoRA modules into plain ones, in place, and return the bank. Nothing to do for a bank without."""
        for path, merged in self._merged_adapters().items():
            parent, _, leaf = path.rpartition(".")
            base = self.get_submodule(path).base_layer
            base.weight.data = merged
            setattr(self.get_submodule(parent), leaf, base)
        self.config.lora = None
        return self

    def _merged_adapters(self) -> dict[str, torch.Tensor]:
        # By what peft's LoRA layers have, for peft need not be installed where a bank runs.
        return {
            path: (layer.base_layer.weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)).detach()
            for path, layer in self.named_modules()
            if hasattr(layer, "lora_A")
        }

    # -- plans -------------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> BankShape:
        """The counts that choosing a plan works with, read off the parameters."""
        return self._shape_in(self.dtype)

    def _shape_in(self, dtype: torch.dtype) -> BankShape:
        sizes = {id(parameter): (name, parameter.numel()) for name, parameter in reversed(one_layer_of(self).items())}  # tied ones once
        return shape_in(dtype, dict(sizes.values()), self.config)

    @property
    def plan(self) -> AssemblyPlan:
        """What runs. Saved with the bank."""
        return AssemblyPlan.from_any(self.config.plan)

    def set_plan(self, strategy: PlanLike, ratio: float | None = None, **budget: Unpack[Budgets]) -> AssemblyPlan:
        """Run a plan from now on, given as in `assemble`; returns it. Nothing is copied."""
        plan = self.choose_plan(strategy, ratio, **budget)
        for side in SIDES:
            stack, blocks = getattr(self, side), self.blocks_of(plan, side)
            stack.block.run(blocks)
            stack.config.num_layers = len(blocks)
        self.switch_parts(plan)
        self.config.plan = plan.to_dict()
        return plan

    def initial_layer(self, side: str, start: int, span: int) -> T5Block:
        """The original layer that the module for `span` layers from `start` on started as a copy of."""
        return getattr(self, side).block[start + INITIALIZATIONS[self.config.initialization](start, span)]

    def modules_of_bank(self) -> Iterator[tuple[str, int, int, T5Block]]:
        """`(side, first original layer, granularity, module)` of every module."""
        for side in SIDES:
            for s in self.config.granularities[side]:
                for index, module in enumerate(getattr(self, side).bank[str(s)]):
                    yield side, s * index, s, module

    def blocks_of(self, plan: AssemblyPlan, side: str) -> list[T5Block]:
        """The original layers and modules that run a side of a plan, bottom first."""
        stack = getattr(self, side)
        return [stack.block[start] if span == 1 else stack.bank[str(span)][start // span] for start, span in plan.blocks(side)]

    @contextmanager
    def using(
        self, strategy: PlanLike, ratio: float | None = None, **budget: Unpack[Budgets]
    ) -> Iterator["ModularT5ForConditionalGeneration"]:
        """`with bank.using("2x6/2x6"): ...` runs a plan inside the block and the former one after it."""
        former = self.plan
        self.set_plan(strategy, ratio, **budget)
        try:
            yield self
        finally:
            self.set_plan(former)

    def choose_plan(self, strategy: PlanLike, ratio: float | None = None, **budget: Unpack[Budgets]) -> AssemblyPlan:
        """The plan that `assemble` would write out for the same arguments."""
        return self.report(strategy, ratio, **budget).plan

    def choose_plans(
        self,
        strategy: PlanLike,
        ratio: float | None = None,
        *,
        count: int = 5,
        dtype: torch.dtype | str | None = None,
        **budget: Unpack[Budgets],
    ) -> list[AssemblyPlan]:
        """The `count` plans that a strategy prefers within a budget, given as in `assemble`, which would write out the first of them.

        `measure_frontier` tells which of them generates best. There are fewer where the strategy has no more within the budget.
        """
        if not is_integer(count) or count < 1:
            raise ValueError(f"count must be a positive integer, got {count!r}")
        shape = self._shape_in(torch_dtype(dtype) or self.dtype)
        return [report.plan for report in resolve_plans(shape, strategy, ratio, **budget)[:count]]

    def report(
        self, strategy: PlanLike, ratio: float | None = None, *, dtype: torch.dtype | str | None = None, **budget: Unpack[Budgets]
    ) -> PlanReport:
        """Parameters, bytes, ratios and, with a `latency`, speed of a plan, given as in `assemble`."""
        return resolve_plan(self._shape_in(torch_dtype(dtype) or self.dtype), strategy, ratio, **budget)

    def parameter_map(self, plan: PlanLike) -> dict[str, str]:
        """`{parameter name in the assembled T5: parameter name in the bank}`: assembling is renaming."""
        return parameter_map(one_layer_of(self), self.choose_plan(plan), self.config)

    def assemble(
        self,
        strategy: PlanLike,
        ratio: float | None = None,
        *,
        share_weights: bool = False,
        dtype: torch.dtype | str | None = None,
        **budget: Unpack[Budgets],
    ) -> T5ForConditionalGeneration:
        """A stock T5 of the size asked for, in evaluation mode, without further training.

        What was asked, and what came out of it, is in `model.config.modular_t5`.

        Args:
            strategy: `"size-first"`, `"speed-first"` or `"calibrated"` (the table `STRATEGIES`) with a ratio or another budget, or
                a plan without one: an `AssemblyPlan` or its notation, such as `"1x12/4x3"`. The first plan that the strategy has
                within the budget is taken.
            ratio: at least this much: layer parameters of the teacher / layer parameters of the result. From 1 to the bank's
                largest.
            share_weights: copy nothing; the result reads, and if trained changes, the bank's own memory.
            dtype: of the result; by default the bank's.
            budget: in place of a ratio one of `max_parameters`, `max_bytes` (in `dtype`), `min_speedup` over the teacher, or
                `max_latency_ms`; the latter two with `latency`, which `measure_latency` returns.

        Raises:
            ValueError: an unknown strategy, none or several budgets, one that no plan is within (the message names the nearest), a
                plan that this bank cannot run, or weights to share that are not there: LoRA modules are merged into what is
                returned, and another `dtype` makes copies.
        """
        if share_weights and self.config.lora:
            raise ValueError("LoRA modules are merged when assembling, which makes copies; call merge_and_unload() first to share weights")
        if share_weights and torch_dtype(dtype) not in (None, self.dtype):
            raise ValueError(f"weights of {self.dtype} cannot be shared as {torch_dtype(dtype)}; leave out share_weights or dtype")
        report = self.report(strategy, ratio, dtype=dtype, **budget)
        remembered = {**self.origin, **assembly_record(report, strategy, ratio, **budget)}
        config = run_like(self, _assembled_config(self.config, report, remembered))
        bank = dict(self.named_parameters(remove_duplicate=False))
        bank |= {f"{path}.weight": merged for path, merged in self._merged_adapters().items()}
        sources = {name: bank[bank_name] for name, bank_name in self.parameter_map(report.plan).items()}
        return built(T5ForConditionalGeneration, config, sources, self.generation_config, dtype=dtype, share_weights=share_weights)


def one_layer_of(model: T5ForConditionalGeneration | MT5ForConditionalGeneration) -> dict[str, nn.Parameter]:
    """The parameters of a teacher or bank that a T5 with one layer a side would have, the embeddings first. Without a walk over all."""
    parts: dict[str, nn.Module] = {"shared": model.shared}
    for side in SIDES:
        stack = getattr(model, side)
        parts |= {f"{side}.embed_tokens": stack.embed_tokens, f"{side}.final_layer_norm": stack.final_layer_norm}
        parts[f"{side}.block.0"] = stack.block[0]
    parts["lm_head"] = model.lm_head
    return {f"{part}.{name}": parameter for part, module in parts.items() for name, parameter in module.named_parameters()}


def _module_bank(stack: T5Stack, granularities: Sequence[int]) -> nn.ModuleDict:
    bank = nn.ModuleDict(
        {str(s): nn.ModuleList(T5Block(stack.config, layer_idx=j) for j in range(len(stack.block) // s)) for s in granularities}
    )
    # Whichever block comes first computes the relative position bias, from the one table in original layer 0. Unregistered there:
    # the table has one name and is saved once.
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    for modules in bank.values():
        attention = modules[0].layer[0].SelfAttention
        attention.has_relative_attention_bias = True
        attention.__dict__["relative_attention_bias"] = table
    return bank


def _assembled_config(config: ModularT5Config, report: PlanReport, remembered: Mapping[str, Any]) -> T5Config:
    """A stock configuration, which remembers where the model comes from."""
    assembled = stock_config(config, report.plan.depths)
    assembled.modular_t5 = dict(remembered)
    return assembled


def _with_recorded_tie(loaded: Any) -> Any:
    """What `from_pretrained` returned, with or without its report."""
    bank = loaded[0] if isinstance(loaded, tuple) else loaded
    record_tie(bank)
    bank.switch_parts(bank.plan)  # a head is only now known to be tied or not
    return loaded
