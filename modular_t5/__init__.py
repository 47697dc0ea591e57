"""Train a T5's module bank once, assemble any size from it. Importing the package registers the bank with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .assembly_modular_t5 import AssemblyPlan
from .calibration import calibrate
from .choosing_modular_t5 import STRATEGIES, BankShape, Latency, PlanReport
from .configuration_modular_t5 import ModularT5Config
from .frontier import Frontier, measure_frontier
from .latency import measure_latency
from .model_card import assembled_card, bank_card
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .pairs import Pairs
from .trainer import ModularTrainer
from .training_args import ModularTrainingArguments


AutoConfig.register(ModularT5Config.model_type, ModularT5Config, exist_ok=True)
AutoModel.register(ModularT5Config, ModularT5ForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(ModularT5Config, ModularT5ForConditionalGeneration, exist_ok=True)

# What `push_to_hub` writes where there is no card: the files that are saved with a bank, which have to do without the rest of the
# package, have only transformers' own.
ModularT5ForConditionalGeneration.new_card = bank_card

__all__ = [
    "STRATEGIES",
    "AssemblyPlan",
    "BankShape",
    "Frontier",
    "Latency",
    "ModularT5Config",
    "ModularT5ForConditionalGeneration",
    "ModularTrainer",
    "ModularTrainingArguments",
    "Pairs",
    "PlanReport",
    "assembled_card",
    "bank_card",
    "calibrate",
    "measure_frontier",
    "measure_latency",
]
