"""Names of a bank's tensors, told without a bank, against a real one."""

import pytest
from conftest import TEACHERS, make_bank, make_teacher

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.configuration_modular_t5 import OWN_PARTS
from modular_t5.layout_modular_t5 import (
    initial_name,
    is_bank_tensor,
    own_part_of,
    parameter_map,
    shaped_like,
    shard_of,
    tensor_names,
)
from modular_t5.modeling_modular_t5 import one_layer_of


@pytest.mark.parametrize("name", TEACHERS)
def test_what_one_layer_tells_is_what_a_bank_has(name):
    bank = make_bank(name)
    for part in OWN_PARTS:
        bank.add_own_part(part)
    parameters = dict(bank.named_parameters(remove_duplicate=False))
    one_layer = one_layer_of(bank)
    assert sorted(tensor_names(one_layer, bank.config)) == sorted(parameters)
    for parameter_name, parameter in parameters.items():
        assert parameter.shape == one_layer[shaped_like(parameter_name)].shape, parameter_name


@pytest.mark.parametrize("initialization", ["first", "middle", "last", "bottom-first"])
def test_initial_names(initialization):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(), initialization=initialization)
    parameters = dict(bank.named_parameters())
    for name in filter(is_bank_tensor, parameters):
        assert parameters[initial_name(name, bank.config)].equal(parameters[name]), name
    for side, start, span, module in bank.modules_of_bank():
        assert bank.initial_layer(side, start, span).layer[0].SelfAttention.q.weight.equal(module.layer[0].SelfAttention.q.weight)


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("shared.weight", "common"),
        ("lm_head.weight", "common"),
        ("encoder.final_layer_norm.weight", "common"),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "common"),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", "decoder-original"),
        ("encoder.block.11.layer.1.DenseReluDense.wi_0.weight", "encoder-original"),
        ("encoder.bank.2.3.layer.0.layer_norm.weight", "encoder-modules-2"),
        ("decoder.bank.6.0.layer.0.SelfAttention.q.lora_A.default.weight", "decoder-modules-6"),
        ("decoder.bank.embed_tokens.weight", "own"),
        ("decoder.bank.lm_head.weight", "own"),
        ("encoder.bank.final_layer_norm.weight", "own"),
        ("unheard-of", "common"),
    ],
)
def test_shards(name, shard):
    assert shard_of(name) == shard
    assert (own_part_of(name) is not None) == (shard == "own")


def test_the_map_of_a_plan_takes_each_tensor_once_and_the_bias_from_the_teacher():
    bank = make_bank(num_layers=12, num_decoder_layers=12)
    one_layer = one_layer_of(bank).keys() & dict(bank.named_parameters()).keys()  # tied ones once
    mapping = parameter_map(one_layer, bank.choose_plan("1x6-2x3/4x3"), bank.config)
    assert len(set(mapping.values())) == len(mapping) == len(list(bank.assemble("1x6-2x3/4x3").parameters()))
    table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert mapping[table] == table
    assert mapping["decoder.block.2.layer.1.EncDecAttention.q.weight"] == "decoder.bank.4.2.layer.1.EncDecAttention.q.weight"
    assert mapping["encoder.block.7.layer.0.layer_norm.weight"] == "encoder.bank.2.4.layer.0.layer_norm.weight"
