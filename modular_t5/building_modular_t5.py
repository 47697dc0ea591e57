"""Making a model of tensors that are there already."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration


def dtype_of(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The type that a T5 of this type has a parameter in: transformers keeps some in float32 where a model is in float16."""
    keeps = dtype == torch.float16 and not set(name.split(".")).isdisjoint(T5ForConditionalGeneration._keep_in_fp32_modules)
    return torch.float32 if keeps else dtype


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type, or its name; None for None and "auto"."""
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type of torch, its name, or 'auto'; got {dtype!r}")
    return dtype


@torch.inference_mode(False)
def built(
    model_class: type,
    config: T5Config,
    sources: Mapping[str, torch.Tensor],
    generation_config: GenerationConfig,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    share_weights: bool = False,
) -> Any:
    """A model on copies of these tensors, or on themselves; names with the same tensor share a parameter."""
    dtype = torch_dtype(dtype)
    config.dtype = dtype or next(iter(sources.values())).dtype
    with torch.device("meta"):
        model = model_class(config)
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf in [leaf for leaf, parameter in module._parameters.items() if parameter is not None]:
            name = f"{path}.{leaf}"
            if name not in sources:
                raise ValueError(f"{model_class.__name__} needs {name}, which is not there; adapters are merged first (merge_and_unload)")
            tensor = sources[name]
            if tensor.shape != (wanted := module._parameters[leaf].shape):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, and by the configuration {tuple(wanted)}")
            if id(tensor) not in parameters:
                own = tensor.detach().to(device=device, dtype=dtype_of(name, dtype))
                mine = own.data_ptr() != tensor.data_ptr() and not own.is_inference()
                parameters[id(tensor)] = nn.Parameter(own if share_weights or mine else own.clone())
            module._parameters[leaf] = parameters[id(tensor)]
    model.generation_config = copy.deepcopy(generation_config)
    record_tie(model)
    return model.eval()


def record_tie(model: Any) -> None:
    """Let a T5's configuration say whether its head is tied to the embeddings.

    Of itself it says "tied" of every model. Where the head is a matrix of its own, the saved file must say so, or older transformers
    and `tie_weights()` replace it by the embeddings. Where there is no matrix, but factors, these are tied by other means.
    """
    model.config.tie_word_embeddings = is_tied(model)


def is_tied(model: Any) -> bool:
    """Whether a T5's head is the matrix of its embeddings."""
    return "weight" in model.lm_head._parameters and model.lm_head.weight is model.shared.weight


def run_like(model: T5ForConditionalGeneration, config: T5Config) -> T5Config:
    """`config`, for a model that computes as `model` does."""
    # The stacks' own, for older transformers do not carry a later change of the model's to them.
    config._attn_implementation = model.encoder.config._attn_implementation
    return config
