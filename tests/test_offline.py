"""Offline compression: decompositions against numpy's, auto-encoders on rows that have a shape, and what is restored of both."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import logits, make_bank, make_teacher, same
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_calibration import examples
from transformers import AutoTokenizer, T5ForConditionalGeneration

from modular_t5 import (
    CompactT5Config,
    CompactT5ForConditionalGeneration,
    compress_offline,
    drop_layers,
    factorize_embeddings,
    restore_matrices,
)
from modular_t5.exports import to_ctranslate2
from modular_t5.matrices_compact_t5 import FactoredLinear, RestoredMatrix
from modular_t5.offline import autoencoded, parameters_of, sensitivity, shape_within, truncated_svd


QUICK = {"steps": 30, "description": None}
Q = "encoder.block.1.layer.0.SelfAttention.q"
OUT = "decoder.block.0.layer.1.EncDecAttention.o"


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def on_a_curve(rows=300, width=12):
    """Rows of any length on a closed curve that fills many dimensions."""
    angles = np.linspace(0, 2 * np.pi, rows, endpoint=False)[:, None] * np.arange(1, width // 2 + 1)
    lengths = np.random.default_rng(0).uniform(0.5, 3, (rows, 1))
    return torch.tensor(lengths * np.concatenate([np.cos(angles), np.sin(angles)], 1), dtype=torch.float32)


def error(encoded, rows):
    return ((encoded.rows() - rows).norm() / rows.norm()).item()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_decomposition_is_numpys(weighted):
    rows, weights = torch.randn(40, 9), torch.rand(40) + 0.1 if weighted else torch.ones(40)
    encoded = truncated_svd(rows, 4, weights)
    roots = weights.sqrt().double().numpy()[:, None]
    left, values, right = np.linalg.svd(roots * rows.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(encoded.rows().numpy(), (left[:, :4] * values[:4]) @ right[:4] / roots, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("keep_factors", [False, True])
@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_the_model_is_that_of_matrices_that_numpy_cut(name, keep_factors, together, inputs):
    """Rows of `q`, columns of `o` and `wo`: cut by numpy, put into a stock T5, and run there."""
    model = make_teacher(name)
    settings = {"matrices": ["attention", "feed_forwards"], "method": "svd", "together": together, "keep_factors": keep_factors}
    compact, report = compress_offline(model, 1.4, **settings)
    cut, state = copy.deepcopy(model), model.state_dict()
    for group in report.chosen["decoded"]:
        rows = [state[f"{path}.weight"].T if path.endswith("o") else state[f"{path}.weight"] for path in group["matrices"]]
        left, values, right = np.linalg.svd(torch.cat(rows).double().numpy(), full_matrices=False)
        rank = group["rank"]
        near = torch.tensor((left[:, :rank] * values[:rank]) @ right[:rank], dtype=torch.float32)
        for path, of_one in zip(group["matrices"], near.split([len(each) for each in rows]), strict=True):
            cut.get_submodule(path).weight.data = of_one.T.contiguous() if path.endswith("o") else of_one
    torch.testing.assert_close(logits(compact, inputs), logits(cut, inputs), rtol=1e-3, atol=1e-3)
    groups = len(report.chosen["decoded"])
    places = 12 + 2 * (2 if name == "v1.0" else 3)  # three attentions of four matrices, feed-forwards of two sides
    assert groups == (places if together else 6 * places)
    restored = restore_matrices(compact)
    assert type(restored) is T5ForConditionalGeneration
    torch.testing.assert_close(logits(restored, inputs), logits(compact, inputs), rtol=1e-4, atol=1e-4)


def test_what_has_so_low_a_rank_is_kept(inputs):
    model, common = make_teacher(), torch.randn(4, 16)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("q.weight", "k.weight", "v.weight")):
                parameter.copy_(torch.randn(16, 4) @ common * 0.2)
            elif path.endswith("Attention.o.weight"):
                parameter.copy_((torch.randn(16, 4) @ common).T * 0.2)
    compact, report = compress_offline(model, 3, matrices=["attention"], method="svd")
    assert report.error < 1e-6
    torch.testing.assert_close(logits(compact, inputs), logits(model, inputs), rtol=1e-3, atol=1e-3)
    apart, report = compress_offline(model, 1.9, matrices=["attention"], method="svd", together=False)
    assert report.error < 1e-6
    torch.testing.assert_close(logits(apart, inputs), logits(model, inputs), rtol=1e-3, atol=1e-3)


def test_an_autoencoder_finds_the_shape_of_rows():
    """In as many numbers as a decomposition: rows on a curve need one or two each, and a plane is no curve."""
    rows = on_a_curve()
    budget = rows.numel() / 2.5
    rank, hidden = shape_within(*rows.shape, budget, "autoencoder")
    of_svd, none = shape_within(*rows.shape, budget, "svd")
    assert none == 0
    assert parameters_of(*rows.shape, rank, hidden) <= budget
    assert parameters_of(*rows.shape, of_svd, 0) <= budget < parameters_of(*rows.shape, of_svd + 1, 0)
    encoded = autoencoded(rows, rank, hidden, torch.ones(300), steps=300, seed=0)
    assert error(encoded, rows) < 0.5 * error(truncated_svd(rows, of_svd, torch.ones(300)), rows)
    # The lengths of rows are kept as they are.
    np.testing.assert_allclose(encoded.norms.numpy()[:, 0], np.linalg.norm(rows.numpy(), axis=1), rtol=1e-6)
    again = autoencoded(rows, rank, hidden, torch.ones(300), steps=300, seed=0)
    assert torch.equal(again.rows(), encoded.rows())


@pytest.mark.parametrize("method", ["svd", "autoencoder"])
def test_rows_that_weigh_more_are_nearer(method):
    torch.manual_seed(2)
    rows, weights = torch.randn(200, 10), torch.ones(200)
    weights[:20] = 100

    def missed(weights):
        rank, hidden = shape_within(*rows.shape, rows.numel() / 1.6, method)
        encoded = truncated_svd(rows, rank, weights) if method == "svd" else autoencoded(rows, rank, hidden, weights, steps=200, seed=0)
        return (encoded.rows() - rows)[:20].norm()

    assert missed(weights) < 0.8 * missed(torch.ones(200))


def test_a_row_of_zeros_stays_one():
    rows = on_a_curve(60)
    rows[7] = 0
    encoded = autoencoded(rows, 3, 4, torch.ones(60), steps=30, seed=0)
    assert encoded.rows().isfinite().all()
    assert torch.equal(encoded.rows()[7], torch.zeros(12))


def test_sensitivity_is_the_sum_of_squared_derivatives(tokenizer):
    model = make_teacher("v1.1")
    found = sensitivity(model, examples(), tokenizer, [Q, OUT], batch_size=1, description=None)
    sums = {Q: torch.zeros(16), OUT: torch.zeros(16)}
    for row in examples():
        model.zero_grad()
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        sums[Q] += model.get_submodule(Q).weight.grad.square().sum(1)
        sums[OUT] += model.get_submodule(OUT).weight.grad.square().sum(0)  # whose columns are as wide as the model
    for path, of_one in sums.items():
        torch.testing.assert_close(found[path], of_one, rtol=1e-4, atol=0)


def test_sensitivity_leaves_the_model_alone(tokenizer):
    model = make_teacher().requires_grad_(False)
    compact, report = compress_offline(model, 1.5, matrices=["attention"], dataset=examples(), processing_class=tokenizer, **QUICK)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    plain, of_plain = compress_offline(model, 1.5, matrices=["attention"], **QUICK)
    assert report.parameters_after == of_plain.parameters_after
    assert not torch.equal(plain.get_submodule(Q).weight, compact.get_submodule(Q).weight)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("method", "ratio"), [("svd", 1.2), ("svd", 3), ("autoencoder", 1.3)])
def test_every_group_has_as_many_parameters_as_it_may(method, ratio, together):
    model = make_teacher("v1.1")
    compact, report = compress_offline(model, ratio, method=method, together=together, steps=3, description=None)
    for group in report.chosen["decoded"]:
        before = sum(model.get_submodule(path).weight.numel() for path in group["matrices"])
        after = parameters_of(before // 16, 16, group["rank"], group["hidden"])
        assert before / after >= ratio > before / parameters_of(before // 16, 16, group["rank"] + 1, group["hidden"])
        modules = [compact.get_submodule(path) for path in group["matrices"]]
        own = {id(p): p.numel() for module in modules for p in [*module.parameters(), *module.decoder.parameters()]}
        assert sum(own.values()) == after
    assert report.parameters_after == compact.num_parameters()


def test_a_matrix_is_restored_once_and_whenever_what_it_is_made_of_changes():
    compact, _ = compress_offline(make_teacher(), 1.5, **QUICK)
    q = compact.get_submodule(Q)
    with torch.no_grad():
        kept = q.weight
        assert q.weight is kept
        q.norms.mul_(2)
        torch.testing.assert_close(q.weight, 2 * kept)
        owner = compact.get_submodule("encoder.block.0.layer.0.SelfAttention.q")
        owner.decoder.outer.add_(1)
        assert not torch.allclose(q.weight, 2 * kept)
        assert compact.to(torch.float64).get_submodule(Q).weight.dtype == torch.float64
        changed = q.weight
        q.latents.data.add_(1)  # of this nothing counts versions
        assert q.weight is changed
        compact.train().eval()
        assert not torch.allclose(q.weight, changed)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        in_inference = q.weight
    torch.testing.assert_close(in_inference, q.restored(), rtol=1e-6, atol=1e-6)
    assert not in_inference.is_inference()
    # With gradients it is made anew, and they reach what it is made of.
    q(torch.randn(2, 16, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in [q.latents, q.norms, *owner.decoder.parameters()])
    copied = pickle.loads(pickle.dumps(q))
    assert copied._kept is copy.deepcopy(q)._kept is None
    assert torch.equal(copied.weight, q.weight)


def test_embeddings_that_learn_decode_the_rows_that_are_read():
    compact, _ = compress_offline(make_teacher(), 1.5, matrices=["embeddings"], **QUICK)
    ids = torch.tensor([[5, 5, 7]])
    learning = compact.shared(ids)
    with torch.no_grad():
        torch.testing.assert_close(learning, compact.shared(ids), rtol=1e-5, atol=1e-5)
    learning.sum().backward()
    assert compact.shared.latents.grad.any(1).nonzero().flatten().tolist() == [5, 7]


@pytest.mark.parametrize("method", ["svd", "autoencoder"])
def test_what_was_never_trained_has_finite_weights(method, tmp_path):
    compact, _ = compress_offline(make_teacher("v1.1"), 1.5, method=method, **QUICK)
    torch.use_deterministic_algorithms(True)  # torch fills new memory with NaN then
    try:
        fresh = CompactT5ForConditionalGeneration(compact.config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    compact.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.block.2.")}, file, {"format": "pt"})
    lacking, info = CompactT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert any(name.endswith("latents") for name in info["missing_keys"])
    for name, parameter in lacking.named_parameters():
        assert parameter.isfinite().all()
        assert parameter.abs().max() < 1e3
        assert name in info["missing_keys"] or torch.equal(parameter, tensors[name])


@pytest.mark.parametrize("method", ["svd", "autoencoder"])
def test_in_float16_as_in_float32(method, inputs, tmp_path):
    whole = make_teacher()
    with torch.no_grad():
        whole.shared.weight.mul_(40)  # whose squares sum up to more than float16 has
    whole.save_pretrained(tmp_path / "whole")
    half = T5ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float16)
    compact, report = compress_offline(half, 1.5, method=method, **QUICK)
    assert report.error == pytest.approx(compress_offline(whole, 1.5, method=method, **QUICK)[1].error, rel=0.05)
    wo = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert compact.get_submodule(wo).latents.dtype == half.get_submodule(wo).weight.dtype == torch.float32
    assert compact.get_submodule(Q).latents.dtype == torch.float16
    assert restore_matrices(compact).get_submodule(wo).weight.dtype == torch.float32
    compact.save_pretrained(tmp_path / "compact")
    again = CompactT5ForConditionalGeneration.from_pretrained(tmp_path / "compact", dtype=torch.float16)
    assert torch.equal(logits(again, inputs), logits(compact, inputs))


@pytest.mark.parametrize("method", ["svd", "autoencoder"])
def test_a_matrix_of_zeros(method, inputs):
    model = make_teacher()
    with torch.no_grad():
        model.get_submodule(Q).weight.zero_()
    compact, report = compress_offline(model, 1.2, matrices=["attention"], method=method, together=False, **QUICK)
    assert logits(compact, inputs).isfinite().all()
    assert not compact.get_submodule(Q).weight.any()
    assert 0 < report.error < 1


def test_under_inference_mode_it_can_be_trained(inputs):
    with torch.inference_mode():
        compact, _ = compress_offline(make_teacher(), 1.5, **QUICK)
        restored = restore_matrices(compact)
    for model in (compact, restored):
        model(**inputs, labels=inputs["decoder_input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["svd", "autoencoder"])
@pytest.mark.parametrize(("rows", "width"), [(500, 16), (32128, 512), (20, 16)])
def test_the_largest_ratio_that_it_says_is_reached(method, rows, width):
    largest = rows * width / parameters_of(rows, width, 1, int(method == "autoencoder"))
    assert shape_within(rows, width, rows * width / largest, method) == (1, int(method == "autoencoder"))
    assert shape_within(rows, width, rows * width / largest - 1, method) is None


@pytest.mark.parametrize("keep_factors", [False, True])
def test_in_ctranslate2(keep_factors, tokenizer, tmp_path):
    import ctranslate2

    settings = {"matrices": ["attention", "feed_forwards"], "method": "svd", "keep_factors": keep_factors}
    compact, _ = compress_offline(make_teacher(vocab_size=len(tokenizer)), 1.3, **settings)
    translator = ctranslate2.Translator(str(to_ctranslate2(compact, tokenizer, tmp_path / "out")), intra_threads=1)
    ids = tokenizer("one tree and a book").input_ids
    (result,) = translator.translate_batch([tokenizer.convert_ids_to_tokens(ids)], beam_size=1, max_decoding_length=8)
    ours = compact.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    said = tokenizer.convert_tokens_to_ids(result.hypotheses[0])
    assert said == ours[: len(said)]
    assert len(said) > 2


@pytest.mark.parametrize(
    ("structure", "decoded", "message"),
    [
        ({"tied_layers": {"encoder": [0, 0, 2, 3, 4, 5], "decoder": list(range(6))}}, [Q], "or shares with another layer"),
        (
            {"tied_feed_forwards": {"encoder": [0, 0, 2, 3, 4, 5], "decoder": list(range(6))}},
            ["encoder.block.1.layer.1.DenseReluDense.wi"],
            "or shares with another layer",
        ),
        ({}, ["encoder.block.6.layer.1.DenseReluDense.wi"], "which this T5 has not"),
        ({}, ["encoder.block.1.layer.1.DenseReluDense.wi_0"], "which this T5 has not"),
    ],
)
def test_configurations_of_what_is_not_there(structure, decoded, message):
    config = make_teacher().config.to_dict() | structure | {"decoded": [{"matrices": decoded, "rank": 3}]}
    del config["model_type"]
    with pytest.raises(ValueError, match=message):
        CompactT5ForConditionalGeneration(CompactT5Config(**config))


def test_a_head_of_its_own_is_not_lost():
    with pytest.raises(ValueError, match="name lm_head in decoded, beside shared"):
        CompactT5ForConditionalGeneration.from_t5(make_teacher("v1.1"), decoded=[{"matrices": ["shared"], "rank": 3}])


def test_kept_factors_are_never_multiplied(monkeypatch, inputs):
    compact, _ = compress_offline(make_teacher("v1.1"), 2, matrices=["attention", "feed_forwards"], method="svd", keep_factors=True)
    monkeypatch.setattr(RestoredMatrix, "restored", None)
    assert sum(isinstance(module, FactoredLinear) for module in compact.modules()) == 6 * 4 + 6 * 8 + 12 * 3
    assert logits(compact, inputs).isfinite().all()
    assert compact.get_submodule(Q).weight.is_meta


def test_restored_it_is_free_for_other_methods(inputs):
    model = drop_layers(make_teacher("v1.1"), encoder=[3])[0]
    factorized, _ = factorize_embeddings(model, 8)
    compact, _ = compress_offline(factorized, 1.5, matrices=["attention"], **QUICK)
    restored = restore_matrices(compact)
    assert type(restored) is CompactT5ForConditionalGeneration  # its embeddings are factorized still
    assert torch.equal(logits(restored, inputs), logits(compact, inputs))
    assert drop_layers(restored, decoder=[0])[0].config.num_decoder_layers == 5
    assert restored.num_parameters() == factorized.num_parameters()
    with pytest.raises(ValueError, match="no decoded matrices in CompactT5ForConditionalGeneration to restore"):
        restore_matrices(restored)
    whole, _ = compress_offline(model, 1.5, **QUICK)
    assert type(restore_matrices(whole)) is T5ForConditionalGeneration
    assert torch.equal(logits(restore_matrices(whole), inputs), logits(whole, inputs))


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_embeddings_stay_tied_or_not(name, inputs, tmp_path):
    model = make_teacher(name)
    compact, report = compress_offline(model, 1.5, matrices=["embeddings"], **QUICK)
    groups = [group["matrices"] for group in report.chosen["decoded"]]
    assert groups == ([["shared"]] if name == "v1.0" else [["shared"], ["lm_head"]])
    assert compact.encoder.embed_tokens is compact.decoder.embed_tokens is compact.shared
    compact.save_pretrained(tmp_path)
    again, info = CompactT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same(again, compact)
    assert torch.equal(logits(again, inputs), logits(compact, inputs))
    with torch.no_grad():
        before = again.lm_head.weight
        again.shared.norms.mul_(2)
        torch.testing.assert_close(again.lm_head.weight, (2 if name == "v1.0" else 1) * before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1}, "ratio must be a number above 1, got 1"),
        ({"ratio": float("nan")}, "above 1, got nan"),
        ({"ratio": 500}, r"can be compressed up to \d+(\.\d+)?x, got 500"),
        ({"matrices": "attention"}, "in a list; got 'attention'"),
        ({"matrices": []}, "matrices are some of embeddings, attention, feed_forwards"),
        ({"matrices": ["heads"]}, "some of embeddings, attention, feed_forwards"),
        ({"method": "pca"}, "unknown method 'pca'; choose one of autoencoder, svd"),
        ({"keep_factors": True}, "keep_factors goes with method='svd'"),
        ({"keep_factors": True, "method": "svd"}, "whose factors factorize_embeddings keeps"),
        ({"keep_factors": 1}, "keep_factors is true or false, got 1"),
        ({"together": "no"}, "together is true or false, got 'no'"),
        ({"matrices": 5}, "in a list; got 5"),
        ({"matrices": [["a"]]}, "in a list"),
        ({"seed": "a"}, "seed must be an integer of at least 0, got 'a'"),
        ({"steps": 2}, "steps must be an integer of at least 3, got 2"),
        ({"dataset": [{"input_ids": [3, 1], "labels": [4, 1]}]}, "given together, or neither"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        compress_offline(make_teacher(), **{"ratio": 1.5, **QUICK, **arguments})


def test_what_is_compressed_already(tokenizer):
    compact, _ = compress_offline(make_teacher(), 1.5, matrices=["attention"], **QUICK)
    with pytest.raises(ValueError, match="matrices are decoded: take the model before"):
        compress_offline(compact, 1.5, **QUICK)
    with pytest.raises(ValueError, match="leave 'embeddings' out of matrices"):
        compress_offline(factorize_embeddings(make_teacher(), 6)[0], 1.5, **QUICK)
    with pytest.raises(ValueError, match="examples are needed, each with labels; there are none"):
        compress_offline(make_teacher(), 1.5, dataset=[], processing_class=tokenizer, **QUICK)
    with pytest.raises(ValueError, match="assemble a size of the bank first"):
        compress_offline(make_bank(), 1.5)
    broken = make_teacher()
    with torch.no_grad():
        broken.shared.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="some numbers in shared are none"):
        compress_offline(broken, 1.5, **QUICK)


def test_what_is_shared_is_on_one_device(inputs, tmp_path):
    compact, _ = compress_offline(make_teacher("v1.1"), 1.5, matrices=["attention"], **QUICK)
    compact.save_pretrained(tmp_path)
    whole = CompactT5ForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(whole, inputs), logits(compact, inputs))
    split = {"shared": "cpu", "encoder": "cpu", "decoder": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"load the model on one device, not \['cpu', 'disk'\]"):
        CompactT5ForConditionalGeneration.from_pretrained(tmp_path, device_map=split, offload_folder=tmp_path / "offload")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize("targets", [["q", "v"], "all-linear"], ids=str)
def test_adapters_find_nothing_that_is_decoded(targets):
    compact, _ = compress_offline(make_teacher(), 1.5, **QUICK)
    with pytest.raises(ValueError, match=r"is not supported|No `target_modules` passed"):
        get_peft_model(compact, LoraConfig(target_modules=targets))
    restored = get_peft_model(restore_matrices(compact), LoraConfig(target_modules=["q", "v"]))
    assert restored.get_nb_trainable_parameters()[0]
