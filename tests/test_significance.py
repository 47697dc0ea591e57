"""The paired bootstrap over test sentences, held against sacreBLEU's own."""

import random

import pytest
import sacrebleu

from modular_t5.significance import BleuSamples


REFERENCES = [f"der Hund Nummer {n} läuft mit dem Mann {n % 7} schnell über die Wiese nach Haus" for n in range(80)]


def spoiled(share, seed):
    draw = random.Random(seed)
    return [" ".join("etwas" if draw.random() < share else word for word in reference.split()) for reference in REFERENCES]


def test_bleu_and_its_interval_are_sacrebleus():
    texts = spoiled(0.2, 0)
    ours = BleuSamples([texts], REFERENCES)
    its = sacrebleu.BLEU().corpus_score(texts, [REFERENCES], n_bootstrap=1000)
    assert ours.mean == ours.of_seeds[0] == pytest.approx(its.score, abs=1e-9)
    low, high = ours.interval
    assert low < ours.mean < high
    assert (high - low) / 2 == pytest.approx(its._ci, rel=0.15)


def test_of_several_seeds_the_mean():
    texts = [spoiled(0.2, 0), spoiled(0.4, 1)]
    both = BleuSamples(texts, REFERENCES)
    assert both.mean == pytest.approx(sum(sacrebleu.corpus_bleu(of, [REFERENCES]).score for of in texts) / 2)
    assert both.of_seeds == [BleuSamples([of], REFERENCES).mean for of in texts]


def test_a_paired_difference_is_surer_than_two_intervals():
    good, bad = BleuSamples([spoiled(0.2, 0)], REFERENCES), BleuSamples([spoiled(0.25, 0)], REFERENCES)
    by, (low, high) = good.ahead_of(bad)
    assert by == good.mean - bad.mean
    assert low < by < high
    widths = [interval[1] - interval[0] for interval in (good.interval, bad.interval)]
    assert high - low < sum(widths)
    assert good.ahead_of(good) == (0, (0, 0))


def test_texts_without_four_matching_words_score_as_in_sacrebleu():
    texts = ["der Hund schläft heute sehr gern"] * len(REFERENCES)
    wanted = sacrebleu.corpus_bleu(texts, [REFERENCES]).score
    assert wanted > 0
    assert BleuSamples([texts], REFERENCES).mean == pytest.approx(wanted)
