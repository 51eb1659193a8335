"""The rational projection of the `torch` backend, for a chunk of images, head by head as the attention reads it.

A chunk has b images and U = b·H units, which are (image, head).
"""

from __future__ import annotations

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

    def beside(self, projections: Tensor, b: slice) -> Queries:
        """All queries of the images of slice b; projections [N, U, K, E] as `rational_projection` gives them."""
        image = None if self.image is None else self.image[b].flatten(0, 1).unsqueeze(1)
        text = [] if self.text is None else [self.text.repeat(b.stop - b.start, 1, 1)]
        return Queries(image, [*text, *projections[2:]])


def layers_over_x(options: Options) -> list[str]:
    """Names of the layers over X, in the order of `projections`."""
    return ["key", "value"] + ["query_rational"] * ("rational" in options.queries)


def rational_projection(x: Tensor, params: Params, options: Options, out: Tensor) -> None:
    """The layers over X [b·K, D], written to out [N, U, K, E]."""
    classes, heads = out.shape[2], options.num_heads
    for name, projection in zip(layers_over_x(options), out, strict=True):
        weight, bias = params.layer(name)
        rows = torch.addmm(bias, x, weight.t()).view(-1, classes, heads, out.shape[3])
        projection.unflatten(0, (-1, heads)).copy_(rows.transpose(1, 2))


class ProjectionGradients:
    """The gradients of features and layers, summed chunk by chunk in the accumulation dtype."""

    def __init__(self, features: Features, params: Params, options: Options, wanted: Wanted, layers: LayerGradients):
        self.features, self.params, self.options, self.wanted, self.layers = features, params, options, wanted, layers
        self.f, self.h = torch.zeros_like(features.f), torch.zeros_like(features.h)
        self.query_image, self.query_text = torch.zeros_like(self.f), torch.zeros_like(self.h)

    def add(self, b: slice, queries: Queries, key: Tensor, value: Tensor, masked: Tensor | None) -> None:
        """A chunk's, of queries, keys and values; masked [b, K, D]: of R through the sums, if features want them."""
        (f, h), heads, matrix = self.features[:2], self.options.num_heads, list(queries.matrix)
        if queries.image is not None:
            self.query_image[b] = queries.image.reshape_as(f[b])
        if "text" in self.options.queries:
            by_image = matrix.pop(0).unflatten(0, (-1, heads)).sum(0, dtype=h.dtype)  # [H, K, E]
            self.query_text += join_heads(by_image, heads)
        x = self.features.rational_rows(b) if self.wanted.layers else None
        grad_x = f.new_zeros(())
        for name, grad in zip(layers_over_x(self.options), (key, value, *matrix), strict=True):
            rows = join_heads(grad, heads)  # [b·K, D]
            if x is not None:
                self.layers.add(name, rows, x)
            if masked is not None:
                grad_x = grad_x + (rows @ self.params.layer(name)[0]).to(f.dtype)
        if masked is not None:  # X = s R, R = f ⊙ h
            grad_r = self.features.scale * grad_x.unflatten(0, (-1, len(h))) + masked
            self.f[b] = (grad_r * h).sum(1)
            self.h += (grad_r * f[b].unsqueeze(1)).sum(0)

    def finish(self) -> list[Tensor]:
        """The two queries without X, the rows' normalisation: the gradients of image and text that are wanted."""
        features, root, grads = self.features, self.features.scale.sqrt(), []
        for kind, rows, inverse, grad_rows, grad_query, wanted in (
            ("image", features.f, features.inverse_f, self.f, self.query_image, self.wanted.image),
            ("text", features.h, features.inverse_h, self.h, self.query_text, self.wanted.text),
        ):
            if kind in self.options.queries:
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
