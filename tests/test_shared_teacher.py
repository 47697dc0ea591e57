"""A bank around a T5 that was trained on real sentences. Runs where `../shared` lies beside the repository, as in CI."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.measuring import generate_texts


SHARED = Path(__file__).parents[2] / "shared"
TEACHER = SHARED / "teachers" / "multi30k-en-de"
DATA = SHARED / "data" / "multi30k-en-de"

pytestmark = pytest.mark.skipif(not TEACHER.exists(), reason="the shared Multi30k teacher is not beside the repository")


@pytest.fixture(scope="module")
def bank():
    return ModularT5ForConditionalGeneration.from_t5(TEACHER)


def test_the_bank_translates_as_the_teacher_and_as_what_it_assembles(bank):
    teacher, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    sources = [json.loads(line)["translation"]["en"] for line in (DATA / "test.jsonl").read_text().splitlines()[:50]]
    translated = generate_texts(teacher, tokenizer, sources, max_new_tokens=40, num_beams=2)
    assert generate_texts(bank, tokenizer, sources, max_new_tokens=40, num_beams=2) == translated
    assert len(set(translated)) == 50
    for plan in ("2x3/2x3", "1x6/3x2"):
        with bank.using(plan):
            in_place = generate_texts(bank, tokenizer, sources, max_new_tokens=40)
        assert in_place == generate_texts(bank.assemble(plan), tokenizer, sources, max_new_tokens=40) != translated


def test_every_size_of_the_real_bank_saves_and_loads_to_the_bit(bank, tmp_path):
    for plan in bank.shape.plans("size-first"):
        assembled = bank.assemble(plan)
        assembled.save_pretrained(tmp_path)
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(assembled.parameters(), again.parameters(), strict=True))
