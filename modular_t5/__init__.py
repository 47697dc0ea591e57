"""Train a T5's module bank once, assemble any size from it. Importing the package registers its models with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .assembly_modular_t5 import AssemblyPlan
from .calibration import calibrate
from .choosing_modular_t5 import STRATEGIES, BankShape, Latency, PlanReport
from .configuration_compact_t5 import CompactT5Config
from .configuration_modular_t5 import ModularT5Config
from .embeddings import count_tokens, factorize_embeddings, trim_vocabulary
from .feed_forwards import feed_forward_similarity, merge_feed_forwards, plot_similarity
from .frontier import Frontier, measure_frontier
from .heads import head_importance, plot_heads, prune_heads
from .latency import measure_latency
from .layers import drop_layers, share_layers
from .model_card import assembled_card, bank_card
from .modeling_compact_t5 import CompactT5ForConditionalGeneration
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .offline import compress_offline, restore_matrices
from .pairs import Pairs
from .trainer import ModularTrainer
from .training_args import ModularTrainingArguments


for config_class, model_class in (
    (ModularT5Config, ModularT5ForConditionalGeneration),
    (CompactT5Config, CompactT5ForConditionalGeneration),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForSeq2SeqLM.register(config_class, model_class, exist_ok=True)

# What `push_to_hub` writes where there is no card: the files that are saved with a bank, which have to do without the rest of the
# package, have only transformers' own.
ModularT5ForConditionalGeneration.new_card = bank_card

__all__ = [
    "STRATEGIES",
    "AssemblyPlan",
    "BankShape",
    "CompactT5Config",
    "CompactT5ForConditionalGeneration",
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
    "compress_offline",
    "count_tokens",
    "drop_layers",
    "factorize_embeddings",
    "feed_forward_similarity",
    "head_importance",
    "measure_frontier",
    "measure_latency",
    "merge_feed_forwards",
    "plot_heads",
    "plot_similarity",
    "prune_heads",
    "restore_matrices",
    "share_layers",
    "trim_vocabulary",
]
