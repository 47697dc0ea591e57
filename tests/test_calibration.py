"""Calibrating: scores against an independent reference, and what the strategy makes of them."""

import pytest
import torch
from conftest import logits, make_bank, make_teacher, same
from training import make_trainer
from transformers import AutoTokenizer

from modular_t5 import AssemblyPlan, ModularT5ForConditionalGeneration
from modular_t5.assembly_modular_t5 import tilings
from modular_t5.calibration import calibrate
from modular_t5.choosing_modular_t5 import foreseen_best


@pytest.fixture
def tokenizer(pico_tokenizer):
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def examples(count=7):
    """Of different lengths, so that batches are padded."""
    torch.manual_seed(5)
    return [
        {"input_ids": torch.randint(3, 60, (3 + i,)).tolist(), "labels": torch.randint(3, 60, (2 + i % 4,)).tolist(), "length": i}
        for i in range(count)
    ]


def small_bank(name="v1.0"):
    bank = make_bank(name)
    with torch.no_grad():  # heads of random T5s are sure of themselves, and their divergences huge
        (bank.shared if bank.config.tie_word_embeddings else bank.lm_head).weight.mul_(0.3)
    return bank


def predictions(model, rows):
    """One example at a time."""
    model_inputs = [{"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])} for row in rows]
    return torch.cat([logits(model, inputs)[0] for inputs in model_inputs]).double().log_softmax(-1)


@pytest.mark.parametrize("parts", [(), ("embeddings",), ("final_norms", "head")], ids=str)
@pytest.mark.parametrize("name", ["v1.0", "v1.1", "byt5"])
def test_scores_are_divergences_from_the_teacher(name, parts, tokenizer):
    bank, rows = small_bank(name), examples()
    for part in parts:
        bank.add_own_part(part)
        with torch.no_grad():
            for parameter_name, parameter in bank.named_parameters():
                if ".bank.lm_head" in parameter_name or ".bank.embed_tokens" in parameter_name or ".bank.final" in parameter_name:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    scores = calibrate(bank, rows, tokenizer, batch_size=3, description=None)
    assert len(scores.plans) > 12
    p = predictions(bank.assemble(bank.shape.teacher), rows)
    for plan, score in list(scores.plans.items())[::3]:
        q = predictions(bank.assemble(plan, share_weights=True), rows)
        assert score == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4, abs=1e-7)
    assert bool(scores.own_parts) == bool(parts)
    for side in ("encoder", "decoder"):
        assert {s: len(of_modules) for s, of_modules in scores.modules[side].items()} == {
            s: bank.shape.num_layers[side] // s for s in bank.shape.granularities[side]
        }
    if not parts:
        alone = AssemblyPlan.from_any({"encoder": [1, 1, 2, 1, 1], "decoder": list(bank.shape.teacher.decoder)})
        assert scores.modules["encoder"][2][1] == scores.plans[alone]


@pytest.mark.parametrize("seed", range(2))
def test_under_every_budget_the_best_of_what_was_measured_is_chosen(seed, tokenizer):
    torch.manual_seed(seed)
    bank = small_bank()
    scores = calibrate(bank, examples(), tokenizer, description=None)
    shape = bank.shape
    plans = [AssemblyPlan(encoder, decoder) for encoder in tilings(6, (2, 3, 6)) for decoder in tilings(6, (2, 3, 6))]
    reports = {plan: shape.report(plan) for plan in plans}
    for limit in {report.total_parameters for report in reports.values()}:
        chosen = shape.choose("calibrated", max_parameters=limit)
        assert reports[chosen].total_parameters <= limit
        within = [plan for plan in plans if reports[plan].total_parameters <= limit]
        measured = [scores.foreseen(plan) for plan in within if plan in scores.plans or plan == shape.teacher]
        assert scores.foreseen(chosen) == min(measured)
        # What was not measured is not foreseen to be better, but for other tilings of the same depths.
        of_depths = {plan.depths: scores.foreseen(plan) for plan in foreseen_best(shape, scores)}
        assert min(measured) <= min(score for depths, score in of_depths.items() if depths in {plan.depths for plan in within})


def test_without_verifying_every_module_is_scored_once_and_nothing_else(tokenizer):
    bank = small_bank()
    whole = calibrate(bank, examples(), tokenizer, description=None)
    scores = calibrate(bank, examples(), tokenizer, verify=False, description=None)
    assert scores == whole._replace(plans={})
    assert bank.choose_plan("calibrated", 2) in foreseen_best(bank.shape, scores)


def test_predictions_that_are_no_numbers_are_not_saved(tokenizer):
    bank = small_bank()
    with torch.no_grad():
        bank.decoder.bank["3"][1].layer[2].DenseReluDense.wo.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the predictions of 1x6/1x3-3x1 are no numbers in torch.float32: calibrate in float32"):
        calibrate(bank, examples(), tokenizer, description=None)
    assert bank.config.calibration is None


def test_a_calibrated_bank_is_the_same_bank_with_its_scores(inputs, tokenizer, tmp_path):
    bank = small_bank()
    before = small_bank()
    bank.set_plan("2x3/3x2")
    bank.train()
    calibrate(bank, examples(), tokenizer, description=None)
    assert bank.training
    assert str(bank.plan) == "2x3/3x2"
    assert same(bank, before)
    bank.eval()
    small = bank.assemble("calibrated", ratio=3)
    bank.save_pretrained(tmp_path)
    loaded = ModularT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.calibration == bank.config.calibration
    assert torch.equal(logits(loaded.assemble("calibrated", ratio=3), inputs), logits(small, inputs))
    lazily = ModularT5ForConditionalGeneration.assemble_from_pretrained(tmp_path, "calibrated", ratio=3)
    assert same(lazily, small)


@pytest.mark.parametrize(
    "rows", [[], [{"input_ids": [1, 2]}, {"input_ids": [1], "labels": [1]}], [{"input_ids": [1, 2], "labels": [-100, -100]}]], ids=str
)
def test_examples_without_labels_are_refused(rows, tokenizer):
    with pytest.raises(ValueError, match="examples are needed, each with labels"):
        calibrate(ModularT5ForConditionalGeneration.from_t5(make_teacher()), rows, tokenizer, description=None)


def test_training_on_forgets_the_scores(tokenizer, tmp_path):
    bank = small_bank()
    calibrate(bank, examples(), tokenizer, verify=False, description=None)
    make_trainer(tmp_path, bank=bank, max_steps=1).train()
    with pytest.raises(ValueError, match="needs scores"):
        bank.assemble("calibrated", ratio=2)
