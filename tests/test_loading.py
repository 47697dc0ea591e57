"""Opening saved banks: assembling without loading the rest, and refusing what is not as it must be before anything is run or taken."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, TEACHERS, Trap, logits, make_bank, make_teacher, same, tamper
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, T5ForConditionalGeneration

from modular_t5 import Latency, ModularT5ForConditionalGeneration
from modular_t5.loading_modular_t5 import SavedBank
from modular_t5.storage_modular_t5 import StoredTensors


assemble_from = ModularT5ForConditionalGeneration.assemble_from_pretrained
load = ModularT5ForConditionalGeneration.from_pretrained


# -- assembling without loading the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_it_is_what_the_loaded_bank_assembles(name, dtype, inputs, tmp_path):
    saved = make_bank(name, dtype)
    saved.generation_config = GenerationConfig(num_beams=3, decoder_start_token_id=0)
    saved.save_pretrained(tmp_path)
    bank = load(tmp_path)
    for plan in bank.shape.plans("size-first")[1::2]:
        lazily, whole = assemble_from(tmp_path, plan), bank.assemble(plan)
        assert type(lazily) is T5ForConditionalGeneration
        assert same(lazily, whole)
        assert torch.equal(logits(lazily, inputs), logits(whole, inputs))
        assert {**lazily.config.to_dict(), "_name_or_path": None} == {**whole.config.to_dict(), "_name_or_path": None}
        assert (lazily.lm_head.weight is lazily.shared.weight) == (whole.lm_head.weight is whole.shared.weight)
        assert lazily.generation_config.num_beams == 3
        assert not lazily.training


@pytest.mark.parametrize("parts", [("head",), ("final_norms",), ("embeddings",), ("final_norms", "head"), ("head", "embeddings")])
@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_with_parts_of_its_own(name, parts, inputs, tmp_path):
    bank = make_bank(name)
    for part in parts:
        bank.add_own_part(part)
    with torch.no_grad():
        for side, module in (("encoder", "final_layer_norm"), ("decoder", "embed_tokens")):
            for parameter in getattr(bank, side).bank[module].parameters() if module in getattr(bank, side).bank else ():
                parameter.mul_(2)
    bank.save_pretrained(tmp_path)
    for plan in ("2x3/1x6", "1x6/2x3"):
        assert same(assemble_from(tmp_path, plan), bank.assemble(plan))
    assert SavedBank(tmp_path).shape == bank.shape


def test_strategies_choose_as_the_bank_does(tmp_path):
    bank = make_bank("byt5")
    bank.save_pretrained(tmp_path)
    assert SavedBank(tmp_path).shape == bank.shape
    for strategy, ratio in (("size-first", 1.5), ("speed-first", 2)):
        assert same(assemble_from(tmp_path, strategy, ratio), bank.assemble(strategy, ratio))
    with pytest.raises(ValueError, match="ratio must be a number from 1"):
        assemble_from(tmp_path, "size-first", 100)
    with pytest.raises(ValueError, match="unknown strategy 'smallest'"):
        assemble_from(tmp_path, "smallest", 2)
    with pytest.raises(ValueError, match="covers 4 layers; it has 6"):
        assemble_from(tmp_path, "2x2/1x2")


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16], ids=str)
def test_budgets_are_kept_from_memory_and_from_disk(dtype, tmp_path):
    bank = make_bank("v1.1")
    bank.save_pretrained(tmp_path)
    latency = Latency(2.0, {"encoder": 1.0, "decoder": 3.0}, hardware="an abacus", request={"batch_size": 1})
    half = bank.report("2x3/2x3", dtype=dtype)
    budgets = [
        {"max_parameters": half.total_parameters},
        {"max_bytes": half.bytes},
        {"min_speedup": 1.8, "latency": latency},
        {"max_latency_ms": 14, "latency": latency},
    ]
    for budget in budgets:
        whole = bank.assemble("size-first", dtype=dtype, **budget)
        lazily = assemble_from(tmp_path, "size-first", dtype=dtype, **budget)
        assert same(lazily, whole)
        told = whole.config.modular_t5
        assert told == lazily.config.modular_t5
        assert told["plan"] == "2x3/2x3"
        assert told["achieved"]["total_parameters"] == whole.num_parameters()
        assert told["achieved"]["bytes"] == sum(parameter.nbytes for parameter in whole.parameters())
        with bank.using("size-first", **({"max_bytes": bank.report("2x3/2x3").bytes} if "max_bytes" in budget else budget)):
            assert str(bank.plan) == "2x3/2x3"
    assert bank.assemble("2x3/2x3").config.modular_t5.keys() == {"bank", "revision", "plan"}


def test_scores_of_modules_come_with_a_saved_bank(tmp_path):
    bank = make_bank()
    modules = {
        "encoder": {"2": [9, 9, 9], "3": [1, 1], "6": [9]},
        "decoder": {"2": [9, 9, 9], "3": [0.5, 9], "6": [2]},
    }
    bank.config.calibration = {"modules": modules, "plans": {}}
    bank.save_pretrained(tmp_path)
    assert str(load(tmp_path).choose_plan("calibrated", 2)) == str(bank.choose_plan("calibrated", 2)) == "1x6/6x1"
    assert same(assemble_from(tmp_path, "calibrated", 6), bank.assemble("6x1/6x1"))


def test_type_device_and_attention(inputs, tmp_path):
    bank = make_bank("v1.1")
    bank.save_pretrained(tmp_path)
    whole = bank.assemble("2x3/2x3")
    for dtype in (torch.bfloat16, "bfloat16", "auto", torch.float16):
        model = assemble_from(tmp_path, "2x3/2x3", dtype=dtype)
        whole.save_pretrained(tmp_path / "stock")
        stock = T5ForConditionalGeneration.from_pretrained(tmp_path / "stock", dtype=dtype)
        assert model.dtype == stock.dtype
        assert {name: p.dtype for name, p in model.named_parameters()} == {name: p.dtype for name, p in stock.named_parameters()}
        assert same(model, stock)
    assert assemble_from(tmp_path, "2x3/2x3", device="meta").device.type == "meta"
    assert assemble_from(tmp_path, "2x3/2x3", attn_implementation="eager").encoder.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type of torch, its name, or 'auto'; got 'float33'"):
        assemble_from(tmp_path, "2x3/2x3", dtype="float33")
    with pytest.raises(ValueError, match="does not take device_map"):
        assemble_from(tmp_path, "2x3/2x3", device_map="auto")


@pytest.mark.parametrize(("saved", "told"), [(torch.float32, "bfloat16"), (torch.float16, "float16"), (torch.bfloat16, "float32")])
def test_the_type_is_the_one_that_the_configuration_names(saved, told, tmp_path):
    make_bank("v1.1", saved).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": told}))
    one, other = load(tmp_path).assemble("2x3/2x3"), assemble_from(tmp_path, "2x3/2x3")
    assert str(one.dtype) == str(other.dtype) == f"torch.{told}"
    assert {name: p.dtype for name, p in one.named_parameters()} == {name: p.dtype for name, p in other.named_parameters()}
    assert same(one, other)
    for dtype in ("int8", torch.complex64, "nn"):
        with pytest.raises(ValueError, match="dtype must be a floating-point type"):
            assemble_from(tmp_path, "2x3/2x3", dtype=dtype)


def test_only_the_plans_tensors_are_read(tmp_path, monkeypatch):
    bank = make_bank(num_layers=12, num_decoder_layers=12)
    bank.save_pretrained(tmp_path)
    for shard in ("decoder-original", "encoder-modules-2", "decoder-modules-6"):  # of no use to the plan
        (tmp_path / f"model-{shard}.safetensors").unlink()
    read, get = [], StoredTensors.__getitem__
    monkeypatch.setattr(StoredTensors, "__getitem__", lambda stored, name: read.append(name) or get(stored, name))
    model = assemble_from(tmp_path, "1x6-3x2/4x3")
    assert len(read) == len(set(read)) == len(list(model.parameters()))
    assert set(read) <= set(bank.parameter_map("1x6-3x2/4x3").values())
    with pytest.raises(OSError, match=r"model-decoder-original\.safetensors"):
        assemble_from(tmp_path, "4x3/1x12")


def test_what_is_assembled_belongs_to_nobody_else(inputs, tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path)
    model = assemble_from(tmp_path, "2x3/2x3")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(assemble_from(tmp_path, "2x3/2x3"), bank.assemble("2x3/2x3"))


def test_a_bank_of_the_first_format(inputs, tmp_path):
    # One file, no index, no code, and a configuration without what came later.
    bank = make_bank("v1.1")
    bank.set_plan("2x3/2x3")
    T5ForConditionalGeneration.save_pretrained(bank, tmp_path)
    for path in tmp_path.glob("*.py"):
        path.unlink()
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for name in ("auto_map", "initialization", "lora", "modules_only", "own_parts", "teacher"):
        fields.pop(name)
    path.write_text(json.dumps(fields))
    again = load(tmp_path)
    assert same(again, bank)
    assert str(again.plan) == "2x3/2x3"
    assert same(assemble_from(tmp_path, "1x6/2x3"), bank.assemble("1x6/2x3"))


@pytest.mark.parametrize(
    "more",
    [
        {"transformers_weights": "other.safetensors"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"attn_implementation": "eager", "_attn_implementation": "eager"},
        {"num_labels": 4_000_000},
        {"decoder_layers": 200_000},
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSeq2SeqLM": "evil.M"}},
        {"is_decoder": True, "is_encoder_decoder": False},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_configuration_says_beside_that_is_not_obeyed(more, tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    for again in (load(tmp_path), AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
        assert same(again, bank)
        assert again.encoder.config._attn_implementation == "sdpa"
        assembled = again.assemble("1x6/2x3").config.to_dict()
        assert not {"transformers_weights", "quantization_config"} & assembled.keys()
        assert assembled["decoder_layers"] == 3
    assert same(assemble_from(tmp_path, "1x6/2x3"), bank.assemble("1x6/2x3"))


def test_a_folder_that_is_saved_anew_while_it_is_read(tmp_path, monkeypatch):
    bank = make_bank()
    bank.save_pretrained(tmp_path / "bank")
    saved = SavedBank(tmp_path / "bank")
    bank.save_pretrained(tmp_path / "bank")
    with pytest.raises(OSError, match="was saved anew while it was read; load it again"):
        saved.read(saved.names)


@pytest.mark.parametrize("content", ["[]", "null", "5", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json_of_ours(name, content, folder):
    (folder / name).write_text(content)
    for way in (load, lambda folder: assemble_from(folder, "2x3/2x3")):
        with pytest.raises((ValueError, OSError), match=r"config|index|it is no bank"):
            way(folder)


def test_a_head_that_is_gone(tmp_path):
    make_bank("v1.1").save_pretrained(tmp_path)
    tamper(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    both_ways(tmp_path, "it lacks 1, the first of them lm_head.weight")


def test_torn_generation_settings_are_not_passed_over(tmp_path):
    make_bank().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    for way in (load, lambda folder: assemble_from(folder, "2x3/2x3")):
        with pytest.raises(OSError, match="generation_config"):
            way(tmp_path)


def test_a_bank_of_a_later_version_with_more_in_its_configuration(tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later_field": {"2x3/2x3": 0.5}, "bank_format": 9}))
    assert same(load(tmp_path), bank)
    assert same(assemble_from(tmp_path, "2x3/2x3"), bank.assemble("2x3/2x3"))


# -- modules alone ---------------------------------------------------------------------------------------------------------


def test_modules_alone_are_assembled_with_their_teacher(inputs, tmp_path):
    teacher = make_teacher("v1.1")
    teacher.save_pretrained(tmp_path / "teacher")
    bank = ModularT5ForConditionalGeneration.from_t5(tmp_path / "teacher")
    with torch.no_grad():
        bank.decoder.bank["3"][1].layer[0].SelfAttention.q.weight.mul_(2)
    bank.save_pretrained(tmp_path / "bank", modules_only=True)
    for given in (None, teacher, tmp_path / "teacher"):
        model = assemble_from(tmp_path / "bank", "1x2-2x2/3x2", teacher=given)
        assert same(model, bank.assemble("1x2-2x2/3x2"))
        with torch.no_grad():
            model.shared.weight.zero_()
    assert teacher.shared.weight.any()
    with pytest.raises(ValueError, match="cannot build a bank from Linear"):
        assemble_from(tmp_path / "bank", "2x3/2x3", teacher=torch.nn.Linear(1, 1))


# -- what is refused -------------------------------------------------------------------------------------------------------

MODULE = "decoder.bank.3.1.layer.1.EncDecAttention.q.weight"
SHARD = "model-decoder-modules-3.safetensors"


LINUX = Path("/proc/self/clear_refs").exists()


def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines() if LINUX else [f"{field}: 0 kB"]
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def both_ways(folder, message, plan="2x3/3x2"):
    """Refused by loading and by assembling, with a sentence, and with little memory taken."""
    for way in (load, lambda folder: assemble_from(folder, plan)):
        if LINUX:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = kilobytes("VmRSS")
        with pytest.raises(ValueError, match=message):
            way(folder)
        assert kilobytes("VmHWM") - before < 100_000


@pytest.fixture
def folder(tmp_path):
    make_bank().save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.mark.parametrize("dump", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_in_place_of_a_shard(dump, folder, tmp_path):
    trap = {"a": Trap(tmp_path / "sprung")}
    if dump:
        (folder / SHARD).write_bytes(dump(trap))
    else:
        torch.save(trap, folder / SHARD)
    both_ways(folder, f"{SHARD} of .* is torn, or no safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_pickles_alone_are_not_read(folder, tmp_path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    both_ways(folder, "holds neither model.safetensors nor model.safetensors.index.json; only safetensors are read")
    with pytest.raises(ValueError, match="use_safetensors=False"):
        load(folder, use_safetensors=False)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/etc/secret.safetensors", "..", "a/b.safetensors", "*.safetensors", "x.bin", 3]
)
def test_an_index_that_points_elsewhere(outside, folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][MODULE] = outside
    index.write_text(json.dumps(content))
    both_ways(folder, "which is no safetensors file beside it")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_an_index_that_is_none(content, folder):
    (folder / "model.safetensors.index.json").write_text(content)
    both_ways(folder, "the index of .* is torn, or none")


@pytest.mark.parametrize(
    ("change", "listed", "message"),
    [
        (lambda tensors: tensors.update({MODULE: torch.zeros(3, 3)}), True, f"{MODULE} in .* has shape .3, 3.; by the configuration"),
        (
            lambda tensors: tensors.update({MODULE: tensors[MODULE].to(torch.int64)}),
            True,
            "floating-point numbers of one type; there are .*I64",
        ),
        (lambda tensors: tensors.update({MODULE: tensors[MODULE].double()}), True, r"of one type; there are F32 \(.*, F64 \("),
        (lambda tensors: tensors.pop(MODULE), True, f"it lacks 1, the first of them {MODULE}"),
        (lambda tensors: tensors.pop(MODULE), False, f"{SHARD} of .* and the index disagree on 1 tensors, the first of them {MODULE}"),
        (
            lambda tensors: tensors.update({"decoder.bank.3.7.x": torch.zeros(1)}),
            True,
            "has beside those 1, the first of them decoder.bank.3.7.x",
        ),
        (
            lambda tensors: tensors.update({"decoder.bank.3.7.x": torch.zeros(1)}),
            False,
            f"{SHARD} of .* and the index disagree on 1 tensors",
        ),
        (lambda tensors: tensors.update({"evil": torch.zeros(1)}), True, "has beside those 1, the first of them evil"),
    ],
    ids=["shape", "type", "types", "missing", "missing in its shard", "extra", "extra in its shard", "extra at the top"],
)
def test_tensors_that_are_not_what_the_configuration_says(change, listed, message, folder):
    tamper(folder, change, listed)
    both_ways(folder, message)


def test_the_report_tells_what_is_missing(folder):
    tamper(folder, lambda tensors: tensors.pop(MODULE))
    bank, info = load(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {MODULE}
    assert str(bank.plan) == "1x6/1x6"


@pytest.mark.parametrize("cut", [10, 1000, "all but 4 bytes"])
def test_a_truncated_shard(cut, folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:4] if isinstance(cut, str) else content[:-cut])
    both_ways(folder, f"{SHARD} of .* is torn")


def test_a_missing_shard(folder):
    (folder / SHARD).unlink()
    for way in (load, lambda folder: assemble_from(folder, "2x3/3x2")):
        with pytest.raises(OSError, match=SHARD):
            way(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**6}, "num_layers must be an integer from 1 to 256"),
        ({"num_layers": 256, "num_decoder_layers": 256, "granularities": [2], "plan": None}, "it lacks"),
        ({"d_model": 10**9}, "d_model must be an integer"),
        ({"d_model": 1 << 16, "d_ff": 1 << 20}, "has shape"),
        ({"vocab_size": 1 << 24}, "has shape"),
        ({"d_ff": -24}, "d_ff must be an integer"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon must be from 0 to 1, got -1.0"),
        ({"scale_decoder_outputs": "no"}, "scale_decoder_outputs must be true or false, got 'no'"),
        ({"feed_forward_proj": "nope"}, "nope"),
        ({"initialization": []}, "not as it must be"),
        ({"own_parts": None}, "not as it must be"),
        ({"use_cache": "maybe"}, "not as it must be"),
        ({"dtype": "evil"}, "dtype must be one of float32"),
        ({"num_heads": "many"}, "num_heads"),
        ({"d_model": "many"}, "d_model"),
        ({"granularities": [4]}, "granularity 4 does not divide"),
        ({"granularities": [2]}, "has beside those"),
        ({"num_layers": 5, "num_decoder_layers": 5, "granularities": None, "plan": None}, "a bank needs modules"),
        ({"plan": {"encoder": [2, 2], "decoder": [6]}}, "covers 4 layers"),
        ({"plan": {"encoder": [1, 2, 3], "decoder": [6]}}, "begin at a multiple of 2"),
        ({"plan": "../../etc"}, "is not <span>x<count>|two sides"),
        ({"plan": "1x6/" + "-".join(["1x999"] * 10_000)}, "a plan has at most 256 spans"),
        ({"own_parts": ["head"]}, "it lacks 1, the first of them decoder.bank.lm_head.weight"),
        ({"initialization": "../x"}, "unknown initialization"),
        ({"lora": {"rank": 3, "scaling": 1.0}}, "lora belongs to a bank of modules alone"),
        ({"lora": {"rank": -3, "scaling": 1.0}}, "the rank of lora must be a positive integer, got -3"),
        ({"modules_only": True}, "names its teacher by the SHA-256"),
        ({"model_type": "t5"}, r"it is no bank; .*from_t5 builds one"),
    ],
    ids=str,
)
def test_a_broken_configuration(change, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    both_ways(folder, message)


@pytest.mark.parametrize(
    "named", ["/etc/t5", "../t5", "https://example.org/t5", "file:///etc/t5", "org/t5/../../x", "", "C:\\t5", "~/t5", "org/t5@main"]
)
def test_a_teacher_that_is_no_hub_id(named, tmp_path):
    make_bank().save_pretrained(tmp_path / "bank", modules_only=True)
    path = tmp_path / "bank" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "teacher": {**fields["teacher"], "name_or_path": named, "revision": "a" * 40}}))
    both_ways(tmp_path / "bank", "which is no Hub id: pass it as")


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/1", "../main", "A" * 40])
def test_a_teacher_without_a_commit(revision, tmp_path):
    make_bank().save_pretrained(tmp_path / "bank", modules_only=True)
    path = tmp_path / "bank" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "teacher": {**fields["teacher"], "name_or_path": "org/t5", "revision": revision}}))
    both_ways(tmp_path / "bank", "of their teacher 'org/t5' no commit is named")


def test_a_teacher_of_other_weights(tmp_path):
    make_bank().save_pretrained(tmp_path / "bank", modules_only=True)
    other = make_teacher()
    with torch.no_grad():
        other.decoder.block[5].layer[2].DenseReluDense.wo.weight[0, 0] += 1e-6
    for way in (load, lambda folder, teacher: assemble_from(folder, "2x3/2x3", teacher=teacher)):
        with pytest.raises(ValueError, match="were trained for another teacher"):
            way(tmp_path / "bank", teacher=other)


def test_an_adapter_that_names_another_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/evil"}')
    both_ways(folder, "holds an adapter_config.json")


def test_modules_that_lie_about_the_head(tmp_path):
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher("v1.1"))
    bank.save_pretrained(tmp_path / "bank", modules_only=True)
    path = tmp_path / "bank" / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ValueError, match="says of its teacher's head tie_word_embeddings=True, which is not so"):
        load(tmp_path / "bank", teacher=make_teacher("v1.1"))


def test_two_saves_of_different_formats_in_one_folder(folder):
    T5ForConditionalGeneration.save_pretrained(make_bank(), folder)
    both_ways(folder, "holds both model.safetensors and model.safetensors.index.json, saved at different times")
