"""The rational projection of the `torch` backend, for a chunk of images, head by head as the attention reads it.

A chunk has b images and U = b·H units, which are (image, head).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels.numerics import LayerGradients, accumulation_dtype, inverse_norms, unit_rows_backward
from rada_kernels.options import Options, Params, Wanted


class Features(NamedTuple):
    """Unit rows in the accumulation dtype; the features themselves without `normalize`, and then no inverse norms."""

    f: Tensor  # [B, D]
    h: Tensor  # [K, D]
    inverse_f: Tensor | None  # [B]
    inverse_h: Tensor | None  # [K]
    scale: Tensor  # []
    dtype: torch.dtype  # of the products

    @staticmethod
    def of(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> Features:
        dtype = accumulation_dtype(image.dtype)
        f, h = image.to(dtype).contiguous(), text.to(dtype).contiguous()
        if not normalize:
            return Features(f, h, None, None, scale.to(dtype), image.dtype)
        inverse_f, inverse_h = inverse_norms(image), inverse_norms(text)
        f, h = f * inverse_f.unsqueeze(-1), h * inverse_h.unsqueeze(-1)
        return Features(f, h, inverse_f, inverse_h, scale.to(dtype), image.dtype)

    def rational_rows(self, b: slice) -> Tensor:
        """X = s f ⊙ h of the images of slice b, [b·K, D], rounded once."""
        return ((self.scale * self.f[b])[:, None, :] * self.h).flatten(0, 1).to(self.dtype)


class Queries(NamedTuple):
    image: Tensor | None  # [U, 1, E]
    matrix: list[Tensor]  # each [U, K, E]

    @property
    def kinds(self) -> int:
        return len(self.matrix) + (self.image is not None)

    def by_layer(self, options: Options) -> dict[str, Tensor]:
        """The queries, or their gradients, by the names of the layers that give them."""
        tensors = iter([*([] if self.image is None else [self.image]), *self.matrix])
        return {f"query_{kind}": next(tensors) for kind in options.queries}


class FeatureQueries(NamedTuple):
    """W (√s x) + c of all unit rows x: the queries that do not need X. None where a kind is not in use."""

    image: Tensor | None  # [B, H, E]
    text: Tensor | None  # [H, K, E]

    @staticmethod
    def of(features: Features, params: Params, options: Options) -> FeatureQueries:
        root, heads = features.scale.sqrt(), options.num_heads

        def query(kind: str, rows: Tensor) -> Tensor:
            weight, bias = params.layer(f"query_{kind}")
            return torch.addmm(bias, (root * rows).to(weight.dtype), weight.t()).unflatten(-1, (heads, -1))

        return FeatureQueries(
            query("image", features.f) if "image" in options.queries else None,
            query("text", features.h).transpose(0, 1) if "text" in options.queries else None,
        )

    def beside(self, rational: Iterable[Tensor], b: slice) -> Queries:
        """All queries of the images of slice b; rational: the rational query [U, K, E] where it is in use."""
        image = None if self.image is None else self.image[b].flatten(0, 1).unsqueeze(1)
        text = [] if self.text is None else [self.text.repeat(b.stop - b.start, 1, 1)]
        return Queries(image, [*text, *rational])


def layers_over_x(options: Options) -> list[str]:
    """Names of the layers over X, in the order of `projections`."""
    return ["key", "value"] + ["query_rational"] * ("rational" in options.queries)


def rational_projection(x: Tensor, params: Params, layers: Sequence[str], num_heads: int, out: Tensor) -> None:
    """The named layers over X [b·K, D], written to out [N, U, K, E]."""
    classes, heads = out.shape[2], num_heads
    for name, projection in zip(layers, out, strict=True):
        weight, bias = params.layer(name)
        rows = torch.addmm(bias, x, weight.t()).view(-1, classes, heads, out.shape[3])
        projection.unflatten(0, (-1, heads)).copy_(rows.transpose(1, 2))


class ProjectionGradients:
    """The gradients of features and layers, summed chunk by chunk in the accumulation dtype."""

    def __init__(self, features: Features, params: Params, options: Options, wanted: Wanted, layers: LayerGradients):
        self.features, self.params, self.options, self.wanted, self.layers = features, params, options, wanted, layers
        self.f, self.h = torch.zeros_like(features.f), torch.zeros_like(features.h)
        self.query_image: Tensor | None = None  # [B, D] once there is any
        self.query_text: Tensor | None = None  # [K, D]

    def add(self, b: slice, grads: Mapping[str, Tensor], masked: Tensor | None = None) -> None:
        """A chunk's gradients of the layers' results, by layer, each [U, K, E], of the image query [U, 1, E].

        masked [b, K, D]: of R through the sums, where features want them and the rows have sums.
        """
        (f, h), heads, over_x = self.features[:2], self.options.num_heads, dict(grads)
        if (image := over_x.pop("query_image", None)) is not None:
            self.query_image = torch.zeros_like(f) if self.query_image is None else self.query_image
            self.query_image[b] = image.reshape_as(f[b])
        if (text := over_x.pop("query_text", None)) is not None:
            self.query_text = torch.zeros_like(h) if self.query_text is None else self.query_text
            self.query_text += join_heads(text.unflatten(0, (-1, heads)).sum(0, dtype=h.dtype), heads)
        x = self.features.rational_rows(b) if self.wanted.layers and over_x else None
        of_features = self.wanted.image or self.wanted.text
        grad_r = 0.0 if masked is None else masked
        for name, grad in over_x.items():
            rows = join_heads(grad, heads).to(self.features.dtype)  # [b·K, D]
            if x is not None:
                self.layers.add(name, rows, x)
            if of_features:  # X = s R
                weight = self.params.layer(name)[0]
                if rows.dtype == torch.float16:  # whose range the product may leave
                    rows, weight = rows.to(f.dtype), weight.to(f.dtype)
                grad_x = (rows @ weight).to(f.dtype)
                grad_r = grad_r + self.features.scale * grad_x.unflatten(0, (-1, len(h)))
        if of_features:  # R = f ⊙ h
            self.f[b] = (grad_r * h).sum(1)
            self.h += (grad_r * f[b].unsqueeze(1)).sum(0)

    def finish(self) -> list[Tensor]:
        """The two queries without X, the rows' normalisation: the gradients of image and text that are wanted."""
        features, root, grads = self.features, self.features.scale.sqrt(), []
        for kind, rows, inverse, grad_rows, grad_query, wanted in (
            ("image", features.f, features.inverse_f, self.f, self.query_image, self.wanted.image),
            ("text", features.h, features.inverse_h, self.h, self.query_text, self.wanted.text),
        ):
            if grad_query is not None:
                if self.wanted.layers:
                    self.layers.add(f"query_{kind}", grad_query, root * rows)
                if wanted:
                    grad_rows += root * (grad_query @ self.params.layer(f"query_{kind}")[0].to(grad_query.dtype))
            if wanted:
                grads.append(grad_rows if inverse is None else unit_rows_backward(grad_rows, rows, inverse))
        return grads


def split_heads(rows: Tensor, classes: int, num_heads: int) -> Tensor:
    """[b·K, D] -> [U, K, E]"""
    return rows.view(-1, classes, num_heads, rows.shape[-1] // num_heads).transpose(1, 2).flatten(0, 1)


def join_heads(units: Tensor, num_heads: int) -> Tensor:
    """[U, K, E] -> [b·K, D]"""
    return units.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(-2).flatten(0, 1)
