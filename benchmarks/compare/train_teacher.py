"""Train a small T5 on pairs of texts, to be a teacher that methods of compression can be compared on.

From nothing, with a tokenizer made of the same texts; or, with `--start_from DIR`, from a T5 that was not trained to the end, or with
`--repeat_layers 2` from one of half the depth:

    python benchmarks/compare/train_teacher.py --train_file train.jsonl --validation_file validation.jsonl --test_file test.jsonl \
        --source_lang en --target_lang de --output_dir out/teacher

The files are JSON lines in the Hub's translation format. The same command again continues from the last checkpoint. When training is over
the folder holds the best model by validation loss, its tokenizer, and a card with schedule, losses and scores. Whether it is at its end is
shown by a second training that starts from it and finds nothing better. Every argument of `Seq2SeqTrainingArguments` may be given too;
their defaults are in `RECIPE`.
"""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Adafactor,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modular_t5.baselines import DistillationTrainer, set_dropout
from modular_t5.measuring import environment, generate_texts
from modular_t5.pairs import Pairs, scores_of, signatures
from modular_t5.presenting import markdown_table
from modular_t5.training_args import DistillationArguments


@dataclass
class TeacherArguments:
    """What to train on what."""

    train_file: str = field(metadata={"help": "JSON lines in the Hub's translation format."})
    validation_file: str = field(metadata={"help": "The same, for the loss that says when to stop."})
    test_file: str = field(metadata={"help": "The same, for the scores on the card."})
    source_lang: str = field(metadata={"help": "Key of the source in `translation`."})
    target_lang: str = field(metadata={"help": "Key of the target in `translation`."})
    max_length: int = field(default=64, metadata={"help": "Of sources and targets, in tokens; what is longer is cut."})
    start_from: str | None = field(
        default=None, metadata={"help": "Folder of a T5 with its tokenizer to continue from; else from nothing."}
    )
    repeat_layers: int = field(
        default=1, metadata={"help": "With start_from, begin with every layer so many times in a row, their outputs divided by that."}
    )
    num_layers: int = field(default=6, metadata={"help": "Of each side."})
    d_model: int = field(default=128, metadata={"help": "Width."})
    d_ff: int = field(default=512, metadata={"help": "Width of the feed-forward."})
    num_heads: int = field(default=4, metadata={"help": "Of attention, d_model / num_heads wide each."})
    vocab_size: int = field(default=6000, metadata={"help": "Of the joint Unigram vocabulary."})
    dropout_rate: float = field(default=0.15, metadata={"help": "Of embeddings and residual branches; inside of these there is none."})


# Adafactor scales every matrix's step by its own size: T5's embeddings start some ten times larger than the rest.
RECIPE = {
    "logit_weight": 0.0,
    "hidden_weight": 0.0,
    "learning_rate": 0.02,
    "lr_scheduler_type": "linear",
    "warmup_steps": 300,
    "max_steps": 9000,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 250,
    "save_steps": 250,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "report_to": "none",
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def main() -> None:
    parser = HfArgumentParser((TeacherArguments, DistillationArguments))
    parser.set_defaults(**RECIPE)
    args, training = parser.parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    set_seed(training.seed)
    train, validation, test = (
        Pairs.read(file, args.source_lang, args.target_lang) for file in (args.train_file, args.validation_file, args.test_file)
    )
    model, tokenizer = starting_point(args, train)
    set_dropout(model, args.dropout_rate, inner=0.0)  # the costliest part of a step on a CPU; none of it is in the configuration
    trainer = DistillationTrainer(
        model,
        training,
        train_dataset=train.tokenized(tokenizer, args.max_length, args.max_length),
        eval_dataset=validation.tokenized(tokenizer, args.max_length, args.max_length),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        optimizers=(Adafactor(model.parameters(), lr=training.learning_rate, scale_parameter=True, relative_step=False), None),
    )
    out = Path(training.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.is_dir() else None)
    trainer.save_model()
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # scored in float32
    scores = {
        name: scores_of(generate_texts(model.eval(), tokenizer, test.sources, max_new_tokens=args.max_length, **decoding), test.targets)
        for name, decoding in {"greedy": {}, "beam 4": {"num_beams": 4}}.items()
    }
    card = card_of(trainer, args, scores)
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def starting_point(args: TeacherArguments, train: Pairs) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """The T5 to continue, or a new one. Attention is eager: in bfloat16 on a CPU its gradients are the faster."""
    if args.repeat_layers < 1 or (args.repeat_layers > 1 and args.start_from is None):
        raise ValueError(
            f"repeat_layers={args.repeat_layers} must be at least 1, and above 1 there must be a start_from whose layers are repeated"
        )
    if args.start_from is not None:
        model = AutoModelForSeq2SeqLM.from_pretrained(args.start_from, dtype=torch.float32, attn_implementation="eager")
        model.config.dropout_rate = args.dropout_rate
        model = model if args.repeat_layers == 1 else deepened(model, args.repeat_layers)
        return model, AutoTokenizer.from_pretrained(args.start_from)
    tokenizer = trained_tokenizer(train, args.vocab_size)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=args.d_model,
        d_kv=args.d_model // args.num_heads,
        d_ff=args.d_ff,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        dropout_rate=args.dropout_rate,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    return T5ForConditionalGeneration(config), tokenizer


def deepened(model: T5ForConditionalGeneration, times: int) -> T5ForConditionalGeneration:
    """A T5 of every layer so many times in a row, what they add to the residual stream divided by that: about the same function.

    Source of the stacking: Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019.
    """
    config = copy.deepcopy(model.config)
    config.num_layers, config.num_decoder_layers = times * config.num_layers, times * config.num_decoder_layers
    deeper, weights = type(model)(config), model.state_dict()
    deeper.generation_config = model.generation_config
    for name, weight in deeper.state_dict().items():
        shallow = re.sub(r"(?<=block\.)\d+", lambda number: str(int(number[0]) // times), name)
        weight.copy_(weights[shallow] / (times if re.search(r"\.(o|wo)\.weight$", name) else 1))
    return deeper


def trained_tokenizer(train: Pairs, vocab_size: int) -> PreTrainedTokenizerBase:
    """A joint Unigram tokenizer like T5's own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*train.sources, *train.targets], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def card_of(trainer: DistillationTrainer, args: TeacherArguments, scores: dict[str, dict[str, float]]) -> str:
    """The card: what it is, how it was trained, its losses and scores."""
    state, training, config = trainer.state, trainer.args, trainer.model.config
    told = environment()
    facts = {
        "layers": f"{config.num_layers}+{config.num_decoder_layers}",
        "width": f"d_model {config.d_model}, d_ff {config.d_ff}, {config.num_heads} heads",
        "parameters": f"{trainer.model.num_parameters():,}",
        "vocabulary": f"{config.vocab_size:,}, joint, Unigram (`tokenizer.json`)",
        "started from": (args.start_from or "nothing") + (f", every layer {args.repeat_layers} times" if args.repeat_layers > 1 else ""),
        "optimizer": f"Adafactor, scaled by each matrix's size; batch {training.train_batch_size * training.world_size}, label smoothing "
        f"{training.label_smoothing_factor:g}, dropout {args.dropout_rate:g} on residuals and embeddings",
        "schedule": f"{training.lr_scheduler_type.value}, peak {training.learning_rate:g}, {training.warmup_steps:g} steps of warm-up",
        "best step": f"{state.best_global_step} of {state.max_steps}, which the folder holds",
        "command": f"`{told['command']}`",
        "date": told["date"],
        "hardware": told["hardware"],
        "versions": ", ".join(f"{name} {number}" for name, number in told["versions"].items()),
        "seed": str(training.seed),
    }
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    rates = {entry["step"]: entry["learning_rate"] for entry in state.log_history if "learning_rate" in entry}
    shown = [entry for number, entry in enumerate(evaluations) if number % max(1, len(evaluations) // 20) == 0 or entry is evaluations[-1]]
    losses = [[str(entry["step"]), f"{entry['eval_loss']:.4f}", f"{rates.get(entry['step'], float('nan')):g}"] for entry in shown]
    return "\n\n".join(
        [
            f"# A T5 for {args.source_lang}-{args.target_lang}, a teacher to compare methods on",
            markdown_table(["", ""], list(map(list, facts.items())), left=2),
            "Scores on the test split: " + "; ".join(f"{name}: {value}" for name, value in signatures().items()) + ".",
            markdown_table(
                ["decoding", *scores["greedy"]], [[name, *(f"{value:.2f}" for value in of.values())] for name, of in scores.items()]
            ),
            f"Validation cross-entropy, without label smoothing; best {state.best_metric:.4f}:",
            markdown_table(["step", "loss", "learning rate"], losses, left=0),
            "",
        ]
    )


if __name__ == "__main__":
    main()
