"""Merging feed-forwards: its mathematics against numpy and scipy, and what it finds where the answer was planted."""

import sys

import numpy as np
import pytest
import torch
from conftest import logits, make_teacher
from scipy.optimize import linear_sum_assignment
from test_calibration import examples
from test_heads import loss_of
from transformers import AutoTokenizer

from modular_t5 import merge_feed_forwards
from modular_t5.feed_forwards import FeatureMoments, aligning_permutation, averaged, feed_forward_similarity, permuted, plot_similarity


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def feed_forward(model, side, layer):
    return model.get_submodule(side).block[layer].layer[-1].DenseReluDense


def weights(model, side, layer):
    return {name: parameter.detach().clone() for name, parameter in feed_forward(model, side, layer).named_parameters()}


def plant(model, side, first, others):
    """Let feed-forwards be that of `first` with its features in another order; returns the orders."""
    orders = {}
    for layer in others:
        orders[layer] = torch.randperm(model.config.d_ff)
        feed_forward(model, side, layer).load_state_dict(permuted(weights(model, side, first), orders[layer]))
    return orders


def test_moments_are_those_of_numpy():
    random = np.random.default_rng(0)
    scales, means = [1, 2, 3, 4, 0], [0, 100, 0, -5, 0.7]
    batches = [[random.standard_normal((tokens, 5)) * scales + means for _ in range(2)] for tokens in (7, 1, 30)]
    moments = FeatureMoments([(0, 1), (0, 0), (1, 1)])
    for batch in batches:
        moments.add([torch.tensor(of_layer) for of_layer in batch])
    one, two = (np.concatenate([batch[layer] for batch in batches]) for layer in (0, 1))
    whole = np.corrcoef(one[:, :4], two[:, :4], rowvar=False)[:4, 4:]
    np.testing.assert_allclose(moments.correlation(0, 1)[:4, :4], whole, atol=1e-5)
    assert (moments.correlation(0, 1)[4] == 0).all()  # a feature that never changes
    one, two = one - one.mean(0), two - two.mean(0)
    expected = np.linalg.norm(one.T @ two) ** 2 / np.linalg.norm(one.T @ one) / np.linalg.norm(two.T @ two)
    assert moments.similarity(0, 1) == pytest.approx(expected, rel=1e-4)
    assert moments.similarity(0, 0) == pytest.approx(1)


def test_the_permutation_is_the_best_assignment():
    correlation = torch.randn(40, 40)
    permutation = aligning_permutation(correlation)
    rows, columns = linear_sum_assignment(-correlation.numpy())
    assert correlation[range(40), permutation].sum().item() == pytest.approx(correlation.numpy()[rows, columns].sum(), rel=1e-6)
    assert sorted(permutation.tolist()) == list(range(40))


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_features_in_another_order_do_the_same(name):
    model = make_teacher(name)
    states = torch.randn(3, 4, model.config.d_model)
    before = feed_forward(model, "encoder", 2)(states)
    plant(model, "encoder", 2, [2])
    torch.testing.assert_close(feed_forward(model, "encoder", 2)(states), before)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5"])
def test_shuffled_copies_are_found_and_merged_without_loss(name, side, tokenizer, inputs):
    model = make_teacher(name)
    orders = plant(model, side, 1, [2, 3])
    merged, report = merge_feed_forwards(model, examples(40), tokenizer, {side: 3}, start={side: 1}, description=None)
    assert report.chosen[side] == [1, 2, 3]
    assert merged.config.tied_feed_forwards[side] == [0, 1, 1, 1, 4, 5]
    for tensor, planted in zip(weights(merged, side, 1).values(), weights(model, side, 1).values(), strict=True):
        torch.testing.assert_close(tensor, planted)
    torch.testing.assert_close(logits(merged, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    assert abs(report.error) < 1e-5
    assert report.parameters_before - report.parameters_after == 2 * sum(p.numel() for p in feed_forward(model, side, 0).parameters())
    # As they lie they do not fit each other.
    unaligned, _ = merge_feed_forwards(model, examples(40), tokenizer, {side: 3}, start={side: 1}, align=False, description=None)
    assert not torch.allclose(logits(unaligned, inputs), logits(model, inputs), rtol=1e-2, atol=1e-2)
    lying = averaged([weights(model, side, layer) for layer in (1, 2, 3)])
    assert all(torch.equal(lying[name], tensor) for name, tensor in weights(unaligned, side, 1).items())
    assert len(orders) == 2


def test_the_place_is_the_one_of_the_least_loss(tokenizer):
    model = make_teacher()
    _, report = merge_feed_forwards(model, examples(20), tokenizer, {"encoder": 3, "decoder": 2}, description=None)
    for side, places in (("encoder", 4), ("decoder", 5)):
        losses = report.chosen["losses"][side]
        assert list(losses) == list(range(places))
        assert report.chosen[side][0] == min(losses, key=losses.get)
    both, _ = merge_feed_forwards(model, examples(20), tokenizer, 6, description=None)
    assert both.config.tied_feed_forwards == {"encoder": [0] * 6, "decoder": [0] * 6}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_padding_does_not_count(side, tokenizer, monkeypatch):
    """One example at a time has none."""
    seen = {}
    for size in (1, 9):
        added = []
        monkeypatch.setattr(FeatureMoments, "add", lambda self, features_TF, added=added: added.append([f.clone() for f in features_TF]))
        monkeypatch.setattr(FeatureMoments, "permutation", lambda self, first, other: torch.arange(24))
        merge_feed_forwards(make_teacher(), examples(9), tokenizer, {side: 2}, start={side: 1}, batch_size=size, description=None)
        seen[size] = [torch.cat(of_layer) for of_layer in zip(*added, strict=True)]
    assert len(seen[1]) == 6
    for alone, padded in zip(seen[1], seen[9], strict=True):
        torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)


def test_the_error_is_a_token_not_an_example(tokenizer):
    model = make_teacher()
    merged, report = merge_feed_forwards(model, examples(), tokenizer, {"encoder": 3}, description=None)
    losses = [loss_of(each, examples()) for each in (merged, model)]
    assert report.error == pytest.approx(losses[0] - losses[1], rel=1e-3, abs=1e-5)
    assert report.chosen["losses"]["encoder"][report.chosen["encoder"][0]] == pytest.approx(losses[0], rel=1e-5)


def test_numbers_that_are_none_are_refused(tokenizer):
    broken = make_teacher()
    with torch.no_grad():
        broken.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss of the examples is no number in torch.float32"):
        merge_feed_forwards(broken, examples(), tokenizer, 2, description=None)


def test_feed_forwards_that_are_shared_are_not_merged_again(tokenizer):
    once, _ = merge_feed_forwards(make_teacher(), examples(), tokenizer, {"encoder": 3}, start={"encoder": 2}, description=None)
    with pytest.raises(ValueError, match=r"no 3 consecutive feed-forwards of the encoder are left that are not shared"):
        merge_feed_forwards(once, examples(), tokenizer, {"encoder": 3}, description=None)
    twice, report = merge_feed_forwards(once, examples(), tokenizer, {"encoder": 2}, description=None)
    assert twice.config.tied_feed_forwards["encoder"] == [0, 0, 2, 2, 2, 5]
    assert report.chosen["encoder"] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": 1}, "a run is of 2 to 6 feed-forwards of the encoder, got 1"),
        ({"run": 7}, "got 7"),
        ({"run": True}, "got True"),
        ({"run": {}}, "run names no side"),
        ({"run": {"cross": 2}}, "run has no 'cross'; it takes encoder, decoder"),
        ({"run": {"encoder": 3}, "start": {"encoder": 4}}, "a run of 3 in the encoder may start at 0, 1, 2, 3; got 4"),
        ({"run": {"encoder": 3}, "start": {"encoder": True}}, "got True"),
        ({"run": {"encoder": 3}, "start": {"decoder": 0}}, "start has no 'decoder'"),
        ({"run": {"encoder": 3}, "start": 1}, "start is a mapping with keys of encoder, got 1"),
        ({"run": {1: 2, "x": 3}}, "run has no 1; it takes"),
        ({"run": 2, "dataset": []}, "examples are needed"),
    ],
)
def test_what_cannot_be_merged(arguments, message, tokenizer):
    given = {"dataset": examples(), "processing_class": tokenizer, "description": None, **arguments}
    with pytest.raises(ValueError, match=message):
        merge_feed_forwards(make_teacher(), **given)


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        aligning_permutation(torch.eye(3))


def test_copies_are_alike(tokenizer, tmp_path):
    model = make_teacher()
    plant(model, "encoder", 0, [1])
    similar = feed_forward_similarity(model, examples(40), tokenizer, description=None)
    assert {side: tuple(of_side.shape) for side, of_side in similar.items()} == {"encoder": (6, 6), "decoder": (6, 6)}
    torch.testing.assert_close(similar["encoder"], similar["encoder"].T)
    torch.testing.assert_close(similar["encoder"].diagonal(), torch.ones(6))
    assert similar["encoder"][0, 1] > similar["encoder"][0, 2:].max()
    plot_similarity(similar, tmp_path / "similar.png", title="Feed-forwards")
    assert (tmp_path / "similar.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="similarity has no 'cross'; it takes encoder, decoder"):
        plot_similarity({"cross": similar["encoder"]}, tmp_path / "wrong.png")
