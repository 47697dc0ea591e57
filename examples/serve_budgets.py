"""One resident bank that answers at different sizes: a text, a budget, and the answers and times of two sizes side by side.

    modular-t5 frontier bank test.jsonl --source-lang en --target-lang de
    python examples/serve_budgets.py --bank bank

The first command measures the sizes on offer, and leaves `frontier.json` in the bank's folder. Every size is a view on the bank's own
weights, `bank.assemble(plan, share_weights=True)`: a T5 of its own that costs no memory but its Python objects. So requests at different
sizes run at once, in as many threads as there are, where `bank.set_plan` would change the size of all.
"""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from modular_t5 import Frontier, ModularT5ForConditionalGeneration
from modular_t5.frontier import RESULTS_FILE


@dataclass
class ServingArguments:
    """What to serve where."""

    bank: str = field(metadata={"help": "Folder of a bank, its tokenizer and its frontier.json."})
    frontier: str | None = field(default=None, metadata={"help": "The result file of modular-t5 frontier, if it is not there."})
    max_new_tokens: int = field(default=64, metadata={"help": "Of an answer."})
    example: str = field(default="A dog runs across the green grass.", metadata={"help": "Text to begin with."})
    port: int | None = field(default=None, metadata={"help": "On loopback; a free one by default."})


class Sizes:
    """The measured sizes of a bank, each a view on its weights, made when first asked for."""

    def __init__(
        self, bank: ModularT5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, frontier: Frontier, max_new_tokens: int
    ):
        self.frontier = frontier
        self._bank, self._tokenizer, self._max_new_tokens = bank, tokenizer, max_new_tokens
        self._views: dict[str, transformers.T5ForConditionalGeneration] = {}
        self._making = threading.Lock()

    def view(self, plan: str) -> transformers.T5ForConditionalGeneration:
        with self._making:
            if plan not in self._views:
                self._views[plan] = self._bank.assemble(plan, share_weights=True)
            return self._views[plan]

    @torch.inference_mode()
    def answer(self, plan: str, text: str) -> tuple[str, float]:
        """What a size makes of a text, and in how many milliseconds."""
        model, inputs = self.view(plan), self._tokenizer(text, return_tensors="pt").to(self._bank.device)
        start = time.perf_counter()
        ids = model.generate(inputs.input_ids, max_new_tokens=self._max_new_tokens, do_sample=False, num_beams=1)
        return self._tokenizer.decode(ids[0], skip_special_tokens=True), 1000 * (time.perf_counter() - start)


def app(sizes: Sizes, example: str, pictures: Path) -> gr.Blocks:
    frontier = sizes.frontier
    fastest = max(map(frontier.speedup, frontier.points))

    def serve(text: str, speedup: float) -> tuple[str, str, str, str, str]:
        point = frontier.best(min_speedup=speedup)
        teacher, teacher_ms = sizes.answer(frontier.teacher.plan, text)
        small, small_ms = sizes.answer(point.plan, text)
        picture = pictures / f"{speedup:g}.png"
        if not picture.exists():
            frontier.plot(picture, title="Measured sizes, and the one that answers", min_speedup=speedup)
        told = f"{point.plan}: {'+'.join(map(str, point.depths))} layers, {point.bytes / 1e6:.1f} MB, "
        told += f"{frontier.kept(point):.1f} % of the teacher's {frontier.metric}; {small_ms:.0f} ms"
        return teacher, f"{frontier.teacher.plan}: {frontier.teacher.bytes / 1e6:.1f} MB; {teacher_ms:.0f} ms", small, told, str(picture)

    with gr.Blocks(title="One bank, every size") as blocks:
        gr.Markdown("## One bank, every size")
        text = gr.Textbox(example, label="Text", elem_id="text")
        largest = int(10 * fastest) / 10
        speedup = gr.Slider(
            1, largest, value=min(2, largest), step=0.1, label="At least so many times the teacher's speed", elem_id="budget"
        )
        ask = gr.Button("Ask both", elem_id="ask")
        with gr.Row():
            outputs = []
            for name, title in (("teacher", "The teacher"), ("small", "The best size within the budget")):
                with gr.Column():
                    outputs += [gr.Textbox(label=title, elem_id=name), gr.Markdown(elem_id=f"{name}-told")]
        outputs.append(gr.Image(label="Frontier", elem_id="frontier", type="filepath"))
        ask.click(serve, [text, speedup], outputs, concurrency_limit=None)
        speedup.release(serve, [text, speedup], outputs, concurrency_limit=None)
    return blocks


def main() -> None:
    (args,) = HfArgumentParser(ServingArguments).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    results = Path(args.frontier or Path(args.bank, RESULTS_FILE))
    if not results.exists():
        raise SystemExit(f"there is no {results}; measure the sizes on offer first: modular-t5 frontier {args.bank} ...")
    bank = AutoModelForSeq2SeqLM.from_pretrained(args.bank).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    sizes = Sizes(bank, AutoTokenizer.from_pretrained(args.bank), Frontier.load(results), args.max_new_tokens)
    with TemporaryDirectory() as pictures:
        app(sizes, args.example, Path(pictures)).launch(server_name="127.0.0.1", server_port=args.port, allowed_paths=[pictures])


if __name__ == "__main__":
    main()
