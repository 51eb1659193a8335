"""What the operator takes besides features: the static options and the head's tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

QUERIES = ("image", "text", "rational")
PENALTIES = ("linf", "l1", "mse")


@dataclass(frozen=True)
class Options:
    """The static options of one head.

    num_heads: H, must divide the embedding width D. Default 8.
    temperature: τ of the attention, a positive number. Default 1.0.
    queries: the query kinds in use, any non-empty subset of ("image", "text", "rational"). Default: all three.
    penalty: what is measured of |M - 1|: "linf" (default), "l1", "mse".
    normalize: divide each feature row by its L2 norm first. Default True. A row whose norm is below 1e-12
        counts as a zero row: it stays zero and receives a zero gradient.
    """

    num_heads: int = 8
    temperature: float = 1.0
    queries: tuple[str, ...] = QUERIES
    penalty: str = "linf"
    normalize: bool = True

    def __post_init__(self):
        if isinstance(self.queries, str) or not isinstance(self.queries, Collection):
            raise TypeError(
                f"queries: got {self.queries!r}; it takes a tuple of names from {QUERIES}, such as ({QUERIES[0]!r},)"
            )
        # In the order of QUERIES, whatever order they were given in: equal options compare equal.
        unknown = [name for name in self.queries if name not in QUERIES]
        if unknown or not self.queries or len(set(self.queries)) != len(self.queries):
            raise ValueError(
                f"queries: got {tuple(self.queries)!r}; it takes a non-empty subset of {QUERIES} without repeats"
            )
        object.__setattr__(self, "queries", tuple(name for name in QUERIES if name in self.queries))
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty: got {self.penalty!r}; it takes one of {PENALTIES}")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize: got {self.normalize!r}; it takes True or False")
        if isinstance(self.num_heads, bool) or not isinstance(self.num_heads, int):
            raise TypeError(f"num_heads: got {self.num_heads!r}; it takes a positive int")
        if self.num_heads < 1:
            raise ValueError(f"num_heads: got {self.num_heads}; it takes a positive int")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float):
            raise TypeError(f"temperature: got {self.temperature!r}; it takes a positive finite number")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: got {self.temperature}; it takes a positive finite number")

    def score_factor(self, embed_dim: int) -> float:
        """1 / (√E τ), the factor between a dot product and a score."""
        return 1.0 / (math.sqrt(embed_dim // self.num_heads) * self.temperature)


class Params(NamedTuple):
    """The head's tensors: six linear layers (weight [D, D], bias [D]) and what turns sums into logits.

    In the released checkpoints the layers are called q_proj1, q_proj2, q_proj3, k_proj, v_proj, out_proj.
    """

    query_image_weight: Tensor  # [D, D]
    query_image_bias: Tensor  # [D]
    query_text_weight: Tensor
    query_text_bias: Tensor
    query_rational_weight: Tensor
    query_rational_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    logit_scale: Tensor | float = 1.0  # the exponentiated scale, 0-d
    logit_bias: Tensor | float | None = None  # SigLIP's, 0-d

    @property
    def scale(self) -> Tensor:
        """logit_scale as the backends get it, a 0-d tensor."""
        return cast(Tensor, self.logit_scale)

    @property
    def layers(self) -> list[Tensor]:
        """The twelve tensors of the six layers, in the order of the fields."""
        return list(self[:12])

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight [D, D] and bias [D], such as of "key"."""
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def layer_grads(self, grads: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Gradients in the order of `layers`, of those by name: zeros for a query kind that is not in use."""
        ordered: list[Tensor] = []
        for field in self._fields[0:12:2]:
            name = field.removesuffix("_weight")
            ordered += grads.get(name) or [torch.zeros_like(tensor) for tensor in self.layer(name)]
        return ordered


class Wanted(NamedTuple):
    """Which gradients a backward pass is asked for. `layers` are all twelve layer tensors or none."""

    image: bool
    text: bool
    layers: bool
