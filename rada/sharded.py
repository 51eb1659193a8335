"""The head's classes shared among processes: what `RAdaHead.shard_classes` computes, and every collective of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rada.distributed import gather_shares, share_of
from rada_kernels.api import logits_and_penalty, on_device
from rada_kernels.backends import class_rows
from rada_kernels.backends.class_rows import Share
from rada_kernels.budget import Tiling
from rada_kernels.checks import LAYER_NAMES, check_inputs
from rada_kernels.numerics import autocast_dtype, matmul_precision
from rada_kernels.options import Options, Params, Wanted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(group: ProcessGroup | None) -> ProcessGroup:
    """The group, or the default one for None. Raises ValueError where this process is in none."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group: got none; it takes one that torch.distributed.init_process_group has set up")
    group = dist.group.WORLD if group is None else group
    if group is None or dist.get_rank(group) < 0:
        raise ValueError("process_group: got one without this process; it takes one that this process belongs to")
    return group


def sharded_logits(
    image: Tensor, text: Tensor, params: Params, options: Options, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """What `rada_kernels.rada_logits` returns of the same arguments, computed by all processes of a group together."""
    _check_same(image, text, params, options, group)
    params = on_device(params, image)
    cast_image, cast_text, *layers = tensors = _follow_autocast(image, text, *params.layers)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    call = _Call(options, group, params.scale.detach(), save, len(text))
    with torch.autocast(image.device.type, enabled=False):
        sums, deviation = _MaskedSimilarity.apply(call, cast_image, cast_text, *layers)
    return logits_and_penalty(sums, deviation, image, params)


class _Call(NamedTuple):
    options: Options
    group: ProcessGroup
    scale: Tensor  # []
    save: bool
    classes: int

    @property
    def share(self) -> Share:
        rank = dist.get_rank(self.group)
        rows = share_of(self.classes, rank, dist.get_world_size(self.group))
        return Share(rows, rank, lambda tensor: torch.stack(_gather(tensor, self.group)))

    def params(self, layers: Sequence[Tensor]) -> Params:
        return Params._make((*layers, self.scale, None))


class _MaskedSimilarity(torch.autograd.Function):
    """Σ_d M R [B, K] and each image's deviation |M - 1| [B]; every result and gradient whole in every process."""

    @staticmethod
    def forward(ctx, call: _Call, image: Tensor, text: Tensor, *layers: Tensor):
        share = call.share
        own, deviation, weight, saved = class_rows.forward(
            image, text, call.params(layers), call.options, share, call.save
        )
        ctx.set_materialize_grads(False)
        ctx.call, ctx.chunks, ctx.precision = call, len(saved), torch.get_float32_matmul_precision()
        ctx.save_for_backward(image, text, *layers, weight, *(tensor for rows in saved for tensor in rows))
        return _gather_columns(own, call), deviation

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums: Tensor | None, grad_deviation: Tensor | None):
        image, text, *rest = ctx.saved_tensors
        call, layers, weight, rest = ctx.call, rest[:12], rest[12], rest[13:]
        width = len(class_rows.Rows._fields)
        saved = [class_rows.Rows._make(rest[i : i + width]) for i in range(0, len(rest), width)]
        share, (_, need_image, need_text, *need_layers) = call.share, ctx.needs_input_grad
        if grad_sums is None:
            grad_sums = weight.new_zeros(len(image), call.classes)
        own = grad_sums[:, share.rows]
        of_own = None if grad_deviation is None else grad_deviation * weight
        wanted = Wanted(need_image, need_text, any(need_layers))
        with torch.autocast(image.device.type, enabled=False), matmul_precision(ctx.precision):
            grads = class_rows.backward(
                own, of_own, image, text, call.params(layers), saved, call.options, share, wanted
            )
        for grad in grads:
            dist.all_reduce(grad, group=call.group)
        found = iter(grad.to(image.dtype) for grad in grads)
        grad_image = next(found) if need_image else None
        grad_text = next(found) if need_text else None
        return None, grad_image, grad_text, *(next(found, None) if wanted.layers else None for _ in layers)


def _gather(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    """A tensor of the same shape in every process: that of each, by rank."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _gather_columns(own: Tensor, call: _Call) -> Tensor:
    """The own columns [B, R] -> those of all classes [B, K]."""
    if not own.numel():
        return own.new_empty(len(own), call.classes)
    return torch.cat(gather_shares(own.mT, call.classes, call.group)).mT.contiguous()


def _follow_autocast(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of the surrounding autocast; float64 stays as it is, as in torch's own rules."""
    dtype = autocast_dtype(tensors[0].device)
    return [tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _check_same(image: Tensor, text: Tensor, params: Params, options: Options, group: ProcessGroup) -> None:
    """Raise in every process where one of them has a wrong argument, or another one than rank 0."""
    processes = dist.get_world_size(group)
    error: Exception | None = None
    mine: str | dict[str, str]
    try:
        check_inputs(image, text, params, options)
        if len(text) < processes:
            raise ValueError(
                f"text_features: got {len(text)} classes for {processes} processes; it takes at least one for each"
            )
        mine = _account(image, text, params, options)
    except (TypeError, ValueError) as wrong:
        error, mine = wrong, str(wrong)
    accounts: list = [None] * processes
    dist.all_gather_object(accounts, mine, group=group)
    if error is not None:
        raise error
    for other, account in enumerate(accounts):
        if isinstance(account, str):
            raise ValueError(f"rank {other} of the process group: {account}")
    for other, account in enumerate(accounts):
        for name, value in accounts[0].items():
            if account[name] != value:
                raise ValueError(
                    f"{name}: got {account[name]} in rank {other} and {value} in rank 0 of the process group; it takes "
                    "the same in every process"
                )


def _account(image: Tensor, text: Tensor, params: Params, options: Options) -> dict[str, str]:
    """What has to be the same in every process, by name."""
    tensors = {"image_features": image, "text_features": text, **dict(zip(LAYER_NAMES, params.layers, strict=True))}
    scalars = {"logit_scale": params.logit_scale, "logit_bias": params.logit_bias}
    tensors |= {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
    checksums = torch.stack([_checksum(tensor).to(image.device) for tensor in tensors.values()]).tolist()
    kind = image.device.type
    tiling = Tiling.fit(len(text), image.shape[1], options.num_heads, image.dtype, image.device)
    return {
        **{
            name: f"{list(tensor.shape)} {tensor.dtype} with checksum {checksum:x}"
            + ", which requires a gradient," * tensor.requires_grad
            for (name, tensor), checksum in zip(tensors.items(), checksums, strict=True)
        },
        **{name: str(value) for name, value in scalars.items() if name not in tensors},
        "options": str(options),
        "torch.is_grad_enabled": str(torch.is_grad_enabled()),
        "torch.autocast": str(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)),
        "RADA_TILE_BYTES": f"what makes {tiling}",
    }


def _checksum(tensor: Tensor) -> Tensor:
    """Of the bits and of the order of the rows, an int64."""
    rows = tensor.detach() if tensor.dim() == 2 else tensor.detach().reshape(-1, 1)
    hashes = torch.hash_tensor(rows, 1).view(torch.int64)
    return ((2 * torch.arange(len(rows), device=rows.device) + 1) * hashes).sum()
