"""What a saved bank costs to assemble from, beside loading the same stock model, on a randomly initialised T5-base-sized bank.

    python benchmarks/banks.py --output benchmarks/results/DATE-banks.json

The bank and its sizes are written to a folder of `--folder`, some 6 GB, and taken away again. Memory and bytes are each measured in a
process of its own, time in one process that takes turns; always with all weights touched afterwards, for files are mapped, and what is
never touched is never read. Memory is what the process's peak resident size grows by, pages of mapped files included. Bytes are what
the kernel read from the disk with the files taken out of its cache first.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from assembling import SHAPE, SIZES
from transformers import T5ForConditionalGeneration

from modular_t5 import ModularT5Config, ModularT5ForConditionalGeneration
from modular_t5.measuring import environment, measure_seconds
from modular_t5.presenting import markdown_table


GOALS = {"memory": 1.1, "bytes": 1.02, "time": 1.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write; on a disk, not in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "FOLDER", "PLAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.measure:
        what, folder, plan = args.measure
        print(json.dumps({"memory": measure_memory, "bytes": measure_bytes}[what](loader(Path(folder), plan), Path(folder))))
        return

    torch.manual_seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="banks-", dir=args.folder))
    try:
        bank = ModularT5ForConditionalGeneration(ModularT5Config(**SHAPE)).eval()
        bank.save_pretrained(folder / "bank")
        results = {}
        for name, plan in SIZES.items():
            stock = bank.assemble(plan, share_weights=True)
            stock.save_pretrained(folder / "stock" / name)
            size = sum(parameter.nbytes for parameter in stock.parameters())
            results[name] = {"plan": plan, "bytes": size, "stock": {}, "lazily": {}}
        bank_parameters = bank.num_parameters()
        del bank, stock
        gc.collect()
        os.sync()
        for name, row in results.items():
            for way, where, plan in (("lazily", folder / "bank", row["plan"]), ("stock", folder / "stock" / name, "")):
                for what in ("memory", "bytes"):
                    command = [sys.executable, __file__, "--output", "-", "--measure", what, str(where), plan]
                    row[way][what] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            calls = [loader(folder / "bank", row["plan"]), loader(folder / "stock" / name, "")]
            until_read = [lambda call=call: touched(call()) for call in calls]
            for what, tasks in (("seconds", until_read), ("seconds, call alone", calls)):
                row["lazily"][what], row["stock"][what] = measure_seconds(tasks, rounds=args.rounds, between=gc.collect)
            print(name, json.dumps(row), flush=True)
    finally:
        shutil.rmtree(folder)

    rows = {
        name: {
            "memory": row["lazily"]["memory"] / row["bytes"],
            "bytes": row["lazily"]["bytes"] / row["bytes"],
            "time": row["lazily"]["seconds"] / row["stock"]["seconds"],
            "time, call alone": row["lazily"]["seconds, call alone"] / row["stock"]["seconds, call alone"],
            "stock: memory": row["stock"]["memory"] / row["bytes"],
            "stock: bytes": row["stock"]["bytes"] / row["bytes"],
        }
        for name, row in results.items()
    }
    print(markdown_table(["", *rows], [[what, *(f"{row[what]:.3f}" for row in rows.values())] for what in next(iter(rows.values()))]))
    for what, goal in GOALS.items():
        worst = max(row[what] for row in rows.values())
        print(f"{what}: at most {worst:.3f}, goal {goal}: {'met' if worst <= goal else 'MISSED'}")
    document = {
        **environment(),
        "seed": args.seed,
        "rounds": args.rounds,
        "bank_parameters": bank_parameters,
        "goals": GOALS,
        "sizes": {name: {**results[name], "ratios": rows[name]} for name in results},
    }
    args.output.write_text(json.dumps(document, indent=2) + "\n")


def loader(folder: Path, plan: str) -> Callable[[], T5ForConditionalGeneration]:
    """Assembling a plan from a bank, or, without a plan, loading a stock model."""
    if plan:
        return lambda: ModularT5ForConditionalGeneration.assemble_from_pretrained(folder, plan)
    return lambda: T5ForConditionalGeneration.from_pretrained(folder)


def touched(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """The model, every page of its weights read."""
    for parameter in model.parameters():
        parameter.detach().flatten()[:: 4096 // parameter.itemsize].sum()
    return model


def measure_memory(load: Callable[[], T5ForConditionalGeneration], folder: Path) -> int:
    """By how many bytes the peak grows. What the libraries take on first use is taken before, by a pico model."""
    pico = {**SHAPE, "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    with tempfile.TemporaryDirectory() as warm:
        ModularT5ForConditionalGeneration(ModularT5Config(**pico)).save_pretrained(warm)
        touched(ModularT5ForConditionalGeneration.assemble_from_pretrained(warm, "1x12/4x3")).save_pretrained(f"{warm}/stock")
        touched(T5ForConditionalGeneration.from_pretrained(f"{warm}/stock"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    touched(load())
    return status("VmHWM") - before  # the peak, whatever is freed by now


def measure_bytes(load: Callable[[], T5ForConditionalGeneration], folder: Path) -> int:
    """How many bytes come from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = bytes_read()
    touched(load())
    return bytes_read() - before


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def bytes_read() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512


if __name__ == "__main__":
    main()
