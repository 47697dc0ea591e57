"""Pairs of texts: reading, tokenizing, scoring."""

import pytest
import sacrebleu
from datasets import Dataset
from transformers import AutoTokenizer

from modular_t5.pairs import Pairs, scores_of, signatures


def test_reading_a_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"translation": {"en": "a dog", "de": "ein Hund"}}\n{"translation": {"en": "a man", "de": "ein Mann"}}\n')
    pairs = Pairs.read(file, "en", "de", prefix="translate: ")
    assert pairs == (["translate: a dog", "translate: a man"], ["ein Hund", "ein Mann"])
    assert pairs.head(1) == (["translate: a dog"], ["ein Hund"])
    assert pairs.head(None) == pairs


def test_data_without_pairs_is_refused():
    with pytest.raises(ValueError, match=r"needs a 'translation' with the keys 'en' and 'de'; these have \['text'\]"):
        Pairs.of(Dataset.from_dict({"text": ["a"]}), "en", "de")
    with pytest.raises(ValueError, match=r"example 0 has no text under 'fr'; its keys are \['de', 'en'\]"):
        Pairs.of(Dataset.from_dict({"translation": [{"en": "a", "de": "b"}]}), "en", "fr")


def test_tokenized_as_the_trainers_take_it(pico_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    split = Pairs(["ein Hund", "a"], ["und ein Mann", "b"]).tokenized(tokenizer, max_source_length=4, max_target_length=6)
    assert [len(ids) for ids in split["input_ids"]] == [4, 3]
    assert split["length"] == [len(ids) for ids in split["labels"]] == [6, 3]
    assert {ids[-1] for ids in split["labels"]} == {tokenizer.eos_token_id}


def test_scores_are_sacrebleus():
    texts, references = ["ein Hund läuft schnell nach Haus", "so"], ["ein Hund läuft nach Haus", "so"]
    scores = scores_of(texts, references)
    assert scores["exact match"] == 50
    assert scores["BLEU"] == sacrebleu.corpus_bleu(texts, [references]).score
    assert scores["chrF"] == sacrebleu.corpus_chrf(texts, [references]).score
    assert "tok:13a" in signatures()["BLEU"]
