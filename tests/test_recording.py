"""What is recorded is what transformers itself would put out, and a replay changes nothing."""

import pytest
import torch
from conftest import make_teacher

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.recording import Replay, recording


PLANS = ["1x6/1x6", "1x2-2x2/1x3-3x1", "3x2/6x1"]


@pytest.fixture
def bank(teacher):
    return ModularT5ForConditionalGeneration.from_t5(teacher)


@pytest.fixture
def small_bank():
    return ModularT5ForConditionalGeneration.from_t5(make_teacher())


def ends_of(plan):
    return {side: {start + span for start, span in plan.blocks(side)} for side in ("encoder", "decoder")}


def test_states_are_those_that_transformers_puts_out(bank, inputs):
    plans = [
        bank.shape.teacher,
        bank.choose_plan("size-first", min(2, bank.shape.largest_ratio)),
        bank.choose_plan("size-first", bank.shape.largest_ratio),
    ]
    for plan in plans:
        with torch.no_grad():
            with recording(bank, plan, ends_of(plan)) as record:
                logits = bank(**inputs, use_cache=False).logits
            outputs = bank.assemble(plan)(**inputs, output_hidden_states=True)
        assert torch.equal(logits, outputs.logits)
        for side in ("encoder", "decoder"):
            states = outputs[f"{side}_hidden_states"]
            for block, end in enumerate(sorted(ends_of(plan)[side])):
                assert torch.equal(record[side].state(end), states[block + 1])


@pytest.mark.parametrize("plan", PLANS)
def test_attention_is_what_transformers_puts_out(plan, small_bank, inputs):
    plan = small_bank.choose_plan(plan)
    stock = small_bank.assemble(plan)
    for model in (stock, small_bank):
        for stack in (model.encoder, model.decoder):
            stack.config._attn_implementation = "eager"
    with torch.no_grad():
        with recording(small_bank, plan, ends_of(plan), attention=ends_of(plan)) as record:
            small_bank(**inputs, use_cache=False)
        outputs = stock(**inputs, output_attentions=True)
    for block, end in enumerate(sorted(ends_of(plan)["encoder"])):
        (found,) = record["encoder"].attention[end]
        assert torch.equal(found, outputs.encoder_attentions[block])
    for block, end in enumerate(sorted(ends_of(plan)["decoder"])):
        own, cross = record["decoder"].attention[end]
        assert torch.equal(own, outputs.decoder_attentions[block])
        assert torch.equal(cross, outputs.cross_attentions[block])


def test_attention_that_is_not_there_is_an_error(small_bank, inputs):
    plan = small_bank.choose_plan("3x2/6x1")
    with pytest.raises(AssertionError, match="has none"), recording(small_bank, plan, ends_of(plan), attention=ends_of(plan)):
        small_bank(**inputs)


def test_a_replay_stands_in_for_the_blocks_below(small_bank, inputs):
    bank, plan = small_bank, small_bank.choose_plan("1x4-2x1/1x3-3x1")
    with torch.no_grad(), recording(bank, bank.shape.teacher, {"encoder": {4}, "decoder": set()}) as of_teacher:
        bank(**inputs, use_cache=False)
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(bank.encoder.block._modules.values())
    ]
    replays = {"encoder": {4: Replay(of_teacher["encoder"].recorders[4].passed)}}
    with torch.no_grad(), recording(bank, plan, {"encoder": (), "decoder": ()}, replays=replays):
        replayed = bank(**inputs, use_cache=False).logits
    assert ran == []
    for handle in handles:
        handle.remove()
    with torch.no_grad(), bank.using(plan):
        assert torch.equal(replayed, bank(**inputs).logits)


@pytest.mark.parametrize("fails", [False, True])
def test_the_bank_is_as_it_was_afterwards(fails, small_bank, inputs):
    bank, plan = small_bank, small_bank.choose_plan("3x2/6x1")
    bank.set_plan("2x3/2x3")
    with torch.no_grad():
        before = bank(**inputs).logits
        try:
            with recording(bank, plan, ends_of(plan)):
                bank(**inputs, use_cache=False)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert torch.equal(bank(**inputs).logits, before)
    assert not any(module._forward_hooks for module in bank.modules())
    assert str(bank.plan) == "2x3/2x3"
