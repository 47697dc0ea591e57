"""Pairs of texts, as fine-tuning a T5 takes them: reading, tokenizing, scoring."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase


class Pairs(NamedTuple):
    """Sources and what is to be made of them, in the same order."""

    sources: list[str]
    targets: list[str]

    @classmethod
    def of(cls, split: Dataset, source_lang: str, target_lang: str, *, prefix: str = "") -> "Pairs":
        """Of a split in the Hub's translation format: a column `translation` with `{"en": ..., "de": ...}` in every row.

        Args:
            source_lang, target_lang: the keys in it.
            prefix: put before every source, for T5s that were trained so.

        Raises:
            ValueError: there is no such column, or a row has no text under a key.
        """
        if "translation" not in split.column_names:
            raise ValueError(
                f"every example needs a 'translation' with the keys {source_lang!r} and {target_lang!r}; these have {split.column_names}"
            )
        pairs = split["translation"]
        for number, pair in enumerate(pairs):
            for key in (source_lang, target_lang):
                if not isinstance(pair.get(key), str):
                    raise ValueError(f"example {number} has no text under {key!r}; its keys are {sorted(pair)}")
        return cls([prefix + pair[source_lang] for pair in pairs], [pair[target_lang] for pair in pairs])

    @classmethod
    def read(cls, file: str, source_lang: str, target_lang: str, *, prefix: str = "") -> "Pairs":
        """Of a file of JSON lines in that format."""
        return cls.of(load_dataset("json", data_files=str(file), split="train"), source_lang, target_lang, prefix=prefix)

    def head(self, count: int | None) -> "Pairs":
        """The first so many; all by default."""
        return Pairs(self.sources[:count], self.targets[:count])

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, max_source_length: int, max_target_length: int) -> Dataset:
        """As the trainers take them, `input_ids` and `labels`, with the `length` that they group batches by; longer texts are cut."""

        def tokenize(rows: Mapping[str, list[str]]) -> dict[str, list[Any]]:
            features = tokenizer(rows["source"], max_length=max_source_length, truncation=True)
            labels = tokenizer(text_target=rows["target"], max_length=max_target_length, truncation=True).input_ids
            return {"input_ids": features.input_ids, "labels": labels, "length": [len(ids) for ids in labels]}

        rows = Dataset.from_dict({"source": self.sources, "target": self.targets})
        return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def scores_of(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of the corpus and the share of equal texts, 0 to 100.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    bleu, chrf = _metrics()
    equal = sum(text == reference for text, reference in zip(texts, references, strict=True))
    return {
        "exact match": 100 * equal / len(references),
        "chrF": chrf.corpus_score(list(texts), [list(references)]).score,
        "BLEU": bleu.corpus_score(list(texts), [list(references)]).score,
    }


def signatures() -> dict[str, str]:
    """What the scores are, in sacreBLEU's notation; it knows them after the first score."""
    bleu, chrf = _metrics()
    return {"exact match": "% of equal strings", "chrF": str(chrf.get_signature()), "BLEU": str(bleu.get_signature())}


def sacrebleu() -> Any:
    """The library, which only scoring needs.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("scoring needs sacrebleu: pip install 'modular_t5[compare]'") from error
    return sacrebleu


@cache
def _metrics() -> tuple[Any, Any]:
    return sacrebleu().BLEU(), sacrebleu().CHRF()
