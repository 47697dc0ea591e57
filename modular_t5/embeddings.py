"""Smaller embeddings: every token through a few dimensions, and no tokens that are never said.

Sources: Lan et al., "ALBERT", arXiv 1909.11942, for the factors; Chen et al., "GroupReduce", arXiv 1806.06950, for weighing tokens by how
often they occur.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5ForConditionalGeneration

from .assembly_modular_t5 import is_integer
from .building_modular_t5 import built, is_tied, run_like
from .compacting import CompactReport, weighted_factors
from .layout_modular_t5 import EMBEDDINGS, HEAD
from .modeling_compact_t5 import CompactT5ForConditionalGeneration, structure_of


# The names of special tokens that a T5's configurations hold ids of.
_SPECIAL_IDS = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
# What else a generation configuration may name tokens by.
_NAMES_TOKENS = ("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "sequence_bias", "suppress_tokens")
_SPECIAL_TOKENS = ("pad_token", "eos_token", "unk_token", "bos_token", "sep_token", "cls_token", "mask_token")


def count_tokens(dataset: Iterable[Mapping[str, Any]], vocab_size: int) -> torch.Tensor:
    """How often each token occurs in `input_ids` and `labels` of examples, (vocab_size,); a `ValueError` for one beyond."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in dataset:
        ids = torch.tensor([*row["input_ids"], *(label for label in row.get("labels") or () if label != -100)], dtype=torch.long)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"the tokens are 0 to {vocab_size - 1}; an example has {ids.max().item()} or {ids.min().item()}")
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


@torch.no_grad()
def factorize_embeddings(
    model: T5ForConditionalGeneration, rank: int, *, token_counts: Mapping[int, float] | Sequence[float] | torch.Tensor | None = None
) -> tuple[CompactT5ForConditionalGeneration, CompactReport]:
    """Let tokens go through `rank` dimensions on their way in and out, by the same factors where the head is tied to the embeddings.

    They are those of a singular value decomposition weighed by how often tokens occur. Training afterwards recovers what that costs.

    Args:
        model: a T5; left alone.
        rank: from 1 to its `d_model`. Parameters are saved where it is below d_model * vocab_size / (d_model + vocab_size).
        token_counts: of each token, as of `count_tokens`, or by token, 0 for the others; one more is added to each. By default all
            count alike.

    Returns:
        The model and a report: the rank; the error is that of the embeddings, weighed, relative to their size.

    Raises:
        ValueError: the rank is out of range, the counts are not one a token, or the embeddings are factorized already or no numbers.
    """
    structure = structure_of(model)
    if structure.get("embedding_rank") is not None:
        raise ValueError(f"the embeddings go through {structure['embedding_rank']} dimensions already; factorize those of the T5 before")
    vocab_size, d_model = model.shared.weight.shape
    if not is_integer(rank) or not 1 <= rank <= d_model:
        raise ValueError(f"rank must be an integer from 1 to d_model ({d_model}), got {rank!r}")
    if isinstance(token_counts, Mapping):
        if unknown := [token for token in token_counts if not is_integer(token) or not 0 <= token < vocab_size]:
            raise ValueError(f"token_counts are by token, from 0 to {vocab_size - 1}; {unknown[0]!r} is none")
        token_counts = [token_counts.get(token, 0) for token in range(vocab_size)]
    counts = torch.zeros(vocab_size) if token_counts is None else torch.as_tensor(token_counts)
    if counts.shape != (vocab_size,) or not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError(f"token_counts must be {vocab_size} finite numbers of at least 0, a token each, got {tuple(counts.shape)}")
    weights = (counts + 1).to(model.device)
    untied = not is_tied(model)
    matrices = {"shared": model.shared.weight, **({"lm_head.factors": model.lm_head.weight} if untied else {})}
    if not all(matrix.isfinite().all() for matrix in matrices.values()):
        raise ValueError("some embeddings are no numbers")
    factors = {prefix: weighted_factors(matrix, rank, weights) for prefix, matrix in matrices.items()}
    tensors = {f"{prefix}.tokens.weight": tokens for prefix, (tokens, _) in factors.items()}
    tensors |= {f"{prefix}.projection": projection for prefix, (_, projection) in factors.items()}
    compact = CompactT5ForConditionalGeneration.from_t5(model, tensors, embedding_rank=rank, untied_head=untied)
    roots = weights.sqrt()[:, None]
    missed = (roots * (model.shared.weight - compact.shared.weight)).norm() / (roots * model.shared.weight).norm()
    return compact, CompactReport.of(model, compact, missed.item(), rank=rank)


def trim_vocabulary(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, keep: Iterable[str] = ()
) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerBase, CompactReport]:
    """Leave out every token that texts do not use: a model of the same class, stock if it was, and its tokenizer.

    These texts are split as before: a Unigram tokenizer takes the likeliest pieces, which are still there, like the least likely of all, by
    which it weighs what it does not know. To each of their tokens the model gives the score that it gave. Where it would have said a token
    that is gone, it says another: what it answers belongs among the texts. Their tokens have other numbers: a dataset is tokenized anew.

    Args:
        model: a T5; left alone, like the tokenizer.
        tokenizer: of the Unigram kind, as T5's and mT5's are.
        texts: sources, with their prefix if the model takes one, targets and the model's own answers: all that is to be read and said.
        keep: tokens that stay in any case, beside padding, end of text and unknown.

    Returns:
        The model, a `PreTrainedTokenizerFast`, and a report: the ids that are left, in their new order (`token_ids`).

    Raises:
        ValueError: the tokenizer is of another kind or another model's, there are no texts, or a token to keep is none.
    """
    if rank := structure_of(model).get("embedding_rank"):
        raise ValueError(f"the embeddings are factorized (rank {rank}); trim the vocabulary before")
    if isinstance(texts, str) or isinstance(keep, str):
        raise ValueError("texts and keep are several strings each; put the one into a list")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if isinstance(backend, Tokenizer) else {"model": {"type": None}}
    if described["model"]["type"] != "Unigram":
        raise ValueError(f"a vocabulary can be trimmed where the tokenizer is of the Unigram kind, not {type(tokenizer).__name__}")
    pieces = described["model"]["vocab"]
    least_likely = min(range(len(pieces)), key=lambda i: pieces[i][1])
    kept = sorted({least_likely} | _kept_ids(model, tokenizer, list(texts), keep))
    if kept[-1] >= len(model.shared.weight):
        raise ValueError(f"the tokenizer has a token {kept[-1]}, the model {len(model.shared.weight)} tokens: it is another model's")
    renumbered = {old: new for new, old in enumerate(kept)}
    config, generation_config = run_like(model, copy.deepcopy(model.config)), copy.deepcopy(model.generation_config)
    config.vocab_size = len(kept)
    for told in (config, generation_config):
        _renumber(told, renumbered)
    sources = dict(model.named_parameters(remove_duplicate=False))
    rows = torch.tensor(kept, device=model.device)
    tied = is_tied(model)
    sources |= dict.fromkeys((*EMBEDDINGS, *([HEAD] if tied else [])), model.shared.weight[rows])
    if not tied:
        sources[HEAD] = model.lm_head.weight[rows]
    trimmed = built(type(model), config, sources, generation_config)
    return trimmed, _trimmed_tokenizer(tokenizer, described, renumbered), CompactReport.of(model, trimmed, token_ids=kept)


def _kept_ids(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, texts: list[str], keep: Iterable[str]) -> set[int]:
    """What texts use, what is special, what is to stay."""
    if not texts:
        raise ValueError("there are no texts to see what tokens they use")
    ids = {i for row in tokenizer(texts).input_ids for i in row}
    vocabulary = tokenizer.get_vocab()
    for token in keep:
        if token not in vocabulary:
            raise ValueError(f"the tokenizer has no token {token!r} to keep")
        ids.add(vocabulary[token])
    ids |= {vocabulary[token] for name in _SPECIAL_TOKENS if (token := getattr(tokenizer, name, None)) is not None}
    for told in (model.config, model.generation_config):
        for name in _SPECIAL_IDS:
            value = getattr(told, name, None)
            ids |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return ids


def _renumber(told: Any, renumbered: Mapping[int, int]) -> None:
    """The special tokens' ids of a configuration."""
    for name in _SPECIAL_IDS:
        value = getattr(told, name, None)
        if value is not None:
            setattr(told, name, [renumbered[i] for i in value] if isinstance(value, list) else renumbered[value])
    if isinstance(told, GenerationConfig) and (named := [name for name in _NAMES_TOKENS if getattr(told, name, None)]):
        raise ValueError(f"the generation configuration names tokens by number ({', '.join(named)}); take that out before trimming")


def _trimmed_tokenizer(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], renumbered: Mapping[int, int]
) -> PreTrainedTokenizerBase:
    unigram = described["model"]
    unigram["vocab"] = [piece for i, piece in enumerate(unigram["vocab"]) if i in renumbered]
    if unigram["unk_id"] is not None:
        unigram["unk_id"] = renumbered[unigram["unk_id"]]
    described["added_tokens"] = [
        {**token, "id": renumbered[token["id"]]} for token in described["added_tokens"] if token["id"] in renumbered
    ]
    for token in ((described.get("post_processor") or {}).get("special_tokens") or {}).values():
        token["ids"] = [renumbered[i] for i in token["ids"]]
    special = {name: token for name in _SPECIAL_TOKENS if (token := getattr(tokenizer, name, None)) is not None}
    ids = tokenizer.get_vocab()
    return PreTrainedTokenizerFast(
        extra_special_tokens=[token for token in tokenizer.extra_special_tokens if ids[token] in renumbered],
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **special,
    )
