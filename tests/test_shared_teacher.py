"""A bank around a T5 that was trained on real sentences. Runs where `../shared` lies beside the repository, as in CI."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from modular_t5 import ModularT5ForConditionalGeneration, Pairs, compress_offline
from modular_t5.exports import to_ctranslate2, to_onnx
from modular_t5.measuring import generate_texts
from modular_t5.pairs import scores_of


SHARED = Path(__file__).parents[2] / "shared"
TEACHER = SHARED / "teachers" / "multi30k-en-de"
DATA = SHARED / "data" / "multi30k-en-de"
LENGTH = 25  # tokens of a translation

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


# -- exports, on 200 real sentences ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    return Pairs.read(DATA / "test.jsonl", "en", "de").head(200)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


def greedy(model, tokenizer, sources):
    """Ids of each text, one at a time, without start and end."""
    with torch.no_grad():
        made = [model.generate(tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=LENGTH)[0, 1:].tolist() for text in sources]
    return [[i for i in ids if i != tokenizer.eos_token_id] for ids in made]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["1x6/1x6", "1x6/1x4-2x1"])
def test_ctranslate2_gives_the_same_ids(plan, bank, tokenizer, pairs, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    model = bank.assemble(plan)
    expected = greedy(model, tokenizer, pairs.sources)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(pairs.sources).input_ids]
    bleu = {"HF": scores_of(tokenizer.batch_decode(expected), pairs.targets)["BLEU"]}
    for compute, quantization in (("float32", None), ("int8", "int8")):
        folder = to_ctranslate2(model, tokenizer, tmp_path / compute, quantization=quantization)
        translator = ctranslate2.Translator(str(folder), compute_type=compute, intra_threads=1)
        results = translator.translate_batch(tokens, beam_size=1, max_decoding_length=LENGTH)
        made = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        if quantization is None:
            assert made == expected
        bleu[compute] = scores_of(tokenizer.batch_decode(made), pairs.targets)["BLEU"]
    assert bleu["int8"] == pytest.approx(bleu["HF"], abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["1x6/1x6", "1x6/1x4-2x1"])
def test_onnx_gives_the_same_ids(plan, bank, tokenizer, pairs, tmp_path):
    pytest.importorskip("onnx", reason="pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model = bank.assemble(plan)
    to_onnx(model, tokenizer, tmp_path)
    encoder, decoder = (runtime.InferenceSession(tmp_path / f"{part}_model.onnx") for part in ("encoder", "decoder"))
    batch = tokenizer(pairs.sources, return_tensors="np", padding=True)
    source = {name: batch[name].astype("int64") for name in ("input_ids", "attention_mask")}
    (states,) = encoder.run(None, source)
    ids = np.zeros((len(pairs.sources), 1), dtype="int64")
    for _ in range(LENGTH):
        feed = {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": source["attention_mask"]}
        ids = np.concatenate([ids, decoder.run(None, feed)[0][:, -1:].argmax(-1)], axis=1)
    end = tokenizer.eos_token_id
    made = [row[: row.index(end)] if end in row else row for row in ids[:, 1:].tolist()]
    assert made == greedy(model, tokenizer, pairs.sources)


# -- inside the layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("matrices", "together"), [("embeddings", True), ("attention", True), ("attention", False)])
def test_an_autoencoder_is_nearer_to_real_matrices_than_a_decomposition(bank, matrices, together):
    teacher, settings = bank.assemble(bank.shape.teacher), {"matrices": [matrices], "together": together, "description": None}
    near, of_near = compress_offline(teacher, 2, steps=150, **settings)
    cut, of_cut = compress_offline(teacher, 2, method="svd", **settings)
    assert of_near.error < 0.98 * of_cut.error
    for compact in (near, cut):  # neither has more numbers than it may
        kept = compact.num_parameters() - (teacher.num_parameters() - sizes_of(teacher, matrices))
        assert kept <= sizes_of(teacher, matrices) / 2


def sizes_of(teacher, matrices):
    end = "shared" if matrices == "embeddings" else ("Attention.q", "Attention.k", "Attention.v", "Attention.o")
    return sum(module.weight.numel() for name, module in teacher.named_modules() if name.endswith(end))
