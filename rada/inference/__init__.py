"""Predictions of a stored head at scale.

    predictor = Predictor("runs/emoji/seed-1")
    options = PredictOptions(what="topk", top_k=5)
    shards = plan_shards(predictor, options, features="embeddings")      # or images=, data=
    predict_to_folder(predictor, shards, "predictions", options)         # torchrun's ranks share the shards
    predict_shard(predictor, shards[3], "predictions", options)          # what a cluster's engine calls

`python -m rada predict` is the same on the command line. Of a shard, one thread reads while the head computes and
another one writes; neither the features nor the results are ever in memory as a whole. The modules, in the data's
order: `inputs` and `files` (what is read), `predictor` (what the head makes of it), `writers` (what is written),
`shard` (one shard from end to end), `manifest` (what a run is, and which shards are finished), `run`.
"""

from rada.inference.inputs import Shard
from rada.inference.manifest import read_manifest, shards_of, write_manifest
from rada.inference.options import PredictOptions
from rada.inference.predictor import Predictor
from rada.inference.run import plan_shards, predict, predict_to_file, predict_to_folder
from rada.inference.shard import predict_shard

__all__ = [
    "PredictOptions",
    "Predictor",
    "Shard",
    "plan_shards",
    "predict",
    "predict_shard",
    "predict_to_file",
    "predict_to_folder",
    "read_manifest",
    "shards_of",
    "write_manifest",
]
