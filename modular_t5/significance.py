"""How sure a difference in BLEU is: paired bootstrap over the test sentences. That trainings with other seeds differ is not in it.

Source: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004.
"""

from collections.abc import Sequence

import numpy as np

from .pairs import sacrebleu


RESAMPLES = 1000


class BleuSamples:
    """BLEU, 0 to 100, of a system's texts, and of the same texts on `RESAMPLES` resamples of the test sentences.

    All samples over test sets of one length are of the same sentences, so that differences between two are paired.

    Args:
        texts: of one system, a list for each seed; BLEU is the mean over them.
        references: one a sentence.
    """

    def __init__(self, texts: Sequence[Sequence[str]], references: Sequence[str]):
        count = len(references)
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        weights = np.stack([np.bincount(sample, minlength=count) for sample in drawn])
        of_seeds, samples_of_seeds = [], []
        for of_seed in texts:
            statistics = _sentence_statistics(of_seed, references)
            of_seeds.append(_bleu(statistics.sum(0)))
            samples_of_seeds.append([_bleu(sums) for sums in weights @ statistics])
        self.of_seeds = of_seeds
        self.mean = float(np.mean(of_seeds))
        self.samples = np.mean(samples_of_seeds, axis=0)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        return _interval(self.samples)

    def ahead_of(self, other: "BleuSamples") -> tuple[float, tuple[float, float]]:
        """By how much this one's BLEU is above the other's, and the 95 % interval of that."""
        return self.mean - other.mean, _interval(self.samples - other.samples)


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def _sentence_statistics(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """A row a sentence of what BLEU sums up: n-grams that match, n-grams, length, length of the reference."""
    bleu = sacrebleu().BLEU(effective_order=True)  # it only silences a warning; the counts are the same
    scores = [bleu.sentence_score(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])


def _bleu(sums: np.ndarray) -> float:
    *counts, sys_len, ref_len = map(int, sums)
    order = len(counts) // 2
    return sacrebleu().BLEU.compute_bleu(counts[:order], counts[order:], sys_len, ref_len, smooth_method="exp").score  # as `BLEU` does
