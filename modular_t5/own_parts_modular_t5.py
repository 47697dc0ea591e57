"""What a bank may have of its own beside modules: copies of the teacher's embeddings, final norms or head, which run where modules do.

The teacher's part stays where it is, as a module that hands its input on to the bank's where that is switched to.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .configuration_modular_t5 import OWN_PARTS
from .layout_modular_t5 import running_own_parts


class _Switched:
    """Named and saved as itself, but runs another module of its kind where one is switched to."""

    def switch(self, other: nn.Module | None) -> None:
        self.__dict__["other"] = other  # past nn.Module's registration: the other has its name elsewhere

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        other = self.__dict__.get("other")
        return super().forward(inputs) if other is None else other(inputs)


class SwitchedNorm(_Switched, T5LayerNorm):
    pass


class SwitchedEmbedding(_Switched, nn.Embedding):
    pass


class SwitchedHead(_Switched, nn.Linear):
    pass


class OwnEmbedding(nn.Embedding):
    """Given hidden states in place of token ids, it is the head that is tied to it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight) if inputs.is_floating_point() else super().forward(inputs)


class OwnPartsMixin:
    """For a T5 whose stacks have a `bank` of modules."""

    def add_own_part(self, part: str) -> None:
        """Give the bank a copy of a part of the teacher, to train, which runs and is assembled in its place.

        Args:
            part: `"embeddings"`, of both sides and of a head that is tied to them, where either side has modules; `"final_norms"`, the
                norm at the top of each side that has modules; or `"head"`, where the decoder has modules, which is then not tied to the
                embeddings, but starts as the bank's own where it was tied to those.
        """
        if part not in OWN_PARTS:
            raise ValueError(f"unknown part {part!r}; choose one of {', '.join(OWN_PARTS)}")
        if part in self.config.own_parts:
            return
        for original, copied in self._register_own_part(part):
            copied.to(device=original.weight.device, dtype=original.weight.dtype).load_state_dict(original.state_dict())
        self.config.own_parts = [each for each in OWN_PARTS if each == part or each in self.config.own_parts]
        self.switch_parts(self.plan)

    def _register_own_part(self, part: str) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of what is copied, the teacher's with a switch now, and the bank's, its weights not set."""
        config, stacks = self.config, [self.encoder, self.decoder]
        if part == "final_norms":
            for stack in stacks:
                stack.bank["final_layer_norm"] = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
                stack.final_layer_norm.__class__ = SwitchedNorm
            return [(stack.final_layer_norm, stack.bank["final_layer_norm"]) for stack in stacks]
        if part == "embeddings":
            self.decoder.bank["embed_tokens"] = OwnEmbedding(config.vocab_size, config.d_model)
            for embeddings in self._embeddings:
                embeddings.__class__ = SwitchedEmbedding
            self.lm_head.__class__ = SwitchedHead
            return [(self.shared, self.decoder.bank["embed_tokens"])]
        copied = self.lm_head
        if config.tie_word_embeddings and "embeddings" in config.own_parts:
            copied = self.decoder.bank["embed_tokens"]
        self.decoder.bank["lm_head"] = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.__class__ = SwitchedHead
        return [(copied, self.decoder.bank["lm_head"])]

    @property
    def _embeddings(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The modules that the one matrix of embeddings is in."""
        return self.shared, self.encoder.embed_tokens, self.decoder.embed_tokens

    def switch_parts(self, plan: AssemblyPlan) -> None:
        """Run the bank's own embeddings, norms and head where a plan does. `set_plan` does this too."""
        own = {(side, name): getattr(self, side).bank[name] for side, name in running_own_parts(plan, self.config)}
        embeddings = own.get(("decoder", "embed_tokens"))
        if "embeddings" in self.config.own_parts:
            for each in self._embeddings:
                each.switch(embeddings)
        for side in SIDES if "final_norms" in self.config.own_parts else ():
            getattr(self, side).final_layer_norm.switch(own.get((side, "final_layer_norm")))
        if isinstance(self.lm_head, SwitchedHead):
            tied = embeddings if self.config.tie_word_embeddings else None
            self.lm_head.switch(own.get(("decoder", "lm_head"), tied))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; a `ValueError` for a bank with embeddings or a head of its own."""
        if own := [part for part in ("embeddings", "head") if part in self.config.own_parts]:
            raise ValueError(f"the bank has {own[0]} of its own, whose size would stay; resize the teacher before from_t5")
        return super().resize_token_embeddings(*args, **kwargs)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As `PreTrainedModel.set_input_embeddings`; a `ValueError` for a bank with embeddings of its own."""
        if "embeddings" in self.config.own_parts:
            raise ValueError("the bank has embeddings of its own, which go with the teacher's; set those of the teacher before from_t5")
        super().set_input_embeddings(value)
