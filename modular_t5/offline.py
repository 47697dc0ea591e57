"""Offline compression: matrices kept as a few numbers a row and one decoder for many rows, without training the model.

Rows are decoded linearly, which is a truncated singular value decomposition, or by an auto-encoder. This is fitted to rows of length 1 by
cosine and squared error, their lengths kept beside; first with an encoder, then the latents by themselves, for which nothing has to
encode a row that is not in the matrix.

Sources: Banaei et al., "Revisiting Offline Compression: Going Beyond Factorization-based Methods for Transformer Language Models",
arXiv 2302.04045; Hsu et al., "Language model compression with weighted low-rank factorization", arXiv 2207.00112, for weighing rows.
"""

import copy
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from .assembly_modular_t5 import is_integer, is_number
from .building_modular_t5 import built, dtype_of, is_tied, run_like
from .compacting import CompactReport, weighted_factors
from .configuration_compact_t5 import CompactT5Config
from .configuration_modular_t5 import t5_fields
from .matrices_compact_t5 import RestoredMatrix, RowDecoder, is_transposed
from .measuring import labelled_batches, on_device
from .modeling_compact_t5 import CompactT5ForConditionalGeneration, structure_of


# Kinds of matrices that may be compressed, each with the ends of their paths.
KINDS = {
    "embeddings": ("shared", "lm_head"),
    "attention": ("Attention.q", "Attention.k", "Attention.v", "Attention.o"),
    "feed_forwards": ("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),
}
METHODS = ("autoencoder", "svd")

# Of the parameters of an auto-encoded group, the part that its decoder's hidden units may take; there are at most d_model.
_HIDDEN_PART = 0.25
_LEARNING_RATE, _COSINE_WEIGHT = 0.01, 0.1


class Encoded(NamedTuple):
    """What rows (N, D) are kept as: latents (N, rank), lengths (N, 1) for an auto-encoder, and the decoder."""

    latents: torch.Tensor
    norms: torch.Tensor | None
    decoder: RowDecoder

    @torch.no_grad()
    def rows(self) -> torch.Tensor:
        """(N, D), as near as it comes."""
        decoded_ND = self.decoder(self.latents)
        return decoded_ND if self.norms is None else decoded_ND * self.norms


def parameters_of(rows: int, width: int, rank: int, hidden: int) -> int:
    """How many numbers rows are kept as, the decoder's with them."""
    linear = rank * (rows + width)
    return linear + rows + hidden * (rank + 1 + width) if hidden else linear


def shape_within(rows: int, width: int, budget: float, method: str) -> tuple[int, int] | None:
    """The largest rank within a number of parameters, and hidden units; None if there is none."""
    if method == "svd":
        rank = min(width, int(budget / (rows + width)))
        return (rank, 0) if rank else None
    for rank in range(width, 0, -1):
        hidden = max(1, min(width, int(_HIDDEN_PART * budget / (rank + 1 + width))))
        if parameters_of(rows, width, rank, hidden) <= budget:
            return rank, hidden
    fewer = int((budget - parameters_of(rows, width, 1, 1)) / (2 + width)) + 1  # beside a rank of 1, less than their part is left
    return (1, fewer) if fewer >= 1 and parameters_of(rows, width, 1, fewer) <= budget else None


def truncated_svd(rows_ND: torch.Tensor, rank: int, weights_N: torch.Tensor) -> Encoded:
    """The nearest by squares, weighed by row."""
    latents, linear = weighted_factors(rows_ND, rank, weights_N)
    decoder = RowDecoder(rank, 0, rows_ND.shape[1]).to(rows_ND)
    decoder.linear.data = linear
    return Encoded(latents, None, decoder)


@torch.inference_mode(False)
@torch.enable_grad()
def autoencoded(
    rows_ND: torch.Tensor, rank: int, hidden: int, weights_N: torch.Tensor, *, steps: int, seed: int, description: str | None = None
) -> Encoded:
    """Fitted by Adam on all rows at once, from a singular value decomposition on: a third of the steps with an encoder of two layers."""
    width, generator = rows_ND.shape[1], torch.Generator().manual_seed(seed)
    rows_ND = rows_ND.detach().clone().float()
    norms_N1 = rows_ND.norm(dim=1, keepdim=True)
    units_ND = rows_ND / norms_N1.clamp(min=torch.finfo(torch.float32).tiny)
    weights_N1 = (weights_N / weights_N.mean()).to(rows_ND)[:, None]
    squares_N1 = weights_N1 * norms_N1.square()
    squares_N1 = squares_N1 / squares_N1.mean().clamp(min=torch.finfo(torch.float32).tiny)

    def random(std: float, *shape: int) -> nn.Parameter:
        return nn.Parameter((std * torch.randn(*shape, generator=generator)).to(rows_ND))

    start_NR, linear_RD = weighted_factors(units_ND, rank, torch.ones(len(rows_ND)))
    scale_R = start_NR.square().mean(0).sqrt().clamp(min=1e-6)  # for latents of deviation 1
    decoder = RowDecoder(rank, hidden, width).to(rows_ND)
    decoder.linear = nn.Parameter(linear_RD * scale_R[:, None])
    decoder.inner, decoder.outer = random(rank**-0.5, hidden, rank), random(0.01, hidden, width)
    nn.init.zeros_(decoder.bias)
    encoder = [nn.Parameter(torch.linalg.pinv(decoder.linear.detach())), random(0.1, width, 2 * width), random(0.01, 2 * width, rank)]

    def encoded() -> torch.Tensor:
        linear_DR, inner_DH, outer_HR = encoder
        return units_ND @ linear_DR + nn.functional.gelu(units_ND @ inner_DH) @ outer_HR

    def fit(learning: list[nn.Parameter], latents: Callable[[], torch.Tensor], count: int) -> None:
        optimizer = torch.optim.Adam([*decoder.parameters(), *learning], lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 10 * (step + 1) / count) * (1 - step / count))
        for _ in range(count):
            decoded_ND = decoder(latents())
            squared_N1 = squares_N1 * (decoded_ND - units_ND).square().sum(1, keepdim=True)
            cosine_N1 = weights_N1 * (1 - nn.functional.cosine_similarity(decoded_ND, units_ND))[:, None]
            optimizer.zero_grad()
            (squared_N1 + _COSINE_WEIGHT * cosine_N1).mean().backward()
            optimizer.step()
            schedule.step()
            bar.update()

    with tqdm(total=steps, desc=description, disable=description is None, leave=False) as bar:
        fit(encoder, encoded, steps // 3)
        latents_NR = nn.Parameter(encoded().detach())
        fit([latents_NR], lambda: latents_NR, steps - steps // 3)
    return Encoded(latents_NR.detach(), norms_N1, decoder.requires_grad_(False))


@torch.no_grad()
def compress_offline(
    model: T5ForConditionalGeneration,
    ratio: float,
    *,
    matrices: Sequence[str] = tuple(KINDS),
    method: str = "autoencoder",
    together: bool = True,
    keep_factors: bool = False,
    dataset: Sequence[Mapping[str, Any]] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    steps: int = 600,
    seed: int = 0,
    description: str | None = "Compressing",
) -> tuple[CompactT5ForConditionalGeneration, CompactReport]:
    """Keep matrices as latents of their rows and a decoder. They are restored once, or, with gradients, at every use.

    Of `o` and `wo` columns are meant for rows: what is decoded is as wide as the model. Of the methods of the compact wing it comes last;
    adapters, too, go on what `restore_matrices` makes of it. A decoder is a child of its first matrix's module, a side's model by itself
    may so lack it.

    Args:
        model: a T5; left alone.
        ratio: parameters of the chosen matrices, before / after, reached by every group that shares a decoder.
        matrices: which, of `KINDS`. Where the head is tied to the embeddings, it stays so.
        method: `"autoencoder"`, or `"svd"`, a truncated singular value decomposition.
        together: whether the matrices of the same place in all layers of a side share a decoder, such as all queries of the encoder; else
            each has its own.
        keep_factors: never restore matrices, but multiply with their factors, which is less memory, and less work where the ratio is
            above 2. For `"svd"`, and not for embeddings, whose factors `factorize_embeddings` keeps.
        dataset: a few hundred examples, `input_ids` and `labels`: rows are weighed by how much their loss depends on them (`sensitivity`).
            By default all count alike.
        processing_class: the tokenizer, for padding them.
        steps: of fitting a group's auto-encoder, each over all of its rows.
        seed: of where that begins.
        description: of the progress bars; none without it.

    Returns:
        The model and a report: the groups, as in the configuration (`decoded`), and the error of each kind (`errors`), relative to the
        size of its matrices, unweighed; the error is that of all.

    Raises:
        ValueError: something is out of range, is not there, or is compressed already; or examples are given without a tokenizer, or have
            no labels.
    """
    structure = structure_of(model)
    _check(matrices, method, together, keep_factors, ratio, steps, seed)
    if (dataset is None) != (processing_class is None):
        raise ValueError("dataset and processing_class are given together, or neither")
    if "embeddings" in matrices and structure.get("embedding_rank"):
        raise ValueError("the embeddings are factorized already: leave 'embeddings' out of matrices, or compress the T5 before")
    kinds = {path: kind for kind in matrices for path in _matrices_of(model, kind)}
    groups = _of_the_same_place(kinds) if together else [[path] for path in kinds]
    shapes = [_shape(model, group, ratio, method) for group in groups]
    weights = {} if dataset is None else sensitivity(model, dataset, processing_class, list(kinds), description=description)
    decoded, tensors = [], {}
    for group, (rank, hidden) in zip(groups, shapes, strict=True):
        rows = [_rows(model.get_submodule(path).weight, path).detach().float() for path in group]
        weights_N = torch.cat([weights[path] if weights else torch.ones(len(of_one)) for path, of_one in zip(group, rows, strict=True)])
        weights_N = (weights_N / weights_N.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0.01)  # no row is given up
        if method == "svd":
            encoded = truncated_svd(torch.cat(rows), rank, weights_N)
        else:
            encoded = autoencoded(torch.cat(rows), rank, hidden, weights_N, steps=steps, seed=seed, description=description)
        decoded.append({"matrices": group, "rank": rank, "hidden": hidden, "keep_factors": keep_factors})
        tensors |= {name: tensor.to(dtype_of(name, model.dtype)) for name, tensor in _tensors(encoded, group, list(map(len, rows))).items()}
    compact = CompactT5ForConditionalGeneration.from_t5(model, tensors, decoded=decoded)
    missed, sizes = (dict.fromkeys(matrices, 0.0) for _ in range(2))
    for path, kind in kinds.items():
        matrix = model.get_submodule(path).weight.float()
        missed[kind] += (compact.get_submodule(path).restored().float() - matrix).square().sum().item()
        sizes[kind] += matrix.square().sum().item()
    errors = {kind: math.sqrt(missed[kind] / max(sizes[kind], sys.float_info.min)) for kind in matrices}
    error = math.sqrt(sum(missed.values()) / max(sum(sizes.values()), sys.float_info.min))
    return compact, CompactReport.of(model, compact, error, decoded=decoded, errors=errors)


@torch.no_grad()
def restore_matrices(model: CompactT5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """The same model with its decoded matrices restored for good: stock if nothing else in it is compact, and free for other methods.

    Raises:
        ValueError: no matrix of it is decoded.
    """
    if not getattr(getattr(model, "config", None), "decoded", None):
        raise ValueError(f"there are no decoded matrices in {type(model).__name__} to restore: it takes what compress_offline made")
    fields = {**t5_fields(model.config), "decoded": None}
    config = CompactT5Config(**fields)
    plain = all(getattr(config, name) == getattr(CompactT5Config, name) for name in CompactT5Config.own_fields())
    if plain:
        config = T5Config(**{name: value for name, value in fields.items() if name not in CompactT5Config.own_fields()})
    sources = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if isinstance(module, RestoredMatrix):
            sources[f"{path}.weight"] = module.restored()
    embeddings = sources.get("shared.weight")
    if embeddings is not None:
        sources |= dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), embeddings)
        sources.setdefault("lm_head.weight", embeddings)
    config.name_or_path = model.config.name_or_path
    of_class = T5ForConditionalGeneration if plain else CompactT5ForConditionalGeneration
    return built(of_class, run_like(model, config), sources, model.generation_config)


@torch.inference_mode(False)
def sensitivity(
    model: T5ForConditionalGeneration,
    dataset: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    paths: Sequence[str],
    *,
    batch_size: int = 8,
    description: str | None = "Weighing rows",
) -> dict[str, torch.Tensor]:
    """How much the loss of examples depends on each row of matrices: the sum of its squared derivatives, the Fisher information, about.

    Args:
        dataset, processing_class: as of `compress_offline`.
        paths: of the modules that have the matrices.
        batch_size: examples whose mean loss is derived at a time.

    Returns:
        By path, (rows,) on the CPU.

    Raises:
        ValueError: there are no examples, or one has no labels; or what comes out are no numbers.
    """
    batches = labelled_batches(model, dataset, processing_class, batch_size)
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    matrices = [copied.get_submodule(path).weight for path in paths]
    sums = [torch.zeros(())] * len(paths)
    with torch.enable_grad():
        for batch in tqdm(batches, desc=description, disable=description is None, leave=False):
            derivatives = torch.autograd.grad(copied(**on_device(batch, copied), use_cache=False).loss, matrices)
            squares = [_rows(of_one.float(), path).square().sum(1).cpu() for of_one, path in zip(derivatives, paths, strict=True)]
            sums = [total + of_batch for total, of_batch in zip(sums, squares, strict=True)]
    if not torch.cat(sums).isfinite().all() or not any(of_one.any() for of_one in sums):
        raise ValueError(f"derivatives of the loss are no numbers in {model.dtype}: take the model in float32, or look at its weights")
    return dict(zip(paths, sums, strict=True))


def _check(matrices: Any, method: Any, together: Any, keep_factors: Any, ratio: Any, steps: Any, seed: Any) -> None:
    if not isinstance(matrices, list | tuple) or not matrices or not all(kind in list(KINDS) for kind in matrices):
        raise ValueError(f"matrices are some of {', '.join(KINDS)}, in a list; got {matrices!r}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    for name, given in (("together", together), ("keep_factors", keep_factors)):
        if not isinstance(given, bool):
            raise ValueError(f"{name} is true or false, got {given!r}")
    if keep_factors and (method != "svd" or "embeddings" in matrices):
        raise ValueError("keep_factors goes with method='svd' and other matrices than embeddings, whose factors factorize_embeddings keeps")
    if not is_number(ratio) or not ratio > 1:
        raise ValueError(f"ratio must be a number above 1, got {ratio!r}")
    for name, number, least in (("steps", steps, 3), ("seed", seed, 0)):
        if not is_integer(number) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")


def _shape(model: T5ForConditionalGeneration, group: Sequence[str], ratio: float, method: str) -> tuple[int, int]:
    """Rank and hidden units of a group; a `ValueError` if there are none within the ratio, or the matrices are no numbers."""
    matrices = [model.get_submodule(path).weight for path in group]
    if not all(matrix.isfinite().all() for matrix in matrices):
        raise ValueError(f"some numbers in {', '.join(group)} are none")
    total, width = sum(matrix.numel() for matrix in matrices), model.config.d_model
    if (shape := shape_within(total // width, width, total / ratio, method)) is None:
        largest = total / parameters_of(total // width, width, 1, int(method == "autoencoder"))
        can = f"up to {math.floor(100 * largest) / 100:g}x" if largest > 1.01 else f"not at all by {method!r}"
        raise ValueError(f"{group[0]} and what shares its decoder, {total:,} numbers, can be compressed {can}, got {ratio!r}")
    return shape


def _matrices_of(model: T5ForConditionalGeneration, kind: str) -> list[str]:
    """The paths of the modules that have a model's own matrices of a kind, each once."""
    if kind == "embeddings":
        return ["shared"] if is_tied(model) else ["shared", "lm_head"]
    return [path for path, module in model.named_modules() if path.endswith(KINDS[kind]) and isinstance(module, nn.Linear)]


def _of_the_same_place(paths: Iterable[str]) -> list[list[str]]:
    """Paths that differ in nothing but the number of the layer, in groups."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"block\.\d+", "block", path), []).append(path)
    return list(groups.values())


def _rows(matrix: torch.Tensor, path: str) -> torch.Tensor:
    """A matrix, or its transpose, with rows as wide as the model."""
    return matrix.T if is_transposed(path) else matrix


def _tensors(encoded: Encoded, group: Sequence[str], counts: list[int]) -> dict[str, torch.Tensor]:
    """What a group's modules have, by name."""
    tensors = {f"{group[0]}.decoder.{name}": tensor for name, tensor in encoded.decoder.state_dict().items()}
    tensors |= {f"{path}.latents": latents for path, latents in zip(group, encoded.latents.split(counts), strict=True)}
    if encoded.norms is not None:
        tensors |= {f"{path}.norms": norms for path, norms in zip(group, encoded.norms.split(counts), strict=True)}
    return tensors
