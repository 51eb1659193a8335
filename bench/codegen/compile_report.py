"""What the Triton kernels become on each architecture, compiled without a GPU: make compile-report

The launches are those of the library: the operator runs on tensors of the meta device with every launch recorded, for
the workloads of workloads.py and for every head width with few and many classes. Each distinct kernel is compiled
once and its machine code read (machine_code.py); a configuration that does not fit is halved as on a GPU, and the
launches are recorded again, until nothing is left to compile. Times of 16-bit workloads are predicted by a model
(prediction.py) on the parts for which published measurements calibrate it (calibration.py).

What is compiled is chosen so that no kernel is compiled twice that cannot differ in kind: `loads_of`, `covered`.
What is compiled is kept in runs/codes.jsonl: a run that was stopped goes on, and after a change only what
changed is compiled again. Tables of every kernel and of every predicted call go to runs/compile_report/.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rows import table
from workloads import WORKLOADS, Workload, workload

from codegen.calibration import calibration_table
from codegen.launches import (
    SHARED_BYTES,
    Launch,
    Recorder,
    TorchCall,
    device_named,
    float32_precision,
    record_calls,
)
from codegen.machine_code import Code, Store, blocks_of, compile_all, key_of
from codegen.prediction import (
    ARCHITECTURES,
    MODEL,
    NOTHING,
    PARTS,
    Spent,
    limit_s,
    predicted,
    predicted_torch,
    resident_programs,
)
from rada_kernels.backends.triton import spills

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs"
PREDICTED = "bfloat16"
FEW_CLASSES = 256  # up to here two programs are to reside on a multiprocessor
# (dtype, torch.get_float32_matmul_precision(), architectures or None for all, class numbers of its sizes). What a
# device's registers do not hold is left out, as `usable` leaves it to torch.
KINDS = {
    "bfloat16": (torch.bfloat16, "highest", None, (10, 24, 100, 1000)),
    "float16": (torch.float16, "highest", None, (1000,)),
    "float32": (torch.float32, "high", None, (10, 24, 1000)),
    "float32-highest": (torch.float32, "highest", ["sm_90"], (10, 1000)),
}
SAME_CODE = {"sm_89": "sm_86"}  # the same PTX and machine code: tests/kernels/test_triton_compile.py
ARCHS = [arch for arch in ARCHITECTURES if arch not in SAME_CODE]
# With eight heads: every width of open_clip's encoders, and the widest that the kernels take. 10 and 24 classes have
# blocks of 16 and 32, 100 and 1000 those of few and of many classes.
HEADS = (32, 48, 64, 80, 96, 128, 144, 160, 192, 256)
CLASSES = KINDS["bfloat16"][-1]
SIZES = {load.name: load for width in HEADS for load in (Workload(f"E{width}-K{k}", 32, k, 8 * width) for k in CLASSES)}
BASIC = "eurosat", "caltech101", "imagenet"  # few classes, some and many
WHOLE = "bfloat16", 1000  # dtype and class number of the sizes whose every kernel is compiled


def loads_of(arch: str, kind: str) -> list[Workload]:
    """The sizes, and the basic workloads, or all of them where their times are predicted."""
    names = WORKLOADS if arch in PARTS and kind == PREDICTED else BASIC
    return [WORKLOADS[name] for name in names] + [load for load in SIZES.values() if load.classes in KINDS[kind][-1]]


def covered(kind: str, load: Workload, call: Launch | TorchCall) -> bool:
    """Whether a call is part of the report. The attention's registers follow from a head's width: it is compiled at
    every size. The other kernels are at every width in one dtype; at all class numbers and dtypes workloads have them.
    """
    if load.name not in SIZES:
        return True
    return isinstance(call, Launch) and (call.name.startswith("mask_attention") or (kind, load.classes) == WHOLE)


WHAT = [
    f"A whole run has all kernels of {', '.join(BASIC)}, in bfloat16 on {' and '.join(PARTS)} of every workload;",
    "for heads of",
    f"{', '.join(map(str, HEADS))} columns, eight of them, the attention with",
    "; ".join(f"{', '.join(map(str, classes))} classes in {kind}" for kind, (*_, classes) in KINDS.items()) + ";",
    f"of these in {WHOLE[0]} with {WHOLE[1]} classes the other kernels too. sm_89 has the machine code of sm_86.",
    "",
]


def pass_of(row: dict) -> tuple:
    return row["arch"], row["kind"], row["load"].name, row["mode"]


def modes_of(load: Workload) -> tuple[str, ...]:
    """A size's one mode launches every kernel; only workloads have a predicted time."""
    return load.modes if load.name not in SIZES else ("step-features",)


def gather(archs: list[str], kinds: list[str], loads: list[Workload] | None, codes: dict[str, Code]) -> list[dict]:
    """A row for every call of every pass. loads: None for loads_of. codes: what is compiled already, by which blocks
    are fitted.
    """
    rows = []
    for arch in archs:

        def usage_of(launch: Launch, arch: str = arch):
            code = codes.get(key_of(arch, launch))
            return code and code.usage

        for kind in kinds:
            dtype, precision, only, _ = KINDS[kind]
            if only and arch not in only:
                continue
            recorder = Recorder(device_named(arch), usage_of, configs={})
            for load in loads or loads_of(arch, kind):
                if spills(recorder.device, dtype, load.width / load.heads):
                    continue
                for mode in modes_of(load):
                    with float32_precision(precision):
                        calls = record_calls(load, mode, dtype, recorder)
                    rows += [
                        {
                            "arch": arch,
                            "kind": kind,
                            "load": load,
                            "mode": mode,
                            "call": call,
                            "key": key_of(arch, call) if isinstance(call, Launch) else None,
                        }
                        for call in calls
                        if covered(kind, load, call)
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
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes,
        "shared_limit": SHARED_BYTES[row["arch"]],
        "products": code.products,
        "tensor_core": ", ".join(f"{count} {name}" for name, count in code.tensor_core.items()),
        "resident": resident_programs(code, architecture, row["arch"], warps),
    }


ALONE = "1 resident"


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
        found.append(ALONE if kernel["resident"] else "0 resident")
    return found


def predict(rows: list[dict], codes: dict[str, Code]) -> list[tuple[dict, Spent]]:
    """The calls whose time is predicted, those of bfloat16 workloads on calibrated parts, and what they spend."""
    out = []
    for row in rows:
        if row["load"].name not in SIZES and row["kind"] == PREDICTED and row["arch"] in PARTS:
            call, arch = row["call"], row["arch"]
            if isinstance(call, Launch):
                out.append((row, predicted(call, arch, codes[row["key"]])))
            else:
                out.append((row, predicted_torch(call, arch, KINDS[row["kind"]][1])))
    return out


def render(rows: list[dict], codes: dict[str, Code], left: int) -> tuple[str, list[dict], list[dict]]:
    """The report as Markdown, the kernels' table, the predictions."""
    few = {row["key"] for row in rows if row["load"].classes <= FEW_CLASSES}
    kernels, groups = [], {}
    for (kind, key), row in {(row["kind"], row["key"]): row for row in rows if row["key"]}.items():
        kernel = kernel_row(row, codes[key])
        kernels.append(kernel)
        groups.setdefault((row["arch"], kind), []).append((kernel, misses(kernel, codes[key], key in few)))
    meet = sum(not found for group in groups.values() for _, found in group)
    predictions = predict(rows, codes)
    lines = [
        "# What the Triton kernels become",
        "",
        "Written by `make compile-report`. Compiled for, verified by interpreter, **not yet run on hardware**:",
        "registers, spills and shared memory are read from the machine code; times and scores are **predictions**. The",
        "same command writes a row for every kernel and for every predicted call to `runs/compile_report/`.",
        "",
        "## Reading",
        "",
        f"{len(kernels)} distinct kernels were compiled; {meet} meet every figure."
        + (f" {left} more were not compiled in this run." if left else ""),
        *WHAT,
        "The figures: no byte spilled; a tensor-core instruction for every product; shared memory within the device's",
        f"limit; a program resident on a multiprocessor, two where K ≤ {FEW_CLASSES}.",
        'float32 is compiled as torch.set_float32_matmul_precision("high") asks, and for sm_90 as "highest" does too,',
        "whose products are float32 multiply-adds by intent.",
        "",
        *overview(groups),
        "",
        *missing_figures(pair for group in groups.values() for pair in group),
        "## The model, and how near it comes to what others measured",
        "",
        *MODEL.splitlines(),
        "",
        calibration_table(),
        "",
        *predicted_scores(predictions),
        *predicted_launches(predictions),
    ]
    calls = [
        {
            **{name: row[name] for name in ("arch", "mode")},
            "workload": row["load"].name,
            "call": name_of(row["call"]),
            **{f"{unit}_us": round(seconds * 1e6, 2) for unit, seconds in vars(spent).items()},
            "predicted_us": round(spent.total * 1e6, 2),
        }
        for row, spent in predictions
    ]
    return "\n".join(lines) + "\n", kernels, calls


def name_of(call: Launch | TorchCall) -> str:
    return call.name if isinstance(call, Launch) else f"torch {call.name}"


def overview(groups: dict[tuple, list[tuple[dict, list[str]]]]) -> list[str]:
    """Architectures down, dtypes across: how many meet every figure, and what the others spill at most."""
    archs, kinds = (list(dict.fromkeys(key[at] for key in groups)) for at in (0, 1))

    def cell(group: list[tuple[dict, list[str]]]) -> str:
        spills = [kernel["spill_bytes"] for kernel, _ in group if kernel["spill_bytes"]]
        spilling = f"; {len(spills)} spill, {max(spills)} B at most" if spills else ""
        return f"{sum(not found for _, found in group)} of {len(group)}{spilling}" if group else ""

    rows = [[arch, *(cell(groups.get((arch, kind), [])) for kind in kinds)] for arch in archs]
    return [table(["arch", *kinds], rows)]


def missing_figures(judged: Iterable[tuple[dict, list[str]]]) -> list[str]:
    """A line for each architecture, dtype and kernel that misses a figure at some width. An architecture's kernels that
    reside alone, and miss nothing else, share one.
    """
    found: dict[tuple, dict[str, list[str]]] = {}
    for kernel, what in judged:
        if what:
            alone = what == [ALONE]
            name, shape = f"{kernel['dtype']} {kernel['kernel']}", f"{kernel['width']} {kernel['blocks']}"
            shapes = found.setdefault((kernel["arch"], "" if alone else name), {})
            shapes.setdefault("; ".join(what), []).append(name if alone else shape)
    if not found:
        return []
    rows = [
        [*key, "; ".join(f"{what} ({', '.join(dict.fromkeys(shapes))})" for what, shapes in by_what.items())]
        for key, by_what in found.items()
    ]
    return [
        "### What misses a figure",
        "",
        table(["arch", "kernel", "what (heads × width, blocks, or kernels)"], rows),
        "",
    ]


def predicted_scores(predictions: list[tuple[dict, Spent]]) -> list[str]:
    """Workloads and modes down; each part's score and time, and what the first part's time goes to."""
    total: dict[tuple, dict[str, Spent]] = {}
    for row, spent in predictions:
        of = total.setdefault((row["load"].name, row["mode"]), {})
        of[row["arch"]] = of.get(row["arch"], NOTHING) + spent
    if not total:
        return []
    archs = [arch for arch in PARTS if any(arch in of for of in total.values())]
    rows = []
    for (name, mode), of in total.items():
        cells = [name, mode]
        for arch in archs:
            took = of[arch].total if arch in of else None
            score = took and limit_s(workload(name), mode, arch) / took
            cells.append(f"{score:.2f} ({took * 1e6:.0f} µs)" if took else "not compiled")
        spent = of.get(archs[0], NOTHING)
        shares = vars(spent).values()
        rows.append([*cells, *(f"{share / spent.total:.0%}" if spent.total else "" for share in shares)])
    return [
        "## Predicted scores, bfloat16",
        "",
        "Limit time / predicted time, and the predicted time. **Predictions, not measurements**, on parts for which",
        f"measurements calibrate the model. The shares are what the time on {PARTS[archs[0]].name} goes to: idle are",
        "starts and ends of programs and multiprocessors with fewer of them; torch are its own calls.",
        "",
        table(["workload", "mode", *(PARTS[arch].name for arch in archs), *vars(NOTHING)], rows),
        "",
    ]


def predicted_launches(predictions: list[tuple[dict, Spent]], arch: str = "sm_90", most: int = 12) -> list[str]:
    """The longest calls of one step, on one part."""
    chosen = [
        (row["call"], spent)
        for row, spent in predictions
        if (row["arch"], row["load"].name, row["mode"]) == (arch, "imagenet", "step")
    ]
    total = sum(spent.total for _, spent in chosen)
    chosen = sorted(chosen, key=lambda pair: pair[1].total, reverse=True)[:most]
    rows = [
        [
            name_of(call),
            getattr(call, "programs", ""),
            f"{spent.total * 1e6:.0f}",
            f"{spent.total / total:.0%}",
            spent.limit,
        ]
        for call, spent in chosen
    ]
    header = ["call", "programs", "predicted µs", "share", "most of it"]
    return [f"### The longest calls of imagenet, step, {PARTS[arch].name}", "", table(header, rows), ""] if rows else []


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile every kernel that the workloads and sizes launch, for every architecture, and write the report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--arch", action="append", choices=ARCHS, help="default: all")
    add("--dtype", action="append", choices=KINDS, help="default: all")
    add(
        "--workload",
        action="append",
        metavar="NAME",
        help="or a size, such as b64-k21841-d512, or one of the report's, such as E64-K100; default: `loads_of`",
    )
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: the cores")
    add("--count", action="store_true", help="say how many kernels there are to compile, and stop")
    add("--stored", action="store_true", help="compile nothing: write the report of what a stopped run has compiled")
    add("--out", type=Path, default=HERE / "compile_report.md", help="where the report goes")
    add("--tables", type=Path, default=RUNS / "compile_report", help="the folder of the .csv tables")
    options = parser.parse_args(arguments)
    chosen = (
        options.arch or ARCHS,
        options.dtype or [*KINDS],
        [SIZES.get(name) or workload(name) for name in options.workload] if options.workload else None,
    )
    RUNS.mkdir(exist_ok=True)
    store, start = Store(RUNS / "codes.jsonl"), time.monotonic()
    while True:
        rows = gather(*chosen, store.codes)
        wanted = {row["key"]: (row["arch"], row["call"]) for row in rows if row["key"]}
        left = len(wanted.keys() - store.codes.keys())
        print(f"{len(wanted)} kernels, {left} to compile", flush=True)
        if options.count:
            return
        if options.stored or not left:
            break
        compile_all(wanted, store, options.jobs)
    print(f"{len(wanted) - left} of {len(wanted)} kernels, {(time.monotonic() - start) / 60:.0f} minutes")
    missing = {pass_of(row) for row in rows if row["key"] and row["key"] not in store.codes}
    text, kernels, calls = render([row for row in rows if pass_of(row) not in missing], store.codes, left)
    options.out.write_text(text)
    options.tables.mkdir(parents=True, exist_ok=True)
    for name, content in (("kernels", kernels), ("predicted", calls)):
        if content:
            write_csv(options.tables / f"{name}.csv", content)


if __name__ == "__main__":
    main()
