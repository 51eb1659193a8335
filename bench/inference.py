"""Predictions at scale: memory, how busy the head is, ranks, kills: python bench/inference.py

Random unit features, float16, in one .npy file, by `rada.inference` into a folder of Parquet. Each run is a process
of its own; its time starts when its checkpoint is loaded and a first batch computed.

    memory    the peak of the resident memory above what the process had with its model, of the run over all --rows
    busy      the head's share of that run's time
    ranks     one rank of one thread against two ranks of one thread each, over the first --rank-rows: the ratio of the
              medians of --rounds interleaved rounds
    kills     the run over the first --rank-rows killed with kill -9 --kills times, then left alone: the same bytes?

Exit status 1 where a figure misses its limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_above
from numpy.lib.format import open_memmap

from rada import RAdaHead
from rada.checkpoint import Checkpoint
from rada.classification import Classes
from rada.inference import PredictOptions, Predictor, plan_shards, predict_to_folder

MOST_BYTES, LEAST_BUSY, LEAST_RATIO = 1e9, 0.85, 1.8
START_SECONDS = 120  # that a process may take to be ready
PIECE = 10_000  # rows that are drawn at a time
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Run:
    """A run of one process: what it predicts, and its part in it."""

    checkpoint: Path
    features: Path
    output: Path
    rows_per_shard: int
    threads: int
    rank: int = 0
    ranks: int = 1


def write_features(path: Path, rows: int, width: int) -> None:
    """Random rows of unit length."""
    generator = np.random.default_rng(0)
    file = open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, PIECE):
        piece = generator.standard_normal((min(PIECE, rows - start), width), np.float32)
        file[start : start + PIECE] = piece / np.linalg.norm(piece, axis=1, keepdims=True)
    file.flush()


def write_checkpoint(folder: Path, classes: int, width: int) -> None:
    torch.manual_seed(0)
    head = RAdaHead(width).eval()
    torch.nn.init.normal_(head.out_proj.weight, std=0.02)
    text = torch.nn.functional.normalize(torch.randn(classes, width), dim=-1)
    Checkpoint(head, Classes(text, 100.0), tuple(f"class {i}" for i in range(classes)), "random").save(folder)


def predict(run: Run, ready: Any, results: Any) -> None:
    """A run, in the process that this is. Puts begin and end in seconds, busy and bytes into `results`."""
    os.environ |= {"RANK": str(run.rank), "WORLD_SIZE": str(run.ranks)}
    torch.set_num_threads(run.threads)
    predictor, options = Predictor(run.checkpoint, device="cpu"), PredictOptions(rows_per_shard=run.rows_per_shard)
    predictor(torch.zeros(options.batch_size, predictor.trained.rada.embed_dim), options)
    shards = plan_shards(predictor, options, features=run.features)
    ready.wait()
    begin, done = time.time(), {}
    peak = peak_above(lambda: done.update(predict_to_folder(predictor, shards, run.output, options)))
    results.put((begin, time.time(), done["head_busy"], peak))


def together(runs: Sequence[Run]) -> tuple[float, float, int]:
    """Seconds from the first begin to the last end, the least busy share, the most bytes of runs at the same time."""
    ready, results = SPAWN.Barrier(len(runs), timeout=START_SECONDS), SPAWN.SimpleQueue()
    processes = [SPAWN.Process(target=predict, args=(run, ready, results)) for run in runs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a run ended with {process.exitcode}")
    begins, ends, busy, peaks = zip(*(results.get() for _ in runs), strict=True)
    return max(ends) - min(begins), min(busy), max(peaks)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_often(run: Run, times: int, seconds: float) -> int:
    """Kill a run at random moments of its first `seconds`, let the next go on, and so on; returns how many were."""
    moments, killed = random.Random(0), 0
    for _ in range(times):
        ready, results = SPAWN.Barrier(2, timeout=START_SECONDS), SPAWN.SimpleQueue()
        process = SPAWN.Process(target=predict, args=(run, ready, results))
        process.start()
        ready.wait()
        process.join(moments.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode != 0
    together([run])
    return killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="of the large run; default: %(default)s")
    add("--rank-rows", type=int, default=20_000, help="of the runs of ranks and kills; default: %(default)s")
    add("--classes", type=int, default=100, help="default: %(default)s")
    add("--width", type=int, default=512, help="default: %(default)s")
    add("--threads", type=int, default=2, help="of the large run; default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--kills", type=int, default=10, help="default: %(default)s")
    add("--folder", type=Path, help="for features and results; default: a temporary one")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        return measure(Path(name), given)


def measure(folder: Path, given: argparse.Namespace) -> int:
    write_checkpoint(folder / "head", given.classes, given.width)
    for name, rows in (("all", given.rows), ("few", given.rank_rows)):
        write_features(folder / f"{name}.npy", rows, given.width)

    def run(output: str, rank: int = 0, ranks: int = 1) -> Run:
        shard = max(1, given.rank_rows // 20)
        return Run(folder / "head", folder / "few.npy", folder / output, shard, 1, rank, ranks)

    seconds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(given.rounds):
        for ranks, times in seconds.items():
            times.append(together([run(f"{ranks}-{number}", rank, ranks) for rank in range(ranks)])[0])
    one, two = (statistics.median(times) for times in seconds.values())
    killed = kill_often(run("killed"), given.kills, 1.2 * one / max(1, given.kills))  # most of a run, in all
    same = contents(folder / "killed") == contents(folder / "1-0") == contents(folder / "2-0")
    large = Run(folder / "head", folder / "all.npy", folder / "large", PredictOptions.rows_per_shard, given.threads)
    whole, busy, peak = together([large])
    figures = [
        (f"two ranks / one, rows per second (medians of {given.rounds})", f"{one / two:.2f}", one / two >= LEAST_RATIO),
        (f"killed {killed} times, then the same bytes", str(same), same),
        (f"memory above the model, {given.rows} rows", f"{peak / 1e6:.0f} MB", peak <= MOST_BYTES),
        (f"head busy, {given.threads} threads, {whole:.0f} s", f"{busy:.1%}", busy >= LEAST_BUSY),
    ]
    print(f"K = {given.classes}, D = {given.width}, float16 features, torch {torch.__version__}")
    for what, figure, holds in figures:
        print(f"{what:60} {figure:>10}{'' if holds else '   misses its limit'}")
    return 0 if all(holds for *_, holds in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
