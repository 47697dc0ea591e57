"""LoRA modules: each a frozen copy of an original layer plus a low-rank difference that trains.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the layers are peft's.
"""

import copy
from dataclasses import fields

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from .modeling_modular_t5 import ModularT5ForConditionalGeneration


# What may be set of a LoraConfig; the rest would make something else than pairs of matrices.
_FREE = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules", "exclude_modules"),
    *("task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
)


def add_adapters(bank: ModularT5ForConditionalGeneration, peft_config: LoraConfig) -> None:
    """Turn the modules of a fresh bank into LoRA modules, in place. A bank that has such modules already keeps them.

    Raises:
        ValueError: the configuration is not plain LoRA of one rank, targets nothing in a module, or is another than the bank's; or
            the modules are trained already. The bank is as it was then.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"peft_config must be a LoraConfig, got {type(peft_config).__name__}")
    peft_config = copy.copy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["t5"])
    defaults = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(peft_config, field.name)
        if field.name not in _FREE and value != getattr(defaults, field.name):
            raise ValueError(
                "LoRA modules are saved as pairs of matrices with one scaling, to be added to layers of the teacher; "
                f"{field.name}={value!r} does not fit that, leave it out"
            )
    if peft_config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} changes the layers of the teacher that adapters are added to; "
            "choose True, False or 'gaussian'"
        )
    described = {
        "rank": peft_config.r,
        "scaling": peft_config.lora_alpha / (peft_config.r**0.5 if peft_config.use_rslora else peft_config.r),
    }
    if bank.config.lora:
        if bank.config.lora != described:
            raise ValueError(f"the bank has LoRA modules of {bank.config.lora}, the peft_config says {described}; merge_and_unload() first")
        return
    modules = [(module, bank.initial_layer(side, start, span)) for side, start, span, module in bank.modules_of_bank()]
    for module, source in modules:
        if any(not torch.equal(parameter, source.get_parameter(name)) for name, parameter in module.named_parameters()):
            raise ValueError("LoRA modules start as copies of original layers, but this bank is trained already; build one by from_t5")
    # One of each side on a copy first: the two have different layers, and a bank is converted as a whole or not at all.
    by_side = {side: module for side, _, _, module in bank.modules_of_bank()}
    for trial in (*(copy.deepcopy(module) for module in by_side.values()), *(module for module, _ in modules)):
        try:
            inject_adapter_in_model(peft_config, trial)
        except ValueError as error:
            raise ValueError(f"no adapter fits into a module: {error}") from error
    bank.config.lora = described
