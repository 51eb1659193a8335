"""Peak memory of a head whose classes are shared among processes: python bench/class_shards.py

Each method runs in processes of its own, one thread each: `torch` and `cpu` in one, `sharded` (RAdaHead.shard_classes)
in --processes over gloo. A call of a tiny size comes first; the peak is what the measured call raises the process's
resident memory by, results included, the largest of the processes. Results are compared with those of `torch`. Exit
status 1 where they differ by more than TOLERANCE of a result's root mean square.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from implementations import Method, all_methods, result_names, why_unusable, work
from memory import give_back_freed_blocks, peak_above
from torch import Tensor
from workloads import DTYPES, Cell, make_inputs, workload

from rada.sharded import sharded_logits

TOLERANCE = 1e-3
SHARDED = "sharded"
MODES = "forward", "step"


def measure(cell: Cell, method: str, processes: int) -> tuple[int, float, dict[str, Tensor]]:
    """The largest peak in bytes of a method's processes, the longest time in seconds, and the results."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_child, (cell, method, processes, Path(folder)), nprocs=processes)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    return max(f["peak_bytes"] for f in found), max(f["seconds"] for f in found), found[0]["results"]


def _child(rank: int, cell: Cell, name: str, processes: int, folder: Path) -> None:
    give_back_freed_blocks()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    inputs = make_inputs(cell.workload, cell.mode, DTYPES[cell.dtype], torch.device("cpu"))
    tiny = make_inputs(
        replace(cell.workload, classes=4 * processes), cell.mode, DTYPES[cell.dtype], torch.device("cpu")
    )
    method = Method(SHARDED, _sharded) if name == SHARDED else all_methods()[name]
    work(method, tiny)()
    results: list[Tensor] = []
    dist.barrier()
    start = time.perf_counter()
    peak = peak_above(_keeping(work(method, inputs), results))
    seconds = time.perf_counter() - start
    named = dict(zip(result_names(inputs), results, strict=True))
    torch.save({"peak_bytes": peak, "seconds": seconds, "results": named}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _sharded(image, text, params, options):
    return sharded_logits(image, text, params, options, dist.group.WORLD)


def _keeping(run: Callable[[], list[Tensor]], results: list[Tensor]) -> Callable[[], list[Tensor]]:
    def keeping() -> list[Tensor]:
        results[:] = run()
        return results

    return keeping


def difference(results: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest, over the results, of the root mean square of their differences relative to their own."""
    return max(float((results[name] - other).norm() / other.norm()) for name, other in others.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workload", default="b1-k21841-d512", help="default: %(default)s")
    add("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    add("--modes", default=",".join(MODES), help="default: %(default)s")
    add("--methods", default="torch,cpu", help="to compare with, each in one process; default: %(default)s")
    add("--processes", type=int, default=2, help="that share the classes; default: %(default)s")
    options = parser.parse_args(arguments)
    load, equal = workload(options.workload), True
    for mode in options.modes.split(","):
        cell = Cell(load, mode, options.dtype)
        print(f"{cell}, one thread a process", flush=True)
        peaks: dict[str, int] = {}
        expected: dict[str, Tensor] = {}
        for name in [*options.methods.split(","), SHARDED]:
            processes = options.processes if name == SHARDED else 1
            reason = name != SHARDED and why_unusable(
                all_methods()[name], load, DTYPES[options.dtype], torch.device("cpu")
            )
            if reason:
                print(f"  {name:9} {reason}")
                continue
            peak, seconds, results = measure(cell, name, processes)
            expected = expected or results
            peaks[name] = peak
            error = difference(results, expected)
            equal &= error <= TOLERANCE
            ratios = "".join(f"  / {other} {peak / of:.2f}" for other, of in peaks.items() if other != name)
            print(
                f"  {name:9} {processes} processes  peak {peak / 1e6:7.1f} MB each{ratios}  "
                f"{seconds:.1f} s  difference {error:.1e}",
                flush=True,
            )
    return int(not equal)


if __name__ == "__main__":
    raise SystemExit(main())
