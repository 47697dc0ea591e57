"""Assembled models, or any other T5, for other engines: CTranslate2 and ONNX."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MT5ForConditionalGeneration, PreTrainedTokenizerBase, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .offline import restore_matrices


T5 = T5ForConditionalGeneration | MT5ForConditionalGeneration

QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")


def to_ctranslate2(
    model: T5, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike, *, quantization: str | None = None, force: bool = False
) -> Path:
    """Write a T5 as CTranslate2 reads it, with its tokenizer; returns the folder.

    Unlike `ct2-transformers-converter` under transformers 5, which takes every T5 for one whose outputs are scaled, it asks the
    configuration: FLAN-T5, T5 v1.1 and mT5 get the right scores, and so the right beams.

    Args:
        model: a T5 in float32.
        quantization: of the weights, one of `QUANTIZATIONS`; by default float32, as they are.
        force: replace an earlier export, with all that is in its folder.

    Raises:
        ImportError: ctranslate2 is not installed.
        ValueError: the model is none of these, or a bank, or not in float32, or heads of it were pruned; there is no such
            quantization; or there is something in the folder, other than an earlier export and `force`.
    """
    try:
        from ctranslate2.converters.converter import Converter
        from ctranslate2.converters.transformers import T5Loader
        from ctranslate2.specs.model_spec import OPTIONAL
    except ImportError as error:
        raise ImportError("to_ctranslate2 needs ctranslate2: pip install ctranslate2") from error
    _check(model)
    if getattr(model.config, "heads", None) is not None:
        raise ValueError("CTranslate2 takes all attention of a model to have as many heads, and some of this one's are gone; use to_onnx")
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"unknown quantization {quantization!r}; choose one of {', '.join(QUANTIZATIONS)}, or None")

    class T5Converter(Converter):
        def _load(self) -> Any:
            with torch.no_grad():
                spec = T5Loader()(copied, tokenizer)
            scaled = getattr(model.config, "scale_decoder_outputs", False)
            spec.decoder.scale_outputs = model.config.d_model**-0.5 if scaled else OPTIONAL
            return spec

    folder = _free(folder, "model.bin", force)
    # Quantizing writes into the tensors that it is given.
    copied = (restore_matrices(model) if getattr(model.config, "decoded", None) else copy.deepcopy(model)).cpu()
    T5Converter().convert(os.fspath(folder), quantization=quantization, force=True)
    tokenizer.save_pretrained(folder)
    return folder


class _Encoder(nn.Module):
    def __init__(self, model: T5):
        super().__init__()
        self.encoder = model.encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Decoder(nn.Module):
    def __init__(self, model: T5):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=BaseModelOutput(encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            use_cache=False,
        ).logits


def to_onnx(model: T5, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike, *, force: bool = False) -> Path:
    """Write a T5 as two ONNX graphs, for any batch and lengths, with its tokenizer; returns the folder.

    `encoder_model.onnx`: `input_ids`, `attention_mask` -> `last_hidden_state`. `decoder_model.onnx`: `input_ids`,
    `encoder_hidden_states`, `encoder_attention_mask` -> `logits`. The decoder is without a cache of keys and values: every step reads
    all tokens before it. Beside them lie the configurations, so that runtimes that know these names find all that they need.

    Args:
        model: a T5 in float32.
        force: replace an earlier export.

    Raises:
        ImportError: onnx is not installed.
        ValueError: the model is none of these, or a bank, or not in float32; or there is something in the folder, other than an earlier
            export and `force`.
    """
    try:
        import onnx  # noqa: F401 - what torch's exporter needs
    except ImportError as error:
        raise ImportError("to_onnx needs onnx: pip install onnx") from error
    _check(model)
    folder = _free(folder, "encoder_model.onnx", force)
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).cpu()
    batch, source, target = 2, 5, 3
    ids, mask = torch.ones(batch, source, dtype=torch.long), torch.ones(batch, source, dtype=torch.long)
    states, decoder_ids = torch.zeros(batch, source, model.config.d_model), torch.ones(batch, target, dtype=torch.long)
    over_source, over_target = {0: "batch", 1: "source"}, {0: "batch", 1: "target"}
    graphs = {
        "encoder_model.onnx": (
            _Encoder(model),
            {"input_ids": (ids, over_source), "attention_mask": (mask, over_source)},
            {"last_hidden_state": over_source},
        ),
        "decoder_model.onnx": (
            _Decoder(model),
            {
                "input_ids": (decoder_ids, over_target),
                "encoder_hidden_states": (states, over_source),
                "encoder_attention_mask": (mask, over_source),
            },
            {"logits": over_target},
        ),
    }
    for name, (module, inputs, outputs) in graphs.items():
        with torch.no_grad(), warnings.catch_warnings():
            # What tracing says of a T5's own code, and of itself: the exporter that is to replace it cannot do dynamic shapes of T5 yet.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                tuple(example for example, _ in inputs.values()),
                folder / name,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={**{each: axes for each, (_, axes) in inputs.items()}, **outputs},
                dynamo=False,
            )
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _free(folder: str | os.PathLike, export: str, force: bool) -> Path:
    """The folder, if nothing in it would be lost but an earlier export that may be."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (force and (folder / export).exists()):
        remedy = "pass force=True to replace it" if (folder / export).exists() else "choose another folder"
        raise ValueError(f"there is something in {folder}; {remedy}")
    return folder


def _check(model: Any) -> None:
    if isinstance(model, ModularT5ForConditionalGeneration):
        raise ValueError("a bank is every size at once; assemble the one to export first")
    if not isinstance(model, T5):
        raise ValueError(f"what is exported is a T5 or mT5 with its head, got {type(model).__name__}")
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}; export it in float32: model.float()")
