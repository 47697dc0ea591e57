"""Measuring models: texts in order, figures as defined."""

import pytest
import torch
from conftest import make_teacher
from transformers import AutoTokenizer

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.measuring import evaluating, generate_texts, lower_quartile, measure_seconds, measure_speed


SOURCES = ["three trees", "a", "seven hundred and six large ships", "two books"]


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def test_texts_come_in_the_order_of_the_sources(tokenizer):
    model = make_teacher(vocab_size=len(tokenizer))
    one_by_one = [generate_texts(model, tokenizer, [source], max_new_tokens=5)[0] for source in SOURCES]
    assert generate_texts(model, tokenizer, SOURCES, max_new_tokens=5, batch_size=2) == one_by_one
    assert len(set(one_by_one)) > 1
    assert generate_texts(model, tokenizer, [], max_new_tokens=5) == []


def test_generation_arguments_reach_generate(tokenizer):
    model = make_teacher(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="nonsense"):
        generate_texts(model, tokenizer, SOURCES, max_new_tokens=5, nonsense=1)


def test_every_part_is_in_its_own_mode_again():
    model = make_teacher().train()
    model.encoder.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert model.decoder.training
    assert not any(module.training for module in model.encoder.modules())


def test_of_rounds_the_middle_or_a_quick_one_counts(monkeypatch):
    """One task, whose rounds take 9 (which warms up), 5, 1, 2, 8 and 3 seconds."""
    ends = iter([0, 9, 0, 5, 0, 1, 0, 2, 0, 8, 0, 3] * 2)
    monkeypatch.setattr("modular_t5.measuring.time.perf_counter", lambda: float(next(ends)))
    assert measure_seconds([lambda: None], rounds=5) == [3.0]
    assert measure_seconds([lambda: None], rounds=5, counts=lower_quartile) == [2.0]
    assert [lower_quartile(range(rounds)) for rounds in (1, 4, 5, 9)] == [0, 0, 1, 2]


def test_speed_counts_the_tokens_of_the_batch(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("modular_t5.measuring.time.perf_counter", lambda: float(next(clock)))  # every generation takes one second
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    models = [bank, bank.assemble("6x1/6x1")]
    assert measure_speed(models, {"input_ids": torch.full((3, 4), 5)}, new_tokens=2, rounds=3) == [6.0, 6.0]
