"""What the Triton kernels become on each architecture, compiled without a GPU: make compile-report

The launches are those of the library: the operator runs on tensors of the meta device with every launch recorded, for
the workloads of workloads.py and for every head width with few and many classes. Each distinct kernel is compiled
once and its machine code read (machine_code.py); a configuration that does not fit is halved as on a GPU, and the
launches are recorded again, until nothing is left to compile. Times are predicted by a model (prediction.py).

What is compiled is kept in runs/machine_code.jsonl: a run that was stopped goes on, and after a change only what
changed is compiled again. From nothing, about 5,000 kernels: an hour on two cores. Tables of every kernel and of every
predicted call go to runs/compile_report/.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from workloads import WORKLOADS, Workload

from codegen.launches import SHARED_BYTES, Launch, Recorder, device_named, float32_precision, record_calls
from codegen.machine_code import Code, Store, blocks_of, compile_all, key_of
from codegen.prediction import (
    ARCHITECTURES,
    LAUNCH_S,
    MODEL,
    limit_s,
    predicted_s,
    predicted_torch_s,
    resident_programs,
    work_of,
)

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs"
FEW_CLASSES = 256  # up to here two programs are to reside on a multiprocessor
# (dtype, torch.get_float32_matmul_precision(), architectures or None for all)
KINDS = {
    "bfloat16": (torch.bfloat16, "high", None),
    "float16": (torch.float16, "high", None),
    "float32": (torch.float32, "high", [arch for arch in ARCHITECTURES if arch != "gfx1100"]),  # `usable` says why
    "float32-highest": (torch.float32, "highest", ["sm_90"]),
}
# Every head width at a CLIP's width D: (E, D). 10 and 24 classes have blocks of 16 and 32, 100 and 1000 those of few
# and of many classes.
HEADS = ((16, 512), (32, 512), (48, 768), (64, 512), (80, 640), (96, 768), (128, 512))
CLASSES = (10, 24, 100, 1000)
SIZES = {
    load.name: load
    for head_width, width in HEADS
    for load in (Workload(f"E{head_width}-K{k}", 32, k, width, width // head_width) for k in CLASSES)
}


def pass_of(row: dict) -> tuple:
    return row["arch"], row["kind"], row["load"].name, row["mode"]


def modes_of(load: Workload) -> tuple[str, ...]:
    """A size's one mode launches every kernel; only workloads have a predicted time."""
    return load.modes if load.name in WORKLOADS else ("step-features",)


def gather(archs: list[str], kinds: list[str], loads: list[Workload], codes: dict[str, Code]) -> list[dict]:
    """A row for every call of every pass. codes: what is compiled already, by which blocks are fitted."""
    rows = []
    for arch in archs:

        def usage_of(launch: Launch, arch: str = arch):
            code = codes.get(key_of(arch, launch))
            return code and code.usage

        for kind in kinds:
            dtype, precision, only = KINDS[kind]
            if only and arch not in only:
                continue
            recorder = Recorder(device_named(arch), usage_of, configs={})
            for load in loads:
                for mode in modes_of(load):
                    with float32_precision(precision):
                        rows += [
                            {
                                "arch": arch,
                                "kind": kind,
                                "load": load,
                                "mode": mode,
                                "call": call,
                                "key": key_of(arch, call) if isinstance(call, Launch) else None,
                            }
                            for call in record_calls(load, mode, dtype, recorder)
                        ]
    return rows


def kernel_row(row: dict, code: Code) -> dict:
    """What the table says of a kernel."""
    launch, architecture = row["call"], ARCHITECTURES[row["arch"]]
    arguments = launch.arguments
    shapes, warps = arguments["S"], arguments["num_warps"]
    return {
        "arch": row["arch"],
        "dtype": row["kind"],
        "kernel": launch.name,
        "width": f"{shapes.H}×{shapes.E}",
        "blocks": blocks_of(launch),
        "warps": warps,
        "stages": arguments["num_stages"],
        **asdict(code),
        "tensor_core": ", ".join(f"{count} {name}" for name, count in code.tensor_core.items()),
        "shared_limit": SHARED_BYTES[row["arch"]],
        "resident": resident_programs(code, architecture, row["arch"], warps),
    }


def misses(kernel: dict, code: Code, few: bool) -> list[str]:
    """The figures to reach that a kernel misses; few: it serves up to FEW_CLASSES classes."""
    found = []
    if code.spill_bytes:
        found.append(f"spills {code.spill_bytes} B")
    # float32 by float32 multiply-adds is what torch's "highest" asks for.
    if kernel["dtype"] != "float32-highest" and sum(code.tensor_core.values()) < code.products:
        found.append(f"{code.products} products, tensor cores: {kernel['tensor_core'] or 'none'}")
    if code.shared_bytes > kernel["shared_limit"]:
        found.append(f"{code.shared_bytes} B shared, over {kernel['shared_limit']}")
    if kernel["resident"] < 1 or (few and kernel["resident"] < 2):
        found.append(f"{kernel['resident']} resident")
    return found


def table(header: list[str], rows: list[list]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def predict(rows: list[dict], codes: dict[str, Code]) -> list[dict]:
    """Rows of predicted times, of the workloads."""
    out = []
    for row in rows:
        if row["load"].name not in WORKLOADS:
            continue
        call, arch = row["call"], row["arch"]
        if isinstance(call, Launch):
            seconds, limit = predicted_s(call, arch, codes[row["key"]])
            flop, exponentials = work_of(call)
            name, programs = call.name, call.programs
        else:
            seconds, limit = predicted_torch_s(call, arch, KINDS[row["kind"]][1])
            flop, exponentials, name, programs = call.flop, 0, f"torch {call.name}", ""
        out.append(
            {
                "arch": arch,
                "dtype": row["kind"],
                "workload": row["load"].name,
                "mode": row["mode"],
                "call": name,
                "programs": programs,
                "flop": flop,
                "exponentials": exponentials,
                "bytes": call.bytes,
                "predicted_us": round(seconds * 1e6, 2),
                "limit": limit,
            }
        )
    return out


def render(rows: list[dict], codes: dict[str, Code], left: int) -> tuple[str, list[dict], list[dict]]:
    """The report as Markdown, the kernels' table, the predictions."""
    few = {row["key"] for row in rows if row["load"].classes <= FEW_CLASSES}
    kernels, missing, groups = [], [], {}
    for (kind, key), row in {(row["kind"], row["key"]): row for row in rows if row["key"]}.items():
        kernel, code = kernel_row(row, codes[key]), codes[key]
        kernels.append(kernel)
        found = misses(kernel, code, key in few)
        groups.setdefault((row["arch"], kind), []).append((kernel, found))
        if found:
            shape = [kernel[name] for name in ("arch", "dtype", "kernel", "width", "blocks")]
            missing.append([*shape, f"{kernel['warps']} × {kernel['stages']}", kernel["registers"], "; ".join(found)])
    predictions = predict(rows, codes)
    counts = {
        figure: sum(any(figure in miss for miss in found) for group in groups.values() for _, found in group)
        for figure in ("spills", "products", "shared", "resident")
    }
    lines = [
        "# What the Triton kernels become",
        "",
        "Written by `make compile-report`. Compiled for, verified by interpreter, **not yet run on hardware**:",
        "registers, spills, shared memory and instructions are read from the machine code; times and scores are",
        "**predictions** by the model stated below. The same command writes a row for every kernel and for every",
        "predicted call to `runs/compile_report/`.",
        "",
        "## Reading",
        "",
        f"{len(kernels)} distinct kernels were compiled; {len(kernels) - len(missing)} meet every figure."
        + (f" {left} more were not compiled in this run." if left else ""),
        "The figures, and how many kernels miss each:",
        "",
        f"- no byte spilled: {counts['spills']}",
        f"- a tensor-core instruction for every product: {counts['products']}",
        f"- shared memory within the device's limit: {counts['shared']}",
        f"- a program resident on a multiprocessor, two where K ≤ {FEW_CLASSES}: {counts['resident']}",
        "",
        'float32 is compiled as torch.set_float32_matmul_precision("high") asks, and for sm_90 as "highest" does too,',
        "whose products are float32 multiply-adds by intent.",
        "",
        *table(
            ["arch", "dtype", "kernels", "meet every figure", "spill", "worst spill, B per thread"],
            [
                [
                    *key,
                    len(group),
                    sum(not found for _, found in group),
                    sum(kernel["spill_bytes"] > 0 for kernel, _ in group),
                    max(kernel["spill_bytes"] for kernel, _ in group),
                ]
                for key, group in groups.items()
            ],
        ),
        "",
        "### What misses a figure",
        "",
        *table(["arch", "dtype", "kernel", "width", "blocks", "warps × stages", "registers", "what"], missing),
        "",
        "## Predicted scores",
        "",
        "Limit time / predicted time, and the predicted time. **Predictions, not measurements.**",
        "",
        *MODEL,
        "",
        *predicted_scores(predictions),
        *predicted_limits(predictions),
        *predicted_launches(predictions),
    ]
    return "\n".join(lines) + "\n", kernels, predictions


def predicted_scores(predictions: list[dict]) -> list[str]:
    """A table per dtype: workloads and modes down, architectures across. float16 takes bfloat16's times."""
    total: dict[tuple, float] = {}
    for row in predictions:
        if row["dtype"] == "float16":
            continue
        key = row["dtype"], row["workload"], row["mode"], row["arch"]
        total[key] = total.get(key, 0.0) + row["predicted_us"]
    lines = []
    for kind in dict.fromkeys(key[0] for key in total):
        dtype, precision, _ = KINDS[kind]
        archs = list(dict.fromkeys(arch for k, _, _, arch in total if k == kind))
        cells = []
        for name, mode in dict.fromkeys((name, mode) for k, name, mode, _ in total if k == kind):
            cells.append([name, mode])
            for arch in archs:
                took = total.get((kind, name, mode, arch))
                score = took and limit_s(WORKLOADS[name], mode, arch, dtype, precision) * 1e6 / took
                cells[-1].append(f"{score:.2f} ({took:.0f} µs)" if took else "not compiled")
        parts = [f"{arch} {ARCHITECTURES[arch].part}" for arch in archs]
        lines += [f"### {kind}", "", *table(["workload", "mode", *parts], cells), ""]
    return lines


def predicted_limits(predictions: list[dict], arch: str = "sm_90", kind: str = "bfloat16") -> list[str]:
    """What the predicted time of each workload is spent on, on one part."""
    spent: dict[tuple, dict] = {}
    for row in predictions:
        if (row["arch"], row["dtype"]) == (arch, kind):
            units = spent.setdefault((row["workload"], row["mode"]), Counter())
            launch = LAUNCH_S * 1e6
            units["launches"] += launch
            units["torch" if row["call"].startswith("torch") else row["limit"]] += row["predicted_us"] - launch
    units = ("products", "exponentials", "memory", "torch", "launches")
    cells = [[*key, *(f"{took[unit] / took.total():.0%}" for unit in units)] for key, took in spent.items()]
    if not cells:
        return []
    return [
        f"### {arch} {kind}: what the predicted time is spent on",
        "",
        "Kernels by the unit that limits them; torch's own calls; the time between launches.",
        "",
        *table(["workload", "mode", *units], cells),
        "",
    ]


def predicted_launches(predictions: list[dict], arch: str = "sm_90", kind: str = "bfloat16") -> list[str]:
    """Where the predicted time of a workload goes, on one part."""
    chosen = [row for row in predictions if (row["arch"], row["dtype"]) == (arch, kind)]
    lines = []
    for name, mode in (("caltech101", "forward"), ("imagenet", "forward"), ("imagenet", "step")):
        calls = [row for row in chosen if (row["workload"], row["mode"]) == (name, mode)]
        total = sum(row["predicted_us"] for row in calls)
        cells = [
            [
                row["call"],
                row["programs"],
                f"{row['predicted_us']:.1f}",
                f"{row['predicted_us'] / total:.0%}",
                row["limit"],
            ]
            for row in calls
        ]
        if calls:
            header = ["call", "programs", "predicted µs", "share", "limited by"]
            lines += [f"### {arch} {kind}, {name}, {mode}", "", *table(header, cells), ""]
    return lines


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Architectures; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; default: all.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="Workloads or sizes such as E64-K100; default: all.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; default: the cores.")] = os.cpu_count() or 1,
    count: Annotated[
        bool, typer.Option("--count", help="Say how many kernels there are to compile, and stop.")
    ] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="Compile nothing: write the report of what a stopped run has compiled.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = HERE / "compile_report.md",
    tables: Annotated[Path, typer.Option(help="The folder of the .csv tables.")] = RUNS / "compile_report",
) -> None:
    """Compile every kernel that the workloads and sizes launch, for every architecture, and write the report."""
    loads = WORKLOADS | SIZES
    chosen = arch or [*ARCHITECTURES], dtype or [*KINDS], [loads[name] for name in workload or loads]
    RUNS.mkdir(exist_ok=True)
    store = Store(RUNS / "machine_code.jsonl")
    while True:
        rows = gather(*chosen, store.codes)
        wanted = {row["key"]: (row["arch"], row["call"]) for row in rows if row["key"]}
        left = len(wanted.keys() - store.codes.keys())
        print(f"{len(wanted)} kernels, {left} to compile", flush=True)
        if count:
            return
        if stored or not left:
            break
        compile_all(wanted, store, jobs)
    missing = {pass_of(row) for row in rows if row["key"] and row["key"] not in store.codes}
    text, kernels, predictions = render([row for row in rows if pass_of(row) not in missing], store.codes, left)
    out.write_text(text)
    tables.mkdir(parents=True, exist_ok=True)
    write_csv(tables / "kernels.csv", kernels)
    if predictions:
        write_csv(tables / "predicted.csv", predictions)


if __name__ == "__main__":
    typer.run(main)
