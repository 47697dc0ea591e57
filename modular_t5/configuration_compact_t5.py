"""The configuration of a T5 that is smaller inside its layers: a T5's, and every change of structure as a plain field."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .assembly_modular_t5 import SIDES, is_integer, is_number
from .configuration_modular_t5 import CheckedT5Config, set_cache_depth


# The kinds of attention a T5 has, each with the side it is on.
ATTENTIONS = {"encoder": "encoder", "decoder": "decoder", "cross": "decoder"}

# A T5's matrices: all have rows, or columns, as wide as the model.
_MATRIX = re.compile(
    r"shared|lm_head|(encoder|decoder)\.block\.\d+\.layer\.\d\.((SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))"
)

# What a group of `decoded` has, each with its default.
_GROUP = {"matrices": None, "rank": None, "hidden": 0, "keep_factors": False}

# Where the code of a compact T5 lies among the files that are saved with it, for use where this package is not installed.
_AUTO_MAP = {
    "AutoConfig": "configuration_compact_t5.CompactT5Config",
    "AutoModel": "modeling_compact_t5.CompactT5ForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_compact_t5.CompactT5ForConditionalGeneration",
}


class CompactT5Config(CheckedT5Config):
    """A `T5Config` that also says what is smaller inside.

    Args:
        tied_feed_forwards: by side, for each layer the one whose feed-forward it runs: in `{"encoder": [0, 1, 1, 1, 4, 5], ...}` layers
            1 to 3 run that of layer 1. Norms stay a layer's own. None: each layer runs its own.
        tied_layers: by side, for each layer the one whose weights it runs, norms too; a stack's relative position biases stay in
            its first layer.
        heads: by kind of attention (`encoder`, `decoder`, `cross`), for each layer the heads that are left, counted as in the T5
            that it was made of; at least one.
        embedding_rank: dimensions that tokens go through on the way in and out.
        untied_head: of a model with `embedding_rank`, whether the head has factors of its own.
        decoded: groups of matrices whose rows, or columns where those are as wide as the model, are decoded from latents by a decoder
            that they share: `{"matrices": [...], "rank": ..., "hidden": ..., "keep_factors": ...}`, paths of modules, numbers of a latent,
            hidden units of the decoder (0: it is linear), whether matrices are never made, which linear ones allow. A head that is tied
            to embeddings is not named beside them.
        encoder_layerdrop, decoder_layerdrop: how likely a layer, but for the first of its side, is left out of a step of training.
        kwargs: every field of `T5Config`.

    Raises:
        ValueError: a field does not fit the others, or is out of range.
    """

    model_type = "compact_t5"
    _auto_class = "AutoConfig"

    tied_feed_forwards: Mapping[str, Sequence[int]] | None = None
    tied_layers: Mapping[str, Sequence[int]] | None = None
    heads: Mapping[str, Sequence[Sequence[int]]] | None = None
    embedding_rank: int | None = None
    untied_head: bool = False
    decoded: Sequence[Mapping[str, Any]] | None = None
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; a `ValueError` for what a bank says."""
        if config_dict.get("model_type") == "modular_t5":
            raise ValueError("this is a bank, not a compact T5: load it as ModularT5ForConditionalGeneration, and assemble a size of it")
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        layers = {"encoder": self.num_layers, "decoder": self.num_decoder_layers}
        for name in ("tied_feed_forwards", "tied_layers"):
            if (given := getattr(self, name)) is not None:
                setattr(self, name, _checked_ties(name, given, layers))
        if self.tied_layers is not None and self.tied_feed_forwards is not None:
            raise ValueError("tied_layers ties their feed-forwards too; leave out tied_feed_forwards")
        if self.heads is not None:
            self.heads = _checked_heads(self.heads, layers, self.num_heads)
        if self.heads is not None and self.tied_layers is not None:
            raise ValueError("layers that share their weights share their heads: heads cannot be pruned layer by layer")
        if self.embedding_rank is not None and not (is_integer(self.embedding_rank) and 1 <= self.embedding_rank <= self.d_model):
            raise ValueError(f"embedding_rank must be an integer from 1 to d_model ({self.d_model}), got {self.embedding_rank!r}")
        self.embedding_rank = None if self.embedding_rank is None else int(self.embedding_rank)
        if not isinstance(self.untied_head, bool) or (self.untied_head and self.embedding_rank is None):
            raise ValueError(f"untied_head is true or false, and true only with embedding_rank; got {self.untied_head!r}")
        if self.decoded is not None:
            self.decoded = _checked_groups(self.decoded, self)
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if not is_number(rate := getattr(self, name)) or not 0 <= rate < 1:
                raise ValueError(f"{name} must be a number from 0 to below 1, got {rate!r}")
        self.auto_map = dict(_AUTO_MAP)
        set_cache_depth(self)


def _checked_ties(name: str, given: Any, layers: Mapping[str, int]) -> dict[str, list[int]] | None:
    """`given`; None if it ties nothing."""
    if not isinstance(given, Mapping) or set(given) != set(SIDES):
        raise ValueError(f"{name} is a mapping of 'encoder' and 'decoder' to a layer for each layer, got {given!r}")
    for side in SIDES:
        ties = given[side]
        fits = isinstance(ties, list | tuple) and len(ties) == layers[side] and all(map(is_integer, ties))
        if not fits or not all(0 <= tie <= layer and ties[tie] == tie for layer, tie in enumerate(ties)):
            raise ValueError(
                f"{name} must have for each of the {layers[side]} layers of the {side} that layer or an earlier one that has its own, "
                f"got {ties!r}"
            )
    checked = {side: list(map(int, given[side])) for side in SIDES}
    return checked if any(tie != layer for ties in checked.values() for layer, tie in enumerate(ties)) else None


def _checked_heads(given: Any, layers: Mapping[str, int], num_heads: int) -> dict[str, list[list[int]]] | None:
    """`given`; None if no head is gone."""
    if not isinstance(given, Mapping) or set(given) != set(ATTENTIONS):
        raise ValueError(f"heads is a mapping of {', '.join(ATTENTIONS)} to the heads of each layer, got {given!r}")
    for kind, side in ATTENTIONS.items():
        of_layers = given[kind]
        if not isinstance(of_layers, list | tuple) or len(of_layers) != layers[side]:
            raise ValueError(f"heads must name those of each of the {layers[side]} layers of {kind}, got {of_layers!r}")
        for heads in of_layers:
            fits = isinstance(heads, list | tuple) and heads and all(is_integer(head) and 0 <= head < num_heads for head in heads)
            if not fits or sorted(set(heads)) != list(heads):
                raise ValueError(f"the heads of a layer are some of 0 to {num_heads - 1}, ascending, at least one; {kind} has {heads!r}")
    checked = {kind: [list(map(int, heads)) for heads in given[kind]] for kind in ATTENTIONS}
    return checked if any(len(heads) < num_heads for of_layers in checked.values() for heads in of_layers) else None


def _checked_groups(given: Any, config: CompactT5Config) -> list[dict[str, Any]] | None:
    """`given`; None if there are none."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"decoded is a list of groups of matrices, got {given!r}")
    groups, seen = [], set()
    for group in given:
        check_keys("a group of decoded", group, _GROUP)
        matrices, rank, hidden, keep_factors = (group.get(name, default) for name, default in _GROUP.items())
        if not isinstance(matrices, list | tuple) or not matrices or not all(isinstance(m, str) and _MATRIX.fullmatch(m) for m in matrices):
            raise ValueError(
                f"a group of decoded names matrices of a T5, such as 'encoder.block.0.layer.0.SelfAttention.q', got {matrices!r}"
            )
        if len(set(matrices)) < len(matrices) or not seen.isdisjoint(matrices):
            raise ValueError(f"decoded names a matrix twice, of {', '.join(matrices)}")
        seen.update(matrices)
        for name, number, least in (("rank", rank, 1), ("hidden", hidden, 0)):
            if not is_integer(number) or not least <= number <= config.d_model:
                raise ValueError(
                    f"{name} of a group of decoded must be an integer from {least} to d_model ({config.d_model}), got {number!r}"
                )
        if not isinstance(keep_factors, bool) or (keep_factors and (hidden or not {"shared", "lm_head"}.isdisjoint(matrices))):
            raise ValueError(f"keep_factors is true or false, and true only where hidden is 0, and not of embeddings; got {keep_factors!r}")
        groups.append({"matrices": list(matrices), "rank": int(rank), "hidden": int(hidden), "keep_factors": keep_factors})
    if config.embedding_rank is not None and "shared" in seen:
        raise ValueError("embeddings are either factorized (embedding_rank) or decoded")
    if "lm_head" in seen and "shared" not in seen:
        raise ValueError("a head is decoded where embeddings are too")
    return groups or None


def check_keys(name: str, given: Any, known: Iterable[str]) -> None:
    """A `ValueError` if what is given is no mapping, or has a key that is not among those known."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is a mapping with keys of {', '.join(known)}, got {given!r}")
    if unknown := sorted(set(given) - set(known), key=str):
        raise ValueError(f"{name} has no {unknown[0]!r}; it takes {', '.join(known)}")
