"""Processes that torchrun started together, and what they exchange.

    with processes():
        features = in_shares(len(images), lambda index: encode(images, index))  # each rank encodes some, all get all

Without a process group there is one rank, and every function here returns what it was given.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The others wait while rank 0 writes and measures.
WAIT = timedelta(hours=1)
# Seconds in which the first to fail says why, before torchrun ends it for another's sake.
GRACE = 10
_state = SimpleNamespace(joined=False)


def rank() -> int:
    """This process's number among those of the run, from 0. Source: torchrun's RANK."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of the run's processes. Default 1. Source: torchrun's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def processes() -> Iterator[None]:
    """The process group of torchrun's processes: gloo for tensors on the CPU, nccl for those on CUDA devices.

    Within it the ranks but 0 print nothing. Where ranks fail one after another, as they do when one of them is gone,
    the first alone raises its error; torchrun then ends them all. Without torchrun, or within a group, nothing happens.
    """
    if world_size() == 1 or _in_group():
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    import_module("torch._dynamo")  # DDP does; once there is a group, that would keep it and its threads: see `leave`
    store, number, size = next(iter(rendezvous("env://", timeout=WAIT)))
    dist.init_process_group(store=store, rank=number, world_size=size, timeout=WAIT)
    _state.joined = True
    try:
        with open(os.devnull, "w") as nowhere:
            if number:
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    yield
            else:
                yield
    except Exception as error:
        if store.add("failed", 1) > 1:
            time.sleep(GRACE)
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()


def leave(status: Any) -> NoReturn:
    """sys.exit(status); of a process that has been in a group of `processes`, without the interpreter's own end.

    Threads of gloo's, which DTensor's caches keep, may abort that (pytorch/pytorch#179291), and torchrun would take a
    finished process for one that failed.
    """
    if not _state.joined:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def own_device(device: torch.device) -> torch.device:
    """This process's device among those of a type, by torchrun's LOCAL_RANK; it becomes torch's current one.

    Raises ValueError where the machine has fewer than processes, and for a device with a number.
    """
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(
            f"device: got '{device}' for {world_size()} processes; it takes {device.type!r}: each has its own"
        )
    local, module = int(os.environ.get("LOCAL_RANK", "0")), torch.get_device_module(device)
    if local >= module.device_count():
        raise ValueError(
            f"device: got {device.type!r} for at least {local + 1} processes on a machine that has "
            f"{module.device_count()}; it takes a device for each of torchrun's --nproc-per-node, or 'cpu'"
        )
    module.set_device(local)
    return torch.device(device.type, local)


def ranks() -> tuple[int, int]:
    """This process's rank in the process group, and the number of ranks: (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if _in_group() else (0, 1)


def replicated(module: nn.Module) -> nn.Module:
    """The module to call in training: under a process group its DistributedDataParallel, else itself."""
    return nn.parallel.DistributedDataParallel(module) if ranks()[1] > 1 else module


def share_of(count: int, rank: int, size: int) -> slice:
    """A rank's share of `count` rows: consecutive ones, as many as any other's, or one more."""
    least, more = divmod(count, size)
    start = rank * least + min(rank, more)
    return slice(start, start + least + (rank < more))


def own_rows(rows: Tensor) -> Tensor:
    """This rank's share of rows [N, ...]: consecutive ones, as many as any other's or one less.

    Where that is none, one row that is another's: what every rank must run has something to run on. See `gather`.
    """
    own = rows[share_of(len(rows), *ranks())]
    return own if len(own) else rows[:1]


def gather(own: Tensor, count: int) -> Tensor:
    """The rows [count, ...] that the ranks made of their `own_rows`, in order.

    A gradient reaches this rank's own alone. Of a loss over all rows, computed on every rank, the ranks' gradients
    therefore add up to that of one process; DDP and FSDP2 take their mean, so it takes `size` times the loss.
    """
    number, size = ranks()
    if size == 1:
        return own
    rows = gather_shares(own.detach(), count)
    rows[number] = own[: len(rows[number])]
    return torch.cat(rows)


def gather_shares(own: Tensor, count: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The rows of every rank's `share_of` count, by rank, without gradients. own: this rank's, and any after them.

    group: of the ranks. Default: the default group.
    """
    size = dist.get_world_size(group)
    shares = [share_of(count, rank, size) for rank in range(size)]
    counts = [share.stop - share.start for share in shares]
    mine = counts[dist.get_rank(group)]
    padded = own.new_zeros(counts[0], *own.shape[1:])
    padded[:mine] = own[:mine]
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:length] for part, length in zip(parts, counts, strict=True)]


def gather_mean(own: Tensor, count: int) -> Tensor:
    """The mean over `count` rows, 0-d, of what is the mean over each rank's `own_rows`. Gradients: as of `gather`."""
    number, size = ranks()
    if size == 1:
        return own
    share = share_of(count, number, size)
    return gather((own * ((share.stop - share.start) / count)).reshape(1), size).sum()


def in_shares(count: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(index [n] int64) -> [n, ...], of 0..count-1: each rank computes its share, and has all [count, ...]."""
    return gather(compute(own_rows(torch.arange(count))), count)


def from_first(value: Any) -> Any:
    """Rank 0's value, any object that can be pickled, on every rank."""
    if ranks()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
