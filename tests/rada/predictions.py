"""A tiny head, rows for it, and what a folder of predictions holds: for the tests of `rada.inference`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from rada import RAdaHead
from rada.adapter import AdaptedHead
from rada.checkpoint import Checkpoint
from rada.classification import Classes
from rada.inference import PredictOptions, read_manifest

ROOT = Path(__file__).parents[2]
CLASSES, WIDTH, ROWS, SCALE = 7, 16, 150, 20.0
NAMES = tuple(f"class {i}" for i in range(CLASSES))
SMALL = PredictOptions(top_k=3, batch_size=8, rows_per_shard=20)  # 8 shards


def rows(count=ROWS, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).half().numpy()


def checkpoint_of(seed=0, head=None):
    torch.manual_seed(seed)
    head = head or RAdaHead(WIDTH, 4)
    core = head.head if isinstance(head, AdaptedHead) else head
    torch.nn.init.normal_(core.out_proj.weight, std=0.5)
    text = F.normalize(torch.randn(CLASSES, WIDTH), dim=-1)
    return Checkpoint(head.eval(), Classes(text, SCALE), NAMES, "tiny")


def saved(folder, values, name="values.npy"):
    np.save(folder / name, values)
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table_of(output: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [shard["name"] for shard in read_manifest(output)["shards"]]
    return pa.concat_tables([pq.read_table(output / "shards" / f"{name}.parquet") for name in names]).to_pydict()


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(checkpoint, features, output, *more):
    """Of `rada predict` with the options SMALL."""
    arguments = ["--checkpoint", checkpoint, "--features", features, "--output", output, "--device", "cpu"]
    arguments += ["--top-k", 3, "--batch-size", 8]
    if not output.suffix:
        arguments += ["--rows-per-shard", 20]
    return ["-m", "rada", "predict", *map(str, [*arguments, *more])]
