"""LoRA modules: each a frozen copy of an original layer plus a low-rank difference that trains.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the layers are peft's.
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from .modeling_modular_t5 import ModularT5ForConditionalGeneration


def add_adapters(bank: ModularT5ForConditionalGeneration, peft_config: LoraConfig) -> None:
    """Turn the modules of a fresh bank into LoRA modules, in place: frozen, with adapters that train.

    Raises:
        ValueError: the configuration is not plain LoRA of fixed rank, targets nothing in a module, or the modules are trained already.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"peft_config must be a LoraConfig, got {type(peft_config).__name__}")
    if peft_config.target_modules is None:
        peft_config.target_modules = set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["t5"])
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "trainable_token_indices"):
        if getattr(peft_config, name, None):
            raise ValueError(f"LoRA modules are saved as pairs of matrices with one scaling; {name} does not fit that, leave it out")
    if peft_config.bias != "none":
        raise ValueError(f"T5 has no biases to train; leave bias at 'none', got {peft_config.bias!r}")
    modules = [(module, bank.initial_layer(side, start, span)) for side, start, span, module in bank.modules_of_bank()]
    for module, source in modules:
        if any(not torch.equal(parameter, source.get_parameter(name)) for name, parameter in module.named_parameters()):
            raise ValueError("LoRA modules start as copies of original layers, but this bank is trained already; build one by from_t5")
    for module, _ in modules:
        try:
            inject_adapter_in_model(peft_config, module)
        except ValueError as error:
            raise ValueError(f"no adapter fits into a module: {error}") from error
    layers = [layer for module, _ in modules for layer in module.modules() if hasattr(layer, "lora_A")]
    bank.config.lora = {"rank": peft_config.r, "scaling": layers[0].scaling["default"]}
