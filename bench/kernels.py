"""The measuring rod: every method on the same tensors in the same run. `python bench/kernels.py --help`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from compare import compare as compare_reports
from compare import print_comparison
from correctness import Judge
from encoder import NAME as ENCODER_NAME
from encoder import make_encoder
from floors import floor_flop, gemm_rate
from measure import Clock, cuda_graph, make_clock, run_rounds, summarize
from memory import Probe, available_bytes, probe_cpu, probe_cuda
from methods import Method, choose_methods, why_unusable, work
from plots import draw
from report import FAILED, OK, OUT_OF_MEMORY, UNUSABLE, WRONG, Encoder, Report, Row, environment, print_report
from rich.console import Console
from workloads import DTYPES, MODES, SUITES, WORKLOADS, Cell, choose_cells, make_inputs

# The head beside which the image encoder is timed, in the same rounds.
ENCODER_CELL = ("imagenet", "forward")
INTERRUPTED = 130


class Bench:
    """One run: measures cells and writes the report after each."""

    def __init__(
        self,
        report: Report,
        path: Path,
        device: torch.device,
        *,
        rounds: int | None,
        seconds: float,
        memory_bytes: int | None,
        use_cuda_graph: bool,
        say: Callable[[str], None],
    ):
        self.report, self.path, self.device, self.say = report, path, device, say
        self.rounds, self.seconds = rounds, seconds
        self.memory_bytes, self.use_cuda_graph = memory_bytes, use_cuda_graph
        self.clock: Clock = make_clock(device)

    def measure_rates(self, dtypes: list[str], when: str) -> None:
        """The large matrix product's rate, `when` = "start" or "end" of the run."""
        for dtype in dtypes:
            self.say(f"{dtype} matrix product")
            measured = gemm_rate(DTYPES[dtype], self.device, self.clock)
            rates = self.report.gemm.setdefault(dtype, {"start_tflops": None, "end_tflops": None})
            rates |= {"size": measured["size"], f"{when}_tflops": measured["tflops"]}
        self.report.write(self.path)

    def measure_cell(self, cell: Cell, methods: list[Method], explicit: bool) -> None:
        """Check every method, time the correct ones in common rounds, append their rows.

        explicit: methods were named by the user, so that those which cannot serve the cell get a row as well.
        """
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        dtype = DTYPES[cell.dtype]
        self.say(f"{cell}: float64 truth")
        inputs = make_inputs(cell.workload, cell.mode, dtype, self.device)
        judge = Judge(inputs)
        rows: dict[str, Row] = {}
        runs: dict[str, Callable] = {}
        samples: dict[str, list[float]] = {}
        try:
            for method in methods:
                if method.compiled and not cell.compiled and not explicit:
                    continue
                row = new_row(cell, method)
                reason = why_unusable(method, cell.workload, dtype, self.device)
                if reason:
                    if explicit:
                        row.status, row.note = UNUSABLE, reason
                        rows[method.name] = row
                    continue
                self.say(f"{cell}: {method.name}")
                rows[method.name] = row
                run = self.check(cell, method, inputs, judge, row)
                if run:
                    runs[method.name] = run
            if (cell.workload.name, cell.mode) == ENCODER_CELL:
                self.say(f"{cell}: {ENCODER_NAME}")
                with contextlib.suppress(ImportError):
                    runs[ENCODER_NAME] = make_encoder(cell.workload.batch, dtype, self.device)
                    runs[ENCODER_NAME]()
            self.say(f"{cell}: rounds")
            run_rounds(runs, samples, self.clock, self.rounds, self.seconds)
        finally:
            self.store(cell, rows, samples)

    def check(self, cell: Cell, method: Method, inputs, judge: Judge, row: Row) -> Callable | None:
        """A correct method's call, ready to be timed; its memory and errors in its row. None if it may not
        run.
        """
        probe = Probe(None)
        if self.device.type == "cpu":
            probe = probe_cpu(cell, method, torch.get_num_threads(), self.allowed_bytes())
        row.compile_s = probe.compile_s
        row.peak_mb = probe.peak_bytes and probe.peak_bytes / 1e6
        if probe.failure:
            row.status = OUT_OF_MEMORY if probe.out_of_memory else FAILED
            row.note = probe.failure.removeprefix("out of memory: ")
            return None
        allowed = self.allowed_bytes()
        if None not in (probe.peak_bytes, allowed) and probe.peak_bytes > allowed:
            row.status = OUT_OF_MEMORY
            row.note = f"needs {probe.peak_bytes / 1e9:.1f} GB of the {allowed / 1e9:.1f} GB that it may take"
            return None
        try:
            run = work(method, inputs)
            start = time.perf_counter()
            results = run()
            first_s = time.perf_counter() - start
            verdict = judge.judge(results)
            del results
            if self.device.type == "cuda":
                row.peak_mb = probe_cuda(run, self.device) / 1e6
                if method.compiled:
                    row.compile_s = first_s - self.clock.time(run)
                if self.use_cuda_graph:
                    run = cuda_graph(run)
        except Exception as error:  # one method's fault, of whatever kind, must not end the run
            out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            row.status = OUT_OF_MEMORY if out_of_memory else FAILED
            row.note = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        row.error_logits, row.error_penalty, *gradients = verdict.errors.values()
        row.error_gradients = max(gradients, default=None)
        row.worst, row.worst_error, row.worst_limit = verdict.worst, verdict.worst_error, verdict.worst_limit
        if not verdict.right:
            row.status = WRONG
            row.note = verdict.account
            return None
        return run

    def allowed_bytes(self) -> int | None:
        """What one call may take: what is free, and no more than the user allows."""
        limits = [limit for limit in (self.memory_bytes, available_bytes()) if limit is not None]
        return min(limits, default=None)

    def store(self, cell: Cell, rows: dict[str, Row], samples: dict[str, list[float]]) -> None:
        """Times into rows, rows into the report, the report into its file. A row that was not reached is left
        out.
        """
        for name, row in rows.items():
            if samples.get(name):
                summary = summarize(samples[name])
                row.median_ms, row.q20_ms, row.q80_ms = (
                    1e3 * value for value in (summary.median, summary.q20, summary.q80)
                )
                row.rounds = summary.n
        self.report.rows += [row for row in rows.values() if row.status != OK or row.rounds]
        if samples.get(ENCODER_NAME):
            summary = summarize(samples[ENCODER_NAME])
            self.report.encoders.append(
                Encoder(
                    ENCODER_NAME,
                    cell.workload.name,
                    cell.mode,
                    cell.dtype,
                    cell.workload.batch,
                    *(1e3 * value for value in (summary.median, summary.q20, summary.q80)),
                    summary.n,
                )
            )
        self.report.write(self.path)


def new_row(cell: Cell, method: Method) -> Row:
    load = cell.workload
    return Row(
        load.name, load.batch, load.classes, load.width, load.heads, cell.mode, cell.dtype, method.name, OK,
        floor_gflop=floor_flop(load, cell.mode) / 1e9,
    )  # fmt: skip


def choose_device(name: str | None) -> torch.device:
    """cuda where there is one, unless a name is given. Raises ValueError for a device that does not exist
    here.
    """
    existing = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    name = name or existing[-1]
    if name not in existing:
        raise ValueError(f"device: got {name!r}; on this machine it takes one of {', '.join(existing)}")
    return torch.device(name)


def split(text: str | None) -> list[str] | None:
    """A comma-separated list; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def fresh_compile_cache() -> Iterator[None]:
    """Compile times from nothing. What a child process compiled for its memory measurement is then taken from
    it.
    """
    with tempfile.TemporaryDirectory(prefix="rada-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def main(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")] = "quick",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    workloads: Annotated[
        str | None,
        typer.Option(help=f"Instead of the suite's: any of {', '.join(WORKLOADS)}, or sizes like b32-k100-d512."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--backends",
            help=f"Instead of all: any of {', '.join(m.name for m in choose_methods(None))}.",
        ),
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"Only these: any of {', '.join(DTYPES)}.")] = None,
    modes: Annotated[str | None, typer.Option(help=f"Only these: any of {', '.join(MODES)}.")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds per cell; by default as many as fit into --seconds, at least 3."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one cell.")] = 5.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB that one call may take on the CPU; by default what is free, less 2 GiB."),
    ] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Time replays of a CUDA graph.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for kernels.json and the plots.")] = None,
    compare: Annotated[Path | None, typer.Option(help="An earlier kernels.json to compare with.")] = None,
    margin: Annotated[float, typer.Option(help="With --compare: how much slower a row may get, 0.1 = 10 %.")] = 0.1,
) -> None:
    """Measure the head's methods against each other; print a table, write kernels.json and plots.

    With --compare: exit status 1 where a row got slower than the margin allows, or lost its time.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    try:
        chosen_methods, chosen_device = choose_methods(split(methods)), choose_device(device)
        cells = choose_cells(suite, split(workloads), split(modes), split(dtypes))
        old = Report.read(compare) if compare else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads:
        torch.set_num_threads(threads)
    settings = {"suite": suite, "rounds": rounds, "seconds": seconds, "cuda_graph": cuda_graph}
    report = Report(environment(chosen_device, torch.get_num_threads()), settings)
    folder = output or Path("runs") / f"bench-{chosen_device.type}"
    path = folder / "kernels.json"
    interrupted = False
    used_dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    with console.status("") as status, fresh_compile_cache():
        bench = Bench(
            report, path, chosen_device, rounds=rounds, seconds=seconds,
            memory_bytes=None if memory is None else int(memory * 1e9), use_cuda_graph=cuda_graph,
            say=status.update,
        )  # fmt: skip
        try:
            bench.measure_rates(used_dtypes, "start")
            for cell in cells:
                start = time.perf_counter()
                bench.measure_cell(cell, chosen_methods, explicit=methods is not None)
                console.print(f"{cell} took {time.perf_counter() - start:.0f} s", style="dim", highlight=False)
            bench.measure_rates(used_dtypes, "end")
            report.complete = True
            report.write(path)
        except KeyboardInterrupt:
            interrupted = True
    print_report(report, console)
    written = [path]
    try:
        written += draw(report, folder)
    except ImportError as error:
        console.print(f"[yellow]no plots: {error}[/]")
    console.print("\nwritten: " + ", ".join(map(str, written)))
    if interrupted:
        console.print("[yellow]interrupted: the file holds what was measured[/]")
        raise typer.Exit(INTERRUPTED)
    if old:
        changes = compare_reports(old, report, margin)
        print_comparison(old, report, changes, margin, console)
        if any(change.slower for change in changes):
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
