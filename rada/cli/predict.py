"""The command rada predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rada.cli.options import Backend, BatchSize, Cache, Checkpoint, Device, Traceback, refuse
from rada.inference.options import FORMATS, WHATS, PredictOptions
from rada.precision import PRECISIONS


def predict(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[
        Path, typer.Option(help="A folder, of shards: a stopped run goes on. Or one file, PATH.parquet or PATH.jsonl.")
    ],
    features: Annotated[
        Path | None, typer.Option(help="Every row of a .npy, .safetensors or .parquet file or of a folder of them.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="An image, or a folder that is searched for images.")] = None,
    data: Annotated[str | None, typer.Option(help="As for train: the test items that evaluate takes.")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="A file of names, one a line: the classes to choose among.")
    ] = None,
    what: Annotated[str, typer.Option(help=f"To write: {', '.join(WHATS)} (adapted ones).")] = PredictOptions.what,
    top_k: Annotated[int, typer.Option(min=1, help="Classes of an image, with topk.")] = PredictOptions.top_k,
    shortlist: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let the head attend among so many best zero-shot classes of an image alone: another function, whose "
            "agreement with the full head on a sample is printed. 0: all.",
        ),
    ] = PredictOptions.shortlist,
    format: Annotated[str, typer.Option(help=f"Of a folder's shards: {', '.join(FORMATS)}.")] = PredictOptions.format,
    rows_per_shard: Annotated[
        int, typer.Option(min=1, help="Of a folder's shards: rows that are finished, or lost, at a time.")
    ] = PredictOptions.rows_per_shard,
    batch_size: BatchSize = PredictOptions.batch_size,
    device: Device = "auto",
    backend: Backend = "auto",
    cache: Cache = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Of encoders and head: {', '.join(PRECISIONS)}. [default: the checkpoint's]")
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay the head's launches as a CUDA graph; not yet run on hardware.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, or the run in the folder.")] = False,
    traceback: Traceback = False,
) -> None:
    """Write the top-k classes, probabilities or logits of features or images: to a folder of shards, or one file.

    torchrun's processes share a folder's shards. Rows with NaN and unreadable images are marked and counted.
    """
    from rada.inference import predict as run_predict
    from rada.inference.run import FILES

    if what != "topk":
        refuse(context, ("top_k",), f"with --what {what}, which is of all classes; it goes with topk")
    if what == "features":
        refuse(context, ("class_names",), "with --what features, which takes no classes; it takes none")
    if output.suffix in FILES:
        refuse(context, ("format", "rows_per_shard"), "with one file as output; it goes with a folder of shards")
    if features is not None:
        refuse(context, ("cache",), "with features, which are not encoded; it goes with images")
    done = run_predict(
        checkpoint,
        output,
        PredictOptions(what, top_k, format, batch_size, rows_per_shard, shortlist),
        features=features,
        images=images,
        data=data,
        class_names=class_names,
        precision=precision,
        device=device,
        backend=backend,
        overwrite=overwrite,
        cache=cache,
        cuda_graph=cuda_graph,
    )
    print(
        f"{done['items']} items to {output} in {done['seconds']:.1f} s, {done['items_per_second']:.0f} images/s "
        f"(device {done['device']}, backend {done['backend']}; the head worked {done['head_busy']:.0%} of the time), "
        f"{done['bad']} bad{', the first: ' * bool(done['reason'])}{done['reason']}"
        + (f"; shards left to other ranks or a later run: {done['left']}" if done["left"] else "")
    )
    if done["compared"]:
        same = f"{done['agreed']} of {done['compared']}"
        print(f"the shortlist of {shortlist} chose the full head's class for {same} sampled images")
