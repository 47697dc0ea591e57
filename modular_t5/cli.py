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

import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, T5ForConditionalGeneration
from transformers.utils import CONFIG_NAME

from .assembly_modular_t5 import SIDES, canonical_tilings
from .choosing_modular_t5 import STRATEGIES, PlanReport, resolve_plan
from .comparison import Comparison, ComparisonArguments
from .comparison_results import tables
from .configuration_modular_t5 import ModularT5Config
from .frontier import standard_sizes
from .layout_modular_t5 import parameter_map
from .loading_modular_t5 import SavedBank
from .model_card import assembled_card, bank_card, counts_table, measured_in
from .modeling_modular_t5 import ModularT5ForConditionalGeneration
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
        *(("file", file) for file in result["files"]),
    ]
    return result, "\n".join(f"{name:<12}{value}" for name, value in rows), 0


def plan(args: argparse.Namespace) -> Outcome:
    """What sizes cost, and which files they need; without a strategy, of a spread of sizes."""
    saved = SavedBank(args.bank, **_hub_arguments(args))
    if args.strategy is None:
        reports = {name: saved.shape.report(each) for name, each in standard_sizes(saved.shape).items()}
        return {"sizes": [{"name": name, **_counts(report)} for name, report in reports.items()]}, counts_table(reports), 0
    report = resolve_plan(saved.shape, args.strategy, args.ratio)
    names = {name for name in parameter_map(saved.one_layer, report.plan, saved.config).values() if name in saved.stored}
    files = sorted({saved.stored.shard_names[name] for name in names})
    table = counts_table({args.strategy if args.ratio is None else f"{args.strategy} {args.ratio:g}x": report})
    return {**_counts(report), "files": files}, f"{table}\n\nfiles: {', '.join(files)}", 0


def assemble(args: argparse.Namespace) -> Outcome:
    """Write a size out as a stock T5, with the bank's tokenizer."""
    output, arguments = Path(args.output), _hub_arguments(args)
    if not args.output:
        raise ValueError("--output is the folder to write, not an empty name")
    if (output / CONFIG_NAME).exists() and _is_bank(output):
        raise ValueError(f"{output} holds a bank, which would be overwritten; choose another folder")
    model = ModularT5ForConditionalGeneration.assemble_from_pretrained(
        args.bank, args.strategy, args.ratio, dtype=args.dtype, teacher=args.teacher, **arguments
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

    bank = {"help": "folder or Hub id of a bank"}
    command("info", info, "org/modular-t5-base").add_argument("bank", **bank)
    added = command("plan", plan, "org/modular-t5-base speed-first 1.9")
    added.add_argument("bank", **bank)
    add_size(added, optional=True)
    added = command("assemble", assemble, "org/modular-t5-base 1x12/4x3 --output fast")
    added.add_argument("bank", **bank)
    add_size(added, optional=False)
    added.add_argument("--output", "-o", required=True, help="folder to write")
    added.add_argument("--dtype", help="such as bfloat16; by default the bank's")
    added.add_argument("--teacher", help="folder or Hub id of the teacher of modules saved alone, if not where they say")
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
