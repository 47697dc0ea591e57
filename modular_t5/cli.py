"""`modular-t5`: banks from the command line. Every command is a call into the package."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5ForConditionalGeneration
from transformers.utils import CONFIG_NAME

from .assembly_modular_t5 import SIDES, canonical_tilings
from .building_modular_t5 import torch_dtype
from .calibration import calibrate
from .choosing_modular_t5 import LIMITS, STRATEGIES, PlanReport, resolve_plans, the_one_budget
from .comparison import Comparison, ComparisonArguments
from .comparison_results import tables
from .configuration_modular_t5 import ModularT5Config
from .frontier import BUDGETS, PICTURE_FILE, RESULTS_FILE, measure_frontier, standard_sizes
from .latency import measure_latency
from .layout_modular_t5 import parameter_map
from .loading_modular_t5 import SavedBank
from .measuring import write_json
from .model_card import assembled_card, bank_card, counts_table, measured_in
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
from .pairs import Pairs
from .presenting import markdown_table
from .rebuilding import rebuild
from .storage_modular_t5 import upload


_COMPARISON_FIELDS = {field.name: field for field in dataclasses.fields(ComparisonArguments)}

# What may be part of a model's repository; whatever else lies in a folder stays there.
_PUBLISHED = {".safetensors", ".json", ".md", ".py", ".png", ".model", ".jinja"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where `rebuild` found differences, 2 after an error."""
    args = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result, table, status = args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError, HfHubHTTPError) as error:
        print(f"modular-t5 {args.command}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else table)
    return status


Outcome = tuple[Mapping[str, Any], str, int]  # for machines, for people, exit status


def info(args: argparse.Namespace) -> Outcome:
    """What is in a bank: its teacher, granularities, sizes and files."""
    saved = SavedBank(args.bank, **_hub_arguments(args))
    config, shape = saved.config, saved.shape
    teacher, smallest = shape.report(shape.teacher), shape.report(shape.smallest)
    result = {
        **saved.origin,
        "teacher": config.teacher,
        "modules_only": config.modules_only,
        "lora": config.lora,
        "own_parts": config.own_parts,
        "layers": dict(shape.num_layers),
        "granularities": {side: list(shape.granularities[side]) for side in SIDES},
        "depths": {side: list(canonical_tilings(shape.num_layers[side], shape.granularities[side])) for side in SIDES},
        "largest_ratio": shape.largest_ratio,
        "calibrated": shape.calibration is not None,
        "teacher_parameters": teacher.total_parameters,
        "smallest_parameters": smallest.total_parameters,
        "files": sorted(set(saved.stored.shard_names.values())),
    }
    rows = [
        ("bank", f"{result['bank']}{f' at {saved.revision}' if saved.revision else ''}"),
        ("teacher", f"{(config.teacher or {}).get('name_or_path') or 'unnamed'}{', not in the files' if config.modules_only else ''}"),
        *((side, f"{shape.num_layers[side]} layers, modules for {', '.join(map(str, shape.granularities[side]))}") for side in SIDES),
        ("sizes", f"{teacher.total_parameters:,} to {smallest.total_parameters:,} parameters, 1x to {shape.largest_ratio:.2f}x"),
        ("of its own", ", ".join(config.own_parts) or "nothing beside modules"),
        ("calibrated", "no" if shape.calibration is None else f"yes, {len(shape.calibration['plans'])} plans measured"),
        *(("file", file) for file in result["files"]),
    ]
    return result, "\n".join(f"{name:<12}{value}" for name, value in rows), 0


def plan(args: argparse.Namespace) -> Outcome:
    """What sizes cost, and which files they need; without a strategy, of a spread of sizes."""
    saved = SavedBank(args.bank, **_hub_arguments(args))
    budget = _budget(args)
    if args.strategy is None:
        if args.ratio is not None or budget:
            raise ValueError("a budget goes with a strategy, which says what to prefer within it")
        shape = saved.shape_in(torch_dtype(args.dtype))
        reports = {name: shape.report(each) for name, each in standard_sizes(shape).items()}
        return {"sizes": [{"name": name, **_counts(report)} for name, report in reports.items()]}, counts_table(reports), 0
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    reports = resolve_plans(saved.shape_in(torch_dtype(args.dtype)), args.strategy, args.ratio, **budget)[: args.count]
    report = reports[0]
    names = {name for name in parameter_map(saved.one_layer, report.plan, saved.config).values() if name in saved.stored}
    files = sorted({saved.stored.shard_names[name] for name in names})
    asked = [f"{args.ratio:g}x"] if args.ratio is not None else [f"{name}={bound:g}" for name, bound in budget.items() if name in LIMITS]
    name = " ".join([args.strategy, *asked])
    table = counts_table({name if each is report else f"next {place}": each for place, each in enumerate(reports)})
    result = {**_counts(report), "files": files, "next": [_counts(each) for each in reports[1:]]}
    return result, f"{table}\n{_foreseen_speed(report, budget)}\nfiles: {', '.join(files)}", 0


def assemble(args: argparse.Namespace) -> Outcome:
    """Write a size out as a stock T5, with the bank's tokenizer."""
    output, arguments = Path(args.output), _hub_arguments(args)
    if not args.output:
        raise ValueError("--output is the folder to write, not an empty name")
    if (output / CONFIG_NAME).exists() and _is_bank(output):
        raise ValueError(f"{output} holds a bank, which would be overwritten; choose another folder")
    budget = _budget(args)
    model = ModularT5ForConditionalGeneration.assemble_from_pretrained(
        args.bank, args.strategy, args.ratio, dtype=args.dtype, teacher=args.teacher, **budget, **arguments
    )
    model.save_pretrained(output)
    try:
        AutoTokenizer.from_pretrained(args.bank, trust_remote_code=False, **arguments).save_pretrained(output)
    except (ValueError, OSError):
        print(f"modular-t5 assemble: {args.bank} has no tokenizer; save the teacher's to {output}", file=sys.stderr)
    written = {**model.config.modular_t5, "output": str(output), "parameters": model.num_parameters()}
    return written, f"{written['plan']}, {written['parameters']:,} parameters, from {written['bank']}: {output}", 0


def rebuild_command(args: argparse.Namespace) -> Outcome:
    """Assemble a saved model anew from what it remembers, and compare every tensor; exit status 1 if it is another."""
    rebuilt = rebuild(args.model, bank=args.bank, revision=args.revision, teacher=args.teacher)
    result = {**rebuilt.origin, "equal": not rebuilt.differences, "differences": rebuilt.differences}
    of = f"{rebuilt.origin['plan']} of {rebuilt.origin['bank']}"
    if not rebuilt.differences:
        return result, f"{args.model} is {of}, to the bit", 0
    shown = "\n".join(f"  {name}" for name in rebuilt.differences[:10])
    more = f"\n  and {len(rebuilt.differences) - 10} more" if len(rebuilt.differences) > 10 else ""
    return result, f"{args.model} is not {of}; these differ:\n{shown}{more}", 1


def push(args: argparse.Namespace) -> Outcome:
    """Upload the folder of a bank or of an assembled model; a card is written if there is none."""
    folder = Path(args.folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is no folder with a model: there is no {CONFIG_NAME} in it")
    details = {"language": args.language, "license": args.license, "datasets": args.dataset, "tags": args.tag}
    details = {name: value for name, value in {**details, "pipeline_tag": args.pipeline_tag}.items() if value}
    if (folder / "README.md").exists() and not args.new_card:
        if details:
            raise ValueError(f"{folder} has a README.md, which is uploaded as it is, without {', '.join(details)}; or pass --new-card")
    else:
        if _is_bank(folder):
            card, described = bank_card, SavedBank(folder)
        else:
            card, described = assembled_card, T5ForConditionalGeneration.from_pretrained(folder)
        card(described, args.repo_id, **measured_in(folder), **details).save(folder / "README.md")
    with tempfile.TemporaryDirectory() as published:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _PUBLISHED and not path.name.startswith("."):
                os.symlink(path.resolve(), Path(published) / path.name)
            else:
                print(f"modular-t5 push: left out {path.name}", file=sys.stderr)
        _tell_no_folder(Path(published) / CONFIG_NAME)
        repo_id = HfApi().create_repo(args.repo_id, private=args.private, exist_ok=True).repo_id
        commit = upload(published, repo_id, revision=args.revision, commit_message=args.commit_message)
    return {"repo_id": args.repo_id, "commit": commit.oid, "url": commit.commit_url}, f"{args.repo_id} at {commit.oid}", 0


def compare(args: argparse.Namespace) -> Outcome:
    """Train a bank and every size by itself, from one teacher, and compare; what is done already is not done again."""
    given = {name: value for name, value in vars(args).items() if name in _COMPARISON_FIELDS}
    if args.arguments is not None:
        given = {**json.loads(Path(args.arguments).read_text(encoding="utf-8")), **given}
    if unknown := sorted(set(given) - set(_COMPARISON_FIELDS)):
        raise ValueError(f"{args.arguments} has {unknown[0]!r}, which is no argument; they are {', '.join(_COMPARISON_FIELDS)}")
    needed = {name for name, field in _COMPARISON_FIELDS.items() if field.default is field.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(given)):
        raise ValueError(f"--{missing[0].replace('_', '-')} is missing, on the command line and in a file of arguments")
    comparison = Comparison(ComparisonArguments(**given))
    results = comparison.run()
    return results, tables(results), 0


def calibrate_command(args: argparse.Namespace) -> Outcome:
    """Score a bank's modules on examples, for the strategy calibrated; the scores are written into the bank's folder."""
    config = Path(args.bank, CONFIG_NAME)
    if not config.is_file():
        raise ValueError(f"{args.bank} is no folder with a bank: scores are saved in it, so download a bank of the Hub first")
    bank, tokenizer, pairs = _bank_and_pairs(args)
    rows = pairs.tokenized(tokenizer, args.max_source_length, args.max_target_length)
    scores = calibrate(bank, rows, tokenizer, batch_size=args.batch_size, verify=not args.no_verify)
    write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "calibration": bank.config.calibration})
    table = markdown_table(
        ["side", "granularity", "divergence of each module alone, nats a token"],
        [
            [side, str(s), " ".join(f"{score:.4f}" for score in of_modules)]
            for side in SIDES
            for s, of_modules in scores.modules[side].items()
        ],
        left=3,
    )
    return bank.config.calibration, f"{table}\n\n{len(scores.plans)} plans measured on {len(rows)} examples; saved in {config}", 0


def frontier(args: argparse.Namespace) -> Outcome:
    """Measure quality and speed of sizes; table, figures and picture go to a folder, and what was measured is not measured again."""
    bank, tokenizer, pairs = _bank_and_pairs(args)
    output = Path(args.output or args.bank)
    if args.output is None and not output.is_dir():
        raise ValueError(f"--output is missing: the folder for the results of {args.bank}")
    budget = {name: value for name in BUDGETS if (value := getattr(args, name)) is not None}
    if budget:
        the_one_budget(budget, BUDGETS)
    measured = measure_frontier(
        bank,
        pairs,
        tokenizer,
        args.plans,
        metric=args.metric,
        num_beams=args.num_beams,
        max_new_tokens=args.max_target_length,
        max_source_length=args.max_source_length,
        batch_size=args.batch_size,
        file=output / RESULTS_FILE,
    )
    measured.to_csv(output / "frontier.csv")
    measured.plot(output / PICTURE_FILE, **budget)
    best = measured.best(**budget) if budget else None
    found = f"\n\nwithin the budget: {best.plan} ({best.name}), {measured.kept(best):.1f} % of the teacher" if best else ""
    result = {"metric": measured.metric, "sizes": measured.to_dicts(), "best": best and best.plan, "output": str(output)}
    return result, f"{measured.table()}{found}\n\nin {output}: {RESULTS_FILE}, frontier.csv, {PICTURE_FILE}", 0


def _bank_and_pairs(args: argparse.Namespace) -> tuple[ModularT5ForConditionalGeneration, PreTrainedTokenizerBase, Pairs]:
    """To measure with, on a GPU if there is one."""
    pairs = Pairs.read(args.file, args.source_lang, args.target_lang, prefix=args.source_prefix).head(args.max_examples)
    return _loaded(args), AutoTokenizer.from_pretrained(args.bank, trust_remote_code=False, **_hub_arguments(args)), pairs


def _loaded(args: argparse.Namespace, dtype: str | None = None) -> ModularT5ForConditionalGeneration:
    loading = {**_hub_arguments(args), **({"dtype": dtype} if dtype else {})}
    bank = ModularT5ForConditionalGeneration.from_pretrained(args.bank, teacher=args.teacher, **loading)
    return bank.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    """The budget that was given; for those of speed, with the latency of this machine, measured if a strategy can choose by it."""
    budget = {name: getattr(args, name) for name in LIMITS if name != "ratio" and getattr(args, name) is not None}
    if args.strategy in STRATEGIES and budget.keys() & {"min_speedup", "max_latency_ms"}:
        the_one_budget({"ratio": args.ratio, **budget}, LIMITS)
        bank = _loaded(args, dtype=args.dtype)
        bank.shape.plans(args.strategy)  # what has none is refused before anything is timed
        request = {name: getattr(args, name) for name in ("batch_size", "source_length", "target_length", "num_beams")}
        budget["latency"] = measure_latency(bank, **request, file=args.latency_file, description="Timing")
    return budget


def _foreseen_speed(report: PlanReport, budget: Mapping[str, Any]) -> str:
    if report.latency_ms is None:
        return ""
    return f"{report.latency_ms:.4g} ms foreseen on {budget['latency'].hardware}, {report.speedup:.2f}x\n"


def _is_bank(folder: Path) -> bool:
    return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type") == ModularT5Config.model_type


def _tell_no_folder(config: Path) -> None:
    """Replace a configuration's link by a copy in which an assembled model does not name a folder of this machine."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    origin = fields.get("modular_t5")
    if origin and not origin.get("revision"):
        config.unlink()
        config.write_text(json.dumps({**fields, "modular_t5": {**origin, "bank": None}}, indent=2) + "\n", encoding="utf-8")


def _counts(report: PlanReport) -> dict[str, Any]:
    return {**report._asdict(), "plan": str(report.plan), "depths": list(report.plan.depths)}


def _hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision} if args.revision else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modular-t5", description="Module banks of T5s: look into them, assemble sizes, share them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Outcome], example: str) -> argparse.ArgumentParser:
        summary = run.__doc__.strip()
        added = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog=f"example:\n  modular-t5 {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON")
        if run is not compare:
            added.add_argument("--revision", help="branch, tag or commit on the Hub")
        return added

    def add_size(parser: argparse.ArgumentParser, optional: bool) -> None:
        choices = f"{', '.join(STRATEGIES)}, or a plan such as 1x12/4x3"
        parser.add_argument("strategy", nargs="?" if optional else None, help=choices)
        parser.add_argument("ratio", nargs="?", type=float, help="with a strategy: the teacher's layer parameters / the size's")
        budgets = parser.add_argument_group("budgets, in place of a ratio")
        budgets.add_argument("--max-parameters", type=int, help="of all, embeddings included")
        budgets.add_argument("--max-bytes", type=int, help="of those parameters, in --dtype")
        budgets.add_argument("--min-speedup", type=float, help="over the teacher, measured on this machine")
        budgets.add_argument("--max-latency-ms", type=float, help="of the request below, measured on this machine")
        request = parser.add_argument_group("what is timed for --min-speedup and --max-latency-ms")
        for name, default, told in (
            ("batch-size", 1, "sources at a time"),
            ("source-length", 32, "in tokens"),
            ("target-length", 32, "in tokens"),
            ("num-beams", 1, "1 is greedy search"),
        ):
            request.add_argument(f"--{name}", type=int, default=default, help=f"{told}; {default} by default")
        request.add_argument("--latency-file", help="JSON that keeps what was measured, for the next time")
        parser.add_argument("--dtype", help="such as bfloat16; by default the bank's")
        parser.add_argument("--teacher", help="folder or Hub id of the teacher of modules saved alone, if not where they say")

    def add_pairs(parser: argparse.ArgumentParser, max_examples: int | None) -> None:
        parser.add_argument("file", help="pairs of texts, JSON lines in the Hub's translation format")
        parser.add_argument("--source-lang", required=True, help="key of the source in `translation`")
        parser.add_argument("--target-lang", required=True, help="key of the target in `translation`")
        parser.add_argument("--source-prefix", default="", help="put before every source, for T5s that were trained so")
        of_all = "all" if max_examples is None else max_examples
        parser.add_argument("--max-examples", type=int, default=max_examples, help=f"the first so many; {of_all} by default")
        parser.add_argument("--max-source-length", type=int, default=128, help="in tokens; 128 by default")
        parser.add_argument("--max-target-length", type=int, default=128, help="in tokens; 128 by default")
        parser.add_argument("--batch-size", type=int, default=32, help="examples at a time; 32 by default")
        parser.add_argument("--teacher", help="as of assemble")

    bank = {"help": "folder or Hub id of a bank"}
    command("info", info, "org/modular-t5-base").add_argument("bank", **bank)
    added = command("plan", plan, "org/modular-t5-base speed-first 1.9")
    added.add_argument("bank", **bank)
    add_size(added, optional=True)
    added.add_argument("--count", type=int, default=1, help="with a strategy: so many that it prefers within the budget; 1 by default")
    added = command("assemble", assemble, "org/modular-t5-base 1x12/4x3 --output fast")
    added.add_argument("bank", **bank)
    add_size(added, optional=False)
    added.add_argument("--output", "-o", required=True, help="folder to write")
    added = command("calibrate", calibrate_command, "bank validation.jsonl --source-lang en --target-lang de")
    added.add_argument("bank", help="folder of a bank")
    add_pairs(added, max_examples=400)
    added.add_argument("--no-verify", action="store_true", help="score single modules alone, and measure no plan")
    added = command("frontier", frontier, "bank test.jsonl --source-lang en --target-lang de --min-kept 97")
    added.add_argument("bank", **bank)
    add_pairs(added, max_examples=None)
    added.add_argument("--plans", nargs="+", help="such as 1x12/4x3; by default a spread of sizes")
    added.add_argument("--metric", default="BLEU", help="that quality is read by: BLEU, chrF or 'exact match'")
    added.add_argument("--num-beams", type=int, default=1, help="1 is greedy search")
    added.add_argument("--output", "-o", help="folder for frontier.json, frontier.csv and frontier.png; by default the bank's")
    budgets = added.add_argument_group("a budget, to draw and to name the best size within it")
    for name, (_, axis) in BUDGETS.items():
        budgets.add_argument(f"--{name.replace('_', '-')}", type=json.loads, metavar="NUMBER", help=f"in {axis}" if axis != "MB" else None)
    added = command("rebuild", rebuild_command, "fast")
    added.add_argument("model", help="folder or Hub id of an assembled model")
    added.add_argument("--bank", help="folder or Hub id of the bank, if not where the model says; --revision is the bank's")
    added.add_argument("--teacher", help="as of assemble")
    added = command("push", push, "fast org/modular-t5-base-fast --language en --language de --pipeline-tag translation")
    added.add_argument("folder", help="of a bank or an assembled model")
    added.add_argument("repo_id", help="where to, org/name")
    added.add_argument("--private", action="store_true", default=None, help="if the repository is made anew")
    added.add_argument("--commit-message", default="Upload model")
    added.add_argument("--new-card", action="store_true", help="write README.md anew")
    added.add_argument("--license", help="for the card, by the Hub's name")
    added.add_argument("--pipeline-tag", help="for the card, such as translation")
    for name in ("language", "dataset", "tag"):
        added.add_argument(f"--{name}", action="append", help="for the card; may be given more than once")
    added = command("compare", compare, "arguments.json --seeds 0 1 2 --output-dir out/compare")
    added.add_argument("arguments", nargs="?", help="JSON with any of the options below, by name; what is given here too, counts")
    for name, field in _COMPARISON_FIELDS.items():
        of_one = (get_args(field.type) or (field.type,))[0]  # X of X | None and of list[X]
        takes = {"action": "store_true"} if of_one is bool else {"type": json.loads if name == "method_arguments" else of_one}
        if get_origin(of_one) is list or get_origin(field.type) is list:
            takes = {"nargs": "+", "type": (get_args(of_one) or (of_one,))[0]}
        added.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=field.metadata["help"], **takes)
    return parser


if __name__ == "__main__":
    sys.exit(main())
