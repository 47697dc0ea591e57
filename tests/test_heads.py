"""Pruning heads: against heads that are silenced, and gates one by one."""

import pytest
import torch
from conftest import logits, make_teacher
from test_calibration import examples
from transformers import AutoTokenizer

from modular_t5 import prune_heads
from modular_t5.heads import head_importance, plot_heads, without_least
from modular_t5.modeling_compact_t5 import attention_path


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def output_of(model, kind, layer):
    """The matrix that an attention's heads speak through, (d_model, heads, d_kv)."""
    return model.get_submodule(attention_path(kind, layer)).o.weight.view(model.config.d_model, -1, model.config.d_kv)


def silenced(name, heads):
    """A teacher in which all but these heads say nothing."""
    teacher = make_teacher(name)
    with torch.no_grad():
        for kind, of_layers in heads.items():
            for layer, of_layer in enumerate(of_layers):
                output_of(teacher, kind, layer)[:, [head for head in range(4) if head not in of_layer]] = 0
    return teacher


def loss_of(model, rows):
    """In nats a token, example by example."""
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            loss = model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}).loss.item()
        total, tokens = total + loss * len(row["labels"]), tokens + len(row["labels"])
    return total / tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5", "byt5"])
def test_heads_that_are_gone_are_heads_that_say_nothing(name, attention, tokenizer, inputs):
    teacher = make_teacher(name)
    pruned, report = prune_heads(teacher, examples(), tokenizer, 11, description=None)
    heads = pruned.config.heads
    assert heads == report.chosen["heads"]
    assert sum(4 - len(of_layer) for of_layers in heads.values() for of_layer in of_layers) == 11
    reference = silenced(name, heads)
    for model in (pruned, reference):
        model.set_attn_implementation(attention)
    torch.testing.assert_close(logits(pruned, inputs), logits(reference, inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(pruned, inputs), logits(teacher, inputs), rtol=1e-3, atol=1e-3)
    passed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 8}
    for decoding in ({}, {"num_beams": 3}):
        assert torch.equal(pruned.generate(**passed, **decoding), reference.generate(**passed, **decoding))
    assert report.parameters_before - report.parameters_after == 11 * 4 * 16 * 4
    # The error is over tokens, however many an example has.
    losses = [loss_of(model, examples()) for model in (pruned, teacher)]
    assert report.error == pytest.approx(losses[0] - losses[1], rel=1e-3, abs=1e-5)


def test_importance_is_the_size_of_the_derivative_by_a_gate(tokenizer):
    """A gate on a head is a factor of the weights that it speaks through: its derivative is theirs, times the weights."""
    teacher, rows = make_teacher(), examples(5)
    found = head_importance(teacher, rows, tokenizer, batch_size=2, description=None)
    sizes = {kind: torch.zeros(6, 4) for kind in found}
    for row in rows:
        teacher.zero_grad()
        teacher(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}).loss.backward()
        for kind, of_kind in sizes.items():
            for layer in range(6):
                weight = teacher.get_submodule(attention_path(kind, layer)).o.weight
                of_kind[layer] += (weight * weight.grad).view(16, 4, 4).sum((0, 2)).abs().detach()
    for kind, of_kind in sizes.items():
        torch.testing.assert_close(found[kind], of_kind / of_kind.norm(dim=-1, keepdim=True), rtol=1e-3, atol=1e-5)


def test_the_least_important_go_and_one_of_each_stays():
    heads = {"encoder": [[0, 1, 2], [0, 1]], "cross": [[2]]}
    importance = {"encoder": torch.tensor([[0.3, 0.1, 0.2], [0.4, 0.5, 0.0]]), "cross": torch.tensor([[0.0, 0.0, 0.0]])}
    assert without_least(heads, importance, 2) == {"encoder": [[0], [0, 1]], "cross": [[2]]}
    assert without_least(heads, importance, 3) == {"encoder": [[0], [1]], "cross": [[2]]}
    assert without_least(heads, importance, 99) == {"encoder": [[0], [1]], "cross": [[2]]}


def test_importance_is_weighed_anew_in_each_round(tokenizer):
    rows, teacher = examples(), make_teacher()
    halfway, _ = prune_heads(teacher, rows, tokenizer, 15, description=None)
    _, report = prune_heads(teacher, rows, tokenizer, 30, rounds=2, description=None)
    anew = head_importance(halfway, rows, tokenizer, description=None)
    for kind, of_kind in report.chosen["importance"].items():
        torch.testing.assert_close(of_kind, anew[kind])
    with torch.inference_mode():
        under = head_importance(halfway, rows, tokenizer, description=None)
        again, _ = prune_heads(teacher, rows, tokenizer, 30, rounds=2, description=None)
    assert all(torch.equal(under[kind], anew[kind]) for kind in anew)
    assert again.config.heads == report.chosen["heads"]


def test_again_and_in_rounds(tokenizer):
    once, _ = prune_heads(make_teacher(), examples(), tokenizer, 20, rounds=3, description=None)
    twice, report = prune_heads(once, examples(), tokenizer, 5, description=None)
    gone = [sum(4 - len(of_layer) for of_layers in m.config.heads.values() for of_layer in of_layers) for m in (once, twice)]
    assert gone == [20, 25]
    for kind, of_layers in twice.config.heads.items():
        for layer, of_layer in enumerate(of_layers):
            assert set(of_layer) <= set(once.config.heads[kind][layer])
            absent = [head for head in range(4) if head not in once.config.heads[kind][layer]]
            assert (report.chosen["importance"][kind][layer, absent] == 0).all()


@pytest.mark.parametrize("limit", [29_000, 29_392, 28_880, 99_999])
def test_to_a_number_of_parameters(limit, tokenizer):
    pruned, report = prune_heads(make_teacher(), examples(), tokenizer, max_parameters=limit, rounds=4, description=None)
    assert min(limit, 29_392) - 4 * 16 * 4 < report.parameters_after <= limit
    assert pruned.num_parameters() == report.parameters_after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of count and max_parameters"),
        ({"count": 1, "max_parameters": 1}, "exactly one of count and max_parameters"),
        ({"count": 55}, "count must be an integer from 0 to 54, which leaves one head an attention; got 55"),
        ({"count": -1}, "got -1"),
        ({"count": 2.0}, "got 2.0"),
        ({"max_parameters": 10}, "max_parameters=10: with one head an attention the model has 15,568 parameters"),
        ({"count": 3, "rounds": 0}, "rounds must be a positive integer, got 0"),
    ],
)
def test_what_cannot_be_pruned(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prune_heads(make_teacher(), examples(), tokenizer, **arguments, description=None)


def test_numbers_that_are_none_are_refused(tokenizer):
    broken = make_teacher()
    with torch.no_grad():
        broken.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"are no numbers in torch.float32"):
        prune_heads(broken, examples(), tokenizer, 3, description=None)


def test_the_picture(tokenizer, tmp_path):
    importance = head_importance(make_teacher("byt5"), examples(), tokenizer, description=None)
    for name, drawn in (("all", importance), ("one", {"cross": importance["cross"]})):
        plot_heads(drawn, tmp_path / f"{name}.png", title="Heads")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        ({}, "plot_heads has nothing to draw"),
        ({"side": importance["cross"]}, "importance has no 'side'; it takes"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_heads(wrong, tmp_path / "wrong.png")
