"""Layers left out, and layers that share their weights: against T5s of which the same was done by hand."""

import pytest
import torch
from conftest import logits, make_bank, make_teacher
from test_calibration import examples
from transformers import AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5ForConditionalGeneration

from modular_t5 import CompactT5ForConditionalGeneration, drop_layers, merge_feed_forwards, prune_heads, share_layers
from modular_t5.baselines import layers_left_out


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def dropping(dropped):
    """What `layers_left_out` asks: of every layer but the first of each side, whether it goes."""
    asked = iter([layer in dropped[side] for side in ("encoder", "decoder") for layer in range(1, 6)])
    return lambda: next(asked)


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5"])
def test_what_is_left_runs_as_if_the_rest_were_skipped(name, inputs, tmp_path):
    model, dropped = make_teacher(name), {"encoder": [1, 4], "decoder": [2, 3, 5]}
    shallower, report = drop_layers(model, **dropped)
    assert type(shallower) is type(model)
    assert report.chosen == {"encoder": [0, 2, 3, 5], "decoder": [0, 1, 4]}
    with layers_left_out(model, dropping(dropped)), torch.no_grad():
        skipped = model(**inputs, use_cache=False).logits
    assert torch.equal(logits(shallower, inputs), skipped)
    passed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 7}
    assert torch.equal(shallower.generate(**passed), shallower.generate(**passed, use_cache=False))
    shallower.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), inputs), skipped)


def test_the_position_biases_stay_when_the_first_layer_goes(inputs):
    model = make_teacher()
    shallower, _ = drop_layers(model, encoder=[0, 1], decoder=[0])
    tables = [m.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight for m in (model, shallower)]
    assert torch.equal(*tables)
    assert torch.equal(
        shallower.encoder.block[0].layer[1].DenseReluDense.wo.weight, model.encoder.block[2].layer[1].DenseReluDense.wo.weight
    )
    assert logits(shallower, inputs).isfinite().all()


def test_as_a_bank_runs_layers_of_its_teacher(inputs):
    """A module is its span's last layer here, but for the bottom, its first: what a bank starts with is a T5 with layers left out."""
    bank = make_bank().from_t5(make_teacher())
    shallower, _ = drop_layers(make_teacher(), encoder=[1, 2], decoder=[1, 2, 3, 4])
    assert torch.equal(logits(bank.assemble("3x1-1x3/3x2"), inputs), logits(shallower, inputs))


def test_layers_of_a_compact_model(tokenizer, inputs):
    merged, _ = merge_feed_forwards(make_teacher(), examples(), tokenizer, {"encoder": 3}, start={"encoder": 1}, description=None)
    pruned, _ = prune_heads(merged, examples(), tokenizer, 9, description=None)
    shallower, report = drop_layers(pruned, encoder=[0, 1], decoder=[3])
    assert type(shallower) is CompactT5ForConditionalGeneration
    assert shallower.config.tied_feed_forwards == {"encoder": [0, 0, 2, 3], "decoder": list(range(5))}
    assert shallower.config.heads["cross"] == [heads for layer, heads in enumerate(pruned.config.heads["cross"]) if layer != 3]
    assert torch.equal(
        shallower.encoder.block[1].layer[1].DenseReluDense.wo.weight, pruned.encoder.block[1].layer[1].DenseReluDense.wo.weight
    )
    assert report.parameters_after == shallower.num_parameters()
    again, _ = drop_layers(shallower, encoder=[0])
    assert again.config.tied_feed_forwards["encoder"] == [0, 1, 2]
    assert logits(again, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": 1}, r"name the layers that go, such as \[1, 3\]; got 1 and \(\)"),
        ({"encoder": [6]}, r"the layers of the encoder are 0 to 5, got \[6\]"),
        ({"decoder": [-1]}, r"the layers of the decoder are 0 to 5, got \[-1\]"),
        ({"decoder": range(6)}, "a T5 needs a layer in its decoder; all 6 were to be left out"),
    ],
)
def test_what_cannot_be_dropped(arguments, message):
    with pytest.raises(ValueError, match=message):
        drop_layers(make_teacher(), **arguments)


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5"])
def test_layers_share_their_weights(name, inputs, tmp_path):
    model = make_teacher(name)
    shared, report = share_layers(model, {"encoder": 3, "decoder": 2})
    assert shared.config.tied_layers == {"encoder": [0, 0, 0, 3, 3, 3], "decoder": [0, 0, 2, 2, 4, 4]}
    assert report.chosen == {"encoder": [0, 0, 0, 5, 5, 5], "decoder": [0, 0, 3, 3, 5, 5]}
    by_hand = make_teacher(name)
    with torch.no_grad():
        for side, taken in report.chosen.items():
            for layer, source in enumerate(taken):
                state = {k: t for k, t in getattr(model, side).block[source].state_dict().items() if "relative" not in k}
                getattr(by_hand, side).block[layer].load_state_dict(state, strict=False)
    assert torch.equal(logits(shared, inputs), logits(by_hand, inputs))
    assert shared.num_parameters() < 0.6 * model.num_parameters()
    shared.save_pretrained(tmp_path)
    assert torch.equal(logits(CompactT5ForConditionalGeneration.from_pretrained(tmp_path), inputs), logits(by_hand, inputs))
    shared.train()
    shared(**inputs, labels=inputs["decoder_input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in shared.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": 4}, "the encoder's 6 layers can share by 1, 2, 3, 6, got 4"),
        ({"run": {"decoder": 0}}, "the decoder's 6 layers can share by 1, 2, 3, 6, got 0"),
        ({"run": {"cross": 2}}, "run has no 'cross'"),
        ({"run": 2, "initialization": "random"}, "unknown initialization 'random'; choose one of first"),
    ],
)
def test_what_cannot_be_shared(arguments, message):
    with pytest.raises(ValueError, match=message):
        share_layers(make_teacher(), **arguments)


def test_what_is_not_alike_does_not_share(tokenizer):
    pruned, _ = prune_heads(make_teacher(), examples(), tokenizer, 3, description=None)
    with pytest.raises(ValueError, match=r"not free to be \(heads\): share layers before"):
        share_layers(pruned, 2)
    shared, _ = share_layers(make_teacher(), 2)
    with pytest.raises(ValueError, match="prune the T5 that it was made of before"):
        prune_heads(shared, examples(), tokenizer, 3, description=None)
    with pytest.raises(ValueError, match="merge feed-forwards of one without tied_layers"):
        merge_feed_forwards(shared, examples(), tokenizer, 2, description=None)


def test_layers_are_left_out_of_training_at_the_rate(inputs, tmp_path):
    model = CompactT5ForConditionalGeneration.from_t5(make_teacher(), encoder_layerdrop=0.5)
    assert torch.equal(logits(model, inputs), logits(make_teacher(), inputs))  # evaluated whole
    ran = {side: [0] * 6 for side in ("encoder", "decoder")}

    def count(side, layer):
        def hook(*_):
            ran[side][layer] += 1

        return hook

    for side in ran:
        for layer in range(6):
            getattr(model, side).block[layer].register_forward_hook(count(side, layer))
    model.train()
    for _ in range(100):
        model(**inputs, labels=inputs["decoder_input_ids"])
    assert ran["decoder"] == [100] * 6
    assert ran["encoder"][0] == 100
    assert 180 < sum(ran["encoder"][1:]) < 320  # of 500 at one half, 6 deviations either way
    model.save_pretrained(tmp_path)
    assert CompactT5ForConditionalGeneration.from_pretrained(tmp_path).encoder.block.rate == 0.5
    stock = drop_layers(model, encoder=[1, 3])[0]
    assert (stock.config.num_layers, type(stock.encoder.block).__name__) == (4, "LayerDropBlocks")
    assert isinstance(stock, T5ForConditionalGeneration)


def test_shared_layers_train_while_some_are_left_out(tokenizer, tmp_path):
    shared, _ = share_layers(make_teacher("v1.1"), {"encoder": 3})
    model = CompactT5ForConditionalGeneration.from_t5(shared, decoder_layerdrop=0.3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = Seq2SeqTrainingArguments(tmp_path, max_steps=6, optim="sgd", learning_rate=0.1, **settings)
    rows = [{"input_ids": [5, 6, 7, 1], "attention_mask": [1] * 4, "labels": [8, 9, 1]}] * 4
    Seq2SeqTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if "block" in name)
    assert len({id(block.layer[0].SelfAttention.q.weight) for block in model.encoder.block}) == 2


@pytest.mark.parametrize("rate", [1, -0.1, "much", True])
def test_a_rate_that_cannot_be(rate):
    with pytest.raises(ValueError, match=f"decoder_layerdrop must be a number from 0 to below 1, got {rate!r}"):
        CompactT5ForConditionalGeneration.from_t5(make_teacher(), decoder_layerdrop=rate)


def test_the_cache_is_as_deep_as_the_decoder_that_is_left():
    uneven, _ = drop_layers(make_teacher(), encoder=[1])
    even, _ = drop_layers(uneven, decoder=[1])
    assert (uneven.config.decoder_layers, even.config.decoder_layers) == (6, 5)
