"""Images to feature shards: the folder that `features:PATH` and clip-retrieval read.

    encode.json                        what made the folder: model, preprocessing, list of images, number of shards
    img_emb/img_emb_0.npy, ...         [n, D] features of unit length; a shard whose file is here is whole.
                                       Of bfloat16, which .npy has not: .safetensors with the entry image_features
    metadata/metadata_0.parquet, ...   image_path of each row, and the columns of `rada.data.listing`
    bad/bad_0.jsonl, ...               image_path and reason of the images of a shard that could not be read, if any
    classes.npz                        text_features, class_names, logit_scale, where there are classes

Shard i holds images i · rows_per_shard to (i + 1) · rows_per_shard of the list, without the unreadable ones. A shard's
features are written last, each file at once, so a run that was killed goes on with the shards that are not there, in
batches that start where they would have: to the same bytes on the same kind of device with as many threads, elsewhere
to the same features up to rounding. Of several processes (torchrun), the r-th of w makes the shards r, r + w, ... They
do not talk to one another.
"""

from __future__ import annotations

import io
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from rada.checks import check_ints, check_one_of, check_same
from rada.classification import CLASSES, write_classes
from rada.data.classes import prompt_names, read_class_names, read_names
from rada.data.feature_files import ENCODING
from rada.data.listing import Listing
from rada.distributed import rank, world_size
from rada.encoders import Encoded, FeatureExtractor, encode_batches, in_batches
from rada.extras import require
from rada.files import check_folder, read_json, write_bytes, write_json
from rada.version import __version__

FORMAT, FORMAT_VERSION = "rada-encoding", 1
ROWS_PER_SHARD = 10_000
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# So many images at a stretch are not unreadable by chance: the disk is gone, or the list is of another place.
TOO_MANY_BAD = 100
# Other versions round otherwise; they make no other encoding.
NOT_COMPARED = ("rada_version", "versions")


def encode_to_shards(
    extractor: FeatureExtractor,
    listing: Listing,
    output: str | Path,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    dtype: str = "float16",
    class_names: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Encode images to a folder of this module's layout.

    listing: see `rada.data.listing.list_images`. rows_per_shard: images per shard. Default 10 000.
    dtype: of DTYPES. Default "float16", which for features of unit length has three bits more than bfloat16.
    class_names: a file. With labels: their names and order, see `rada.data.classes`; `label` then holds the names.
        Without: names, one a line. Default: the labels, unless all of them are numbers.
    resume: go on with the encoding in the folder. Default False: raise where it has shards of this process's.

    Returns images, shards (of the list), encoded (images, by this call), seconds, images_per_s, device, and bad: the
    reason of each unreadable image in the folder, by its name. Raises ValueError naming the entry in which the
    encoding in the folder differs, FileExistsError for other files there or shards without resume, OSError naming the
    file that cannot be written.
    """
    output = Path(output).expanduser()
    check_one_of(DTYPES, dtype=dtype)
    check_ints(1, rows_per_shard=rows_per_shard)
    check_output(output)
    names, listing = _classes(listing, class_names)
    count = -(-len(listing) // rows_per_shard)
    mine = range(count)[rank() :: world_size()]
    shards = _Shards(output, ".safetensors" if dtype == "bfloat16" else ".npy")
    _claim(shards, _identity(extractor, listing, count, rows_per_shard, dtype, names), mine, resume)
    if names and rank() == 0 and not (output / CLASSES).is_file():
        write_classes(output, extractor.classes(prompt_names(names)), names)
    missing = [shard for shard in mine if not shards.whole(shard)]
    parts = {shard: range(len(listing))[shard * rows_per_shard :][:rows_per_shard] for shard in missing}
    batches = {shard: in_batches(part, extractor.batch_size) for shard, part in parts.items()}
    start = time.perf_counter()
    stream = encode_batches(
        extractor, listing.images, [batch for of in batches.values() for batch in of], quiet=rank() > 0
    )
    for shard, part in parts.items():
        found = [
            batch._replace(features=batch.features.to(DTYPES[dtype]).cpu())
            for batch in islice(stream, len(batches[shard]))
        ]
        if sum(len(batch.bad) for batch in found) == len(part) and (len(part) >= TOO_MANY_BAD or count == 1):
            reason = next(iter(found[0].bad.values()))
            raise ValueError(f"images: none of {len(part)} in a row could be read, from {reason}")
        _write_shard(shards.files(shard), listing, found)
    seconds, encoded = time.perf_counter() - start, sum(map(len, parts.values()))
    return {
        "images": len(listing),
        "shards": count,
        "encoded": encoded,
        "seconds": seconds,
        "images_per_s": encoded / seconds,
        "device": str(extractor.logit_scale.device),
        "bad": read_bad(output),
    }


def check_output(output: Path) -> None:
    """Raise ImportError without the package that writes shards, OSError where none can be written. Nothing is made."""
    require("pyarrow", "parquet", "clip-retrieval's layout")
    for folder in (output, output / "img_emb", output / "metadata"):
        check_folder(folder)


def read_bad(output: Path) -> dict[str, str]:
    """The reason of each unreadable image of an encoding, by its name."""
    files = sorted((output / "bad").glob("bad_*.jsonl"), key=lambda file: int(file.stem.removeprefix("bad_")))
    rows = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return {row["image_path"]: row["reason"] for row in rows}


def _classes(listing: Listing, file: str | Path | None) -> tuple[list[str], Listing]:
    """The names of the classes, none where nothing has any, and the listing with these names as labels."""
    labels = listing.columns.get("label")
    origins = sorted(set(labels or ()))
    if labels is not None and file is not None:
        name_of = read_class_names(file, origins)
        names = list(name_of.values())
        columns = {**listing.columns, "label": [name_of[label] for label in labels]}
        listing = Listing(listing.names, listing.images, columns)
    elif file is not None:
        names = list(read_names(file))
    else:
        names = [] if all(label.isdecimal() for label in origins) else origins
    prompt_names(names)  # raises for two names of one prompt, before anything is written
    return names, listing


def _identity(
    extractor: FeatureExtractor, listing: Listing, shards: int, rows: int, dtype: str, names: list[str]
) -> dict[str, Any]:
    """The entries of encode.json."""
    spec = extractor.spec
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rada_version": __version__,
        "name": None if spec is None else spec.name,
        "pretrained": None if spec is None else spec.pretrained,
        **extractor.identity(),
        "images": len(listing),
        "list": listing.digest(),
        "templates": list(extractor.templates) if names else [],
        "class_names": names,
        "rows_per_shard": rows,
        "shards": shards,
        "embed_dim": extractor.embed_dim,
        "dtype": dtype,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def _claim(shards: _Shards, entries: dict[str, Any], mine: range, resume: bool) -> None:
    """Write encode.json, or compare with the one that is there."""
    output, path = shards.output, shards.output / ENCODING
    there = [shard for shard in mine if shards.whole(shard)]
    if not path.exists():
        if any((output / "img_emb").glob("img_emb_*")):
            raise FileExistsError(f"output: {output} holds shards without {ENCODING}; take another folder")
        write_json(path, entries)
    stored = read_json(path, "what made an encoding", FORMAT, FORMAT_VERSION, entries)
    compared = {name: value for name, value in entries.items() if name not in NOT_COMPARED}
    check_same(compared, stored, f"the encoding in {output}", ": take another folder")
    if there and not resume:
        raise FileExistsError(
            f"output: {output} holds {len(there)} of {len(mine)} shards of this encoding; --resume goes on with it"
        )
    _remove_partials(shards, mine)


def _remove_partials(shards: _Shards, mine: range) -> None:
    """Remove what killed runs left half-written. Other processes' shards are theirs."""
    own = {file.name for shard in mine for file in shards.files(shard)}
    own |= {CLASSES} if rank() == 0 else set()
    own |= {ENCODING} if world_size() == 1 else set()
    for partial in (*shards.output.glob(".*"), *shards.output.glob("*/.*")):
        if partial.name.split(".", 2)[-1] in own:
            partial.unlink(missing_ok=True)


def _write_shard(files: tuple[Path, Path, Path], listing: Listing, found: list[Encoded]) -> None:
    pa = require("pyarrow", "parquet", "clip-retrieval's layout")
    pq = require("pyarrow.parquet", "parquet", "clip-retrieval's layout")
    bad_file, metadata_file, features_file = files
    rows = [row for batch in found for row in batch.rows]
    features = torch.cat([batch.features for batch in found])
    bad = {listing.names[row]: reason for batch in found for row, reason in batch.bad.items()}
    if bad:
        lines = (json.dumps({"image_path": name, "reason": reason}, ensure_ascii=False) for name, reason in bad.items())
        write_bytes(bad_file, "".join(f"{line}\n" for line in lines).encode())
    else:
        bad_file.unlink(missing_ok=True)  # of a run that was killed, and could not read what can be read now
    columns = {"image_path": listing.names, **listing.columns}
    text = {name: pa.array([values[row] for row in rows], pa.string()) for name, values in columns.items()}
    table = pa.BufferOutputStream()
    pq.write_table(pa.table(text), table)
    write_bytes(metadata_file, table.getvalue().to_pybytes())
    if features_file.suffix == ".safetensors":
        content = safetensors.torch.save({"image_features": features})
    else:
        array = io.BytesIO()
        np.save(array, features.numpy())
        content = array.getvalue()
    write_bytes(features_file, content)


class _Shards(NamedTuple):
    """The files of the shards. suffix: of the features'."""

    output: Path
    suffix: str

    def files(self, shard: int) -> tuple[Path, Path, Path]:
        """In the order in which they are written: bad images, metadata, features."""
        return (
            self.output / "bad" / f"bad_{shard}.jsonl",
            self.output / "metadata" / f"metadata_{shard}.parquet",
            self.output / "img_emb" / f"img_emb_{shard}{self.suffix}",
        )

    def whole(self, shard: int) -> bool:
        return self.files(shard)[-1].is_file()
