"""CUDA graphs: one launch for a head's whole forward pass, where batches have one size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3  # calls before the capture: kernels are compiled, the allocator and libraries have what they need


def check_device(device: torch.device) -> None:
    """Raise ValueError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: got it on {device}; it takes a CUDA device")


def graphed(head: Callable[[Tensor], Tensor], batch: Tensor) -> Callable[[Tensor], Tensor]:
    """`head` without the host's work: captured once in a CUDA graph for features [B, D] like `batch`, then replayed.

    head: a function of the features alone, such as ``lambda features: rada_head(features, text, scale)``. What else it
        reads, weights and class features, is read from the same memory at every replay: change it in place, if at all.
    batch: features of the size, dtype and device of all calls to come. On a device other than CUDA, head is returned
        as it is.

    The function returned takes features [n, D] of any n: up to B by the graph, padded with the last call's rows (an
    image's logits do not depend on the others), more by head itself. It returns new memory, without gradients. It is
    not for several threads or streams at a time. Raises ValueError for features of another width, dtype or device.
    """
    if batch.device.type != "cuda":
        return head
    with torch.no_grad(), torch.cuda.device(batch.device):
        static = batch.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                head(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = head(static)

    return of_any_number(head, static, out, graph.replay)


def of_any_number(
    head: Callable[[Tensor], Tensor], static: Tensor, out: Tensor, run: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """What `graphed` returns. run: makes `out` of what is in `static`, row by row."""

    @torch.no_grad()
    def replay(features: Tensor) -> Tensor:
        _check(features, static)
        count = len(features)
        if count > len(static):
            return head(features)
        static[:count].copy_(features)
        run()
        return out[:count].clone()

    return replay


def _check(features: Tensor, static: Tensor) -> None:
    got = tuple(features.shape[1:]), features.dtype, features.device
    takes = tuple(static.shape[1:]), static.dtype, static.device
    if got != takes:
        names = "[n, {}], {}, {}"
        raise ValueError(
            f"features: got {names.format(*got[0], *got[1:])}; it takes {names.format(*takes[0], *takes[1:])}, "
            "as captured"
        )
