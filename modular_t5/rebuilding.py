"""Making an assembled model again from what it remembers, and comparing."""

import os
from typing import Any, NamedTuple

import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .layout_modular_t5 import EMBEDDINGS, HEAD, SHARED
from .loading_modular_t5 import saved_generation_config
from .model_card import origin_of
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .storage_modular_t5 import StoredTensors


# Of a configuration, what says nothing about the computation, or what the tensors say better.
_ASIDE = {"_name_or_path", "architectures", "dtype", "modular_t5", "tie_word_embeddings", "transformers_version", "_from_model_config"}


class Rebuilt(NamedTuple):
    """A model made anew, the bank, revision and plan that it was made of, and what is otherwise in the saved one."""

    model: T5ForConditionalGeneration
    origin: dict[str, str | None]
    differences: list[str]


def rebuild(
    directory_or_repo: str | os.PathLike,
    *,
    bank: str | os.PathLike | None = None,
    revision: str | None = None,
    teacher: Any = None,
    **hub_arguments: Any,
) -> Rebuilt:
    """Assemble a saved model anew from the bank, revision and plan that its configuration names, and compare every tensor.

    A model that was fine-tuned after assembling, or a bank that was trained on, shows as differences.

    Args:
        bank, revision: in place of those that the model remembers.
        teacher: of modules saved alone, as in `from_pretrained`.
        hub_arguments: for both, some of `HUB_ARGUMENTS`.

    Raises:
        ValueError: the model remembers no bank that can be told for sure and none is given, or that bank cannot be read or has no
            such plan.
        OSError: the model or the bank is not there.
    """
    config = T5Config.from_pretrained(directory_or_repo, **hub_arguments)
    origin = origin_of(config)
    if bank is not None:
        origin |= {"bank": str(bank), "revision": revision}
    elif origin["bank"] is None:
        raise ValueError(f"{directory_or_repo} was assembled from a bank that had not been saved; name the bank as it was saved then")
    elif origin["revision"] is None and not os.path.isdir(origin["bank"]):
        raise ValueError(f"{directory_or_repo} was assembled from the folder {origin['bank']}, which is not here; name the bank")
    elif revision is not None:
        origin["revision"] = revision
    wanted = hub_arguments if origin["revision"] is None else {**hub_arguments, "revision": origin["revision"]}
    model = ModularT5ForConditionalGeneration.assemble_from_pretrained(origin["bank"], origin["plan"], teacher=teacher, **wanted)
    stored = StoredTensors(directory_or_repo, **hub_arguments)
    expected = dict(model.named_parameters())
    # Under each of its names a file may hold a tensor that has several.
    expected |= {name: expected[SHARED] for name in (*EMBEDDINGS, HEAD) if name in stored and name not in expected}
    differences = sorted(expected.keys() ^ set(stored))
    for name in sorted(expected.keys() & set(stored)):
        saved = stored[name]
        if not torch.equal(expected[name].to(saved.dtype), saved):
            differences.append(name)
    differences += [f"{CONFIG_NAME}: {name}" for name in _differing(config.to_dict(), model.config.to_dict())]
    generation = saved_generation_config(directory_or_repo, **hub_arguments)
    if generation is not None:
        changed = _differing(generation.to_diff_dict(), model.generation_config.to_diff_dict())
        differences += [f"{GENERATION_CONFIG_NAME}: {name}" for name in changed]
    return Rebuilt(model, origin, differences)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names under which two configurations say different things."""
    return sorted(name for name in (one.keys() | other.keys()) - _ASIDE if one.get(name) != other.get(name))
