"""Predictions that are stopped: by kill -9, with a rank, by a full disk. They continue to the same bytes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rada.inference import PredictOptions, Predictor, plan_shards, predict, predict_shard, shards_of
from tests.rada.predictions import SMALL, command, contents, environment, rows

pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def whole(checkpoint, features, tmp_path):
    """The files of a run that nobody stopped."""
    predict(checkpoint, tmp_path / "whole", SMALL, features=features, device="cpu")
    return contents(tmp_path / "whole")


def die_before(module: Any, name: str, number: int) -> None:
    """This process kills itself just before its `number`-th call, from 0, of a function."""
    original, calls = getattr(module, name), itertools.count()

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, counted)


def go_on(checkpoint, features, output, options, replaces, pause):
    """A run whose process kills itself before it puts another file than the first `replaces` ones in its place.

    pause: seconds that a batch takes longer, so that a kill finds it half done.
    """
    torch.set_num_threads(1)
    call = Predictor.__call__
    Predictor.__call__ = lambda *arguments: (time.sleep(pause), call(*arguments))[1]
    die_before(os, "replace", replaces)
    predict(checkpoint, output, options, features=features, device="cpu")


def start(*arguments):
    """A run in a process of its own, whose server has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "rada.inference", __name__])
    process = context.Process(target=go_on, args=arguments)
    process.start()
    return process


def test_a_run_that_dies_before_every_file_continues_to_the_same_bytes(checkpoint, features, tmp_path):
    options = replace(SMALL, rows_per_shard=50)  # 3 shards, of a file and a record each, and the manifest
    predict(checkpoint, tmp_path / "whole", options, features=features, device="cpu")
    for replaces in itertools.islice(itertools.cycle(range(3)), 20):
        process = start(checkpoint, features, tmp_path / "out", options, replaces, 0.0)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        for path in (tmp_path / "out").rglob("[!.]*.parquet"):  # whatever has its name is whole
            assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "out")).read_bytes()
    assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_killed_at_random_moments_continues_to_the_same_bytes(checkpoint, features, whole, tmp_path):
    moments = random.Random(0)
    for _ in range(3):
        process = start(checkpoint, features, tmp_path / "out", SMALL, 1000, 0.05)
        wait_for(tmp_path / "out" / "shards")
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    done = start(checkpoint, features, tmp_path / "out", SMALL, 1000, 0.0)
    done.join()
    assert done.exitcode == 0
    assert contents(tmp_path / "out") == whole


def wait_for(path):
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(path)


@pytest.fixture
def many(tmp_path):
    np.save(tmp_path / "many.npy", rows(16_000))
    return tmp_path / "many.npy"


LONG = ("--rows-per-shard", 1000)


@pytest.mark.slow
def test_the_command_killed_ten_times_continues_to_the_same_bytes(checkpoint, many, tmp_path):
    python, moments = [sys.executable], random.Random(0)
    subprocess.run(python + command(checkpoint, many, tmp_path / "whole", *LONG), env=environment(), check=True)
    killed, arguments = 0, python + command(checkpoint, many, tmp_path / "out", *LONG)
    while killed < 10:
        process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # it is ready to begin
        time.sleep(moments.uniform(0, 1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        killed += 1
    subprocess.run(arguments, env=environment(), check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def torchrun(ranks, arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]


def test_two_ranks_make_the_same_bytes(checkpoint, features, whole, tmp_path):
    arguments = torchrun(2, command(checkpoint, features, tmp_path / "out"))
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_a_dead_rank_left_any_number_of_ranks_finishes(checkpoint, features, whole, tmp_path, monkeypatch, ranks):
    def run(rank, world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")

    assert run(0, 2)["left"] == 4  # the other rank has died in its first shard
    (tmp_path / "out/shards/.0123456789abcdef.img_emb_0-00001.parquet").write_bytes(b"half")
    done = [run(rank, ranks) for rank in range(ranks)]
    assert sum(one["items"] for one in done) == 70
    assert done[-1]["left"] == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_rank_that_is_killed_loses_its_unfinished_shard_alone(checkpoint, many, tmp_path, ranks):
    subprocess.run(
        [sys.executable, *command(checkpoint, many, tmp_path / "whole", *LONG)], env=environment(), check=True
    )
    arguments = command(checkpoint, many, tmp_path / "out", *LONG)
    launcher = subprocess.Popen(torchrun(2, arguments), env=environment(), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out" / "records")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert launcher.wait() != 0
    kept = {name: data for name, data in contents(tmp_path / "out" / "records").items() if name[0] != "."}
    assert kept
    subprocess.run(torchrun(ranks, arguments), env=environment(), check=True)
    found = contents(tmp_path / "out")
    assert kept.items() <= contents(tmp_path / "out" / "records").items()
    assert found == contents(tmp_path / "whole")


def test_ranks_share_the_shards():
    names = [f"shard {i}" for i in range(10)]
    for world_size in (1, 2, 3, 11):
        parts = [shards_of(rank, world_size, names) for rank in range(world_size)]
        assert sorted(itertools.chain(*parts)) == names
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match=r"rank: got 2 of 2; it takes 0\.\.1"):
        shards_of(2, 2, names)


def test_a_finished_run_is_left_alone(checkpoint, features, tmp_path):
    predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    done = predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    assert (done["items"], done["left"]) == (0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_results_that_were_cut_off_or_lost_are_made_again(checkpoint, features, tmp_path):
    predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    before = contents(tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out/shards").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    assert predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")["items"] == 40
    assert contents(tmp_path / "out") == before


def test_a_shard_alone_is_what_the_run_makes_of_it(checkpoint, features, whole, tmp_path):
    """As a cluster's engine calls it: in any order, in any process, twice."""
    predictor = Predictor(checkpoint, device="cpu")
    shards = pickle.loads(pickle.dumps(plan_shards(predictor, SMALL, features=features)))
    for shard in [*reversed(shards), shards[2]]:
        record = predict_shard(predictor, shard, tmp_path / "out", SMALL)
        assert record["shard"]["rows"] == shard.count
    made = contents(tmp_path / "out")
    assert made == {name: data for name, data in whole.items() if name != "predict.json"}


@contextmanager
def full_disk(size):
    """Files may not get larger than `size` bytes: the same kind of error of the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("format", ["parquet", "npy", "jsonl"])
def test_a_full_disk_leaves_nothing_half_written(checkpoint, features, tmp_path, format):
    output, options = tmp_path / "out", PredictOptions("probabilities", format=format)
    message = r"output: .*/out/shards/img_emb_0\.\w+: cannot be written \(File too large\); .* is kept"
    with full_disk(2000), pytest.raises(OSError, match=message):  # above the manifest, below the results
        predict(checkpoint, output, options, features=features, device="cpu")
    assert [*contents(output)] == ["predict.json"]
    assert predict(checkpoint, output, options, features=features, device="cpu")["left"] == 0


def test_a_shard_whose_record_does_not_fit_is_not_finished(checkpoint, features, tmp_path):
    output, options = tmp_path / "out", PredictOptions(format="npy", batch_size=8, rows_per_shard=20)
    predictor = Predictor(checkpoint, device="cpu")
    shards = plan_shards(predictor, options, features=features)
    message = r"output: .*/records/img_emb_0-00000\.json: cannot be written \(File too large\)"
    with full_disk(600), pytest.raises(OSError, match=message):
        predict_shard(predictor, shards[0], output, options)
    assert not (output / "records").exists() or not contents(output / "records")
    assert predict_shard(predictor, shards[0], output, options)["shard"]["rows"] == 20


def test_a_full_disk_ends_with_one_line(checkpoint, features, tmp_path):
    arguments = [sys.executable, *command(checkpoint, features, tmp_path / "p.jsonl")]
    limit = (1000, 1000)
    done = subprocess.run(
        arguments,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "rada: error" in line)
    assert "p.jsonl: cannot be written (File too large)" in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*p.jsonl*"))
