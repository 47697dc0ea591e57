"""A T5 that carries a bank of modularized layers and runs any plan of original layers and modules.

Stack, block and attention are T5's own, and so are their forwards: a plan only decides which blocks a stack runs over. Names stay
T5's for everything that a T5 has, so a plain T5 loads the original layers out of a bank; the modules are
`<side>.bank.<granularity>.<index>`.

Source: "Modular Transformers: Compressing Transformers into Modularized Layers for Flexible Efficient Inference", Zhou, Le Bras,
Choi, Findings of ACL 2023, arXiv 2306.02379.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, MT5ForConditionalGeneration, PreTrainedConfig, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm, T5Stack

from .assembly_modular_t5 import SIDES, AssemblyPlan, BankShape, PlanLike, PlanReport, resolve_plan
from .configuration_modular_t5 import INITIALIZATIONS, OWN_PARTS, ModularT5Config, set_cache_depth
from .storage_modular_t5 import fingerprint, read_tensors, staged_folder


_TEACHERS = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PUSH_ARGUMENTS = ("commit_description", "commit_message", "create_pr", "private", "repo_id", "revision", "tags", "token")
_BANK_FIELDS = (
    *("architectures", "auto_map", "decoder_layers", "model_type", "transformers_version"),
    *("granularities", "initialization", "lora", "modules_only", "own_parts", "plan", "teacher"),
)
# What the Auto classes add to a call of `from_pretrained`, and means nothing to a bank of modules alone.
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


class _Switched:
    """Named and saved as itself, but runs another module of its kind where one is switched to."""

    def switch(self, other: nn.Module | None) -> None:
        self.__dict__["other"] = other  # past nn.Module's registration: the other has its name elsewhere

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        other = self.__dict__.get("other")
        return super().forward(hidden_states) if other is None else other(hidden_states)


class SwitchedNorm(_Switched, T5LayerNorm):
    pass


class SwitchedHead(_Switched, nn.Linear):
    pass


class ModularT5ForConditionalGeneration(T5ForConditionalGeneration):
    """A T5 with a module bank. It trains, generates, saves and loads as any T5, under whatever plan is set.

    `plan`, `set_plan` and `using` run a plan in place; `assemble` writes one out as a stock `T5ForConditionalGeneration`.
    Not thread-safe while plans change: give each thread an `assemble(..., share_weights=True)` of its own.
    """

    config_class = ModularT5Config
    # T5's forward computes a mean over the tokens and ignores `num_items_in_batch`; without this flag the Trainer would scale the
    # loss by accumulation steps and processes.
    accepts_loss_kwargs = False

    def __init__(self, config: ModularT5Config):
        super().__init__(config)
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
        if isinstance(teacher, nn.Module):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} apply where a teacher is loaded; a model was given, so set them on it")
            if not isinstance(teacher, tuple(_TEACHERS.values())) or isinstance(teacher, cls):
                model_type = getattr(getattr(teacher, "config", None), "model_type", None)
                raise ValueError(_not_a_teacher(type(teacher).__name__, model_type))
        else:
            if "output_loading_info" in kwargs:
                raise ValueError("from_t5 returns a bank alone; load the teacher yourself for its output_loading_info")
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            model_type = AutoConfig.from_pretrained(teacher, **hub_arguments).model_type
            if model_type not in _TEACHERS:
                raise ValueError(_not_a_teacher(str(teacher), model_type))
            teacher = _TEACHERS[model_type].from_pretrained(teacher, **kwargs)

        fields = _without(teacher.config.to_dict(), _BANK_FIELDS)
        # mT5's code never scales and its configuration does not say so.
        fields.setdefault("scale_decoder_outputs", False)
        named = {"name_or_path": teacher.config.name_or_path, "revision": getattr(teacher.config, "_commit_hash", None)}
        config = ModularT5Config(**fields, granularities=granularities, initialization=initialization, teacher=named)
        config.name_or_path = teacher.config.name_or_path

        sources: dict[str, torch.Tensor] = dict(teacher.named_parameters(remove_duplicate=False))
        for side, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
            originals = getattr(teacher, side).block
            if len(originals) != layers:
                raise ValueError(f"the teacher's {side} has {len(originals)} layers, its configuration says {layers}; let them agree")
            for s in config.granularities[side]:
                for start in range(0, layers, s):
                    original = originals[start + INITIALIZATIONS[initialization](start, s)]
                    for name, parameter in original.named_parameters():
                        if name != _BIAS_TABLE:
                            # A tensor object of its own: the module is a copy of the layer, not tied to it.
                            sources[f"{_block_name(side, start, s)}.{name}"] = parameter.detach()
        return _built(cls, config, sources, like=teacher)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, and a `ValueError` if the checkpoint lacks a part of the bank.

        With `output_loading_info=True` what is missing is in the returned report instead.

        A bank of modules alone (a checkpoint of `ModularTrainer`, a LoRA bank, `save_pretrained(..., modules_only=True)`) is put
        together with its teacher: the one that its configuration names, or `teacher=`, a model, a folder or a Hub id. Another
        teacher than it was made of is refused by the SHA-256 of its weights. Adapters are merged.
        """
        teacher = kwargs.pop("teacher", None)
        if _holds_modules_only(pretrained_model_name_or_path, kwargs):
            return cls._from_modules(pretrained_model_name_or_path, teacher, **kwargs)
        if teacher is not None:
            raise ValueError(f"{pretrained_model_name_or_path} holds its own teacher; leave teacher= out, or build a bank by from_t5")
        wants_info = kwargs.pop("output_loading_info", False)
        bank, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs)
        if info["missing_keys"] and not wants_info:
            missing = sorted(info["missing_keys"])
            has_modules = any(".bank." in name and name not in missing for name, _ in bank.named_parameters())
            remedy = "download or save it again" if has_modules else f"it is no bank; {cls.__name__}.from_t5 builds one around a T5"
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of this bank, the first of them {missing[0]}: {remedy}"
            )
        _record_tie(bank)
        # Loaded tensors lie in memory as they lie in the file, and where they start decides how CPU kernels round. Aligned as torch
        # aligns its own, a bank and the copies that `assemble` makes of it agree to the bit.
        for parameter in bank.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return (bank, info) if wants_info else bank

    @classmethod
    def _from_modules(cls, path: str | os.PathLike, teacher: Any, **kwargs: Any) -> Any:
        kwargs = _without(kwargs, _AUTO_ARGUMENTS)
        config = kwargs.pop("config", None)
        hub_arguments = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        wants_info, dtype = kwargs.pop("output_loading_info", False), kwargs.pop("dtype", None)
        if kwargs:
            raise ValueError(f"{path} holds modules alone, which load on the CPU and without {', '.join(sorted(kwargs))}")
        if not isinstance(config, PreTrainedConfig):
            config = ModularT5Config.from_pretrained(path, **hub_arguments)
        of_teacher = {"dtype": config.dtype, **_without(hub_arguments, ("revision", "subfolder"))}
        if isinstance(teacher, nn.Module):
            of_teacher = {}
        elif teacher is None:
            teacher, revision = config.teacher["name_or_path"] or "", config.teacher["revision"]
            if not os.path.isdir(teacher):
                if not revision:
                    raise ValueError(
                        f"{path} holds modules alone, and their teacher {teacher!r} is no folder here and has no revision on the Hub: "
                        "pass it as from_pretrained(..., teacher=...)"
                    )
                of_teacher["revision"] = revision
        bank = cls.from_t5(teacher, config.granularities, initialization=config.initialization, **of_teacher)
        found = bank.teacher_sha256()
        if found != config.teacher["sha256"]:
            raise ValueError(
                f"the modules in {path} were trained for another teacher ({config.teacher['name_or_path']}): the weights that they "
                f"came with have SHA-256 {config.teacher['sha256']}, these have {found}"
            )
        for part in config.own_parts:
            bank.add_own_part(part)
        bank.load_modules(read_tensors(path, **hub_arguments), lora=config.lora, source=path)
        bank.set_plan(config.plan)
        bank.config.name_or_path = str(path)
        with suppress(OSError):  # there is none: the teacher's stays
            bank.generation_config = GenerationConfig.from_pretrained(path, **hub_arguments)
        info = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ())
        bank = bank if dtype in (None, "auto") else bank.to(dtype)
        return (bank, info) if wants_info else bank

    def load_modules(self, tensors: Mapping[str, torch.Tensor], *, lora: Mapping[str, Any] | None = None, source: Any = "it") -> None:
        """Copy tensors, as `module_tensors` of an equal bank names them, into this one's modules; merge adapters into them.

        Args:
            tensors: of every module, or adapters of them.
            lora: where there are adapters: the field of that name of the configuration that they were saved with.
            source: for messages.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape. Nothing is changed then.
        """
        own = {name: parameter for name, parameter in self.named_parameters() if _is_bank_tensor(name)}
        if lora:
            downs = {name.partition(".lora_A.")[0]: tensor for name, tensor in tensors.items() if ".lora_A." in name}
            ups = {name.partition(".lora_B.")[0]: tensor for name, tensor in tensors.items() if ".lora_B." in name}
            if not downs or downs.keys() != ups.keys():
                raise ValueError(f"{source} holds {len(downs)} lora_A and {len(ups)} lora_B; they belong together")
            plain = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
            for path, down in downs.items():
                if f"{path}.weight" not in own or down.ndim != 2 or ups[path].ndim != 2 or down.shape[0] != ups[path].shape[1]:
                    raise ValueError(f"{source} holds adapters for {path}, which do not fit this bank")
                base = own[f"{path}.weight"].detach()
                plain[f"{path}.weight"] = base + lora["scaling"] * (ups[path].to(base) @ down.to(base))
            wanted = {name: own[name] for name in own if name in plain or not _is_module_tensor(name)}
        else:
            plain, wanted = tensors, own
        differing = wanted.keys() ^ plain.keys() or {name for name in wanted if wanted[name].shape != plain[name].shape}
        if differing:
            raise ValueError(
                f"{source} does not fit this bank: {len(differing)} tensors are missing, unknown, or of another shape, "
                f"the first of them {min(differing)}"
            )
        with torch.no_grad():
            for name, tensor in plain.items():
                own[name].copy_(tensor)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        modules_only: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`; a save that fails leaves the folder as it was. Uploading comes after saving.

        Args:
            modules_only: leave the teacher out. Its name and the SHA-256 of its weights are saved instead, and `from_pretrained`
                fetches it. So is a bank with LoRA modules always, and a `state_dict` without the teacher's tensors.
        """
        directory = os.path.abspath(os.fspath(save_directory))
        hub_arguments = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        modules_only = modules_only or bool(self.config.lora) or (state_dict is not None and all(map(_is_bank_tensor, state_dict)))
        if modules_only:
            state_dict = self.module_tensors(state_dict)
            self.config.teacher = {**self.config.teacher, "sha256": self.teacher_sha256()}
        self.config.modules_only = modules_only
        try:
            with staged_folder(directory) as staging:
                super().save_pretrained(staging, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        finally:
            self.config.modules_only = False
        if push_to_hub and is_main_process:
            self.push_to_hub(hub_arguments.pop("repo_id", os.path.basename(directory)), **hub_arguments)

    def module_tensors(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What the bank adds to its teacher, out of its own or a given state: modules (of LoRA modules the adapters) and own parts."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {
            name: tensor
            for name, tensor in state_dict.items()
            if _is_bank_tensor(name) and (not self.config.lora or ".lora_" in name or not _is_module_tensor(name))
        }

    def teacher_sha256(self) -> str:
        """SHA-256 of the teacher's weights: names, dtypes, shapes and bytes."""
        return fingerprint({name: parameter for name, parameter in self.named_parameters() if not _is_bank_tensor(name)})

    # -- what a bank may have beside modules -------------------------------------------------------------------------------

    def add_own_part(self, part: str) -> None:
        """Give the bank a copy of a part of the teacher, to train. It runs, and is assembled, where a side has modules.

        Args:
            part: `"final_norms"`, the norm at the top of each side, or `"head"`, which goes with the decoder and is then not tied
                to the embeddings.
        """
        if part not in OWN_PARTS:
            raise ValueError(f"unknown part {part!r}; choose one of {', '.join(OWN_PARTS)}")
        if part in self.config.own_parts:
            return
        for original, copied in self._register_own_part(part):
            copied.to(device=original.weight.device, dtype=original.weight.dtype).load_state_dict(original.state_dict())
        self.config.own_parts = [*self.config.own_parts, part]
        self.switch_parts(self.plan)

    def _register_own_part(self, part: str) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of the teacher's part, now with a switch, and the bank's, its weights not set."""
        config, pairs = self.config, []
        for side in SIDES:
            stack = getattr(self, side)
            if part == "final_norms":
                size = {"hidden_size": config.d_model, "eps": config.layer_norm_epsilon}
                stack.bank["final_layer_norm"], switched = T5LayerNorm(**size), SwitchedNorm(**size)
                switched.weight = stack.final_layer_norm.weight
                stack.final_layer_norm = switched
                pairs.append((switched, stack.bank["final_layer_norm"]))
            elif side == "decoder":
                size = {"in_features": config.d_model, "out_features": config.vocab_size, "bias": False}
                stack.bank["lm_head"], switched = nn.Linear(**size), SwitchedHead(**size)
                switched.weight = self.lm_head.weight
                self.lm_head = switched
                pairs.append((switched, stack.bank["lm_head"]))
        return pairs

    def switch_parts(self, plan: AssemblyPlan) -> None:
        """Run the bank's own norms and head where a plan does. `set_plan` does this too."""
        running = self.own_parts_of(plan)
        for side in SIDES:
            stack = getattr(self, side)
            if "final_norms" in self.config.own_parts:
                stack.final_layer_norm.switch(stack.bank["final_layer_norm"] if (side, "final_layer_norm") in running else None)
        if "head" in self.config.own_parts:
            self.lm_head.switch(self.decoder.bank["lm_head"] if ("decoder", "lm_head") in running else None)

    def own_parts_of(self, plan: AssemblyPlan) -> list[tuple[str, str]]:
        """`(side, name in its bank)` of the bank's own norms and head that a plan runs: those of sides with modules."""
        return [
            (side, OWN_PARTS[part])
            for side in SIDES
            for part in self.config.own_parts
            if OWN_PARTS[part] in getattr(self, side).bank and set(plan.spans(side)) != {1}
        ]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; a `ValueError` for a bank with a head of its own."""
        if "head" in self.config.own_parts:
            raise ValueError("the bank has a head of its own, which would keep its size; resize the teacher before from_t5")
        return super().resize_token_embeddings(*args, **kwargs)

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
        stacks = {side: getattr(self, side) for side in SIDES}
        tables = {side: stack.block[0].layer[0].SelfAttention.relative_attention_bias for side, stack in stacks.items()}
        in_every_plan = [self.shared, self.lm_head, *tables.values(), *(stack.final_layer_norm for stack in stacks.values())]
        # By identity: a tied head is the embeddings.
        shared = {id(parameter): parameter for module in in_every_plan for parameter in module.parameters()}
        return BankShape(
            num_layers={side: len(stack.block) for side, stack in stacks.items()},
            granularities={side: tuple(self.config.granularities[side]) for side in SIDES},
            block_parameters={side: _count(stack.block[0]) - _count(tables[side]) for side, stack in stacks.items()},
            shared_parameters=sum(parameter.numel() for parameter in shared.values()),
            # A head of the bank's own takes the place of one that is the embeddings, which then cost extra.
            own_head_parameters=self.lm_head.weight.numel()
            if "head" in self.config.own_parts and self.lm_head.weight is self.shared.weight
            else 0,
            bytes_per_parameter=self.dtype.itemsize,
        )

    @property
    def plan(self) -> AssemblyPlan:
        """What runs. Saved with the bank."""
        return AssemblyPlan.from_any(self.config.plan)

    def set_plan(self, strategy: PlanLike, ratio: float | None = None) -> AssemblyPlan:
        """Run a plan from now on, given as in `assemble`; returns it. Nothing is copied."""
        plan = self.choose_plan(strategy, ratio)
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
    def using(self, strategy: PlanLike, ratio: float | None = None) -> Iterator["ModularT5ForConditionalGeneration"]:
        """`with bank.using("2x6/2x6"): ...` runs a plan inside the block and the former one after it."""
        former = self.plan
        self.set_plan(strategy, ratio)
        try:
            yield self
        finally:
            self.set_plan(former)

    def choose_plan(self, strategy: PlanLike, ratio: float | None = None) -> AssemblyPlan:
        """The plan that `assemble` would write out for the same arguments."""
        return resolve_plan(self.shape, strategy, ratio)

    def report(self, strategy: PlanLike, ratio: float | None = None) -> PlanReport:
        """Parameters, bytes and ratios of a plan, given as in `assemble`."""
        return self.shape.report(self.choose_plan(strategy, ratio))

    def parameter_map(self, plan: PlanLike) -> dict[str, str]:
        """`{parameter name in the assembled T5: parameter name in the bank}`: assembling is renaming."""
        plan = self.choose_plan(plan)
        mapping = {name: name for name, _ in self.named_parameters(remove_duplicate=False) if not name.startswith(_BLOCK_PREFIXES)}
        for side in SIDES:
            table = f"{side}.block.0.{_BIAS_TABLE}"
            mapping[table] = table
            for position, (start, span) in enumerate(plan.blocks(side)):
                source = _block_name(side, start, span)
                # The original layer's names: a LoRA module has others.
                for name, _ in getattr(self, side).block[start].named_parameters():
                    if name != _BIAS_TABLE:
                        mapping[f"{side}.block.{position}.{name}"] = f"{source}.{name}"
        for side, name in self.own_parts_of(plan):
            mapping["lm_head.weight" if name == "lm_head" else f"{side}.{name}.weight"] = f"{side}.bank.{name}.weight"
        return mapping

    def assemble(self, strategy: PlanLike, ratio: float | None = None, *, share_weights: bool = False) -> T5ForConditionalGeneration:
        """A stock T5 of the size asked for, in evaluation mode, without further training.

        Args:
            strategy: `"size-first"` or `"speed-first"` (the table `STRATEGIES`) with a ratio, or a plan without one: an
                `AssemblyPlan` or its notation, such as `"1x12/4x3"`.
            ratio: layer parameters of the teacher / layer parameters of the result; the first plan of the strategy that reaches
                it is taken. From 1 to the bank's largest.
            share_weights: copy nothing; the result reads, and if trained changes, the bank's own memory.

        Raises:
            ValueError: an unknown strategy, a ratio out of range, a plan that this bank cannot run, or weights to share that are
                not there yet, for LoRA modules are merged into what is returned.
        """
        if share_weights and self.config.lora:
            raise ValueError("LoRA modules are merged when assembling, which makes copies; call merge_and_unload() first to share weights")
        plan = self.choose_plan(strategy, ratio)
        config = T5Config(**_without(self.config.to_dict(), _BANK_FIELDS))
        config.num_layers, config.num_decoder_layers = plan.depths
        set_cache_depth(config)
        config.architectures = [T5ForConditionalGeneration.__name__]
        config.name_or_path = self.config.name_or_path

        bank = dict(self.named_parameters(remove_duplicate=False))
        bank |= {f"{path}.weight": merged for path, merged in self._merged_adapters().items()}
        sources = {name: bank[bank_name] for name, bank_name in self.parameter_map(plan).items()}
        return _built(T5ForConditionalGeneration, config, sources, like=self, share_weights=share_weights)


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


_BIAS_TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"  # in the first original layer of each side
_BLOCK_PREFIXES = tuple(f"{side}.{kind}." for side in SIDES for kind in ("block", "bank"))


def _is_bank_tensor(name: str) -> bool:
    return ".bank." in name


def _is_module_tensor(name: str) -> bool:
    """Whether a tensor of the bank is in a module, not in a part of its own."""
    return own_part_of(name) is None


def own_part_of(name: str) -> str | None:
    """Which of `OWN_PARTS` a tensor of the bank belongs to."""
    return next((part for part, module in OWN_PARTS.items() if f".bank.{module}." in name), None)


def _holds_modules_only(path: Any, kwargs: Mapping[str, Any]) -> bool:
    if path is None:
        return False
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    fields, _ = ModularT5Config.get_config_dict(path, **hub_arguments)
    return fields.get("modules_only", False)


def _block_name(side: str, start: int, span: int) -> str:
    return f"{side}.block.{start}" if span == 1 else f"{side}.bank.{span}.{start // span}"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _without(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _not_a_teacher(name: str, model_type: str | None) -> str:
    reasons = {
        "umt5": "UMT5 has a relative position bias in every layer, which a module for several layers cannot stand in for",
        "modular_t5": "it is a bank already; load it with from_pretrained",
    }
    reason = reasons.get(model_type, "a teacher is a T5ForConditionalGeneration or an MT5ForConditionalGeneration")
    return f"cannot build a bank from {name} (model type {model_type!r}): {reason}"


def _built(
    model_class: type,
    config: T5Config,
    sources: Mapping[str, torch.Tensor],
    *,
    like: T5ForConditionalGeneration,
    share_weights: bool = False,
) -> Any:
    """A model on copies of these tensors, or on themselves; names with the same tensor share a parameter. The rest is as in `like`."""
    # The stacks' own, for older transformers do not carry a later change of the model's to them.
    config._attn_implementation = like.encoder.config._attn_implementation
    config.dtype = like.dtype
    with torch.device("meta"):
        model = model_class(config)
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf in [leaf for leaf, parameter in module._parameters.items() if parameter is not None]:
            name = f"{path}.{leaf}"
            if name not in sources:
                raise ValueError(
                    f"there is no {name} in {type(like).__name__}: a bank is of plain T5 layers, so merge adapters first (merge_and_unload)"
                )
            tensor = sources[name]
            if id(tensor) not in parameters:
                parameters[id(tensor)] = nn.Parameter(tensor.detach() if share_weights else tensor.detach().clone())
            module._parameters[leaf] = parameters[id(tensor)]
    model.generation_config = copy.deepcopy(like.generation_config)
    _record_tie(model)
    return model.eval()


def _record_tie(model: T5ForConditionalGeneration) -> None:
    # T5's configuration says "tied" of every model. Where the head is a matrix of its own, the saved file must say so, or older
    # transformers and tie_weights() replace it by the embeddings.
    model.config.tie_word_embeddings = model.lm_head.weight is model.shared.weight
