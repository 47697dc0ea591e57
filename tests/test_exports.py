"""Exports give what the PyTorch model gives: ids, scores and beams, of every family of T5 and of unequal depths."""

import sys

import pytest
import torch
from conftest import TEACHERS, make_bank, make_teacher, same
from transformers import AutoTokenizer

from modular_t5.exports import to_ctranslate2, to_onnx


PLANS = {"byt5": ["1x6/1x2", "2x3/2x1"], "deep decoder": ["1x2/2x3", "2x1/6x1"]}
TEXTS = ["ein Hund", "am Haus, ein Mann: und", "a", "Mann und Mann und Mann"]


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def sizes(name, tokenizer):
    """Of a bank around a teacher of some family, the teacher and a plan whose sides have different depths."""
    bank = make_bank(name, vocab_size=len(tokenizer))
    return [bank.assemble(plan) for plan in PLANS.get(name, ["1x6/1x6", "2x3/6x1"])]


def generated(model, tokenizer, beams, length=6):
    """`(ids, score)` of each text; score: mean log-probability of the tokens, where the end is ruled out."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": length, "min_new_tokens": length, "length_penalty": 1.0}
        out = model.generate(ids, **settings)[0, 1:]
        with torch.no_grad():
            logits = model(input_ids=ids, labels=out[None]).logits[0]
            logits[:, tokenizer.eos_token_id] = -torch.inf
            logs = logits.log_softmax(-1)
        found.append((out.tolist(), logs.gather(-1, out[:, None]).mean().item()))
    return found


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", TEACHERS)
def test_ctranslate2(name, beams, tokenizer, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    for number, model in enumerate(sizes(name, tokenizer)):
        folder = to_ctranslate2(model, tokenizer, tmp_path / str(number))
        translator = ctranslate2.Translator(str(folder), compute_type="float32", intra_threads=1)
        sources = [tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) for text in TEXTS]
        settings = {"beam_size": beams, "min_decoding_length": 6, "max_decoding_length": 6, "return_scores": True, "length_penalty": 1}
        results = translator.translate_batch(sources, **settings)
        for result, (ids, score) in zip(results, generated(model, tokenizer, beams), strict=True):
            assert tokenizer.convert_tokens_to_ids(result.hypotheses[0]) == ids
            assert result.scores[0] == pytest.approx(score, abs=1e-4)
        assert AutoTokenizer.from_pretrained(folder)("ein").input_ids == tokenizer("ein").input_ids


def test_ctranslate2_in_int8_is_smaller(tokenizer, tmp_path):
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    model = make_teacher(vocab_size=len(tokenizer), d_model=64, d_ff=256)
    bytes_of = {
        quantization: (to_ctranslate2(model, tokenizer, tmp_path / str(quantization), quantization=quantization) / "model.bin")
        .stat()
        .st_size
        for quantization in (None, "int8")
    }
    assert bytes_of["int8"] < 0.4 * bytes_of[None]
    assert same(model, make_teacher(vocab_size=len(tokenizer), d_model=64, d_ff=256))
    with pytest.raises(ValueError, match=r"there is something in .*int8; pass force=True to replace it"):
        to_ctranslate2(model, tokenizer, tmp_path / "int8")
    to_ctranslate2(model, tokenizer, tmp_path / "int8", force=True)
    with pytest.raises(ValueError, match="unknown quantization 'int4'; choose one of int8"):
        to_ctranslate2(model, tokenizer, tmp_path / "x", quantization="int4")


@pytest.mark.parametrize("name", TEACHERS)
def test_onnx(name, tokenizer, tmp_path):
    pytest.importorskip("onnx", reason="pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    for number, model in enumerate(sizes(name, tokenizer)):
        folder = to_onnx(model, tokenizer, tmp_path / str(number))
        assert same(model, sizes(name, tokenizer)[number])
        encoder, decoder = (runtime.InferenceSession(folder / f"{part}_model.onnx") for part in ("encoder", "decoder"))
        batch = tokenizer(TEXTS, return_tensors="np", padding=True)
        source = {"input_ids": batch["input_ids"].astype("int64"), "attention_mask": batch["attention_mask"].astype("int64")}
        (states,) = encoder.run(None, source)
        ids = torch.zeros(len(TEXTS), 1, dtype=torch.long)
        for _ in range(5):
            feed = {"input_ids": ids.numpy(), "encoder_hidden_states": states, "encoder_attention_mask": source["attention_mask"]}
            logits = torch.from_numpy(decoder.run(None, feed)[0])
            with torch.no_grad():
                expected = model(**{key: torch.from_numpy(value) for key, value in source.items()}, decoder_input_ids=ids).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)


@pytest.mark.parametrize("export", [to_ctranslate2, to_onnx])
def test_what_cannot_be_exported_is_refused(export, tmp_path):
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    pytest.importorskip("onnx", reason="pip install onnx")
    with pytest.raises(ValueError, match="assemble the one to export first"):
        export(make_bank(), None, tmp_path / "x")
    with pytest.raises(ValueError, match="got Linear"):
        export(torch.nn.Linear(1, 1), None, tmp_path / "x")
    with pytest.raises(ValueError, match=r"float32: model.float\(\)"):
        export(make_teacher(dtype=torch.bfloat16), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"there is something in .*; choose another folder"):
        export(make_teacher(), None, tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2.converters.converter", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install ctranslate2"):
        to_ctranslate2(make_teacher(), None, tmp_path)
    with pytest.raises(ImportError, match="pip install onnx"):
        to_onnx(make_teacher(), None, tmp_path)
