"""`benchmarks/compare/train_teacher.py`: a teacher from nothing, from another, and again."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_teacher
from transformers import AutoTokenizer, T5ForConditionalGeneration


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare" / "train_teacher.py"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the script on a few pairs of texts; returns its output folder."""
    words = ["ein", "kleiner", "Hund", "und", "ein", "alter", "Mann", "laufen", "am", "Haus", "vorbei"]
    pairs = [{"en": " ".join(words[i % 7 :]), "de": " ".join(words[: i % 7 + 1])} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"translation": pair}) + "\n" for pair in pairs))
    files = [word for split in ("train", "validation", "test") for word in (f"--{split}_file", str(tmp_path / "pairs.jsonl"))]

    def run(name, **arguments):
        given = {
            "source_lang": "en",
            "target_lang": "de",
            "max_length": 16,
            "per_device_train_batch_size": 8,
            "output_dir": tmp_path / name,
        }
        given |= {"max_steps": 8, "warmup_steps": 2, "eval_steps": 4, "save_steps": 4, "logging_steps": 2, "disable_tqdm": True}
        options = [word for option, value in {**given, **arguments}.items() for word in (f"--{option}", str(value))]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *files, *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return tmp_path / name

    return run


def test_from_nothing_then_from_there_then_again(train, capsys):
    small = {"num_layers": 2, "d_model": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 60}
    first = train("first", **small)
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    assert (model.config.num_layers, model.config.d_model, model.config.vocab_size) == (2, 16, len(tokenizer))
    assert tokenizer.decode(tokenizer("ein Hund").input_ids, skip_special_tokens=True) == "ein Hund"
    card = (first / "README.md").read_text()
    for told in ("| best step", "of 8", "| greedy", "| beam 4", "Adafactor", "| started from | nothing", "BLEU"):
        assert told in card

    further = train("further", start_from=first, dropout_rate=0.0)
    assert "dropout 0 on residuals" in (further / "README.md").read_text()
    before, after = (T5ForConditionalGeneration.from_pretrained(folder).shared.weight for folder in (first, further))
    assert before.shape == after.shape
    assert not torch.equal(before, after)

    capsys.readouterr()
    again = train("further", start_from=first, dropout_rate=0.0)  # all done: it scores and writes, and trains no step
    assert "'loss'" not in capsys.readouterr().out
    assert torch.equal(T5ForConditionalGeneration.from_pretrained(again).shared.weight, after)


def test_a_deeper_one_starts_as_about_the_same_function(train):
    """Where layers add little to the residual stream, that they read what they added themselves matters less."""
    shallow, without = make_teacher(dropout_rate=0.0), make_teacher(dropout_rate=0.0)
    for model, scale in ((shallow, 0.05), (without, 0.0)):
        for name, weight in model.state_dict().items():
            if name.endswith((".o.weight", ".wo.weight")):
                weight.mul_(scale)
    deeper = runpy.run_path(str(SCRIPT))["deepened"](shallow, 2)
    assert (deeper.config.num_layers, deeper.config.num_decoder_layers) == (12, 12)
    for layer in range(12):
        ours, its = (model.decoder.block[number].layer[0].SelfAttention for model, number in ((deeper, layer), (shallow, layer // 2)))
        assert torch.equal(ours.q.weight, its.q.weight)
        assert torch.equal(ours.o.weight, its.o.weight / 2)
    inputs = {"input_ids": torch.arange(2, 14)[None], "decoder_input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        logits, same, other = (model.eval()(**inputs).logits for model in (shallow, deeper, without))
    assert 0 < (same - logits).norm() < 0.1 * (other - logits).norm()

    small = {"num_layers": 1, "d_model": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 60, "max_steps": 2, "eval_steps": 2, "save_steps": 2}
    first = train("first", **small)
    second = train("second", **small, start_from=first, repeat_layers=3)
    assert T5ForConditionalGeneration.from_pretrained(second).config.num_layers == 3
    assert f"{first}, every layer 3 times" in (second / "README.md").read_text()
    for wrong in ({"repeat_layers": 0}, {"repeat_layers": 2}):
        with pytest.raises(ValueError, match=r"repeat_layers=\d must be at least 1"):
            train("third", **small, **wrong)
