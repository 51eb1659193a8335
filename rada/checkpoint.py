"""Checkpoints of a head: `head.safetensors` (the weights) and `head.json` (what they are for)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from rada.files import write_bytes
from rada.fused import RAdaHead
from rada.version import __version__
from rada_kernels import Options

WEIGHTS = "head.safetensors"
FORMAT = "rada-head"
FORMAT_VERSION = 1
OPTIONS = tuple(field.name for field in fields(Options))


def save_head(
    path: str | os.PathLike,
    head: RAdaHead,
    *,
    backbone: str,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    extra: dict | None = None,
) -> Path:
    """Write a head's weights and configuration; returns the path of the weights.

    path: a folder, made if need be, which gets head.safetensors and head.json; or a path ending in
        .safetensors, beside which the .json goes.
    backbone: the model whose features the head was trained on, for `load_head` to check.
    class_names, templates, extra: what to keep beside the options; extra is any JSON object.

    Each file appears whole or not at all, an older one is replaced, and the configuration, written last,
    holds the weights' SHA-256: an interrupted save cannot be mistaken for a whole one.
    """
    if not isinstance(backbone, str) or not backbone:
        raise ValueError(f"backbone: got {backbone!r}; it takes the name of the model")
    import safetensors.torch as safetensors

    weights = _weights_path(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    data = safetensors.save({name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()})
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rada_version": __version__,
        "backbone": backbone,
        "embed_dim": head.embed_dim,
        **asdict(head.options),
        "class_names": None if class_names is None else list(class_names),
        "templates": None if templates is None else list(templates),
        "extra": extra or {},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_bytes(weights, data)
    write_bytes(weights.with_suffix(".json"), f"{text}\n".encode())
    return weights


def load_config(path: str | os.PathLike) -> dict:
    """The configuration beside a head's weights, as `save_head` wrote it.

    Raises FileNotFoundError, or ValueError for a file that is no such configuration or of a newer format.
    """
    file = _weights_path(path).with_suffix(".json")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a checkpoint is a .safetensors file with its .json beside it")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{file}: not a head's configuration, which has the entry format = {FORMAT!r}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: format_version: got {version!r}; this version of rada takes {FORMAT_VERSION}")
    missing = [field for field in ("backbone", "embed_dim", *OPTIONS, "sha256") if field not in config]
    if missing:
        raise ValueError(f"{file}: no entry {missing[0]!r}; it holds {sorted(config)}")
    return config


def load_head(
    path: str | os.PathLike,
    *,
    backbone: str | None = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> RAdaHead:
    """The head that `save_head` wrote to `path`, in the dtype it was saved in.

    backbone, embed_dim, num_heads: what the caller is going to use; each one given must be the checkpoint's.
    device: of the parameters. Default: the CPU. backend: as for RAdaHead.

    Raises FileNotFoundError, or ValueError naming the field that does not match, what it got and what the
    checkpoint takes, or the file that is corrupt.
    """
    import safetensors.torch as safetensors

    config = load_config(path)
    for field, got in (("backbone", backbone), ("embed_dim", embed_dim), ("num_heads", num_heads)):
        if got is not None and got != config[field]:
            raise ValueError(f"{field}: got {got!r}; the checkpoint {os.fspath(path)} takes {config[field]!r}")
    weights = _weights_path(path)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file, though its configuration is there")
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{weights}: its SHA-256 is not the one in {weights.with_suffix('.json').name}: the file is "
            "corrupt, or the two are not from one save"
        )
    try:
        state = safetensors.load(data)
        head = RAdaHead(
            config["embed_dim"],
            **{option: config[option] for option in OPTIONS},
            backend=backend,
            device=device,
            dtype=state["out_proj.weight"].dtype,
        )
        head.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{weights}: not the weights of the head that its configuration describes ({error})"
        ) from error
    return head


def _weights_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS
