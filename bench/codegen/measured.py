"""Every launch of a forward pass and a step on this machine's GPU: its time, beside what the model predicts for it.

    python -m codegen.measured --workload imagenet --out launches.json

Launches are timed one by one between two events, in the order of a pass, each median from a few passes. The GPU is kept
busy meanwhile until all of a pass is launched, so that no launch waits for the host. Without a GPU, --dry-run predicts
alone, for an H100.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rows import number, table
from workloads import DTYPES, WORKLOADS, Workload, make_inputs

from codegen.launches import Launch, Recorder, device_named, record_launches
from codegen.machine_code import Code, compile_launch, read_nvidia
from codegen.prediction import PARTS, predicted
from rada_kernels.backends import triton as backend
from rada_kernels.options import Wanted
from rada_kernels.triton_common.target import Gpu, target_of

PASSES = 7
BUSY_PRODUCTS = 20  # of 1.1 TFLOP each, more than a millisecond: longer than launching a pass takes
DRY_ARCH = "sm_90"


class Timed(Gpu):
    """A GPU on which every launch stands between two events."""

    def __init__(self, device):
        super().__init__(device)
        self.launches: list[tuple[Launch, torch.cuda.Event, torch.cuda.Event]] = []

    def launcher(self, kernel, grid, arguments):
        launch = super().launcher(kernel, grid, arguments)

        def timed(arguments: dict) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch(arguments)
            end.record()
            self.launches.append((Launch(kernel, grid, arguments), start, end))

        return timed


def timed_launches(load: Workload, dtype: torch.dtype) -> list[tuple[Launch, Code | None, float]]:
    """Each launch of a step, what its machine code says (None where it cannot be read), and its milliseconds."""
    device = torch.device("cuda")
    inputs = make_inputs(load, "forward", dtype, device)
    call = inputs.image, inputs.text, inputs.params
    target = Timed(target_of(inputs.image).device)
    times: list[list[float]] = []
    busy = torch.ones(8192, 8192, dtype=torch.float16, device=device)
    for _ in range(PASSES):
        target.launches.clear()
        for _ in range(BUSY_PRODUCTS):
            busy @ busy
        sums, deviation, kept = backend.forward(*call, inputs.options, not load.inference_only, target)
        if not load.inference_only:
            wanted = Wanted(False, False, True)
            backend.backward(sums, deviation, *call, kept, inputs.options, wanted, target)
        torch.cuda.synchronize()
        times.append([start.elapsed_time(end) for _, start, end in target.launches])
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return [
        (launch, _code_of(launch), ms) for (launch, _, _), ms in zip(target.launches, medians, strict=True)
    ]  # fmt: skip


def _code_of(launch: Launch) -> Code | None:
    if torch.version.hip:
        return None
    try:
        return read_nvidia(launch.kernel.warmup(grid=launch.grid, **launch.arguments))
    except (OSError, AttributeError, TypeError, KeyError, ValueError) as error:  # another Triton, without its tools
        print(f"{launch.name}: its machine code cannot be read ({type(error).__name__}: {error})")
        return None


def rows_of(load: Workload, kind: str, arch: str, launches: list[tuple[Launch, Code | None, float | None]]) -> list:
    rows = []
    for launch, code, ms in launches:
        known = code is not None and arch in PARTS and DTYPES[kind].itemsize == 2
        seconds = predicted(launch, arch, code).total if known else None
        rows.append(
            {
                "workload": load.name,
                "dtype": kind,
                "arch": arch,
                "kernel": launch.name,
                "programs": launch.programs,
                "registers": code and code.registers,
                "spill_bytes": code and code.spill_bytes,
                "measured_us": ms and 1e3 * ms,
                "predicted_us": seconds and 1e6 * seconds,
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """A line for each launch; measured / predicted where both are known."""
    cells = []
    for row in rows:
        both = row["measured_us"] and row["predicted_us"]
        ratio = f"{row['measured_us'] / row['predicted_us']:.2f}" if both else ""
        names = [str(row[name]) for name in ("workload", "dtype", "kernel", "programs")]
        cells.append([*names, number(row["measured_us"]), number(row["predicted_us"]), ratio])
    return table(["workload", "dtype", "kernel", "programs", "measured µs", "predicted µs", "ratio"], cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="default: caltech101 and imagenet")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: the forward pass, predicted alone")
    options = parser.parse_args(arguments)
    dtype, rows = DTYPES[options.dtype], []
    for name in options.workload or ("caltech101", "imagenet"):
        load = WORKLOADS[name]
        if options.dry_run:
            arch = DRY_ARCH
            recorded = record_launches(load, "forward", dtype, Recorder(device_named(arch)))
            launches = [(launch, compile_launch(arch, launch), None) for launch in recorded]
        else:
            arch = target_of(torch.empty(0, device="cuda")).device.name
            launches = timed_launches(load, dtype)
        rows += rows_of(load, options.dtype, arch, launches)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
