"""What all methods of the compact wing promise, one by one and in pairs: one matrix of methods and families of T5."""

import copy
import json
import subprocess
import sys
from itertools import permutations, product

import pytest
import torch
from conftest import VOCAB_SIZE, logits, make_bank, make_teacher, same
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_calibration import examples
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)

from modular_t5 import (
    CompactT5Config,
    CompactT5ForConditionalGeneration,
    compress_offline,
    drop_layers,
    factorize_embeddings,
    merge_feed_forwards,
    prune_heads,
    share_layers,
)
from modular_t5.exports import to_ctranslate2


def merge(model, tokenizer):
    return merge_feed_forwards(model, examples(), tokenizer, {"encoder": 2}, description=None)


def prune(model, tokenizer):
    return prune_heads(model, examples(), tokenizer, 7, rounds=2, description=None)


def factorize(model, tokenizer):
    return factorize_embeddings(model, 6)


def drop(model, tokenizer):
    return drop_layers(model, encoder=[1], decoder=[-1 + len(model.decoder.block)])


def share(model, tokenizer):
    return share_layers(model, {"encoder": len(model.encoder.block)})


def offline(model, tokenizer):
    matrices = ["attention", "feed_forwards", *([] if getattr(model.config, "embedding_rank", None) else ["embeddings"])]
    return compress_offline(model, 1.5, matrices=matrices, steps=20, description=None)


METHODS = {"drop": drop, "merge": merge, "prune": prune, "factorize": factorize, "share": share, "offline": offline}
# Layers that share all they have share feed-forwards and heads too; of decoded matrices nothing is made.
PAIRS = [pair for pair in permutations(METHODS, 2) if not ("share" in pair and {"merge", "prune"} & set(pair)) and pair[0] != "offline"]
LONGEST = ("drop", "merge", "prune", "factorize", "offline")
CHAINS = [*((name,) for name in METHODS), *PAIRS, LONGEST]
FAMILIES = ["v1.0", "v1.1", "mt5", "byt5", "assembled"]


def family(name):
    return make_bank().assemble("1x2-2x2/3x2") if name == "assembled" else make_teacher(name)


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def compacted(model, chain, tokenizer):
    for method in chain:
        model, report = METHODS[method](model, tokenizer)
    return model, report


def matrix():
    """Every chain in every family; by default every method by itself in one, and the longest in three."""
    for name, chain in product(FAMILIES, CHAINS):
        marks = (
            []
            if (name == "v1.1" and len(chain) == 1) or (name in ("v1.0", "v1.1", "assembled") and chain == LONGEST)
            else [pytest.mark.slow]
        )
        yield pytest.param(name, chain, id=f"{name}-{'+'.join(chain)}", marks=marks)


@pytest.mark.parametrize(("name", "chain"), list(matrix()))
def test_methods_alone_and_one_after_the_other(name, chain, tokenizer, inputs, tmp_path):
    model = family(name)
    before, generation = copy.deepcopy(model), model.generation_config.to_dict()
    compact, report = compacted(model, chain, tokenizer)
    # Its input is untouched, and nothing is shared with it.
    assert same(model, before)
    assert model.generation_config.to_dict() == generation == compact.generation_config.to_dict()
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in compact.parameters())
    # As many parameters as it says.
    assert report.parameters_after == compact.num_parameters() == sum(p.numel() for p in compact.parameters()) < model.num_parameters()
    assert report.ratio > 1
    # It runs, with the cache and without.
    out = logits(compact, inputs)
    assert out.isfinite().all()
    passed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 7}
    for decoding in ({}, {"num_beams": 3}):
        ids = compact.generate(**passed, **decoding)
        assert torch.equal(ids, compact.generate(**passed, **decoding, use_cache=False))
    # It is saved and loaded to the bit, by its own class and the Auto classes.
    compact.save_pretrained(tmp_path)
    assert type(compact) is (type(model) if chain == ("drop",) else CompactT5ForConditionalGeneration)
    again, info = type(compact).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same(again, compact)
    assert again.num_parameters() == compact.num_parameters()
    assert torch.equal(logits(again, inputs), out)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is type(compact)
    # It is its configuration's shape.
    config = type(compact.config).from_pretrained(tmp_path)
    shapes = {name: tensor.shape for name, tensor in type(compact)(config).state_dict().items()}
    own = {name: tensor.shape for name, tensor in compact.state_dict().items()}
    assert {name: shapes[name] for name in own} == own
    # It trains, all of it.
    compact.train()
    compact(**inputs, labels=inputs["decoder_input_ids"]).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in compact.parameters())


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_ties_hold_through_training_copying_and_moving(name, tokenizer, tmp_path):
    compact, _ = compacted(make_teacher(name), LONGEST, tokenizer)
    rows = [{"input_ids": [5, 6, 7, 1], "attention_mask": [1] * 4, "labels": [8, 9, 1]}] * 4
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1}
    args = Seq2SeqTrainingArguments(tmp_path, max_steps=2, optim="sgd", learning_rate=0.1, **settings)
    before = copy.deepcopy(compact)
    Seq2SeqTrainer(compact, args, train_dataset=rows, processing_class=tokenizer).train()
    assert not same(compact, before)
    moved = copy.deepcopy(compact).to(torch.float64)
    for model in (compact, moved, CompactT5ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")):
        assert len({id(block.layer[-1].DenseReluDense) for block in model.encoder.block}) == 4
        assert model.encoder.embed_tokens is model.decoder.embed_tokens is model.shared
        assert (model.lm_head.factors is model.shared) is (name == "v1.0")
    checkpoint = tmp_path / "checkpoint-1"
    resumed = CompactT5ForConditionalGeneration.from_pretrained(checkpoint)
    Seq2SeqTrainer(resumed, args, train_dataset=rows, processing_class=tokenizer).train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(resumed.state_dict(), compact.state_dict())


def test_tied_layers_run_one_layer_at_several_depths(inputs, tmp_path):
    teacher = make_teacher("v1.1")
    shared = CompactT5ForConditionalGeneration.from_t5(teacher, tied_layers={"encoder": [0, 0, 0, 3, 3, 3], "decoder": [0, 1, 1, 1, 1, 5]})
    unrolled = make_teacher("v1.1")
    with torch.no_grad():
        for side, ties in shared.config.tied_layers.items():
            blocks = getattr(unrolled, side).block
            for layer, tie in enumerate(ties):
                state = {name: t for name, t in blocks[tie].state_dict().items() if "relative_attention_bias" not in name}
                blocks[layer].load_state_dict(state, strict=False)
    assert torch.equal(logits(shared, inputs), logits(unrolled, inputs))
    passed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 7}
    assert torch.equal(shared.generate(**passed), unrolled.generate(**passed))
    shared.save_pretrained(tmp_path)
    assert torch.equal(logits(CompactT5ForConditionalGeneration.from_pretrained(tmp_path), inputs), logits(unrolled, inputs))
    assert shared.num_parameters() < 0.5 * teacher.num_parameters()


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["modular_t5"] = None
import torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model.generate(torch.tensor([[5, 6, 7, 1]]), max_new_tokens=6).tolist()))
"""


def test_it_loads_where_the_package_is_not(tokenizer, tmp_path):
    compact, _ = compacted(make_teacher("v1.1"), LONGEST, tokenizer)
    compact.save_pretrained(tmp_path / "compact")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "compact")],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "cache"), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == compact.generate(torch.tensor([[5, 6, 7, 1]]), max_new_tokens=6).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(dtype, tokenizer, inputs, tmp_path):
    compact, _ = compacted(make_teacher("v1.1"), LONGEST, tokenizer)
    compact.save_pretrained(tmp_path)
    loaded = CompactT5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    torch.testing.assert_close(logits(loaded, inputs).float(), logits(compact, inputs), rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tied_feed_forwards": {"encoder": [0, 2, 2, 3, 4, 5], "decoder": range(6)}}, "that layer or an earlier one that has its own"),
        ({"tied_feed_forwards": {"encoder": [0, 0, 1, 3, 4, 5], "decoder": list(range(6))}}, r"got \[0, 0, 1, 3, 4, 5\]"),
        ({"tied_layers": {"encoder": [0] * 5, "decoder": [0] * 6}}, "for each of the 6 layers of the encoder"),
        ({"tied_layers": [0] * 6}, "tied_layers is a mapping"),
        ({"heads": {"encoder": [[0]] * 6, "decoder": [[0]] * 6, "cross": [[0]] * 5 + [[]]}}, "at least one; cross has"),
        ({"heads": {"encoder": [[0]] * 6, "decoder": [[0]] * 6, "cross": [[0, 4]] * 6}}, "some of 0 to 3"),
        ({"heads": {"encoder": [[0]] * 6}}, "heads is a mapping of encoder, decoder, cross"),
        ({"embedding_rank": 17}, r"embedding_rank must be an integer from 1 to d_model \(16\)"),
        ({"untied_head": True}, "true only with embedding_rank"),
        ({"decoded": {"matrices": ["shared"]}}, "decoded is a list of groups"),
        ({"decoded": [{"matrices": ["shared"], "rank": 17}]}, r"rank of a group of decoded must be an integer from 1 to d_model \(16\)"),
        ({"decoded": [{"matrices": ["shared"], "rank": 2, "hidden": -1}]}, "hidden of a group of decoded"),
        ({"decoded": [{"matrices": ["encoder.block.0"], "rank": 2}]}, r"names matrices of a T5, such as .* got \['encoder.block.0'\]"),
        ({"decoded": [{"matrices": ["shared"], "rank": 2}, {"matrices": ["shared"], "rank": 2}]}, "names a matrix twice"),
        ({"decoded": [{"matrices": ["shared"], "rank": 2, "keep_factors": True}]}, "and not of embeddings; got True"),
        ({"decoded": [{"matrices": ["shared"], "rank": 2}], "embedding_rank": 4}, "either factorized"),
        ({"decoded": [{"matrices": ["lm_head"], "rank": 2}]}, "a head is decoded where embeddings are too"),
        ({"decoded": [{"matrices": ["shared"], "rnk": 2}]}, "has no 'rnk'"),
        ({"d_model": 10**9}, "d_model must be an integer from 1 to"),
        (
            {"tied_layers": {"encoder": [0] * 6, "decoder": [0] * 6}, "tied_feed_forwards": {"encoder": [0] * 6, "decoder": [0] * 6}},
            "leave out tied_feed_forwards",
        ),
    ],
)
def test_a_configuration_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        CompactT5Config(**{"num_layers": 6, "d_model": 16, "num_heads": 4, "vocab_size": VOCAB_SIZE, **fields})


def test_what_ties_nothing_is_nothing():
    every = {"encoder": list(range(6)), "decoder": list(range(6))}
    heads = {kind: [[0, 1]] * 6 for kind in ("encoder", "decoder", "cross")}
    config = CompactT5Config(num_layers=6, num_heads=2, tied_feed_forwards=every, heads=heads)
    assert config.tied_feed_forwards is config.heads is None


@pytest.mark.parametrize("method", METHODS)
def test_a_bank_is_assembled_first(method, tokenizer):
    with pytest.raises(ValueError, match=r"model type 'modular_t5'\) compact: assemble a size of the bank first"):
        METHODS[method](make_bank(), tokenizer)


def test_a_bank_is_not_loaded_as_a_compact_t5(tmp_path):
    make_bank().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this is a bank, not a compact T5: load it as ModularT5ForConditionalGeneration"):
        CompactT5ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", [merge, prune])
@pytest.mark.parametrize("row", [{"input_ids": [5, 61], "labels": [7, 1]}, {"input_ids": [5, 1], "labels": [99, 1]}], ids=str)
def test_examples_of_another_tokenizer(method, row, tokenizer, monkeypatch):
    monkeypatch.setitem(globals(), "examples", lambda: [row])
    with pytest.raises(ValueError, match=r"an example has token (61|99), the model 61 tokens: tokenize with the model's tokenizer"):
        method(make_teacher(), tokenizer)


def test_factorized_embeddings_are_not_resized(tokenizer):
    compact, _ = factorize(make_teacher(), tokenizer)
    with pytest.raises(ValueError, match="resize those of the T5 that this was made of"):
        compact.resize_token_embeddings(70)
    assert compact.resize_token_embeddings() is compact.get_input_embeddings() is compact.shared
    merged, _ = merge(make_teacher(), tokenizer)
    assert merged.resize_token_embeddings(70).weight.shape[0] == 70


def test_the_auto_classes_know_it(tmp_path):
    CompactT5ForConditionalGeneration.from_t5(make_teacher()).save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForSeq2SeqLM):
        assert type(auto.from_pretrained(tmp_path)) is CompactT5ForConditionalGeneration


CHANGED = {
    "tied layers": lambda: share_layers(make_teacher("v1.1"), 3)[0],
    "factorized": lambda: factorize_embeddings(make_teacher("v1.0"), 6)[0],
    "factorized, untied": lambda: factorize_embeddings(make_teacher("v1.1"), 6)[0],
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize("targets", [["q", "v"], ["wi_0", "wi", "wo"], "all-linear"], ids=str)
@pytest.mark.parametrize("name", CHANGED)
def test_adapters_do_as_what_they_are_merged_into(name, targets, inputs):
    compact = CHANGED[name]()
    adapted = get_peft_model(compact, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    before = logits(adapted, inputs)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), inputs), before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, logits(CHANGED[name](), inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_merged_first(method, tokenizer):
    model = make_teacher()
    model.add_adapter(LoraConfig(target_modules=["q", "v"]))
    with pytest.raises(ValueError, match=r"there are adapters in this model.*merge them first"):
        METHODS[method](model, tokenizer)


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_a_side_of_a_factorized_model_has_its_embeddings(name, inputs, tmp_path):
    compact, _ = factorize_embeddings(make_teacher(name), 6)
    encoder = compact.get_encoder()
    assert {p.dtype for p in copy.deepcopy(encoder).to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert encoder.embed_tokens is compact.shared
    encoder.save_pretrained(tmp_path)
    assert any("embed_tokens.projection" in name for name in load_file(tmp_path / "model.safetensors"))
    compact.save_pretrained(tmp_path / "whole")
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == compact.num_parameters()


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"shared.weight": torch.zeros(3, 3)}, {}, r"shared.weight is \(3, 3\), and by the configuration \(61, 16\)"),
        ({"nonsense.weight": torch.zeros(3)}, {}, "tensors has no 'nonsense.weight'"),
        ({}, {"embeding_rank": 4}, "from_t5 has no 'embeding_rank'; it takes decoded, decoder_layerdrop"),
        ({}, {"d_ff": 12}, "from_t5 has no 'd_ff'"),
        ({}, {"embedding_rank": 4}, "needs shared.projection, which is not there"),
        (
            {},
            {"heads": {kind: [[0]] * 6 for kind in ("encoder", "decoder", "cross")}},
            r"q.weight is \(16, 16\), and by",
        ),
    ],
)
def test_tensors_that_do_not_fit(tensors, changes, message):
    with pytest.raises(ValueError, match=message):
        CompactT5ForConditionalGeneration.from_t5(make_teacher(), tensors, **changes)


@pytest.mark.parametrize("fields", [{"embedding_rank": 99}, {"heads": "abc"}, {"tied_feed_forwards": [1]}, {"untied_head": "x"}], ids=str)
def test_fields_that_are_given_on_loading_are_checked(fields, tmp_path):
    CompactT5ForConditionalGeneration.from_t5(make_teacher()).save_pretrained(tmp_path)
    for loading in (CompactT5Config, CompactT5ForConditionalGeneration):
        with pytest.raises(ValueError, match=next(iter(fields))):
            loading.from_pretrained(tmp_path, **fields)


def test_what_ctranslate2_would_take_for_another_model_is_refused(tokenizer, tmp_path):
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    with pytest.raises(ValueError, match="as many heads, and some of this one's are gone"):
        to_ctranslate2(prune(make_teacher(), tokenizer)[0], tokenizer, tmp_path / "out")


def test_without_changes_it_is_the_same_model(teacher, inputs):
    compact = CompactT5ForConditionalGeneration.from_t5(teacher)
    assert torch.equal(logits(compact, inputs), logits(teacher, inputs))
    assert isinstance(compact, T5ForConditionalGeneration)
