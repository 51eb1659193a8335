"""The command rada encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rada.cli.options import ClassNames, Device, EncodeBatch, Model, Precision, Pretrained, Template, Traceback, Workers
from rada.encode import DTYPES, ROWS_PER_SHARD
from rada.encoders import IMAGES_PER_BATCH
from rada.templates import DEFAULT_TEMPLATES, expand_templates

Images = Annotated[
    str,
    typer.Argument(
        help="A folder of images, a list of them (.txt), or webdataset tars: a{000..127}.tar or their folder."
    ),
]


def encode(
    images: Images,
    output: Annotated[Path, typer.Option(help="The folder of the shards, which features:PATH reads.")],
    model: Model = None,
    pretrained: Pretrained = None,
    template: Template = None,
    class_names: ClassNames = None,
    dtype: Annotated[str, typer.Option(help=f"Of the features: {', '.join(DTYPES)}.")] = "float16",
    rows_per_shard: Annotated[
        int, typer.Option(min=1, help="Images per shard; what is lost when the command is killed.")
    ] = ROWS_PER_SHARD,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the encoding in the output folder, of the same model and list.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "fp32",
    workers: Workers = None,
    encode_batch: EncodeBatch = IMAGES_PER_BATCH,
    traceback: Traceback = False,
) -> None:
    """Encode images to shards of features, in clip-retrieval's layout, for features:PATH.

    Unreadable images are left out, and listed in bad/. Under torchrun each process makes its share of the shards.
    """
    from rada.data.listing import list_images
    from rada.encode import check_output, encode_to_shards
    from rada.encoders import choose_device
    from rada.models import ModelSpec

    if model is None:
        raise ValueError("model: got none; it takes a name of open_clip's, local-dir:PATH, transformers:NAME, or demo")
    listing = list_images(images)
    check_output(output.expanduser())
    spec = ModelSpec(model, pretrained, expand_templates(tuple(template or DEFAULT_TEMPLATES)))
    extractor = spec.open(choose_device(device), precision)
    extractor.batch_size, extractor.workers = encode_batch, workers
    done = encode_to_shards(
        extractor,
        listing,
        output,
        rows_per_shard=rows_per_shard,
        dtype=dtype,
        class_names=class_names,
        resume=resume,
    )
    print(
        f"{done['encoded']} of {done['images']} images encoded to {output} in {done['seconds']:.1f} s, "
        f"{done['images_per_s']:.0f} images/s (device {done['device']}), {done['shards']} shards, "
        f"{len(done['bad'])} unreadable"
    )
    for name, reason in list(done["bad"].items())[:3]:
        print(f"  {name}: {reason}")
