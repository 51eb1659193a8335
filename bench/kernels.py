"""The measuring rod: every method on the same tensors in the same run. `python bench/kernels.py --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from charts import draw
from compare import compare, print_comparison
from correctness import Judge
from floors import floor_flop, gemm_rate
from implementations import ENCODER, Method, choose_methods, make_encoder, why_unusable, work
from memory import Probe, available_bytes, probe_cpu, probe_cuda
from rows import FAILED, OK, OUT_OF_MEMORY, UNUSABLE, WRONG, Results, Row, environment, markdown
from timing import cuda_graph, make_clock, run_rounds, summarize
from workloads import DTYPES, MODES, SUITES, WORKLOADS, Cell, Inputs, choose_cells, make_inputs

# The head beside which the image encoder is timed, in the same rounds.
ENCODER_CELL = ("imagenet", "forward")
INTERRUPTED = 130


def say(text: str) -> None:
    print(text, end=" ", flush=True)


class Bench:
    """One run: measures cells and writes the results after each."""

    def __init__(
        self,
        results: Results,
        path: Path,
        device: torch.device,
        *,
        rounds: int | None,
        seconds: float,
        memory_bytes: int | None,
        use_cuda_graph: bool,
    ):
        self.results, self.path, self.device = results, path, device
        self.rounds, self.seconds = rounds, seconds
        self.memory_bytes, self.use_cuda_graph = memory_bytes, use_cuda_graph
        self.clock = make_clock(device)

    def measure_rates(self, dtypes: list[str], when: str) -> None:
        """The large matrix product's rate, `when` = "start" or "end" of the run."""
        for dtype in dtypes:
            measured = gemm_rate(DTYPES[dtype], self.device, self.clock)
            rates = self.results.gemm.setdefault(dtype, {"start_tflops": None, "end_tflops": None})
            rates |= {"size": measured["size"], f"{when}_tflops": measured["tflops"]}
        self.results.write(self.path)

    def measure_cell(self, cell: Cell, methods: list[Method], explicit: bool) -> None:
        """Check every method, time the correct ones in common rounds, append their rows.

        explicit: methods were named by the user, so that those which cannot serve the cell get a row as well.
        """
        start = time.perf_counter()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        dtype = DTYPES[cell.dtype]
        say(f"{cell}:")
        inputs = make_inputs(cell.workload, cell.mode, dtype, self.device)
        judge = Judge(inputs)
        rows: dict[str, Row] = {}
        runs: dict[str, Callable] = {}
        samples: dict[str, list[float]] = {}
        try:
            for method in methods:
                if method.compiled and not cell.compiled and not explicit:
                    continue
                row = new_row(cell, method.name)
                reason = why_unusable(method, cell.workload, dtype, self.device)
                if reason:
                    if explicit:
                        row.refuse(UNUSABLE, reason)
                        rows[method.name] = row
                    continue
                say(method.name)
                rows[method.name] = row
                run = self.check(cell, method, inputs, judge, row)
                if run:
                    runs[method.name] = run
            if (cell.workload.name, cell.mode) == ENCODER_CELL:
                with contextlib.suppress(ImportError):
                    runs[ENCODER] = make_encoder(cell.workload.batch, dtype, self.device)
                    runs[ENCODER]()
                    rows[ENCODER] = replace(new_row(cell, ENCODER), floor_gflop=None)
            run_rounds(runs, samples, self.clock, self.rounds, self.seconds)
        finally:
            self.store(rows, samples)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)

    def check(self, cell: Cell, method: Method, inputs: Inputs, judge: Judge, row: Row) -> Callable | None:
        """A correct method's call, ready to be timed; its memory and errors in its row. None if it may not run."""
        allowed, probe = self.allowed_bytes(), Probe(None)
        if self.device.type == "cpu":
            probe = probe_cpu(cell, method, torch.get_num_threads(), allowed)
        row.compile_s = probe.compile_s
        row.peak_mb = probe.peak_bytes and probe.peak_bytes / 1e6
        if probe.failure:
            row.refuse(OUT_OF_MEMORY if probe.out_of_memory else FAILED, probe.failure.removeprefix("out of memory: "))
            return None
        if None not in (probe.peak_bytes, allowed) and probe.peak_bytes > allowed:
            needs, free = probe.peak_bytes / 1e9, allowed / 1e9
            row.refuse(OUT_OF_MEMORY, f"needs {needs:.1f} GB of the {free:.1f} GB that it may take")
            return None
        try:
            run = work(method, inputs)
            start = time.perf_counter()
            values = run()
            first_s = time.perf_counter() - start
            verdict = judge.judge(values)
            del values
            if self.device.type == "cuda":
                row.peak_mb = probe_cuda(run, self.device) / 1e6
                if method.compiled:
                    row.compile_s = first_s - self.clock.time(run)
                if self.use_cuda_graph:
                    run = cuda_graph(run)
        except Exception as error:  # one method's fault, of whatever kind, must not end the run
            out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            status = OUT_OF_MEMORY if out_of_memory else FAILED
            row.refuse(status, f"{type(error).__name__}: {error}".splitlines()[0])
            return None
        row.error_logits, row.error_penalty, *gradients = verdict.errors.values()
        row.error_gradients = max(gradients, default=None)
        row.limit_logits = verdict.limits["logits"]
        row.worst, row.worst_error, row.worst_limit = verdict.worst, verdict.worst_error, verdict.worst_limit
        if not verdict.right:
            row.refuse(WRONG, verdict.account)
            return None
        return run

    def allowed_bytes(self) -> int | None:
        """What one call may take: what is free, and no more than the user allows."""
        limits = [limit for limit in (self.memory_bytes, available_bytes()) if limit is not None]
        return min(limits, default=None)

    def store(self, rows: dict[str, Row], samples: dict[str, list[float]]) -> None:
        """Times into rows, rows into the results and their file. A row that was not reached is left out."""
        for name, times in samples.items():
            if times:
                row, summary = rows[name], summarize(times)
                row.median_ms, row.q20_ms, row.q80_ms = 1e3 * summary.median, 1e3 * summary.q20, 1e3 * summary.q80
                row.rounds = summary.n
        self.results.rows += [row for row in rows.values() if row.status != OK or row.rounds]
        self.results.write(self.path)


def new_row(cell: Cell, method: str) -> Row:
    load = cell.workload
    return Row(
        load.name, load.batch, load.classes, load.width, load.heads, cell.mode, cell.dtype, method,
        floor_gflop=floor_flop(load, cell.mode) / 1e9,
    )  # fmt: skip


def choose_device(name: str | None) -> torch.device:
    """cuda where there is one, unless a name is given. Raises ValueError for a device that does not exist here."""
    existing = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    name = name or existing[-1]
    if name not in existing:
        raise ValueError(f"device: got {name!r}; on this machine it takes one of {', '.join(existing)}")
    return torch.device(name)


def split(text: str) -> list[str]:
    """A comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def fresh_compile_cache() -> Iterator[None]:
    """Compile times from nothing. What a child process compiled for its memory measurement is then taken from it."""
    with tempfile.TemporaryDirectory(prefix="rada-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description="Measure the head's methods against each other; print a table, write kernels.json and plots. "
        "With --compare: exit status 1 where a row got slower than the margin allows, or lost its time."
    )
    add = parser.add_argument
    add("--suite", default="quick", help=f"what to measure: {', '.join(SUITES)}; default: %(default)s")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    names = ", ".join(WORKLOADS)
    add("--workloads", type=split, help=f"instead of the suite's: any of {names}, or sizes like b32-k100-d512")
    names = ", ".join(method.name for method in choose_methods(None))
    add("--methods", "--backends", type=split, help=f"instead of all: any of {names}")
    add("--dtypes", type=split, help=f"only these: any of {', '.join(DTYPES)}")
    add("--modes", type=split, help=f"only these: any of {', '.join(MODES)}")
    add("--rounds", type=int, help="rounds per cell; default: as many as fit into --seconds, at least 3")
    add("--seconds", type=float, default=5.0, help="time for the rounds of one cell; default: %(default)s")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--memory", type=float, help="GB that one call may take on the CPU; default: what is free, less 2 GiB")
    add("--cuda-graph", action="store_true", help="time replays of a CUDA graph")
    add("--output", type=Path, help="folder for kernels.json and the plots; default: runs/bench-DEVICE")
    add("--compare", type=Path, help="an earlier kernels.json to compare with")
    add("--margin", type=float, default=0.1, help="with --compare: how much slower a row may get; default: %(default)s")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}; it takes 1 or more")
    for name in ("seconds", "memory"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name}: got {getattr(options, name)}; it takes a positive number")
    if options.output and options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: {options.output} is a file; it takes a folder")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parse(arguments)
    try:
        methods, device = choose_methods(options.methods), choose_device(options.device)
        cells = choose_cells(options.suite, options.workloads, options.modes, options.dtypes)
        old = Results.read(options.compare) if options.compare else None
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("suite", "rounds", "seconds", "cuda_graph")}
    results = Results(environment(device, torch.get_num_threads()), settings)
    folder = options.output or Path("runs") / f"bench-{device.type}"
    path = folder / "kernels.json"
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    with fresh_compile_cache(), contextlib.suppress(KeyboardInterrupt):
        bench = Bench(
            results, path, device, rounds=options.rounds, seconds=options.seconds,
            memory_bytes=None if options.memory is None else int(options.memory * 1e9),
            use_cuda_graph=options.cuda_graph,
        )  # fmt: skip
        bench.measure_rates(dtypes, "start")
        for cell in cells:
            bench.measure_cell(cell, methods, explicit=options.methods is not None)
        bench.measure_rates(dtypes, "end")
        results.complete = True
        results.write(path)
    print(markdown(results))
    written = [path]
    try:
        written += draw(results, folder)
    except ImportError as error:
        print(f"no plots: {error}")
    print("\nwritten: " + ", ".join(map(str, written)))
    if not results.complete:
        print("interrupted: the file holds what was measured")
        return INTERRUPTED
    changes = compare(old, results, options.margin) if old else []
    if old:
        print_comparison(old, results, changes, options.margin)
    return int(any(change.slower for change in changes))


if __name__ == "__main__":
    raise SystemExit(main())
