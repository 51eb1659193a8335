"""The registered operators torch.ops.rada.{masked_similarity, masked_similarity_backward, attended_rows}: schema, fake,
autograd, autocast.

One schema serves every backend; the backend's name travels as an argument. `rada_kernels.api` holds what people call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from rada_kernels.numerics import accumulation_dtype, matmul_precision
from rada_kernels.options import Options, Params, Wanted

_OPTIONS = "int num_heads, float temperature, str queries, str penalty, bool normalize, str backend"
_INPUTS = "Tensor image, Tensor text, Tensor logit_scale, Tensor[] layers"

LIBRARY = torch.library.Library("rada", "DEF")
# precision: torch.get_float32_matmul_precision() of the forward pass, which the backward pass keeps; "": as it is.
# sums [B, K]: Σ_d M R; deviation [B]: each image's deviation |M - 1|; saved: what the backward pass starts from.
LIBRARY.define(
    f"masked_similarity({_INPUTS}, {_OPTIONS}, bool save) -> (Tensor sums, Tensor deviation, Tensor[] saved)"
)
LIBRARY.define(
    f"masked_similarity_backward(Tensor grad_sums, Tensor? grad_deviation, {_INPUTS}, Tensor[] saved, {_OPTIONS}, "
    "bool want_image, bool want_text, bool want_layers, *, str precision='') -> Tensor[]"
)
# The first two steps alone, O [B, K, D] before the output layer; not differentiable.
LIBRARY.define(f"attended_rows({_INPUTS}, {_OPTIONS}) -> Tensor")


class Kernels(NamedTuple):
    """What a backend does of a call; its arguments and results are those of the operators."""

    forward: Callable  # (image, text, params, options, save) -> (sums, deviation, saved)
    backward: Callable  # (grad_sums, grad_deviation, image, text, params, saved, options, wanted) -> gradients
    empty_saved: Callable  # (image, text, options, save) -> uninitialised `saved`, from shapes alone
    attended_rows: Callable  # (image, text, params, options) -> O [B, K, D] in the features' dtype


KERNELS: dict[str, Kernels] = {}


def register(name: str, *kernels: Callable) -> tuple[Callable, Callable]:
    """Serve the operators under this name by the backend's `Kernels`.

    Returns the backend's masked_similarity, which torch can differentiate, and its attended_rows.
    """
    KERNELS[name] = Kernels(*kernels)

    def masked_similarity(image: Tensor, text: Tensor, params: Params, options: Options) -> tuple[Tensor, Tensor]:
        """Σ_d M R [B, K] and each image's deviation |M - 1| [B], both in the accumulation dtype."""
        # An exported program saves nothing: what fits a byte budget depends on B, which export leaves open.
        save = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        save = save and any(t.requires_grad for t in (image, text, *params.layers))
        sums, deviation, _ = torch.ops.rada.masked_similarity(
            image, text, params.scale.detach(), params.layers, *pack_options(options, name), save
        )
        return sums, deviation

    def attended_rows(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
        """The attended rows O [B, K, D] in the features' dtype, without gradients."""
        return torch.ops.rada.attended_rows(image, text, params.scale, params.layers, *pack_options(options, name))

    return masked_similarity, attended_rows


def pack_options(options: Options, backend: str) -> tuple:
    """Options and backend as the operators take them."""
    queries = ",".join(options.queries)
    return options.num_heads, options.temperature, queries, options.penalty, options.normalize, backend


@functools.cache
def _unpack_options(num_heads, temperature, queries, penalty, normalize) -> Options:
    return Options(num_heads, temperature, tuple(queries.split(",")), penalty, normalize)


@torch.library.impl(LIBRARY, "masked_similarity", "CompositeExplicitAutograd")
def _forward(image, text, logit_scale, layers, *packed):
    *options, backend, save = packed
    params = Params._make((*layers, logit_scale, None))
    return KERNELS[backend].forward(image, text, params, _unpack_options(*options), save)


@torch.library.register_fake("rada::masked_similarity", lib=LIBRARY)
def _forward_fake(image, text, logit_scale, layers, *packed):
    *options, backend, save = packed
    dtype = accumulation_dtype(image.dtype)
    sums = image.new_empty(image.shape[0], text.shape[0], dtype=dtype)
    deviation = image.new_empty(image.shape[0], dtype=dtype)
    return sums, deviation, KERNELS[backend].empty_saved(image, text, _unpack_options(*options), save)


@torch.library.impl(LIBRARY, "masked_similarity_backward", "CompositeExplicitAutograd")
def _backward(grad_sums, grad_deviation, image, text, logit_scale, layers, saved, *packed, precision=""):
    *options, backend, want_image, want_text, want_layers = packed
    params, wanted = Params._make((*layers, logit_scale, None)), Wanted(want_image, want_text, want_layers)
    with matmul_precision(precision):
        return KERNELS[backend].backward(
            grad_sums, grad_deviation, image, text, params, saved, _unpack_options(*options), wanted
        )


@torch.library.register_fake("rada::masked_similarity_backward", lib=LIBRARY)
def _backward_fake(grad_sums, grad_deviation, image, text, logit_scale, layers, saved, *packed, precision=""):
    want_image, want_text, want_layers = packed[-3:]
    like = [image] * want_image + [text] * want_text + list(layers) * want_layers
    return [t.new_empty(t.shape) for t in like]


@torch.library.impl(LIBRARY, "attended_rows", "CompositeExplicitAutograd")
def _attended_rows(image, text, logit_scale, layers, *packed):
    *options, backend = packed
    params = Params._make((*layers, logit_scale, None))
    return KERNELS[backend].attended_rows(image, text, params, _unpack_options(*options))


@torch.library.register_fake("rada::attended_rows", lib=LIBRARY)
def _attended_rows_fake(image, text, *_):
    return image.new_empty(image.shape[0], text.shape[0], image.shape[1])


def _below_autograd(operator, keyset, *args, **kwargs):
    """The operator without its autograd, which is the one that asks."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


class _Similarity(torch.autograd.Function):
    """Takes layers and gives what is saved one by one: torch.library.register_autograd walks lists as trees, three
    quarters of all Python calls in a step.
    """

    @staticmethod
    def forward(ctx, keyset, packed, image, text, logit_scale, *layers):
        operator = torch.ops.rada.masked_similarity.default
        sums, deviation, saved = _below_autograd(operator, keyset, image, text, logit_scale, layers, *packed)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.packed = packed[:-1]
        ctx.precision = torch.get_float32_matmul_precision()
        ctx.layer_count = len(layers)
        ctx.save_for_backward(image, text, logit_scale, *layers, *saved)
        return sums, deviation, *saved

    @staticmethod
    def backward(ctx, grad_sums, grad_deviation, *_):
        image, text, logit_scale, *rest = ctx.saved_tensors
        layers, saved = rest[: ctx.layer_count], rest[ctx.layer_count :]
        need_image, need_text, _, *need_layers = ctx.needs_input_grad[2:]
        wanted = Wanted(need_image, need_text, any(need_layers))
        if grad_sums is None:
            grad_sums = image.new_zeros(image.shape[0], text.shape[0], dtype=accumulation_dtype(image.dtype))
        # A derivative of this pass is asked of autograd, which refuses it; else autograd has nothing to do with it.
        above = contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        with above:
            grads = iter(
                torch.ops.rada.masked_similarity_backward.default(
                    grad_sums, grad_deviation, image, text, logit_scale, layers, saved, *ctx.packed, *wanted,
                    precision=ctx.precision,
                )
            )  # fmt: skip
        grad_image = next(grads) if wanted.image else None
        grad_text = next(grads) if wanted.text else None
        of_layers = grads if wanted.layers else [None] * len(layers)
        grad_layers = [grad if on else None for grad, on in zip(of_layers, need_layers, strict=True)]
        return None, None, grad_image, grad_text, None, *grad_layers


def _refuse_transforms(*_):
    raise RuntimeError(
        "rada::masked_similarity serves backward() and torch.autograd.grad: for forward-mode derivatives and "
        "torch.func's vmap, grad, jvp, jacrev, ... use backend='reference'"
    )


# Called for batched arguments alone.
torch.library.register_vmap("rada::masked_similarity", _refuse_transforms, lib=LIBRARY)


def _is_transformed(tensors) -> bool:
    """Whether a forward-mode derivative or a transform of torch.func goes through one of the tensors.

    Below autograd a tangent would be lost without an error.
    """
    if torch._C._are_functorch_transforms_active() and any(map(is_functorch_wrapped_tensor, tensors)):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _autograd(keyset, image, text, logit_scale, layers, *packed):
    if _is_transformed((image, text, *layers)):
        _refuse_transforms()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (image, text, logit_scale, *layers)):
        sums, deviation, *saved = _Similarity.apply(keyset, packed, image, text, logit_scale, *layers)
        return sums, deviation, saved
    operator = torch.ops.rada.masked_similarity.default
    return _below_autograd(operator, keyset, image, text, logit_scale, layers, *packed)


LIBRARY.impl("masked_similarity", _autograd, "Autograd", with_keyset=True)


def _double_backward(ctx, *_):
    raise RuntimeError(
        "rada::masked_similarity_backward has no derivative of its own: for second derivatives use backend='reference'"
    )


torch.library.register_autograd("rada::masked_similarity_backward", _double_backward, lib=LIBRARY)


def _register_autocast(device_type: str, key: str) -> None:
    """Follow the dtype of the surrounding autocast, whatever it is, and run the operators' bodies outside of it."""

    def cast(tensor: Tensor) -> Tensor:  # float64 stays as it is, as in torch's own rules
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device_type))

    def follow(operator, image, text, logit_scale, layers, *packed):
        layers = [cast(layer) for layer in layers]
        image, text = cast(image), cast(text)
        with torch.autocast(device_type, enabled=False):
            return operator(image, text, logit_scale, layers, *packed)

    def backward(*args, **kwargs):
        with torch.autocast(device_type, enabled=False):
            return torch.ops.rada.masked_similarity_backward(*args, **kwargs)

    for name in ("masked_similarity", "attended_rows"):
        torch.library.impl(LIBRARY, name, key)(functools.partial(follow, getattr(torch.ops.rada, name)))
    torch.library.impl(LIBRARY, "masked_similarity_backward", key)(backward)


for _device_type, _key in {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "mps": "AutocastMPS",
    "xpu": "AutocastXPU",
}.items():
    _register_autocast(_device_type, _key)
