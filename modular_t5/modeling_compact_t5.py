"""A T5 that is smaller inside its layers: tied feed-forwards or layers, fewer heads, embeddings in two factors, decoded matrices.

T5's own modules and forwards run. The configuration alone says the shapes; what is tied is one module, which the layers that share it refer
to, so that its tensors have one name: they are saved once, and stay tied whatever is done to the model.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

from .assembly_modular_t5 import SIDES
from .building_modular_t5 import built, is_tied, record_tie, run_like
from .configuration_compact_t5 import ATTENTIONS, CompactT5Config, check_keys
from .configuration_modular_t5 import t5_fields
from .matrices_compact_t5 import FactoredLinear, RestoredEmbedding, RestoredLinear, RestoredMatrix, RowDecoder


class PrunedAttention(T5Attention):
    """T5's attention with some of its heads. Relative position biases are those of all heads of a stack, of which it takes its own.

    Args:
        like: the attention that it stands in for, of all heads.
        heads: which of them it has.
    """

    def __init__(self, like: T5Attention, heads: list[int]):
        super().__init__(like.config, like.has_relative_attention_bias, like.layer_idx, like.is_causal)
        width = len(heads) * like.key_value_proj_dim
        self.q, self.k, self.v = (nn.Linear(like.d_model, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, like.d_model, bias=False)
        self.heads, self.n_heads, self.inner_dim = list(heads), len(heads), width
        self.is_cross = like.is_decoder and not like.is_causal

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """T5's. What is passed on is the bias of all heads; attention over the source has none, and each layer may have other heads."""
        own = None if self.is_cross or position_bias is None else position_bias[:, self.heads]
        output, computed, weights = super().forward(hidden_states, mask, key_value_states, own, past_key_values, **kwargs)
        if self.is_cross:
            return output, None, weights
        return output, computed.of_all_heads if position_bias is None else position_bias, weights

    def compute_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of the heads that there are; the first layer's forward finds that of all in it."""
        of_all_heads = super().compute_bias(*args, **kwargs)
        bias = of_all_heads[:, self.heads]
        bias.of_all_heads = of_all_heads
        return bias


class SharedAttention(T5Attention):
    """T5's attention with the matrices of another layer's, looked up there whenever it runs; its place in the cache is its own.

    Args:
        like: the attention that it stands in for.
        owner: the one that has the matrices.
    """

    def __init__(self, like: T5Attention, owner: T5Attention):
        super().__init__(like.config, like.has_relative_attention_bias, like.layer_idx, like.is_causal)
        for name in "qkvo":
            del self._modules[name]
        self.__dict__["owner"] = owner

    q, k, v, o = (property(lambda self, name=name: getattr(self.owner, name)) for name in "qkvo")


class FactorizedEmbedding(nn.Module):
    """Embeddings (vocabulary, d_model) as a product (vocabulary, rank) (rank, d_model)."""

    def __init__(self, config: CompactT5Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.embedding_rank)
        self.projection = nn.Parameter(torch.empty(config.embedding_rank, config.d_model))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape -> (..., d_model)."""
        return self.tokens(input_ids) @ self.projection

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> (..., vocabulary)."""
        in_rank = nn.functional.linear(hidden_states, self.projection)
        return nn.functional.linear(in_rank, self.tokens.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The product, made anew at each call."""
        return self.tokens.weight @ self.projection


class EmbeddingHead(nn.Module):
    """The head by embeddings that are no matrix: those of the input, or its own."""

    def __init__(self, factors: FactorizedEmbedding | RestoredEmbedding):
        super().__init__()
        self.factors = factors

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """States (..., d_model) -> logits (..., vocabulary)."""
        return self.factors.scores(hidden_states)

    @property
    def weight(self) -> torch.Tensor:
        """As of the factors."""
        return self.factors.weight


class LayerDropBlocks(nn.ModuleList):
    """A stack's layers, of which training runs some: each but the first, which has the position biases, is left out at a rate."""

    def __init__(self, blocks: nn.ModuleList, rate: float):
        super().__init__(blocks._modules.values())
        self.rate = rate

    def __iter__(self) -> Iterator[nn.Module]:
        for i, block in enumerate(self._modules.values()):
            if not (i and self.training and torch.rand(()).item() < self.rate):
                yield block


class CompactT5ForConditionalGeneration(T5ForConditionalGeneration):
    """A T5 with fewer parameters inside. It trains, generates, saves and loads as any T5.

    Made by the methods of the compact wing, one of another.
    """

    config_class = CompactT5Config
    accepts_loss_kwargs = False  # T5's loss is a mean over tokens, which the Trainer would scale by accumulation steps and processes
    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, config: CompactT5Config):
        super().__init__(config)
        for side in SIDES:
            blocks = getattr(self, side).block
            for layer, tie in enumerate((config.tied_layers or {}).get(side, ())):
                if tie != layer:
                    _share_block(blocks[layer], blocks[tie])
            for layer, tie in enumerate((config.tied_feed_forwards or {}).get(side, ())):
                if tie != layer:
                    _refer(blocks[layer].layer[-1], "DenseReluDense", blocks[tie].layer[-1].DenseReluDense)
        for kind, of_layers in (config.heads or {}).items():
            for layer, heads in enumerate(of_layers):
                if len(heads) < config.num_heads:
                    path = attention_path(kind, layer)
                    self.set_submodule(path, PrunedAttention(self.get_submodule(path), heads))
        for side in SIDES:
            if rate := getattr(config, f"{side}_layerdrop"):
                getattr(self, side).block = LayerDropBlocks(getattr(self, side).block, rate)
        if config.embedding_rank is not None:
            self.set_input_embeddings(FactorizedEmbedding(config))
            self.lm_head = EmbeddingHead(FactorizedEmbedding(config) if config.untied_head else self.shared)
        for group in config.decoded or ():
            self._decode(**group)
        if not isinstance(self.shared, nn.Embedding):
            places = ["encoder.embed_tokens", "decoder.embed_tokens"]
            if isinstance(self.lm_head, EmbeddingHead) and self.lm_head.factors is self.shared:
                places.append("lm_head.factors")
            of_shared = [name for name, _ in self.shared.named_parameters()]
            self._tied_weights_keys = {f"{place}.{name}": f"shared.{name}" for place in places for name in of_shared}
        self.post_init()

    def _decode(self, matrices: list[str], rank: int, hidden: int, keep_factors: bool) -> None:
        """Let matrices be decoded by one decoder, which the first of them has."""
        decoder, own = RowDecoder(rank, hidden, self.config.d_model), dict(self.named_modules())
        for path in matrices:
            if path not in own:
                raise ValueError(f"decoded names {path}, which this T5 has not, or shares with another layer that has it")
            of_class = RestoredEmbedding if path == "shared" else FactoredLinear if keep_factors else RestoredLinear
            restored = of_class(own[path], path, decoder, owner=path == matrices[0])
            if path != "shared":
                self.set_submodule(path, restored)
                continue
            self.set_input_embeddings(restored)
            if not any("lm_head" in group["matrices"] for group in self.config.decoded):
                self.lm_head = EmbeddingHead(restored)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: parameters are initialised by transformers' functions, which leave alone what was loaded."""
        return False

    @classmethod
    def from_t5(
        cls,
        model: T5ForConditionalGeneration | MT5ForConditionalGeneration,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **changes: Any,
    ) -> "CompactT5ForConditionalGeneration":
        """A model like `model`, which is left alone, with changes in its structure.

        Args:
            model: a T5, whatever its code, or a compact one.
            tensors: those that are other than the model's of that name, or that it has not.
            changes: of the fields that `CompactT5Config` has beside a T5's.

        Returns:
            In evaluation mode, all of it trainable.

        Raises:
            ValueError: the model is no T5, or the configuration is not possible, or tensors do not fit it.
        """
        check_keys("from_t5", changes, sorted(CompactT5Config.own_fields()))
        config = run_like(model, CompactT5Config(**{**structure_of(model), **changes}))
        config.name_or_path = model.config.name_or_path
        sources = {**dict(model.named_parameters(remove_duplicate=False)), **(tensors or {})}
        decoded = {path for group in config.decoded or () for path in group["matrices"]}
        if "shared" in decoded and "lm_head" not in decoded and not is_tied(model):
            raise ValueError("this model's head is a matrix of its own: name lm_head in decoded, beside shared")
        compact = built(cls, config, sources, model.generation_config)
        check_keys("tensors", tensors or {}, dict(compact.named_parameters(remove_duplicate=False)))
        return compact

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(places) > 1 and (model.config.decoded or model.config.embedding_rank):
            raise ValueError(
                f"factors and decoders are where one of their modules is: load the model on one device, not {sorted(map(str, places))}"
            )
        record_tie(model)
        return loaded

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As `PreTrainedModel.get_expanded_tied_weights_keys`; embeddings that are no matrix are tied in any case."""
        if isinstance(self.shared, nn.Embedding):
            return super().get_expanded_tied_weights_keys(all_submodels)
        return dict(self._tied_weights_keys)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FactorizedEmbedding):
            init.normal_(module.projection, mean=0.0, std=self.config.initializer_factor * self.config.embedding_rank**-0.5)
        elif module is self and not isinstance(self.shared, nn.Embedding):
            pass  # T5's would initialise the embeddings' weight, which is made of other parameters
        elif not isinstance(module, SharedAttention):
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        """As `PreTrainedModel.initialize_weights`, which asks a stack, not this model, about what is in the stack."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, RowDecoder | RestoredMatrix):
                module.init_weights()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`; a `ValueError` for another number of embeddings that are no matrix."""
        if isinstance(self.shared, nn.Embedding):
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                "factorized or decoded embeddings cannot be resized: resize those of the T5 that this was made of, or of restore_matrices"
            )
        return self.shared


def structure_of(model: Any) -> dict[str, Any]:
    """The fields of `CompactT5Config` that a T5, compact or not, has; a `ValueError` if it is none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = (T5ForConditionalGeneration, MT5ForConditionalGeneration)
    if not isinstance(model, known) or model_type not in ("t5", "mt5", CompactT5Config.model_type):
        told = "assemble a size of the bank first" if model_type == "modular_t5" else "it takes a T5, an mT5, or what it made of one"
        raise ValueError(f"cannot make {type(model).__name__} (model type {model_type!r}) compact: {told}")
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("there are adapters in this model, which are layers of their own: merge them first (merge_and_unload)")
    if getattr(model.config, "decoded", None):
        raise ValueError(
            "this model's matrices are decoded: take the model before (compress_offline comes last), or restore_matrices of it"
        )
    return t5_fields(model.config)


def running_tensors(model: T5ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """By the names that a T5 whose layers share nothing would have, the tensors that run there."""
    ties = dict.fromkeys(("tied_feed_forwards", "tied_layers"))
    with torch.device("meta"):
        untied = CompactT5ForConditionalGeneration(CompactT5Config(**{**structure_of(model), **ties}))
    return {name: attrgetter(name)(model) for name, _ in untied.named_parameters(remove_duplicate=False)}


def attention_path(kind: str, layer: int) -> str:
    """Where in a T5 an attention of `ATTENTIONS` is."""
    return f"{ATTENTIONS[kind]}.block.{layer}.layer.{'1.EncDec' if kind == 'cross' else '0.Self'}Attention"


def _refer(module: nn.Module, name: str, target: nn.Module) -> None:
    """Let a module's child be another's: what is looked up is there, and what is saved, moved and trained is it where it is at home."""
    del module._modules[name]
    module.__dict__[name] = target


def _share_block(block: T5Block, other: T5Block) -> None:
    """All weights, but for relative position biases."""
    for sublayer, others in zip(block.layer, other.layer, strict=True):
        _refer(sublayer, "layer_norm", others.layer_norm)
        for name in ("SelfAttention", "EncDecAttention"):
            if hasattr(sublayer, name):
                setattr(sublayer, name, SharedAttention(getattr(sublayer, name), getattr(others, name)))
        if hasattr(sublayer, "DenseReluDense"):
            _refer(sublayer, "DenseReluDense", others.DenseReluDense)
