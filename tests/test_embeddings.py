"""Factorized embeddings against numpy's decomposition, and trimmed vocabularies against the texts that they are for."""

import numpy as np
import pytest
import torch
from conftest import logits, make_teacher
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5ForConditionalGeneration

from modular_t5 import CompactT5ForConditionalGeneration, factorize_embeddings, trim_vocabulary
from modular_t5.compacting import weighted_factors
from modular_t5.embeddings import count_tokens


def test_the_factors_are_numpys():
    matrix, weights = torch.randn(30, 8, dtype=torch.float64), torch.rand(30, dtype=torch.float64) + 0.1
    tokens, projection = weighted_factors(matrix, 3, weights)
    roots = np.sqrt(weights.numpy())[:, None]
    left, values, right = np.linalg.svd(roots * matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose((tokens @ projection).numpy(), (left[:, :3] * values[:3]) @ right[:3] / roots, atol=1e-12)
    # No other product of this rank is nearer: the error is the singular values that are left out.
    error = np.linalg.norm(roots * (matrix - tokens @ projection).numpy())
    assert error == pytest.approx(np.linalg.norm(values[3:]))
    whole = weighted_factors(matrix, 8, weights)
    torch.testing.assert_close(whole[0] @ whole[1], matrix)


def test_tokens_that_occur_more_are_nearer():
    model, counts = make_teacher(), torch.ones(61)
    counts[:10] = 1e6
    plain, weighed = (factorize_embeddings(model, 4, token_counts=given)[0].shared.weight for given in (None, counts))
    missed = [(model.shared.weight - each)[:10].norm() for each in (plain, weighed)]
    assert missed[1] < 0.8 * missed[0]


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5"])
def test_at_full_rank_nothing_is_lost(name, inputs):
    model = make_teacher(name)
    compact, report = factorize_embeddings(model, 16)
    torch.testing.assert_close(logits(compact, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    assert report.error < 1e-6
    passed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 8}
    assert torch.equal(compact.generate(**passed), model.generate(**passed))


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_what_is_tied_stays_tied(name, inputs):
    model = make_teacher(name)
    compact, report = factorize_embeddings(model, 5)
    matrices = 1 if name == "v1.0" else 2
    assert report.parameters_before - report.parameters_after == matrices * (61 * 16 - 5 * (61 + 16))
    assert (compact.lm_head.factors is compact.shared) is (name == "v1.0")
    missed = (model.shared.weight - compact.shared.weight).norm() / model.shared.weight.norm()
    assert report.error == pytest.approx(missed.item())
    assert report.chosen == {"rank": 5}


def test_counting():
    rows = [{"input_ids": [3, 3, 1], "labels": [4, -100]}, {"input_ids": [5]}, {"input_ids": [], "labels": None}]
    assert count_tokens(rows, 7).tolist() == [0, 1, 0, 2, 1, 1, 0]
    with pytest.raises(ValueError, match="the tokens are 0 to 4; an example has 5"):
        count_tokens(rows, 5)
    model, counts = make_teacher(), {3: 5.0, 4: 1}
    by_token, by_place = (factorize_embeddings(model, 4, token_counts=c)[0] for c in (counts, [counts.get(i, 0) for i in range(61)]))
    assert torch.equal(by_token.shared.weight, by_place.shared.weight)


def test_a_number_of_numpys_is_saved(tmp_path):
    factorize_embeddings(make_teacher(), np.int64(4))[0].save_pretrained(tmp_path)
    assert CompactT5ForConditionalGeneration.from_pretrained(tmp_path).config.embedding_rank == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank must be an integer from 1 to d_model \(16\), got 0"),
        ({"rank": 17}, "got 17"),
        ({"rank": 2.5}, "got 2.5"),
        ({"rank": 4, "token_counts": [1, 2]}, "token_counts must be 61 finite numbers of at least 0"),
        ({"rank": 4, "token_counts": [-1] * 61}, "at least 0"),
        ({"rank": 4, "token_counts": {"tree": 3}}, "by token, from 0 to 60; 'tree' is none"),
        ({"rank": 4, "token_counts": {61: 3}}, "61 is none"),
        ({"rank": 4, "token_counts": [np.inf] * 61}, "finite numbers"),
    ],
)
def test_what_cannot_be_factorized(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorize_embeddings(make_teacher(), **arguments)


def test_embeddings_are_factorized_once():
    with pytest.raises(ValueError, match="go through 4 dimensions already; factorize those of the T5 before"):
        factorize_embeddings(factorize_embeddings(make_teacher(), 4)[0], 3)


# -- vocabulary ----------------------------------------------------------------------------------------------------------------

TEXTS = ["ein Hund", "am Haus", "ein Mann am Haus"]


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "byt5"])
def test_texts_are_split_and_answered_as_before(name, tokenizer, tmp_path):
    model = make_teacher(name, vocab_size=len(tokenizer))
    trimmed, small, report = trim_vocabulary(model, tokenizer, TEXTS)
    assert type(trimmed) is T5ForConditionalGeneration
    assert trimmed.config.vocab_size == len(small) == len(report.chosen["token_ids"]) < len(tokenizer)
    new_ids = {old: new for new, old in enumerate(report.chosen["token_ids"])}
    trimmed.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    loaded, read = T5ForConditionalGeneration.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert read(text).input_ids == small(text).input_ids == [new_ids[i] for i in ids[0].tolist()]
        assert read.decode(read(text).input_ids, skip_special_tokens=True) == text
        decoder_ids = torch.tensor([[0, *ids[0].tolist()]])
        before = logits(model, {"input_ids": ids, "decoder_input_ids": decoder_ids})[..., report.chosen["token_ids"]]
        renumbered = [torch.tensor([[new_ids[i] for i in each[0].tolist()]]) for each in (ids, decoder_ids)]
        after = logits(loaded, dict(zip(("input_ids", "decoder_input_ids"), renumbered, strict=True)))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (read.pad_token_id, read.eos_token_id) == (loaded.config.pad_token_id, loaded.config.eos_token_id)
    assert read(["ein Hund", "am"], padding=True).input_ids[1][-1] == loaded.config.pad_token_id
    assert loaded.generate(**read("ein Hund", return_tensors="pt"), max_new_tokens=3).max() < len(small)


def test_pieces_that_win_a_text_still_do():
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((text, -float(i + 1)) for i, text in enumerate(["ab", "a", "b", "abc", "c", "bc"])),
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    model = make_teacher(vocab_size=len(made))
    _, small, _ = trim_vocabulary(model, made, ["abab", "ca"], keep=["bc"])
    assert set(small.get_vocab()) == {"<pad>", "</s>", "<unk>", "ab", "a", "c", "bc"}  # "bc" is the least likely too
    for text in ("abab", "ca", "caab"):
        assert small.convert_ids_to_tokens(small(text).input_ids) == made.convert_ids_to_tokens(made(text).input_ids)
    assert small.convert_ids_to_tokens(small("b").input_ids) == ["<unk>"]
    with pytest.raises(ValueError, match="no token 'xyz' to keep"):
        trim_vocabulary(model, made, ["ab"], keep=["xyz"])


def test_what_is_unknown_weighs_as_before():
    """A Unigram tokenizer weighs it by the least likely piece: were that gone, "abcd" would be split by an unknown "a" and "bcd"."""
    scores = {"ab": -12.0, "cd": -12.0, "bcd": -1.0, "a": -30.0, "b": -30.0, "c": -30.0, "d": -30.0}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores.items()]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    _, small, _ = trim_vocabulary(make_teacher(vocab_size=len(made)), made, ["abcd", "bcd"])
    assert small.tokenize("abcd") == made.tokenize("abcd") == ["ab", "cd"]
    assert len(small) < len(made)


def test_special_tokens_of_configurations_stay(tokenizer):
    model = make_teacher(vocab_size=len(tokenizer))
    model.generation_config.forced_bos_token_id, model.generation_config.eos_token_id = 40, [1, 41]
    trimmed, _, report = trim_vocabulary(model, tokenizer, TEXTS)
    new_ids = {old: new for new, old in enumerate(report.chosen["token_ids"])}
    assert trimmed.generation_config.forced_bos_token_id == new_ids[40]
    assert trimmed.generation_config.eos_token_id == [new_ids[1], new_ids[41]]
    assert model.generation_config.eos_token_id == [1, 41]


def test_extra_tokens_that_are_kept_stay_special(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    model = make_teacher(vocab_size=len(tokenizer))
    _, small, _ = trim_vocabulary(model, tokenizer, TEXTS, keep=["<two>"])
    small.save_pretrained(tmp_path)
    for read in (small, AutoTokenizer.from_pretrained(tmp_path)):
        assert "<two>" in read.all_special_tokens
        assert "<one>" not in read.get_vocab()
        assert read.decode(read("ein<two>").input_ids, skip_special_tokens=True) == "ein"


@pytest.mark.parametrize(
    ("texts", "keep", "message"),
    [([], (), "there are no texts"), ("ein Hund", (), "put the one into a list"), (TEXTS, "ef", "put the one into a list")],
)
def test_texts_are_several(texts, keep, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(make_teacher(vocab_size=len(tokenizer)), tokenizer, texts, keep=keep)


def test_another_models_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="it is another model's"):
        trim_vocabulary(make_teacher(vocab_size=8), tokenizer, TEXTS)


def test_what_is_compact_stays_compact(tokenizer, inputs):
    model = make_teacher("v1.1", vocab_size=len(tokenizer))
    trimmed, small, report = trim_vocabulary(model, tokenizer, TEXTS)
    compact, _ = factorize_embeddings(trimmed, 4)
    assert compact.config.vocab_size == len(small)
    assert report.parameters_before - report.parameters_after == 2 * 16 * (len(tokenizer) - len(small))
    with pytest.raises(ValueError, match=r"factorized \(rank 4\); trim the vocabulary before"):
        trim_vocabulary(compact, small, TEXTS)
    pruned = CompactT5ForConditionalGeneration.from_t5(model, tied_layers={"encoder": [0] * 6, "decoder": [0] * 6})
    again, _, _ = trim_vocabulary(pruned, tokenizer, TEXTS)
    assert type(again) is CompactT5ForConditionalGeneration
    assert again.config.tied_layers == pruned.config.tied_layers


def test_other_tokenizers_are_refused(tokenizer):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="where the tokenizer is of the Unigram kind"):
        trim_vocabulary(make_teacher(), words, TEXTS)
    named = make_teacher(vocab_size=len(tokenizer))
    named.generation_config.suppress_tokens = [5]
    with pytest.raises(ValueError, match=r"names tokens by number \(suppress_tokens\)"):
        trim_vocabulary(named, tokenizer, TEXTS)
