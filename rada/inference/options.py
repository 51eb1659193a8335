"""What a run of predictions writes, and in what pieces."""

from __future__ import annotations

from dataclasses import dataclass

from rada.checks import check_ints, check_one_of

WHATS = ("topk", "probabilities", "logits", "features")
FORMATS = ("parquet", "npy", "jsonl")


@dataclass(frozen=True)
class PredictOptions:
    """What a run writes.

    what: "topk" (default), the top_k most probable classes; "probabilities" or "logits" of all K classes, in the order
        of the manifest's class_names; "features", the image features that the head takes [D]: see `Predictor`.
    top_k: default 5; all K where there are fewer.
    format: of the shards: "parquet" (default), "npy" or "jsonl", see `rada.inference.writers`.
    batch_size: rows per call of the head, counted from a shard's first row. Default 256. A result's last bit may depend
        on its batch, so a run keeps to one size.
    rows_per_shard: rows of a shard at most: what a process that dies loses. Default 65536.
    shortlist: the head among so many best zero-shot classes of each image alone, which is another function than the
        head over all K, see `rada.shortlist`; with topk alone. 0 (default): over all.

    Raises ValueError naming the field.
    """

    what: str = "topk"
    top_k: int = 5
    format: str = "parquet"
    batch_size: int = 256
    rows_per_shard: int = 65536
    shortlist: int = 0

    def __post_init__(self) -> None:
        check_one_of(WHATS, what=self.what)
        check_one_of(FORMATS, format=self.format)
        check_ints(1, top_k=self.top_k, batch_size=self.batch_size, rows_per_shard=self.rows_per_shard)
        check_ints(0, shortlist=self.shortlist)
        if self.shortlist and self.what != "topk":
            raise ValueError(f"what: got {self.what!r} with a shortlist; it takes topk")
