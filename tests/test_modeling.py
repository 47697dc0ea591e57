"""The bank and what it assembles: the design's contracts 1, 2, 3, 6 and 7, over every family of T5."""

import copy
import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from conftest import DTYPES, PICO, TEACHERS, UNTIED, logits, make_bank, make_teacher
from peft import LoraConfig
from transformers import (
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Block, T5Stack

from modular_t5 import AssemblyPlan, ModularT5Config, ModularT5ForConditionalGeneration
from modular_t5.assembly_modular_t5 import tilings


SIX_SIX_PLANS = [str(AssemblyPlan(*sides)) for sides in product(tilings(6, (2, 3, 6)), repeat=2)]
TWELVE_TWELVE_PLANS = ["1x12/1x12", "1x6-2x3/4x3", "2x6/2x6", "1x12/4x3", "6x2/6x2", "3x2-2x3/1x1-1x3-4x2", "4x3/1x12", "2x3-6x1/6x1-3x2"]

# every way of decoding: what it takes, and whether it writes a cache
DECODING = {
    "greedy": {},
    "greedy without cache": {"use_cache": False},
    "beam": {"num_beams": 3},
    "beam without cache": {"num_beams": 3, "use_cache": False},
    "sampled": {"do_sample": True},
    "sampled without cache": {"do_sample": True, "use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.3},
}


def spread_of_plans(bank):
    return [*bank.shape.plans("size-first"), *bank.shape.plans("speed-first")[-2:]]


def generated(model, inputs, **arguments):
    torch.manual_seed(4)
    arguments = {"max_new_tokens": 6, **arguments}
    return model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **arguments)


# -- contract 1: one mathematics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_plan_is_the_teacher(name, dtype, inputs):
    teacher = make_teacher(name, dtype)
    bank = ModularT5ForConditionalGeneration.from_t5(teacher)
    for model in (bank, bank.assemble("size-first", ratio=1)):
        assert torch.equal(logits(model, inputs), logits(teacher, inputs))
        for arguments in ({"use_cache": False}, {"use_cache": False, "num_beams": 3}):
            assert torch.equal(generated(model, inputs, **arguments), generated(teacher, inputs, **arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_bank_and_what_it_assembles_agree_to_the_bit(name, dtype, inputs):
    bank = make_bank(name, dtype)
    seen = set()
    for plan in spread_of_plans(bank):
        assembled = bank.assemble(plan)
        with bank.using(plan):
            ours, theirs = logits(bank, inputs), logits(assembled, inputs)
            assert torch.equal(ours, theirs)
            assert torch.equal(generated(bank, inputs), generated(assembled, inputs))
        seen.add(ours.float().numpy().tobytes())
    assert len(seen) == len(set(map(str, spread_of_plans(bank))))  # the plans do differ


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_every_plan_of_six_and_six(every, inputs):
    bank = make_bank()
    assert len(SIX_SIX_PLANS) == 14 * 14
    for plan in SIX_SIX_PLANS[::every]:
        assembled = bank.assemble(plan, share_weights=True)
        with bank.using(plan):
            assert torch.equal(logits(bank, inputs), logits(assembled, inputs)), plan
            ids = generated(bank, inputs)
            assert torch.equal(ids, generated(assembled, inputs)), plan
            assert torch.equal(ids, generated(bank, inputs, use_cache=False)), plan


@pytest.mark.parametrize("plan", TWELVE_TWELVE_PLANS)
def test_a_spread_of_plans_of_twelve_and_twelve(plan, inputs):
    bank = make_bank(num_layers=12, num_decoder_layers=12)
    assembled = bank.assemble(plan)
    with bank.using(plan):
        assert torch.equal(logits(bank, inputs), logits(assembled, inputs))
        assert torch.equal(generated(bank, inputs), generated(assembled, inputs))


@pytest.mark.parametrize("mode", DECODING)
@pytest.mark.parametrize("plan", ["1x6/1x6", "1x2-2x2/3x2", "6x1/1x4-2x1", "2x3/6x1"])
def test_generated_ids_in_every_decoding_mode(plan, mode, inputs):
    bank = make_bank("v1.1")
    assembled = bank.assemble(plan)
    with bank.using(plan):
        ours = generated(bank, inputs, **DECODING[mode])
    assert torch.equal(ours, generated(assembled, inputs, **DECODING[mode]))
    if "without cache" in mode:
        cached = {**DECODING[mode], "use_cache": True}
        assert torch.equal(ours, generated(assembled, inputs, **cached))


def test_assisted_generation_with_an_assembled_assistant(inputs):
    one = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    bank = make_bank()
    helped = generated(bank, one, assistant_model=bank.assemble("2x3/6x1"))
    assert torch.equal(helped, generated(bank, one))


@pytest.mark.parametrize("plan", ["2x3/6x1", "6x1/1x6", "2x3/2x3"])
def test_an_assembled_models_cache_has_a_slot_a_decoder_layer(plan, inputs):
    assembled = make_bank().assemble(plan)
    cache = generated(assembled, inputs, return_dict_in_generate=True).past_key_values
    assert len(cache.self_attention_cache.layers) == len(cache.cross_attention_cache.layers) == assembled.config.num_decoder_layers


@pytest.mark.parametrize("name", ["v1.0", "byt5", "deep decoder"])
def test_a_bank_that_was_saved_small_runs_every_plan_again(name, inputs, tmp_path):
    bank = make_bank(name)
    smallest = bank.set_plan(bank.shape.smallest)
    bank.save_pretrained(tmp_path)
    teacher = T5ForConditionalGeneration.from_pretrained(tmp_path)  # the originals alone, whatever plan was saved
    for loaded in (
        ModularT5ForConditionalGeneration.from_pretrained(tmp_path),
        ModularT5ForConditionalGeneration.from_pretrained(tmp_path, plan=smallest.to_dict()),
    ):
        assert loaded.plan == smallest
        for plan in spread_of_plans(bank):
            with bank.using(plan), loaded.using(plan):
                assert torch.equal(logits(loaded, inputs), logits(bank, inputs))
                assert torch.equal(generated(loaded, inputs), generated(bank, inputs))
        with loaded.using(bank.shape.teacher):
            assert torch.equal(generated(teacher, inputs), generated(loaded, inputs))


def test_a_loaded_bank_and_what_it_assembles_agree_to_the_bit(inputs, tmp_path):
    """Tensors of odd sizes lie in the file, and so in memory, where no allocator would put them."""
    for widths in ({"d_model": 18, "d_kv": 5, "d_ff": 26}, {"d_model": 30, "d_kv": 7, "d_ff": 50}):
        make_bank("v1.1", **widths).save_pretrained(tmp_path)
        bank = ModularT5ForConditionalGeneration.from_pretrained(tmp_path)
        assert not any(parameter.data_ptr() % 64 for parameter in bank.parameters())
        for plan in spread_of_plans(bank):
            with bank.using(plan):
                assert torch.equal(logits(bank, inputs), logits(bank.assemble(plan), inputs))


def test_hidden_states_and_attentions_are_those_of_the_plan(inputs):
    bank = make_bank()
    for config in (bank.config, bank.encoder.config, bank.decoder.config):  # set_attn_implementation misses the stacks in 5.17
        config._attn_implementation = "eager"
    for plan in ("1x6/1x6", "2x3/6x1", "1x4-2x1/3x2", "6x1/1x6"):  # one bank after another: hooks must follow the plan
        assembled = bank.assemble(plan)
        with bank.using(plan), torch.no_grad():
            ours = bank(**inputs, output_hidden_states=True, output_attentions=True)
            theirs = assembled(**inputs, output_hidden_states=True, output_attentions=True)
        for field in ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions", "cross_attentions"):
            assert len(ours[field]) == len(theirs[field]) > 0
            assert all(torch.equal(a, b) for a, b in zip(ours[field], theirs[field], strict=True))


def test_a_module_reads_the_teachers_bias_wherever_it_comes_first(inputs):
    bank = make_bank()
    with bank.using("2x3/3x2"):
        before = logits(bank, inputs)
        bank.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(-2)
        assert not torch.equal(logits(bank, inputs), before)
        assert torch.equal(logits(bank, inputs), logits(bank.assemble(bank.plan), inputs))


# -- contract 2: stock output ---------------------------------------------------------------------------------------------

GENERATE_ELSEWHERE = """
import json, sys
sys.modules["modular_t5"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForSeq2SeqLM
folder, inputs = sys.argv[1], json.loads(sys.argv[2])
model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
tensors = {name: torch.tensor(value) for name, value in inputs.items()}
print(json.dumps([type(model).__name__, model.generate(**tensors, max_new_tokens=6).tolist()]))
"""


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("v1.0", "1x2-2x2/3x2"),
        pytest.param("v1.1", "6x1/1x4-2x1", marks=pytest.mark.slow),
        pytest.param("mt5", "2x3/6x1", marks=pytest.mark.slow),
    ],
)
def test_an_assembled_model_runs_where_the_package_is_not(name, plan, inputs, tmp_path):
    assembled = make_bank(name).assemble(plan)
    assembled.save_pretrained(tmp_path)
    wanted = generated(assembled, inputs)
    payload = json.dumps({key: inputs[key].tolist() for key in ("input_ids", "attention_mask")})
    command = [sys.executable, "-c", GENERATE_ELSEWHERE, str(tmp_path), payload]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    class_name, ids = json.loads(done.stdout)
    assert class_name == "T5ForConditionalGeneration"
    assert ids == wanted.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_an_assembled_model_is_stock_and_saves_to_the_bit(name, dtype, inputs, tmp_path):
    bank = make_bank(name, dtype)
    for plan in spread_of_plans(bank):
        assembled = bank.assemble(plan)
        assert type(assembled) is T5ForConditionalGeneration
        assert type(assembled.config) is T5Config
        assert not assembled.training
        assert (assembled.config.num_layers, assembled.config.num_decoder_layers) == plan.depths
        assert {type(module).__module__ for module in assembled.modules()}.isdisjoint(
            name for name in sys.modules if name.startswith("modular_t5")
        )
        assert not {"granularities", "plan", "auto_map"} & set(assembled.config.to_dict())
        assembled.save_pretrained(tmp_path)
        again, info = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert again.dtype == dtype
        assert torch.equal(logits(again, inputs), logits(assembled, inputs))
        assert (again.lm_head.weight is again.shared.weight) == (name not in UNTIED)


def test_untied_heads_survive_tie_weights_and_say_so_in_the_file(inputs, tmp_path):
    bank = make_bank("v1.1")
    for model in (bank, bank.assemble("2x3/2x3")):
        before = logits(model, inputs)
        model.tie_weights()
        assert torch.equal(logits(model, inputs), before)
        model.save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        assert fields["tie_word_embeddings"] is False
        assert fields["scale_decoder_outputs"] is False
    assert make_bank("v1.1 tied").assemble("2x3/2x3").config.tie_word_embeddings is True


def test_an_assembled_model_keeps_generation_settings_and_attention(inputs):
    bank = make_bank()
    bank.generation_config = GenerationConfig(max_new_tokens=3, num_beams=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    bank.encoder.config._attn_implementation = "eager"
    assembled = bank.assemble("2x3/2x3")
    assert assembled.generation_config.num_beams == 2
    assert assembled.generation_config is not bank.generation_config
    assert assembled.config._attn_implementation == "eager"


def test_an_assembled_model_trains(inputs):
    assembled = make_bank().assemble("2x3/3x2").train()
    assembled(input_ids=inputs["input_ids"], labels=inputs["decoder_input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in assembled.parameters())


# -- contract 3: assembling is renaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_the_parameter_map_names_the_source_of_every_tensor(name):
    bank = make_bank(name)
    ours = dict(bank.named_parameters(remove_duplicate=False))
    for plan in spread_of_plans(bank):
        assembled = dict(bank.assemble(plan).named_parameters(remove_duplicate=False))
        mapping = bank.parameter_map(plan)
        assert set(mapping) == set(assembled)
        assert all(torch.equal(assembled[theirs], ours[mine]) for theirs, mine in mapping.items())
        blocks = [mine for mine in mapping.values() if ".block." in mine or ".bank." in mine]
        assert len(set(blocks)) == len(blocks)


def test_an_assembled_model_owns_its_memory(inputs):
    bank = make_bank()
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    assembled = bank.assemble("1x2-2x2/3x2")
    with torch.no_grad():
        for parameter in assembled.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.state_dict().items())


def test_shared_weights_copy_nothing(inputs):
    bank = make_bank()
    pointers = {parameter.data_ptr() for parameter in bank.parameters()}
    assembled = bank.assemble("1x2-2x2/3x2", share_weights=True)
    assert {parameter.data_ptr() for parameter in assembled.parameters()} <= pointers
    with torch.no_grad():
        assembled.encoder.block[-1].layer[0].SelfAttention.q.weight.zero_()
    assert not bank.encoder.bank["2"][2].layer[0].SelfAttention.q.weight.any()


@pytest.mark.parametrize("name", TEACHERS)
def test_reported_counts_are_the_real_ones(name):
    bank = make_bank(name, torch.bfloat16)
    for plan in spread_of_plans(bank):
        report, assembled = bank.report(plan), bank.assemble(plan)
        assert report.total_parameters == assembled.num_parameters()
        assert report.bytes == sum(parameter.nbytes for parameter in assembled.parameters())


# -- contract 6: never a copied forward -----------------------------------------------------------------------------------


def test_every_forward_is_transformers_own():
    bank = make_bank()
    assert ModularT5ForConditionalGeneration.forward is T5ForConditionalGeneration.forward
    assert ModularT5ForConditionalGeneration.generate is T5ForConditionalGeneration.generate
    assert type(bank.encoder) is type(bank.decoder) is T5Stack
    blocks = [module for module in bank.modules() if isinstance(module, T5Block)]
    assert {type(block) for block in blocks} == {T5Block}
    assert len(blocks) == 12 + 2 * (3 + 2 + 1)


# -- plans in place -------------------------------------------------------------------------------------------------------


def test_set_plan_using_and_plan():
    bank = make_bank()
    assert str(bank.plan) == "1x6/1x6"
    assert str(bank.set_plan("size-first", 2)) == "2x3/2x3" == str(bank.plan)
    with bank.using("speed-first", ratio=1.9) as running:
        assert running is bank
        assert str(bank.plan) == "1x6/6x1"
    assert str(bank.plan) == "2x3/2x3"
    with pytest.raises(RuntimeError, match="inside"), bank.using("6x1/6x1"):
        raise RuntimeError("inside")
    assert str(bank.plan) == "2x3/2x3"


def test_a_refused_plan_leaves_the_bank_as_it_was(inputs):
    bank = make_bank()
    bank.set_plan("2x3/3x2")
    before = logits(bank, inputs)
    for bad in ("4x3/2x3", "2x3/2x2", "nonsense", "2x3-"):
        with pytest.raises(ValueError, match=r"granularity|covers|unknown strategy"):
            bank.set_plan(bad)
    assert str(bank.plan) == "2x3/3x2"
    assert torch.equal(logits(bank, inputs), before)


def test_printing_a_bank_shows_every_block():
    bank = make_bank()
    bank.set_plan("6x1/6x1")
    assert repr(bank.encoder.block).count("T5Block(") == 6


def test_a_copy_of_a_bank_is_independent(inputs):
    bank = make_bank()
    bank.set_plan("2x3/3x2")
    twin = copy.deepcopy(bank)
    before = logits(bank, inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.set_plan("1x6/6x1")
    assert torch.equal(logits(bank, inputs), before)


@pytest.mark.parametrize("plan", ["1x6/1x6", "2x3/6x1"])
def test_gradients_reach_what_runs_and_nothing_else(plan, inputs):
    bank = make_bank()
    with bank.using(plan):
        bank(input_ids=inputs["input_ids"], labels=inputs["decoder_input_ids"]).loss.backward()
    running = {name for name in bank.parameter_map(plan).values() if bank.get_parameter(name).requires_grad}
    assert {name for name, parameter in bank.named_parameters(remove_duplicate=False) if parameter.grad is not None} == running


def test_gradient_checkpointing_changes_no_gradient(inputs):
    gradients = []
    for checkpointing in (False, True):
        bank = make_bank(dropout_rate=0.0).train()
        if checkpointing:
            # transformers renamed it between 5.17 and 5.23
            getattr(bank, "activation_checkpointing_enable", bank.gradient_checkpointing_enable)()
        with bank.using("2x3/3x2"):
            loss = bank(input_ids=inputs["input_ids"], labels=inputs["decoder_input_ids"]).loss
        loss.backward()
        gradients.append(bank.encoder.bank["2"][0].layer[0].SelfAttention.q.weight.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


# -- building -------------------------------------------------------------------------------------------------------------


def test_from_t5_leaves_the_teacher_alone(teacher, inputs):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    bank = ModularT5ForConditionalGeneration.from_t5(teacher)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.config.to_dict() == config


@pytest.mark.parametrize(
    ("initialization", "offset"),
    [
        ("first", lambda j, s: 0),
        ("middle", lambda j, s: {2: 1, 3: 1, 6: 3}[s]),
        ("last", lambda j, s: s - 1),
        ("bottom-first", lambda j, s: s - 1 if j else 0),
    ],
)
def test_modules_start_as_copies_of_a_layer_of_their_span(initialization, offset):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(), initialization=initialization)
    for side, s in product((bank.encoder, bank.decoder), (2, 3, 6)):
        for j, module in enumerate(side.bank[str(s)]):
            original = side.block[s * j + offset(j, s)].state_dict()
            assert all(torch.equal(tensor, original[name]) for name, tensor in module.state_dict().items())


def test_from_a_folder_with_loading_arguments(tmp_path, inputs):
    teacher = make_teacher("v1.1")
    teacher.save_pretrained(tmp_path)
    bank = ModularT5ForConditionalGeneration.from_t5(tmp_path, granularities={"encoder": (2, 3), "decoder": (6,)}, dtype=torch.bfloat16)
    assert bank.dtype == torch.bfloat16
    assert bank.config.granularities == {"encoder": [2, 3], "decoder": [6]}
    assert torch.equal(logits(bank, inputs), logits(teacher.to(torch.bfloat16), inputs))


def test_a_bank_from_a_configuration_is_initialised_as_a_t5_is():
    stock = T5ForConditionalGeneration(T5Config(**PICO, num_layers=6))
    bank = ModularT5ForConditionalGeneration(ModularT5Config(**PICO, num_layers=6))
    reference = dict(stock.named_parameters())
    for name, parameter in bank.named_parameters():
        original = name if ".bank." not in name else f"{name.split('.')[0]}.block.1.{name.split('.', 4)[4]}"
        assert parameter.std(correction=0).item() == pytest.approx(reference[original].std(correction=0).item(), rel=0.6, abs=1e-6), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UMT5ForConditionalGeneration(UMT5Config(**PICO, num_layers=2)), "umt5.*relative position bias in every layer"),
        (lambda: T5Model(T5Config(**PICO, num_layers=2)), "T5Model.*a teacher is a T5ForConditionalGeneration"),
        (lambda: make_bank(), "it is a bank already; load it with from_pretrained"),
        (lambda: torch.nn.Linear(2, 2), "Linear.*a teacher is a T5ForConditionalGeneration"),
    ],
)
def test_what_is_no_teacher_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ModularT5ForConditionalGeneration.from_t5(make())


def test_a_folder_that_holds_no_teacher_is_refused(tmp_path):
    UMT5ForConditionalGeneration(UMT5Config(**PICO, num_layers=2)).save_pretrained(tmp_path / "umt5")
    make_bank().save_pretrained(tmp_path / "bank")
    for folder, message in (("umt5", "bias in every layer"), ("bank", "a bank already")):
        with pytest.raises(ValueError, match=message):
            ModularT5ForConditionalGeneration.from_t5(tmp_path / folder)


def test_a_teacher_with_adapters_or_without_some_layers_is_refused():
    adapted = make_teacher()
    adapted.add_adapter(LoraConfig(target_modules=["q", "v"]))
    shortened = make_teacher()
    shortened.decoder.block = shortened.decoder.block[:3]
    for teacher, message in (
        (adapted, r"which is not there; .*merge_and_unload"),
        (shortened, "decoder has 3 layers, its configuration says 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ModularT5ForConditionalGeneration.from_t5(teacher)


def test_wrong_arguments_of_from_t5(tmp_path):
    teacher = make_teacher()
    with pytest.raises(ValueError, match="returns a bank alone"):
        ModularT5ForConditionalGeneration.from_t5(tmp_path, output_loading_info=True)
    with pytest.raises(ValueError, match="granularity 4 does not divide the encoder's 6 layers"):
        ModularT5ForConditionalGeneration.from_t5(teacher, (4,))
    with pytest.raises(ValueError, match="'best'; choose one of first, middle, last, bottom-first"):
        ModularT5ForConditionalGeneration.from_t5(teacher, initialization="best")
    with pytest.raises(ValueError, match=r"\['dtype'\] apply where a teacher is loaded"):
        ModularT5ForConditionalGeneration.from_t5(teacher, dtype=torch.bfloat16)
