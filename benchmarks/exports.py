"""What sizes of a bank are worth in other engines: the same texts, and how fast, beside PyTorch.

    python benchmarks/exports.py --bank DIR --test_file test.jsonl --source_lang en --target_lang de --output benchmarks/results/DATE.json
    python benchmarks/exports.py --shape t5-base --output ...       # random weights: speed alone, every size to the same length

Engines take turns on the same batches in one run. Texts are made greedily; of the first 200 those are counted that differ from PyTorch's in
float32 in any token.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ctranslate2
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.exports import to_ctranslate2
from modular_t5.frontier import markdown_table
from modular_t5.measuring import environment, median_seconds, write_json
from modular_t5.pairs import Pairs, scores_of, signatures


SHAPES = {"t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "vocab_size": 32128}}
PLANS = {6: ["1x6/1x6", "1x6/2x3", "1x6/3x2", "2x3/2x3", "3x2/3x2"], 12: ["1x12/1x12", "1x12/2x6", "1x12/4x3", "2x6/2x6", "4x3/4x3"]}

Ids = list[list[int]]
Engine = Callable[[Ids], Ids]  # sources -> what is generated, without the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--bank", help="folder or Hub id of a bank with its tokenizer")
    parser.add_argument("--test_file", help="JSON lines in the Hub's translation format")
    parser.add_argument("--source_lang")
    parser.add_argument("--target_lang")
    parser.add_argument("--shape", choices=SHAPES, help="a bank of random weights in place of --bank; speed alone")
    parser.add_argument("--examples", type=int, default=1000, help="of the test file")
    parser.add_argument("--timed", type=int, default=96, help="of these, or random sources, those that are timed")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="most new tokens; of random weights, so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    if args.shape:
        config = T5Config(**SHAPES[args.shape], decoder_start_token_id=0)
        bank, tokenizer, pairs = ModularT5ForConditionalGeneration.from_t5(T5ForConditionalGeneration(config)), None, None
        sources = torch.randint(3, 32000, (args.timed, 32)).tolist()
    else:
        bank, tokenizer = ModularT5ForConditionalGeneration.from_pretrained(args.bank), AutoTokenizer.from_pretrained(args.bank)
        pairs = Pairs.read(args.test_file, args.source_lang, args.target_lang).head(args.examples)
        sources = tokenizer(pairs.sources).input_ids
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for plan in PLANS[bank.config.num_layers]:
            rows += rows_of(bank, plan, tokenizer, pairs, sources, Path(folder) / plan.replace("/", "_"), args)
            speeds = {(row["plan"], row["engine"]): row["tokens_per_second"] for row in rows}
            first = rows[0]["plan"]
            for row in rows:
                row["speedup"] = row["tokens_per_second"] / speeds[first, "HF"]
                if pairs:
                    row["kept"] = 100 * row["scores"]["BLEU"] / rows[0]["scores"]["BLEU"]
            told = {**environment(), "ctranslate2": ctranslate2.__version__, "seed": args.seed}
            told |= {"arguments": {name: str(value) for name, value in vars(args).items()}}
            write_json(args.output, {**told, **({"metrics": signatures()} if pairs else {}), "rows": rows})
            print(table(rows), flush=True)


def rows_of(
    bank: ModularT5ForConditionalGeneration,
    plan: str,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Pairs | None,
    sources: Ids,
    folder: Path,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row an engine."""
    model = bank.assemble(plan, share_weights=True)
    engines: dict[str, Engine] = {
        "HF": partial(hugging_face, model, args=args),
        "HF bf16": partial(hugging_face, bank.assemble(plan, dtype="bfloat16"), args=args),
    }
    for name, quantization in (("CTranslate2", None), ("CTranslate2 int8", "int8")):
        written = to_ctranslate2(model, tokenizer or numbers_for_tokens(), folder / name, quantization=quantization)
        translator = ctranslate2.Translator(str(written), compute_type=quantization or "float32", intra_threads=torch.get_num_threads())
        tokens = tokenizer.convert_ids_to_tokens if tokenizer else lambda ids: [str(i) for i in ids]
        ids = tokenizer.convert_tokens_to_ids if tokenizer else lambda tokens: [int(token) for token in tokens]
        engines[name] = partial(ctranslate, translator, tokens, ids, args=args)
    report = bank.report(plan)
    rows = [{"plan": plan, "depths": report.plan.depths, "engine": name, "parameters": report.total_parameters} for name in engines]
    made: dict[str, Ids] = {}
    for row, (name, engine) in zip(rows, engines.items(), strict=True):
        if pairs:
            made[name] = in_batches(engine, sources, args.batch_size)
            row["scores"] = scores_of(tokenizer.batch_decode(made[name], skip_special_tokens=True), pairs.targets)
            row["differing"] = sum(a != b for a, b in zip(made[name][:200], made["HF"][:200], strict=True))
    timed = sources[: args.timed]
    tokens = {name: sum(map(len, in_batches(engine, timed, args.batch_size))) for name, engine in engines.items()}
    tasks = [partial(in_batches, engine, timed, args.batch_size) for engine in engines.values()]
    for row, seconds in zip(rows, median_seconds(tasks, rounds=args.rounds, description=f"Timing {plan}"), strict=True):
        row["tokens_per_second"] = tokens[row["engine"]] / seconds
    return rows


def in_batches(engine: Engine, sources: Ids, batch_size: int) -> Ids:
    """Sources of like length together; results in the order of the sources."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    made: Ids = [[] for _ in sources]
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for i, ids in zip(batch, engine([sources[i] for i in batch]), strict=True):
            made[i] = ids
    return made


@torch.inference_mode()
def hugging_face(model: T5ForConditionalGeneration, sources: Ids, *, args: argparse.Namespace) -> Ids:
    longest = max(map(len, sources))
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sources])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sources])
    forced = {"min_new_tokens": args.length} if args.shape else {}
    made = model.generate(input_ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=args.length, **forced)
    return [words_of(ids[1:], args) for ids in made.tolist()]


def ctranslate(translator: Any, tokens: Callable, ids: Callable, sources: Ids, *, args: argparse.Namespace) -> Ids:
    forced = {"min_decoding_length": args.length} if args.shape else {}
    results = translator.translate_batch([tokens(each) for each in sources], beam_size=1, max_decoding_length=args.length, **forced)
    return [words_of(ids(result.hypotheses[0]), args) for result in results]


def words_of(ids: list[int], args: argparse.Namespace) -> list[int]:
    """Without padding and end; of random weights, all."""
    return ids if args.shape else [i for i in ids if i > 1]


def numbers_for_tokens() -> Any:
    """A tokenizer whose tokens are the numbers themselves, for random weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(32128)}, unk_token="2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1", unk_token="2")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    scored = "scores" in rows[0]
    header = ["plan", "engine", *(["BLEU", "kept", "differ of 200"] if scored else []), "tokens/s", "speed-up"]
    cells = [
        [
            row["plan"],
            row["engine"],
            *([f"{row['scores']['BLEU']:.2f}", f"{row['kept']:.1f} %", str(row["differing"])] if scored else []),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]
    return markdown_table(header, cells, left=2)


if __name__ == "__main__":
    main()
