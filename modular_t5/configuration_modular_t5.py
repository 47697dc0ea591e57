"""The configuration of a bank: a T5's, plus the granularities of each side and the plan that runs."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import T5Config
from transformers.activations import ACT2FN

from .assembly_modular_t5 import MAX_LAYERS, SIDES, AssemblyPlan, PlanLike, checked_plan, is_integer, teacher_plan


DEFAULT_GRANULARITIES = (2, 3, 4, 6)

# Which layer of its span a module starts as a copy of: (first layer of the span, span) -> offset in the span. The layer that reads
# the embeddings is unlike all others, so a module at the bottom had better be it. Measured in benchmarks/initialization.py.
INITIALIZATIONS = {
    "first": lambda start, span: 0,
    "middle": lambda start, span: span // 2,
    "last": lambda start, span: span - 1,
    "bottom-first": lambda start, span: 0 if start == 0 else span - 1,
}

# What a bank may train of its own beside modules: part -> its name in a T5 and in the bank. A head of its own, even where the teacher's
# is tied to the embeddings, comes after them and so has the last word.
OWN_PARTS = {"embeddings": "embed_tokens", "final_norms": "final_layer_norm", "head": "lm_head"}

# Where a bank's code lies among the files that are saved with it, for use where this package is not installed.
_AUTO_MAP = {
    "AutoConfig": "configuration_modular_t5.ModularT5Config",
    "AutoModel": "modeling_modular_t5.ModularT5ForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_modular_t5.ModularT5ForConditionalGeneration",
}

# What a bank's configuration has otherwise than a T5's, beside its own fields.
_NOT_OF_T5 = {"architectures", "auto_map", "decoder_layers", "model_type", "transformers_version"}

# Wider than any T5 by a factor of ten or more. A file that asks for more is refused before memory is taken.
_LARGEST = {
    "num_layers": MAX_LAYERS,
    "num_decoder_layers": MAX_LAYERS,
    "d_model": 1 << 16,
    "d_kv": 1 << 12,
    "d_ff": 1 << 20,
    "num_heads": 1 << 11,
    "vocab_size": 1 << 24,
    "relative_attention_num_buckets": 1 << 12,
    "relative_attention_max_distance": 1 << 20,
}

# What is read of a configuration file. The rest, of later versions or of somebody's making, is left alone.
_READ = {
    *("_commit_hash", "_name_or_path", "architectures", "bos_token_id", "d_ff", "d_kv", "d_model", "decoder_start_token_id"),
    *("dropout_rate", "dtype", "eos_token_id", "feed_forward_proj", "initializer_factor", "layer_norm_epsilon", "model_type"),
    *("num_decoder_layers", "num_heads", "num_layers", "pad_token_id", "prefix", "relative_attention_max_distance"),
    *("relative_attention_num_buckets", "scale_decoder_outputs", "task_specific_params", "tie_word_embeddings", "transformers_version"),
    *("use_cache", "vocab_size"),
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")

_RANGES = {"layer_norm_epsilon": (0, 1), "initializer_factor": (0, 1e3), "dropout_rate": (0, 1)}


class CheckedT5Config(T5Config):
    """A `T5Config` of a sane size, type and activation, or a `ValueError`."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        super().__post_init__(**kwargs)
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not is_integer(value) or not 1 <= value <= largest:
                raise ValueError(f"{name} must be an integer from 1 to {largest}, got {value!r}")
        for name, (smallest, largest) in _RANGES.items():
            if not smallest <= getattr(self, name) <= largest:
                raise ValueError(f"{name} must be from {smallest:g} to {largest:g}, got {getattr(self, name)!r}")
        if not isinstance(self.scale_decoder_outputs, bool):
            raise ValueError(f"scale_decoder_outputs must be true or false, got {self.scale_decoder_outputs!r}")
        if self.dense_act_fn not in ACT2FN:
            raise ValueError(f"unknown activation {self.dense_act_fn!r} (feed_forward_proj is {self.feed_forward_proj!r})")

    @classmethod
    def own_fields(cls) -> set[str]:
        """The fields that it has beside a T5's."""
        return set(cls.__dataclass_fields__) - set(T5Config.__dataclass_fields__)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`, but what the model does not know is ignored, and keywords are validated with the rest."""
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        read = _READ | cls.own_fields()
        try:
            known = {name: value for name, value in config_dict.items() if name in read}
            return super().from_dict({**known, **overrides}, **kwargs)
        except (TypeError, AttributeError, KeyError, StrictDataclassError) as error:
            raise ValueError(f"the configuration of a {cls.model_type} is not as it must be: {error}") from error


class ModularT5Config(CheckedT5Config):
    """A `T5Config` that also says what is in a bank.

    Args:
        granularities: how many consecutive original layers one module stands in for. One sequence for both sides, or a mapping
            `{"encoder": [...], "decoder": [...]}`, which is also how it is stored. By default those of 2, 3, 4, 6 that divide a
            side's number of layers.
        plan: what the bank runs: an `AssemblyPlan`, its notation (`"2x6/2x6"`) or `{"encoder": [...], "decoder": [...]}`, which is
            also how it is stored. By default all original layers, that is, the teacher.
        initialization: which layer of its span a module started as, a name in `INITIALIZATIONS`.
        own_parts: what the bank has of its own beside modules: none or some of `OWN_PARTS`.
        teacher: `{"name_or_path": ..., "revision": ...}` of the T5 that the bank was built around, and, where a bank is saved
            without it, the `"sha256"` of its weights.
        modules_only: whether a saved bank is without its teacher.
        lora: `{"rank": ..., "scaling": ...}` of a bank whose modules are low-rank differences from layers of the teacher.
        calibration: what `calibrate` found modules and plans to cost: `{"modules": {"encoder": {"2": [...], ...}, "decoder": ...},
            "plans": {"2x3/2x3": ...}, "own_parts": ...}`, of each granularity the modules from the bottom up.
        kwargs: every field of `T5Config`.

    Raises:
        ValueError: a dimension is not a positive integer of a sane size, a granularity does not divide its side, or the plan
            does not fit.
    """

    model_type = "modular_t5"
    _auto_class = "AutoConfig"

    granularities: Mapping[str, Sequence[int]] | Sequence[int] | None = None
    plan: PlanLike | None = None
    initialization: str = "bottom-first"
    own_parts: Sequence[str] = ()
    teacher: Mapping[str, str | None] | None = None
    modules_only: bool = False
    lora: Mapping[str, float] | None = None
    calibration: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        layers = {"encoder": self.num_layers, "decoder": self.num_decoder_layers}
        self.granularities = _normalised_granularities(self.granularities, layers)
        plan = teacher_plan(layers) if self.plan is None else AssemblyPlan.from_any(self.plan)
        self.plan = checked_plan(plan, layers, self.granularities).to_dict()
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(f"unknown initialization {self.initialization!r}; choose one of {', '.join(INITIALIZATIONS)}")
        if unknown := set(self.own_parts) - set(OWN_PARTS):
            raise ValueError(f"unknown part {min(unknown)!r}; a bank may have of its own: {', '.join(OWN_PARTS)}")
        self.own_parts = [part for part in OWN_PARTS if part in self.own_parts]
        if not isinstance(self.modules_only, bool):
            raise ValueError(f"modules_only must be true or false, got {self.modules_only!r}")
        self.teacher = _checked_mapping("teacher", self.teacher, {"name_or_path": str, "revision": str, "sha256": str})
        if self.modules_only and not (self.teacher or {}).get("sha256"):
            raise ValueError("a bank of modules alone names its teacher by the SHA-256 of its weights; this configuration does not")
        self.lora = _checked_mapping("lora", self.lora, {"rank": int, "scaling": Real}) if self.lora else None
        if self.lora and not (self.lora["rank"] or 0) >= 1:
            raise ValueError(f"the rank of lora must be a positive integer, got {self.lora['rank']!r}")
        if self.calibration is not None:
            self.calibration = checked_calibration(self.calibration, layers, self.granularities)
        self.auto_map = dict(_AUTO_MAP)
        set_cache_depth(self)


def _checked_mapping(name: str, given: Any, types: Mapping[str, type]) -> dict[str, Any]:
    """`given` with a key for each of `types`, None where there is none."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or set(given) - set(types):
        raise ValueError(f"{name} is a mapping with the keys {', '.join(types)}, got {given!r}")
    for key, value in given.items():
        if value is not None and (not isinstance(value, types[key]) or isinstance(value, bool)):
            raise ValueError(f"{key} of {name} must be of type {types[key].__name__}, got {value!r}")
    return {key: given.get(key) for key in types}


def checked_calibration(given: Any, layers: Mapping[str, int], granularities: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """`given` with strings for granularities, as JSON has them."""
    if not isinstance(given, Mapping) or not {"modules"} <= set(given) <= {"modules", "plans", "own_parts"}:
        raise ValueError(f"calibration is a mapping with the scores of 'modules', and of 'plans' if there are any; got {given!r}")
    modules, plans = given["modules"], given.get("plans") or {}
    if not isinstance(modules, Mapping) or set(modules) != set(SIDES) or not all(isinstance(modules[side], Mapping) for side in SIDES):
        raise ValueError(
            f"the modules of calibration are a mapping of both sides, each of granularities to lists of numbers; got {modules!r}"
        )
    checked: dict[str, dict[str, list[float]]] = {}
    for side in SIDES:
        of_side = {str(s): scores for s, scores in modules[side].items()}
        wanted = {str(s): layers[side] // s for s in granularities[side]}
        if {s: len(scores) if isinstance(scores, list | tuple) else None for s, scores in of_side.items()} != wanted:
            raise ValueError(f"calibration must have of each {side} granularity a number a module, {wanted}; got {of_side!r}")
        checked[side] = {s: [_finite(score) for score in of_side[s]] for s in wanted}
    if not isinstance(plans, Mapping):
        raise ValueError(f"the plans of calibration are a mapping of plans to numbers; got {plans!r}")
    plans = {str(checked_plan(AssemblyPlan.from_any(plan), layers, granularities)): _finite(score) for plan, score in plans.items()}
    return {"modules": checked, "plans": plans, "own_parts": _finite(given.get("own_parts", 0))}


def _finite(score: Any) -> float:
    if not isinstance(score, Real) or isinstance(score, bool) or not abs(score) < 1e9:
        raise ValueError(f"a score of calibration must be a finite number, got {score!r}")
    return float(score)


def t5_fields(config: T5Config) -> dict[str, Any]:
    """What a configuration, of a bank or of a T5, says of a T5."""
    of_bank = ModularT5Config.own_fields() | _NOT_OF_T5
    fields = {name: value for name, value in config.to_dict().items() if name not in of_bank}
    return {"scale_decoder_outputs": False, **fields}  # mT5's code never scales, and its configuration does not say so


def stock_config(config: ModularT5Config, depths: tuple[int, int]) -> T5Config:
    """The configuration of a stock T5 like a bank's teacher, with these numbers of layers in the encoder and the decoder."""
    stock = T5Config(**t5_fields(config))
    stock.num_layers, stock.num_decoder_layers = depths
    stock.architectures = ["T5ForConditionalGeneration"]
    stock.name_or_path = config.name_or_path
    set_cache_depth(stock)
    return stock


def set_cache_depth(config: T5Config) -> None:
    """Make `generate` size the decoder's cache by the decoder.

    transformers (5.17 to 5.23) makes one slot an encoder layer, which for a deeper decoder ends in an IndexError and for a shallower
    one wastes memory, unless the configuration has a field `decoder_layers`.
    """
    if config.num_decoder_layers != config.num_layers or hasattr(config, "decoder_layers"):
        config.decoder_layers = config.num_decoder_layers


def _normalised_granularities(given: Any, layers: Mapping[str, int]) -> dict[str, list[int]]:
    if given is None:
        given = {side: [s for s in DEFAULT_GRANULARITIES if layers[side] % s == 0] for side in SIDES}
    elif not isinstance(given, Mapping):
        given = dict.fromkeys(SIDES, _listed(given))
    if set(given) != set(SIDES):
        raise ValueError(f"granularities by side have the keys 'encoder' and 'decoder', got {sorted(map(str, given))}")
    given = {side: _listed(granularities) for side, granularities in given.items()}
    for side, granularities in given.items():
        for s in granularities:
            if not is_integer(s) or s < 2:
                raise ValueError(f"a granularity is an integer of at least 2, got {s!r} for the {side}")
            if layers[side] % s:
                fitting = [d for d in range(2, layers[side] + 1) if layers[side] % d == 0]
                raise ValueError(f"granularity {s} does not divide the {side}'s {layers[side]} layers; these do: {fitting}")
    if not any(given.values()):
        raise ValueError(f"a bank needs modules: no granularity is given, or none of {DEFAULT_GRANULARITIES} divides {dict(layers)}")
    return {side: sorted({int(s) for s in given[side]}) for side in SIDES}


def _listed(granularities: Any) -> list[Any]:
    if isinstance(granularities, str) or not isinstance(granularities, Iterable):
        raise ValueError(f"granularities are integers such as (2, 3, 6), got {granularities!r}")
    return list(granularities)
