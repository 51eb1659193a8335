"""RAdaHead.shard_classes over gloo processes: every result and gradient is the unsharded head's, in every process."""

from __future__ import annotations

import functools
import itertools
import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tolerance import Expected, judge

from rada.classification import Classes, Labelled
from rada.distributed import share_of
from rada.fused import RAdaHead
from rada.sharded import sharded_logits
from rada.tuning import tune_head
from rada.tuning.schedule import Tuning
from rada_kernels import PENALTIES, QUERIES, rada_logits
from rada_kernels.logit_reduction.plain import joint_deviation
from tests.kernels.truth import Case, expected, make_case, results

PROCESSES = 2, 3
FLOAT64, FLOAT32 = torch.float64, torch.float32
HALVES = torch.bfloat16, torch.float16
SUBSETS = [kinds for n in (1, 2, 3) for kinds in itertools.combinations(QUERIES, n)]
KEEP, RECOMPUTE, LARGE = "100000000", "0", "8000000"


def budgets(tile_bytes: str, save_bytes: str) -> None:
    os.environ.update(RADA_TILE_BYTES=tile_bytes, RADA_SAVE_BYTES=save_bytes)


def cases() -> dict[str, tuple[Case, torch.dtype, str, str]]:
    """By name: a case, the dtype it is computed in, RADA_TILE_BYTES and RADA_SAVE_BYTES."""
    found = {}
    for number, queries in enumerate(SUBSETS):
        case = make_case(3, 7, 12, 3, queries=queries, penalty=PENALTIES[number % 3], temperature=0.5, seed=number)
        found[f"{'+'.join(queries)} {case.options.penalty}"] = case, FLOAT64, "700", KEEP
    for tile_bytes in "1", "300", LARGE:
        for save_bytes in KEEP, RECOMPUTE:
            for dtype in (FLOAT64, FLOAT32)[: 1 + (tile_bytes != "1")]:
                found[f"{dtype} {tile_bytes} {save_bytes}"] = make_case(3, 7, 16, 4), dtype, tile_bytes, save_bytes
    for dtype in HALVES:
        for save_bytes in KEEP, RECOMPUTE:
            case = make_case(3, 37, 32, 4, clear_gates=True, penalty="mse")
            found[f"{dtype} {save_bytes}"] = case, dtype, "4000", save_bytes
    for scale in 1e-3, 1000.0:
        found[f"scale {scale}"] = make_case(3, 19, 32, 4, scale=scale), FLOAT64, "1000", KEEP
    found["as given"] = make_case(3, 9, 32, 4, scale=0.5, normalize=False), FLOAT64, "1000", KEEP
    found["a class each"] = make_case(2, 3, 16, 4), FLOAT64, "1000", KEEP
    return found


class Workers:
    """What P processes found: by name the results of each process, and what failed."""

    def __init__(self, processes: int, folder: Path):
        mp.spawn(_work, args=(processes, folder), nprocs=processes)
        self.found = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module", params=PROCESSES)
def workers(request, tmp_path_factory) -> Workers:
    return Workers(request.param, tmp_path_factory.mktemp("workers"))


def _work(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    found = {name: results(case.cast(dtype), _run(*sizes)) for name, (case, dtype, *sizes) in cases().items()}
    for name, check in CHECKS.items():
        budgets(LARGE, KEEP)
        try:
            found[name] = check(rank, processes)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the processes may no longer wait for the same
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _run(tile_bytes: str, save_bytes: str):
    def run(image, text, params, options):
        budgets(tile_bytes, save_bytes)
        return sharded_logits(image, text, params, options, dist.group.WORLD)

    return run


def _head(dtype: torch.dtype = FLOAT64, **options) -> RAdaHead:
    torch.manual_seed(0)
    head = RAdaHead(12, 3, dtype=dtype, **options)
    torch.nn.init.normal_(head.out_proj.weight, std=0.3)
    return head


def _features(classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 12, generator=generator, dtype=FLOAT64) for n in (8, classes))
    return image, text, torch.arange(8) % classes


def _close(mine, theirs) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def _gradients(head: RAdaHead) -> dict[str, torch.Tensor | None]:
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    return grads


def check_head(rank, processes):
    """The module: parameters that are shared, unused layers, a bias, a float scale, no gradients, backward twice."""
    image, text, labels = _features()
    for queries in SUBSETS[1], SUBSETS[4], SUBSETS[6]:
        head = _head(queries=queries)
        sharded = head.shard_classes()
        assert all(a is b for a, b in zip(head.parameters(), sharded.parameters(), strict=True))
        grads = []
        for module in head, sharded:
            logits, penalty = module(image, text, 20.0, -3.0, return_penalty=True)
            loss = F.cross_entropy(logits, labels) + penalty
            loss.backward(retain_graph=True)
            grads.append(_gradients(head))
            if module is sharded:
                loss.backward()
                grads.append(_gradients(head))
                with torch.no_grad():
                    assert torch.equal(module(image, text, 20.0, -3.0), logits)
        _close(grads[1], grads[0])
        _close(grads[2], grads[1])


def check_parts_of_a_loss(rank, processes):
    """A loss of the penalty alone, of the logits alone, and of one class's logits, which one process has."""
    image, text, _ = _features()
    head = _head()
    sharded = head.shard_classes()
    for part in (lambda logits, penalty: penalty, lambda logits, _: logits.sum(), lambda logits, _: logits[:, 0].sum()):
        grads = []
        for module in head, sharded:
            part(*module(image, text, 20.0, return_penalty=True)).backward()
            grads.append(_gradients(head))
        _close(grads[1], grads[0])


def check_autocast(rank, processes):
    """bfloat16 where autocast asks for it: what the unsharded `torch` backend gives, to rounding."""
    image, text, labels = (t.float() if t.is_floating_point() else t for t in _features())
    head = _head(FLOAT32, penalty="mse", backend="torch")
    found = []
    for module in head, head.shard_classes():
        with torch.autocast("cpu", torch.bfloat16):
            logits, penalty = module(image, text, 20.0, return_penalty=True)
        assert logits.dtype == penalty.dtype == FLOAT32
        F.cross_entropy(logits, labels).backward()
        found.append((logits, penalty, head.k_proj.weight.grad))
        head.zero_grad()
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert (mine - theirs).abs().max() <= 0.02 * theirs.abs().max()


def check_strides(rank, processes):
    """Features of any strides, in 16 bit, with layers that are not in use."""
    image, text, _ = (t.bfloat16() if t.is_floating_point() else t for t in _features())
    sharded = _head(torch.bfloat16, queries=("text",), penalty="mse").shard_classes()
    found = []
    for order in (lambda rows: rows.clone(), lambda rows: rows.t().contiguous().t()):
        leaves = [order(rows).requires_grad_() for rows in (image, text)]
        logits, penalty = sharded(*leaves, 20.0, return_penalty=True)
        found.append([logits, penalty, *torch.autograd.grad(logits.square().sum() + penalty, leaves)])
    for dense, strided in zip(*found, strict=True):
        torch.testing.assert_close(strided, dense)


def check_empty_batch(rank, processes):
    _, text, _ = _features()
    logits, penalty = _head().shard_classes()(text[:0], text, 20.0, return_penalty=True)
    assert logits.shape == (0, 7)
    assert penalty == 0
    logits.sum().backward()


def check_nan_stays_in_its_image(rank, processes):
    image, text, _ = _features()
    image[2, 3] = torch.nan
    bad = _head().shard_classes()(image, text, 20.0).isnan()
    assert bad[2].all()
    assert not bad[[0, 1, 3]].any()


def check_errors(rank, processes):
    """A wrong argument in one process, or another one, is an error in every process, and the next call works."""
    image, text, _ = _features()
    sharded = _head().shard_classes()
    last = rank == processes - 1
    other = _head()
    other.k_proj.weight.data[0, 0] += last
    swapped = image.flip(0) if last else image
    for run, message in (
        (lambda: sharded(image[:, :-1] if last else image, text, 20.0), "got width 12; it takes"),
        (lambda: sharded(image, text[: processes - 1], 20.0), rf"text_features: got {processes - 1} classes for"),
        (
            lambda: sharded(swapped, text, 20.0),
            "image_features: got .*the same in every process",
        ),
        (lambda: sharded(image, text if last else text[:-1], 20.0), "text_features: got .*the same in every process"),
        (lambda: sharded(image, text, 10.0 + last), "logit_scale: got 1[01].0 in rank .* the same in every process"),
        (lambda: other.shard_classes()(image, text, 20.0), r"k_proj.weight .*: got .*the same in every process"),
        (lambda: sharded(image.clone().requires_grad_(last), text, 20.0), "which requires a gradient, in rank"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    _close(sharded(image, text, 20.0), _head()(image, text, 20.0))


def check_group(rank, processes):
    """The last two of the processes share the classes; the others do not take part."""
    group = dist.new_group([processes - 2, processes - 1])
    head, (image, text, _) = _head(), _features()
    if rank < processes - 2:
        with pytest.raises(ValueError, match="process_group: got one without this process"):
            head.shard_classes(group)
    else:
        _close(head.shard_classes(group)(image, text, 20.0), head(image, text, 20.0))


def check_training(rank, processes):
    """`tune_head` as it is: the parameters of a run in one process."""
    image, text, labels = _features()
    trained = []
    for shard in False, True:
        head = _head()
        tune_head(
            head.shard_classes() if shard else head, Labelled(image, labels), Classes(text, 20.0),
            Tuning(epochs=2, lr=1e-3, batch_size=3), seed=1,
        )  # fmt: skip
        trained.append(head.state_dict())
    for name, tensor in trained[1].items():
        torch.testing.assert_close(tensor, trained[0][name], rtol=1e-6, atol=1e-8)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@functools.cache
def expected_of(name: str) -> Expected:
    case, dtype, *_ = cases()[name]
    return expected(case.cast(dtype))


@pytest.mark.parametrize("name", cases())
def test_results_and_gradients_equal_one_process(name, workers):
    first, *others = (found[name] for found in workers.found)
    for other in others:
        assert all(torch.equal(other[tensor], first[tensor]) for tensor in first)
    verdict = judge([expected_of(name)], [first], cases()[name][1])
    assert verdict.right, verdict.account


@pytest.mark.parametrize("name", CHECKS)
def test_in_every_process(name, workers):
    for rank, found in enumerate(workers.found):
        assert found[name] is None, f"rank {rank}: {found[name]}"


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_deviation_of_all_rows(penalty):
    """Of processes with 3 and 2 of 5 rows; of two that attain the largest, the first one counts."""
    parts = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 1.0]])
    fractions = 0.6, 0.4
    sent = parts if penalty == "linf" else parts * torch.tensor(fractions)[:, None]
    expected = [4.0, 2.0, 3.0] if penalty == "linf" else 0.6 * parts[0] + 0.4 * parts[1]
    weights = []
    for rank in range(2):

        def gather(mine, rank=rank):
            torch.testing.assert_close(mine, sent[rank])
            return sent

        whole, weight = joint_deviation(parts[rank], fractions[rank], penalty, rank, gather)
        torch.testing.assert_close(whole, torch.as_tensor(expected))
        weights.append(weight.tolist())
    if penalty == "linf":
        assert weights == [[0, 1, 1], [1, 0, 0]]
    else:
        torch.testing.assert_close(torch.tensor(weights), torch.tensor(fractions)[:, None].expand(2, 3))


def test_slices_cover_the_classes_evenly():
    for classes, processes in (5, 5), (7, 3), (21841, 2), (21841, 8):
        slices = [share_of(classes, rank, processes) for rank in range(processes)]
        assert [i for rows in slices for i in range(classes)[rows]] == list(range(classes))
        counts = [rows.stop - rows.start for rows in slices]
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


def test_without_a_group_and_with_another_backend():
    with pytest.raises(ValueError, match="process_group: got none; it takes one that"):
        RAdaHead(16, 4).shard_classes()
    with pytest.raises(ValueError, match="backend: got 'reference'; sharded classes take"):
        RAdaHead(16, 4, backend="reference").shard_classes()


CLASSES = 21841  # ImageNet-21k


def _many(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    case = make_case(1, CLASSES, 8, 1, penalty="mse").cast(FLOAT32)
    found = results(case, lambda *call: sharded_logits(*call, dist.group.WORLD))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_classes_of_imagenet_21k(tmp_path):
    mp.spawn(_many, args=(tmp_path,), nprocs=2)
    case = make_case(1, CLASSES, 8, 1, penalty="mse").cast(FLOAT32)
    truth = results(case.cast(FLOAT64), lambda *call: rada_logits(*call, backend="torch"))
    plain = results(case, lambda *call: rada_logits(*call, backend="torch"))
    for name, found in torch.load(tmp_path / "found.pt").items():
        error, allowed = ((t.double() - truth[name]).norm() for t in (found, plain[name]))
        floor = 16 * torch.finfo(FLOAT32).eps * truth[name].norm()
        assert error <= 2 * allowed + floor, f"{name}: error {error}, unsharded {allowed}, floor {floor}"
