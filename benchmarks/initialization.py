"""Which original layer of its span should a module start as? Banks trained alike from each choice, compared on the validation split.

    python benchmarks/initialization.py --steps 400 --seeds 0 1                       # the quickstart's built-in task
    python benchmarks/initialization.py --steps 200 --seeds 0 --teacher DIR --train_file F --validation_file F --test_file F

The score of a bank is its validation loss, averaged over the sizes of the quickstart's table, before and after training.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import transformers
from transformers import HfArgumentParser, set_seed


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quickstart

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.configuration_modular_t5 import INITIALIZATIONS
from modular_t5.frontier import standard_sizes
from modular_t5.measuring import environment
from modular_t5.presenting import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--initializations", nargs="+", choices=INITIALIZATIONS, default=list(INITIALIZATIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    own, rest = parser.parse_known_args()
    (args,) = HfArgumentParser(quickstart.QuickstartArguments).parse_args_into_dataclasses([*rest, "--max_steps", str(own.steps)])
    transformers.logging.set_verbosity_error()
    set_seed(args.seed)
    splits = quickstart.load_splits(args)
    teacher, tokenizer = quickstart.load_teacher(args) if args.teacher else quickstart.train_teacher(splits["train"], args)

    runs = []
    for seed in own.seeds:
        for initialization in own.initializations:
            args.seed = seed
            set_seed(seed)
            bank = ModularT5ForConditionalGeneration.from_t5(teacher, initialization=initialization)
            plans = {name: plan for name, plan in standard_sizes(bank.shape).items() if name != "teacher"}
            args.max_steps = 1
            args.learning_rate, rate = 0.0, args.learning_rate
            before = quickstart.losses_by_plan(quickstart.train_bank(bank, tokenizer, splits, plans, args), plans)
            args.max_steps, args.learning_rate = own.steps, rate
            after = quickstart.losses_by_plan(quickstart.train_bank(bank, tokenizer, splits, plans, args), plans)
            runs.append({"initialization": initialization, "seed": seed, "before": before, "after": after})
            own.output.write_text(json.dumps({**environment(), "steps": own.steps, "finished": False, "runs": runs}, indent=2) + "\n")
    own.output.write_text(json.dumps({**environment(), "steps": own.steps, "finished": True, "runs": runs}, indent=2) + "\n")

    rows = []
    for initialization in own.initializations:
        mine = [run for run in runs if run["initialization"] == initialization]
        rows.append([initialization, *(f"{mean(mean(run[when].values()) for run in mine):.3f}" for when in ("before", "after"))])
    print(markdown_table(["initialization", "loss before", "loss after"], rows))


if __name__ == "__main__":
    main()
