"""A saved bank, opened: what is in it, and its tensors by name, fetched and read when asked for.

A bank may be saved whole, or as modules alone that name their teacher, or as low-rank differences from layers of that teacher; here they
are alike.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import GenerationConfig, MT5ForConditionalGeneration, PreTrainedConfig, T5ForConditionalGeneration
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .building_modular_t5 import dtype_of, torch_dtype
from .choosing_modular_t5 import BankShape
from .configuration_modular_t5 import ModularT5Config, stock_config
from .layout_modular_t5 import EMBEDDINGS, HEAD, SHARED, bank_shape, initial_name, is_bank_tensor, own_part_of, shaped_like, tensor_names
from .storage_modular_t5 import HUB_ARGUMENTS, StoredTensors, fingerprint


_TEACHERS = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_arguments_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where on the Hub files are, and how to get them."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}


def commit_of(source: str | os.PathLike, **hub_arguments: Any) -> str | None:
    """The commit that a revision of a Hub repository is now; None for a folder."""
    return None if os.path.isdir(source) else extract_commit_hash(cached_file(source, CONFIG_NAME, **hub_arguments), None)


def saved_generation_config(source: str | os.PathLike, **hub_arguments: Any) -> GenerationConfig | None:
    """The generation configuration that is saved with a model, if one is."""
    if not cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_arguments):
        return None
    try:
        return GenerationConfig.from_pretrained(source, **hub_arguments)
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the {GENERATION_CONFIG_NAME} of {source} is not as it must be: {error}") from error


def load_teacher(
    name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[T5ForConditionalGeneration | MT5ForConditionalGeneration, str | None]:
    """The T5 of a folder or Hub id, and its commit there; never runs code that comes with it.

    Raises:
        ValueError: it is no T5 with a head.
    """
    commit = commit_of(name_or_path, **hub_arguments_of(kwargs))
    kwargs |= {"revision": commit} if commit else {}
    model_type = PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments_of(kwargs))[0].get("model_type")
    if model_type not in _TEACHERS:
        raise ValueError(_not_a_teacher(str(name_or_path), model_type))
    return _TEACHERS[model_type].from_pretrained(name_or_path, **kwargs), commit


def hub_teacher(config: ModularT5Config) -> tuple[str, str]:
    """Hub id and commit of a bank's teacher; a `ValueError` if its configuration does not tell both."""
    named, revision = config.teacher["name_or_path"] or "", config.teacher["revision"] or ""
    try:
        validate_repo_id(named)
    except HFValidationError as error:
        raise ValueError(f"their teacher is named {named!r}, which is no Hub id") from error
    if not _COMMIT.fullmatch(revision):
        raise ValueError(f"of their teacher {named!r} no commit is named, but {revision!r}")
    return named, revision


def check_is_teacher(model: Any) -> None:
    """A `ValueError` if a model is not a stock T5 with a head."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, tuple(_TEACHERS.values())) or model_type not in _TEACHERS:
        raise ValueError(_not_a_teacher(type(model).__name__, model_type))


def _not_a_teacher(name: str, model_type: str | None) -> str:
    reasons = {
        "umt5": "UMT5 has a relative position bias in every layer, which a module for several layers cannot stand in for",
        "modular_t5": "it is a bank already; load it with from_pretrained",
    }
    reason = reasons.get(model_type, "a teacher is a T5ForConditionalGeneration or an MT5ForConditionalGeneration")
    return f"cannot build a bank from {name} (model type {model_type!r}): {reason}"


def on_hub(config: ModularT5Config) -> bool:
    """Whether a bank's teacher is named by Hub id and commit."""
    try:
        return bool(hub_teacher(config))
    except ValueError:
        return False


def shape_in(dtype: torch.dtype, sizes: Mapping[str, int], config: ModularT5Config) -> BankShape:
    """The counts of a bank whose sizes are to be of this type; `sizes` as of `bank_shape`."""
    wide = {name for name in sizes if dtype_of(name, dtype) != dtype}
    return bank_shape(sizes, config, dtype.itemsize, wide)


def teacher_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The teacher's weights by name, out of a teacher or of a bank; a tied head is left out."""
    return {name: parameter for name, parameter in model.named_parameters() if not is_bank_tensor(name)}


class SavedBank:
    """A bank in a folder or on the Hub.

    Args:
        source: the folder or Hub id.
        teacher: of modules saved alone, in place of the one that their configuration names: a model, a folder or a Hub id.
        variant: part of the weights' file names.
        strict: refuse a bank that has too few or too many tensors.
        hub_arguments: some of `HUB_ARGUMENTS`. The revision is looked up once, so that all files are of one commit.

    Raises:
        ValueError: it is no bank; its files do not belong together; its teacher is not named as it must be, or has other weights.
        OSError: something cannot be found or fetched.
    """

    def __init__(
        self, source: str | os.PathLike, *, teacher: Any = None, variant: str | None = None, strict: bool = True, **hub_arguments: Any
    ):
        self.source, self.hub_arguments = source, dict(hub_arguments)
        folder = os.stat(source).st_ino if os.path.isdir(source) else None
        self.revision: str | None = commit_of(source, **hub_arguments)
        if self.revision is not None:
            self.hub_arguments["revision"] = self.revision
        try:
            fields, _ = ModularT5Config.get_config_dict(source, **self.hub_arguments)
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the {CONFIG_NAME} of {source} is not as it must be: {error}") from error
        model_type = fields.get("model_type") if isinstance(fields, dict) else None
        if model_type != ModularT5Config.model_type:
            raise ValueError(
                f"{source} is of model type {model_type!r}: it is no bank; ModularT5ForConditionalGeneration.from_t5 builds one around a T5"
            )
        if cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **self.hub_arguments):
            # transformers would load the model that it names instead of the bank
            raise ValueError(f"{source} holds an adapter_config.json, which is of peft's own adapters and not of banks; take it away")
        self.config: ModularT5Config = ModularT5Config.from_dict(fields)
        if self.config.lora and not self.config.modules_only:
            raise ValueError(f"{source} has a configuration that contradicts itself: lora belongs to a bank of modules alone")
        if teacher is not None and not self.config.modules_only:
            raise ValueError(f"{source} holds its own teacher; leave teacher= out, or build a bank by from_t5")
        self._told_tied = fields.get("tie_word_embeddings", True) is not False  # which every T5's configuration forgets
        # Names that the files may, but need not, have the embeddings under, beside their own.
        self._of_embeddings = {*EMBEDDINGS, *([HEAD] if self._told_tied else [])} - {SHARED}
        self.stored = StoredTensors(source, variant=variant, folder=folder, **self.hub_arguments)
        self._teacher = teacher
        self.config.tie_word_embeddings = not self._has_head  # which T5's configuration has forgotten by now
        if strict:
            self._check_names()

    @property
    def origin(self) -> dict[str, str | None]:
        """What an assembled model remembers."""
        return {"bank": str(self.source), "revision": self.revision}

    @property
    def names(self) -> list[str]:
        """Of all tensors of the bank, the teacher's included, wherever they come from; those with several names once."""
        return [name for name in tensor_names(self.one_layer, self.config) if self._actual(name) == name]

    def has(self, name: str) -> bool:
        """Whether a tensor is there; always, unless the bank was opened without `strict`."""
        return self.config.modules_only or name in self.stored

    @cached_property
    def one_layer(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a T5 like the teacher with one layer a side. No memory is taken for it."""
        with torch.device("meta"):
            model = T5ForConditionalGeneration(stock_config(self.config, (1, 1)))
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}

    @property
    def shape(self) -> BankShape:
        """The counts that choosing a plan works with."""
        return self.shape_in(None)

    def shape_in(self, dtype: torch.dtype | None) -> BankShape:
        """The same, for sizes of another type than the bank's."""
        sizes = {name: torch.Size(shape).numel() for name, shape in self.one_layer.items() if self._actual(name) == name}
        return shape_in(dtype or torch_dtype(self.config.dtype) or torch.float32, sizes, self.config)

    @cached_property
    def teacher(self) -> Mapping[str, torch.Tensor]:
        """Of modules saved alone, the weights that they were made for, checked by their SHA-256. Nothing else of a teacher is read.

        A teacher's configuration is the bank's own, so one that is named by a bank gets no say in what is built or run.
        """
        given = self._teacher
        if isinstance(given, nn.Module):
            check_is_teacher(given)
            tensors = {name: tensor.detach() for name, tensor in teacher_tensors(given).items()}
        else:
            arguments = {name: value for name, value in self.hub_arguments.items() if name not in ("revision", "subfolder")}
            if given is None:
                given, revision = self._named_teacher()
                arguments |= {"revision": revision} if revision else {}
            stored = StoredTensors(given, **arguments)
            names = {name for name in tensor_names(self.one_layer, self.config) if not is_bank_tensor(name)}
            wanted = names - self._of_embeddings
            if missing := wanted - set(stored):
                raise ValueError(f"{given} is no teacher of these modules: it lacks {len(missing)} tensors, such as {min(missing)}")
            stored.check({name: self.one_layer[shaped_like(name)] for name in wanted})
            tensors = {name: stored[name].to(dtype_of(name, self.config.dtype)) for name in wanted}
        found = fingerprint(tensors)
        if found != self.config.teacher["sha256"]:
            raise ValueError(
                f"the modules in {self.source} were trained for another teacher ({self.config.teacher['name_or_path']}): the weights that "
                f"they came with have SHA-256 {self.config.teacher['sha256']}, these have {found}"
            )
        if (HEAD not in tensors) != self._told_tied:
            raise ValueError(f"{self.source} says of its teacher's head tie_word_embeddings={self._told_tied}, which is not so")
        return tensors

    @property
    def generation_config(self) -> GenerationConfig:
        """The bank's own, or if it was saved without, what its configuration implies."""
        saved = saved_generation_config(self.source, **self.hub_arguments)
        return GenerationConfig.from_model_config(self.config) if saved is None else saved

    def check(self, names: Iterable[str] | None = None) -> None:
        """Fetch the shards of these tensors (by default of all) and compare shapes with the configuration's; read no tensor."""
        wanted = self.names if names is None else names
        stored = {part for name in wanted for part in self._parts(name) if part in self.stored}
        self.stored.check({name: self._stored_shape(name) for name in stored})

    def read(self, names: Iterable[str], *, check: bool = True) -> dict[str, torch.Tensor]:
        """These tensors of the bank, and those alone. Names of one tensor get one tensor. Nobody else has them."""
        names = list(names)
        actual = {name: self._actual(name) for name in names}
        if check:
            self.check(actual.values())
        of_teacher = self.teacher if self.config.modules_only else {}
        tensors = {}
        for name in dict.fromkeys(actual.values()):
            if name in self.stored:
                tensors[name] = self.stored[name]
            elif name in of_teacher:
                tensors[name] = of_teacher[name].clone() if isinstance(self._teacher, nn.Module) else of_teacher[name]
            else:
                tensors[name] = self._with_adapters(name, of_teacher[initial_name(name, self.config)])
        return {name: tensors[actual[name]] for name in names}

    # -- what a tensor is made of ------------------------------------------------------------------------------------------

    @cached_property
    def _has_head(self) -> bool:
        """Whether the head is a matrix of its own."""
        return not self._told_tied if self.config.modules_only else HEAD in self.stored

    def _actual(self, name: str) -> str:
        return SHARED if name in EMBEDDINGS or (name == HEAD and not self._has_head) else name

    def _parts(self, name: str) -> tuple[str, ...]:
        """The names that a tensor, or what it is made of, may have in the files."""
        path = name.removesuffix(".weight")
        return (name, *(f"{path}.lora_{matrix}.default.weight" for matrix in "AB"))

    def _with_adapters(self, name: str, base: torch.Tensor) -> torch.Tensor:
        _, down, up = self._parts(name)
        if down not in self.stored:
            return base.clone()
        return base + self.config.lora["scaling"] * (self.stored[up].to(base) @ self.stored[down].to(base))

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        path, adapter, matrix = name.partition(".lora_")
        if not adapter:
            return self.one_layer[shaped_like(name)]
        rows, columns = self.one_layer[shaped_like(f"{path}.weight")]
        rank = self.config.lora["rank"]
        return (rank, columns) if matrix.startswith("A") else (rows, rank)

    def _check_names(self) -> None:
        """Whether the files hold what the configuration says, and nothing else; of Hub banks as their index tells."""
        every = tensor_names(self.one_layer, self.config)
        found = set(self.stored)
        if not self.config.modules_only:
            missing, extra = set(every) - found - self._of_embeddings, found - set(every)
        elif not self.config.lora:
            wanted = set(filter(is_bank_tensor, every))
            missing, extra = wanted - found, found - wanted
        else:
            weights = {name for name in every if is_bank_tensor(name)}
            own = set(filter(own_part_of, weights))
            matrices = {name for name in weights - own if len(self.one_layer[shaped_like(name)]) == 2}
            pairs = {part: pair for name in matrices for _, *pair in [self._parts(name)] for part in pair}
            present = found & pairs.keys()
            missing = {part for name in present for part in pairs[name]} - found | own - found | (set() if present else {"lora_A"})
            extra = found - own - pairs.keys()
        if missing or extra:
            word, names = ("lacks", missing) if missing else ("has beside those", extra)
            raise ValueError(
                f"{self.source} does not hold the tensors that its configuration tells of: it {word} {len(names)}, the first of them "
                f"{min(names)}; download or save it again"
            )

    def _named_teacher(self) -> tuple[str, str | None]:
        """Name and revision of the teacher, as the configuration has them, if it may be loaded from there."""
        folder = self.config.teacher["name_or_path"] or ""
        if os.path.isdir(self.source) and os.path.isdir(folder):
            return folder, None  # both are on this disk
        try:
            return hub_teacher(self.config)
        except ValueError as error:
            raise ValueError(f"{self.source} holds modules alone, and {error}: pass it as from_pretrained(..., teacher=...)") from error
