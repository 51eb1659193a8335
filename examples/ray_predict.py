"""Predictions on a Ray cluster: each worker holds the head and predicts shard after shard; Ray deals them out.

    pip install "rada[parquet]" "ray[data]"
    python examples/ray_predict.py --checkpoint runs/mine --features embeddings --output predictions --workers 4

Folders must be where every machine sees them. What was stopped goes on, and a shard is the same whoever predicts it: a
folder may be begun here and finished by `python -m rada predict` with the same options, or the other way round.
"""

import argparse
from pathlib import Path
from typing import Any

import ray

from rada.inference import PredictOptions, Predictor, Shard, plan_shards, predict_shard, predict_to_folder
from rada.inference.manifest import write_manifest


class Worker:
    """The head on one worker, and what it makes of a shard."""

    def __init__(self, checkpoint: Path, shards: dict[str, Shard], output: Path, options: PredictOptions):
        self.predictor, self.shards = Predictor(checkpoint), shards
        self.output, self.options = output, options

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        record = predict_shard(self.predictor, self.shards[row["shard"]], self.output, self.options)
        return {"shard": row["shard"], "rows": record["shard"]["rows"], "bad": len(record["bad"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows-per-shard", type=int, default=PredictOptions.rows_per_shard)
    given = parser.parse_args()

    options, predictor = PredictOptions(rows_per_shard=given.rows_per_shard), Predictor(given.checkpoint)
    shards = plan_shards(predictor, options, features=given.features.absolute())
    output = given.output.absolute()
    write_manifest(output, predictor, options, shards)
    names = ray.data.from_items([{"shard": shard.name} for shard in shards], override_num_blocks=len(shards))
    settings = (given.checkpoint.absolute(), {shard.name: shard for shard in shards}, output, options)
    done = names.map(Worker, fn_constructor_args=settings, compute=ray.data.ActorPoolStrategy(size=given.workers))
    rows = done.take_all()
    print(f"{sum(row['rows'] for row in rows)} rows in {len(rows)} shards, {sum(row['bad'] for row in rows)} bad")
    predict_to_folder(predictor, shards, output, options)  # nothing is left to predict: it checks and tidies up


if __name__ == "__main__":
    main()
