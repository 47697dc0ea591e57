"""Matrices of which every row is kept as a few numbers, a latent, and restored by a decoder that many rows have in common."""

import re
from typing import Any

import torch
from torch import nn
from transformers import initialization as init


# Matrices of a T5 whose columns, not rows, are as wide as the model.
_TRANSPOSED = re.compile(r"\.(o|wo)$")


class RowDecoder(nn.Module):
    """Latents (..., rank) -> rows (..., width): linear, and beside that, if it is to have hidden units, through those.

    Args:
        rank: of a latent.
        hidden: units; 0 makes it linear.
        width: of a row.
    """

    def __init__(self, rank: int, hidden: int, width: int):
        super().__init__()
        self.hidden = hidden
        self.linear = nn.Parameter(torch.empty(rank, width))
        # No linear maps of torch's, which others would adapt or quantize as such.
        self.inner = nn.Parameter(torch.empty(hidden, rank)) if hidden else None
        self.bias = nn.Parameter(torch.empty(hidden)) if hidden else None
        self.outer = nn.Parameter(torch.empty(hidden, width)) if hidden else None

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """On copies: where memory is aligned in another way, as a mapped file's may be, a product can differ in its last bit."""
        latents = latents.clone()
        linear_RD, *of_hidden = (tensor.clone() for tensor in self.tensors())
        if not of_hidden:
            return latents @ linear_RD
        inner_HR, bias_H, outer_HD = of_hidden
        return latents @ linear_RD + nn.functional.gelu(latents @ inner_HR.T + bias_H) @ outer_HD

    def tensors(self) -> list[torch.Tensor]:
        """Its parameters; `parameters()` would take longer to find them than a matrix of a small T5 takes to multiply."""
        return [self.linear, self.inner, self.bias, self.outer] if self.hidden else [self.linear]

    def init_weights(self) -> None:
        """For latents of deviation 1, rows of length 1, about."""
        init.normal_(self.linear, std=self.linear.numel() ** -0.5)
        if self.hidden:
            init.normal_(self.inner, std=self.inner.shape[1] ** -0.5)
            init.zeros_(self.bias)
            init.normal_(self.outer, std=self.outer.numel() ** -0.5)


class RestoredMatrix(nn.Module):
    """What stands in for a module with a matrix `weight`: latents, norms of rows where the decoder is not linear, the decoder.

    With gradients the matrix is restored whenever it is used; without, once, and kept until what it is made of changes. Who writes there
    through `.data`, of which nothing tells, has `eval()` or `train()` forget it.

    Args:
        module: what it stands in for.
        path: of that in a T5.
        decoder: of the latents.
        owner: whether the decoder is this module's child. Of those that share one a single module has it; the others refer to it.
    """

    def __init__(self, module: nn.Module, path: str, decoder: RowDecoder, *, owner: bool):
        super().__init__()
        self.transposed = is_transposed(path)
        self.shape = module.weight.shape
        rows, rank = self.shape[self.transposed], decoder.linear.shape[0]
        self.latents = nn.Parameter(torch.empty(rows, rank))
        self.norms = nn.Parameter(torch.empty(rows, 1)) if decoder.hidden else None
        if owner:
            self.decoder = decoder
        else:
            self.__dict__["decoder"] = decoder
        self._kept: tuple[Any, torch.Tensor] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, without gradients."""
        if self.latents.is_meta or torch.compiler.is_compiling():
            return self.restored().detach()
        state = [(each.data_ptr(), each.dtype, 0 if each.is_inference() else each._version) for each in self._made_of()]
        if self._kept is None or self._kept[0] != state:
            # What is kept is of full precision, and of use outside, whatever goes on around.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.latents.device.type, enabled=False):
                self._kept = state, self.restored()
        return self._kept[1]

    def restored(self) -> torch.Tensor:
        """The matrix, made anew, with gradients where these are on."""
        rows_ND = self.rows(self.latents, self.norms)
        matrix = rows_ND.T.contiguous() if self.transposed else rows_ND
        matrix._is_hf_initialized = True  # or T5's initialisation would write into it
        return matrix

    def rows(self, latents: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
        """Of latents (..., rank), with norms (..., 1) where there are, (..., width)."""
        decoded = self.decoder(latents.to(self.decoder.linear.dtype)).to(latents.dtype)
        return decoded if norms is None else decoded * norms

    def used(self) -> torch.Tensor:
        """The matrix as a forward takes it."""
        return self.restored() if self.learns() else self.weight

    def learns(self) -> bool:
        """Whether gradients are to reach what the matrix is made of."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._made_of())

    def train(self, mode: bool = True) -> "RestoredMatrix":
        """As `nn.Module.train`; the matrix that was kept is forgotten."""
        self._kept = None
        return super().train(mode)

    def init_weights(self) -> None:
        """Rows of length 1, about."""
        init.normal_(self.latents)
        if self.norms is not None:
            init.ones_(self.norms)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of what the matrix is made of."""
        return {**self.__dict__, "_kept": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "RestoredMatrix":
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _made_of(self) -> list[torch.Tensor]:
        return [self.latents, *([] if self.norms is None else [self.norms]), *self.decoder.tensors()]


class RestoredLinear(RestoredMatrix):
    """In place of a linear map."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., columns) -> (..., rows)."""
        return nn.functional.linear(states, self.used())


class RestoredEmbedding(RestoredMatrix):
    """In place of embeddings."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape -> (..., width); where they learn, these rows alone are decoded."""
        if not self.learns():
            return nn.functional.embedding(input_ids, self.weight)
        return self.rows(self.latents[input_ids], None if self.norms is None else self.norms[input_ids])

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., vocabulary)."""
        return nn.functional.linear(hidden_states, self.used())


class FactoredLinear(RestoredMatrix):
    """In place of a linear map, with a linear decoder: what comes in goes through the factors, and the matrix is never made."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., columns) -> (..., rows)."""
        linear = self.decoder.linear.to(self.latents.dtype)
        return states @ self.latents @ linear if self.transposed else states @ linear.T @ self.latents.T

    @property
    def weight(self) -> torch.Tensor:
        """Shape, type and place of the matrix without its numbers, which are `restored()`: T5 asks for them."""
        return torch.empty(self.shape, dtype=self.latents.dtype, device="meta")


def is_transposed(path: str) -> bool:
    """Whether the columns of the matrix at a path in a T5, not its rows, are as wide as the model."""
    return _TRANSPOSED.search(path) is not None
