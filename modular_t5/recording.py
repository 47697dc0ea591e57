"""Running a plan while recording what passes between its blocks, or replaying what another run recorded.

A stack runs over whatever its `block` iterates as. Among the blocks stand two kinds of stand-ins that compute nothing: a `Recorder`
keeps what the block below it handed on, a `Replay` hands on what a recorder kept, in place of the blocks below.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .modeling_modular_t5 import ModularT5ForConditionalGeneration


# What blocks hand on: hidden states, position bias of the self-attention, and of the cross-attention.
Passed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Recorder:
    """Called as a block, it keeps what it gets and hands it on unchanged."""

    passed: Passed

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_decoder_position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Passed:
        self.passed = hidden_states, position_bias, encoder_decoder_position_bias
        return self.passed


class Replay:
    """Called as a block, it hands on what was recorded, whatever it gets."""

    def __init__(self, passed: Passed):
        self.passed = passed

    def __call__(self, *args: Any, **kwargs: Any) -> Passed:
        return self.passed


@dataclass
class SideRecord:
    """Of one side, by number of original layers passed: what was handed on, and the attention probabilities of the block below it."""

    recorders: dict[int, Recorder] = field(default_factory=dict)
    attention: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    normed: dict[int, torch.Tensor] = field(default_factory=dict)

    def state(self, end: int) -> torch.Tensor:
        """Hidden state after the first `end` original layers, or what stood in for them: batch, tokens, d_model.

        At the top of a stack that is after its final norm, as what follows reads it and as transformers puts it out.
        """
        return self.normed[end] if end in self.normed else self.recorders[end].passed[0]


@contextmanager
def recording(
    bank: ModularT5ForConditionalGeneration,
    plan: AssemblyPlan,
    ends: Mapping[str, Iterable[int]],
    *,
    replays: Mapping[str, Mapping[int, Replay]] | None = None,
    attention: Mapping[str, Iterable[int]] | None = None,
) -> Iterator[dict[str, SideRecord]]:
    """`with recording(bank, plan, ends) as record: bank(...)` runs a plan and fills `record[side]`.

    The bank's own plan returns at the end. Nothing is numbered for a cache: run with `use_cache=False`.

    Args:
        plan: one that the bank can run.
        ends: of each side, after how many original layers to record; where a block of the plan ends.
        replays: of a side, by number of original layers passed, what the block that starts there reads, in place of what is below it. Where
            nothing below is recorded, it does not run.
        attention: at which of the ends to record attention probabilities too, self first, then cross. They exist in eager attention only,
            which both stacks must be set to.
    """
    records = {side: SideRecord() for side in SIDES}
    with ExitStack() as restoring:
        bank.switch_parts(plan)
        restoring.callback(bank.switch_parts, bank.plan)
        for side in SIDES:
            stack, record, replays_of_side = getattr(bank, side), records[side], (replays or {}).get(side, {})
            attended = (attention or {}).get(side, ())
            running: list[Any] = []
            assert replays_of_side.keys() <= {start for start, _ in plan.blocks(side)}, "a replay stands where a block starts"
            for (start, span), block in zip(plan.blocks(side), bank.blocks_of(plan, side), strict=True):
                end = start + span
                if start in replays_of_side:
                    while running and not isinstance(running[-1], Recorder):
                        running.pop()
                    running.append(replays_of_side[start])
                running.append(block)
                if end in ends[side]:
                    record.recorders[end] = Recorder()
                    running.append(record.recorders[end])
                    if end in attended:
                        record.attention[end] = []
                        for handle in _keep_attention(block, record.attention[end]):
                            restoring.callback(handle.remove)
            if end in ends[side]:
                handle = stack.final_layer_norm.register_forward_hook(
                    lambda _, __, output, record=record, top=end: record.normed.__setitem__(top, output)
                )
                restoring.callback(handle.remove)
            restoring.callback(setattr, stack.block, "running", stack.block.running)
            stack.block.running = running
        yield records


@contextmanager
def eager_attention(*models: nn.Module) -> Iterator[None]:
    """Within it, T5s run the implementation of attention that hands out its probabilities."""
    configs = [getattr(model, side).config for model in models for side in SIDES]
    former = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, former, strict=True):
            config._attn_implementation = implementation


def stop_attention_dropout(module: nn.Module) -> None:
    """Until `train` is called again: probabilities with holes would not be comparable."""
    for each in module.modules():
        if isinstance(each, T5Attention):
            each.training = False


def _keep_attention(block: nn.Module, kept: list[torch.Tensor]) -> Iterator[Any]:
    def keep(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        assert output[-1] is not None, "attention probabilities were asked of an implementation that has none"
        kept.append(output[-1])

    for module in block.modules():
        if isinstance(module, T5Attention):
            yield module.register_forward_hook(keep)
