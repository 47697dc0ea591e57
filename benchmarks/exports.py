"""What sizes of a bank are worth in other engines: the same texts, and how fast, beside PyTorch.

    python benchmarks/exports.py --bank DIR --test_file test.jsonl --source_lang en --target_lang de --output benchmarks/results/DATE.json
    python benchmarks/exports.py --shape t5-base --output ...       # random weights: speed alone, every size to the same length

Engines take turns on the same batches in one run: PyTorch one batch after the other on all cores, CTranslate2 as many at a time as there
are cores, which suits each best here (with two threads a batch, int8 in CTranslate2 was eight times slower than with one). Texts are made
greedily; of the first 200 those are counted that differ from PyTorch's in float32 in any token.
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
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.exports import to_ctranslate2
from modular_t5.measuring import environment, measure_seconds, write_json
from modular_t5.pairs import Pairs, scores_of, signatures
from modular_t5.presenting import markdown_table


SHAPES = {"t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "vocab_size": 32128}}
PLANS = {6: ["1x6/1x6", "1x6/2x3", "1x6/3x2", "2x3/2x3", "3x2/3x2"], 12: ["1x12/1x12", "1x12/2x6", "1x12/4x3", "2x6/2x6", "4x3/4x3"]}

Ids = list[list[int]]
Engine = Callable[[Ids], Ids]  # all sources -> what is generated of each, without the end


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
    with tempfile.TemporaryDirectory() as folder:
        rows, engines = [], []
        for plan in tqdm(PLANS[bank.config.num_layers], desc="Exporting"):
            made = engines_of(bank, plan, tokenizer, Path(folder) / plan.replace("/", "_"), args)
            rows += rows_of(bank, plan, made, tokenizer, pairs, sources)
            engines += made.values()
        timed = sources[: args.timed]
        tokens = [sum(map(len, engine(timed))) for engine in engines]
        seconds = measure_seconds([partial(engine, timed) for engine in engines], rounds=args.rounds, description="Timing")
    for row, count, each in zip(rows, tokens, seconds, strict=True):
        row["tokens_per_second"] = count / each
        row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        if pairs:
            row["kept"] = 100 * row["scores"]["BLEU"] / rows[0]["scores"]["BLEU"]
    told = {**environment(), "ctranslate2": ctranslate2.__version__, "seed": args.seed}
    told |= {"arguments": {name: str(value) for name, value in vars(args).items()}}
    write_json(args.output, {**told, **({"metrics": signatures()} if pairs else {}), "rows": rows})
    print(table(rows))


def engines_of(
    bank: ModularT5ForConditionalGeneration, plan: str, tokenizer: PreTrainedTokenizerBase | None, folder: Path, args: argparse.Namespace
) -> dict[str, Engine]:
    """By name; PyTorch in float32 first."""
    model = bank.assemble(plan, share_weights=True)
    engines: dict[str, Engine] = {
        "HF": partial(hugging_face, model, args=args),
        "HF bf16": partial(hugging_face, bank.assemble(plan, dtype="bfloat16"), args=args),
    }
    tokens = tokenizer.convert_ids_to_tokens if tokenizer else lambda ids: [str(i) for i in ids]
    ids = tokenizer.convert_tokens_to_ids if tokenizer else lambda tokens: [int(token) for token in tokens]
    for name, quantization in (("CTranslate2", None), ("CTranslate2 int8", "int8")):
        written = to_ctranslate2(model, tokenizer or numbers_for_tokens(), folder / name, quantization=quantization)
        cores = {"intra_threads": 1, "inter_threads": torch.get_num_threads()}
        translator = ctranslate2.Translator(str(written), compute_type=quantization or "float32", **cores)
        engines[name] = partial(ctranslate, translator, tokens, ids, args=args)
    return engines


def rows_of(
    bank: ModularT5ForConditionalGeneration,
    plan: str,
    engines: dict[str, Engine],
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Pairs | None,
    sources: Ids,
) -> list[dict[str, Any]]:
    """A row an engine, with what it makes of the sources where that can be scored."""
    report = bank.report(plan)
    rows = [{"plan": plan, "depths": report.plan.depths, "engine": name, "parameters": report.total_parameters} for name in engines]
    if pairs:
        made = {name: engine(sources) for name, engine in engines.items()}
        for row in rows:
            texts = made[row["engine"]]
            row["scores"] = scores_of(tokenizer.batch_decode(texts, skip_special_tokens=True), pairs.targets)
            row["differing"] = sum(a != b for a, b in zip(texts[:200], made["HF"][:200], strict=True))
    return rows


@torch.inference_mode()
def hugging_face(model: T5ForConditionalGeneration, sources: Ids, *, args: argparse.Namespace) -> Ids:
    """Batch after batch, of sources of like length, each on all cores."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    forced = {"min_new_tokens": args.length} if args.shape else {}
    made: Ids = [[] for _ in sources]
    for first in range(0, len(order), args.batch_size):
        batch = order[first : first + args.batch_size]
        longest = max(len(sources[i]) for i in batch)
        input_ids = torch.tensor([sources[i] + [0] * (longest - len(sources[i])) for i in batch])
        mask = torch.tensor([[1] * len(sources[i]) + [0] * (longest - len(sources[i])) for i in batch])
        out = model.generate(input_ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=args.length, **forced)
        for i, ids in zip(batch, out.tolist(), strict=True):
            made[i] = words_of(ids[1:], args)
    return made


def ctranslate(translator: Any, tokens: Callable, ids: Callable, sources: Ids, *, args: argparse.Namespace) -> Ids:
    """The same batches, each on one core, as many at a time as there are."""
    settings = {"beam_size": 1, "max_decoding_length": args.length, "max_batch_size": args.batch_size}
    settings |= {"min_decoding_length": args.length} if args.shape else {}
    results = translator.translate_batch([tokens(each) for each in sources], **settings)
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


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a plan: of each engine the speed-up over PyTorch's teacher and, where texts were scored, the BLEU."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        scored = f" ({row['scores']['BLEU']:.2f})" if "scores" in row else ""
        cells.setdefault(row["plan"], [row["plan"]]).append(f"{row['speedup']:.2f}x{scored}")
    return markdown_table(["plan", *engines], list(cells.values()))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row an engine and plan."""
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
