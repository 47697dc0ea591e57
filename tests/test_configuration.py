"""The configuration is validated when built, and survives JSON."""

import json

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modular_t5 import AssemblyPlan, ModularT5Config
from modular_t5.choosing_modular_t5 import Scores


def test_default_granularities_are_those_that_divide_each_side():
    config = ModularT5Config(num_layers=12, num_decoder_layers=8)
    assert config.granularities == {"encoder": [2, 3, 4, 6], "decoder": [2, 4]}
    assert config.plan == {"encoder": [1] * 12, "decoder": [1] * 8}


def test_granularities_by_model_and_by_side():
    assert ModularT5Config(granularities=(3, 2, 2)).granularities == {"encoder": [2, 3], "decoder": [2, 3]}
    by_side = ModularT5Config(granularities={"encoder": (), "decoder": (6,)})
    assert by_side.granularities == {"encoder": [], "decoder": [6]}


def test_granularities_may_be_any_iterable_of_integers():
    for granularities in ((s for s in (2, 3)), map(int, "23"), {3, 2}, np.array([2, 3])):
        assert ModularT5Config(granularities=granularities).granularities == {"encoder": [2, 3], "decoder": [2, 3]}
    by_side = ModularT5Config(granularities={"encoder": iter([6]), "decoder": iter([2])})
    assert by_side.granularities == {"encoder": [6], "decoder": [2]}
    assert json.loads(by_side.to_json_string())["granularities"] == by_side.granularities


def test_fields_given_when_loading_are_validated(tmp_path):
    ModularT5Config(granularities=(2, 3), plan="3x2/2x3").save_pretrained(tmp_path)
    assert ModularT5Config.from_pretrained(tmp_path, plan="6x1/1x6", granularities=(6,)).plan == {"encoder": [6], "decoder": [1] * 6}
    with pytest.raises(ValueError, match="granularity 4 does not divide"):
        ModularT5Config.from_pretrained(tmp_path, granularities=(4,))
    with pytest.raises(ValueError, match="does not divide the encoder's 3 layers"):
        AutoConfig.from_pretrained(tmp_path, num_layers=3)


def test_json_round_trip(tmp_path):
    config = ModularT5Config(num_layers=6, granularities=(2, 6), plan="2x3/6x1", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    again = ModularT5Config.from_pretrained(tmp_path)
    assert again.granularities == config.granularities
    assert AssemblyPlan.from_any(again.plan) == AssemblyPlan.parse("2x3/6x1")
    assert again.scale_decoder_outputs is config.scale_decoder_outputs is False


def scores_of(granularity, scores):
    return {"modules": {side: {granularity: scores} for side in ("encoder", "decoder")}}


def test_a_calibration_survives_json(tmp_path):
    given = {**scores_of(6, (1,)), "plans": {AssemblyPlan.parse("6x1/6x1"): 2}}
    config = ModularT5Config(num_layers=6, granularities=(6,), calibration=given)
    config.save_pretrained(tmp_path)
    assert ModularT5Config.from_pretrained(tmp_path).calibration == {**scores_of("6", [1.0]), "plans": {"6x1/6x1": 2.0}, "own_parts": 0.0}
    assert Scores.of(config.calibration).modules == scores_of(6, [1.0])["modules"]
    assert Scores.of(config.calibration).plans == {AssemblyPlan.parse("6x1/6x1"): 2.0}
    assert Scores.of(config.calibration).to_dict() == config.calibration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularities": (4,)}, r"granularity 4 does not divide the encoder's 6 layers; these do: \[2, 3, 6\]"),
        ({"granularities": {"encoder": (2,), "decoder": (5,)}}, "granularity 5 does not divide the decoder's 6"),
        ({"granularities": (1,)}, "at least 2, got 1"),
        ({"granularities": (2.0,)}, "at least 2, got 2.0"),
        ({"granularities": "236"}, "integers such as"),
        ({"granularities": 2}, "integers such as"),
        ({"granularities": {"encoder": (2,)}}, "'encoder' and 'decoder'"),
        ({"granularities": ()}, "a bank needs modules"),
        ({"num_layers": 5}, "a bank needs modules"),
        ({"num_layers": 0}, "num_layers must be an integer from 1 to 256, got 0"),
        ({"num_layers": -6}, "num_layers .* got -6"),
        ({"num_layers": 1_000_000}, "num_layers .* got 1000000"),
        ({"num_decoder_layers": 1_000_000}, "num_decoder_layers .* got 1000000"),
        ({"d_model": 10**9}, "d_model .* got 1000000000"),
        ({"d_ff": 0}, "d_ff .* got 0"),
        ({"num_heads": -1}, "num_heads .* got -1"),
        ({"vocab_size": 10**12}, "vocab_size .* got"),
        ({"plan": "2x2/2x3"}, "covers 4 layers; it has 6"),
        ({"granularities": (2,), "plan": "3x2/2x3"}, "uses granularity 3"),
        ({"plan": 7}, "a plan is an AssemblyPlan"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be from 0 to 1, got nan"),
        ({"dropout_rate": 2.0}, "dropout_rate must be from 0 to 1"),
        ({"feed_forward_proj": "gated-nope"}, "unknown activation 'nope'"),
        ({"calibration": [1, 2]}, "calibration is a mapping with the scores of 'modules'"),
        ({"calibration": {"modules": {}, "more": {}}}, "calibration is a mapping with the scores of 'modules'"),
        ({"calibration": {"modules": {"encoder": {}}}}, "the modules of calibration are a mapping of both sides"),
        (
            {"granularities": (2,), "calibration": scores_of(2, [0.5, 0])},
            r"of each encoder granularity a number a module, {'2': 3}; got {'2': \[0.5, 0",
        ),
        ({"granularities": (6,), "calibration": scores_of(6, "1")}, "must have of each encoder"),
        ({"granularities": (6,), "calibration": scores_of(6, [float("nan")])}, "a score of calibration must be a finite number, got nan"),
        ({"granularities": (6,), "calibration": scores_of(6, ["1"])}, "must be a finite number, got '1'"),
        ({"granularities": (6,), "calibration": scores_of(6, [10**400])}, "must be a finite number, got 1000"),
        ({"granularities": (6,), "calibration": {**scores_of(6, [1]), "plans": {"6x1/2x3": 1}}}, "uses granularity 2"),
        ({"granularities": (6,), "calibration": {**scores_of(6, [1]), "plans": [1]}}, "the plans of calibration are a mapping"),
    ],
)
def test_bad_fields_are_refused_with_the_value(fields, message):
    with pytest.raises(ValueError, match=message):
        ModularT5Config(**fields)


@pytest.mark.parametrize("fields", [{"num_layers": "6"}, {"d_model": None}, {"d_ff": 1.5}, {"num_heads": [4]}])
def test_wrong_types_are_refused_by_the_library(fields):
    with pytest.raises((StrictDataclassError, ValueError), match=next(iter(fields))):
        ModularT5Config(**fields)
