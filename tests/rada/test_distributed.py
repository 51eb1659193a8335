"""DDP and FSDP2 with two gloo processes: the gradients are those of the whole batch in one process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rada.fused import RAdaHead


def _inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 16, generator=generator), torch.randn(5, 16, generator=generator), torch.arange(8) % 5


def _head(queries):
    torch.manual_seed(0)
    head = RAdaHead(16, 4, queries=queries)
    torch.nn.init.normal_(head.out_proj.weight, std=0.3)
    return head


def _loss(head, image, text, labels):
    logits, penalty = head(image, text, 10.0, return_penalty=True)
    return F.cross_entropy(logits, labels) + penalty


def _worker(rank, store, wrap, queries, result):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    image, text, labels = _inputs()
    half = slice(4 * rank, 4 * rank + 4)
    head = _head(queries)
    model = fully_shard(head) if wrap == "fsdp2" else DistributedDataParallel(head)
    if wrap == "compiled ddp":
        model = torch.compile(model, backend="aot_eager")
    for _ in range(2):  # a parameter left unused in the first step fails in the second
        model.zero_grad()
        _loss(model, image[half], text, labels[half]).backward()
    grads = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
    if wrap == "fsdp2":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    if rank == 0:
        torch.save(grads, result)
    dist.barrier()
    dist.destroy_process_group()


ALL, ONE = ("image", "text", "rational"), ("text",)


@pytest.mark.parametrize(
    ("wrap", "queries"),
    [("ddp", ALL), ("ddp", ONE), ("fsdp2", ALL), ("fsdp2", ONE), ("compiled ddp", ALL)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_gradients_equal_one_process(wrap, queries, tmp_path):
    result = tmp_path / "gradients.pt"
    mp.spawn(_worker, args=(tmp_path / "store", wrap, queries, result), nprocs=2)
    gradients = torch.load(result)
    head = _head(queries)
    _loss(head, *_inputs()).backward()
    expected = {n: p.grad for n, p in head.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
