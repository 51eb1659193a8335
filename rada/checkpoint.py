"""Checkpoints: writer and reader of what was trained, with its classes, its split and the name of its encoders.

    head.safetensors, head.json   the head's weights, and what they are for
    adapter.*, prompt.*           a FeatureAdapter of each side, a learned prompt: where there is one
    towers.*                      the encoders' weights, where they were fine-tuned
    classes.npz                   text_features [K, D], class_names, logit_scale and, where there is one, logit_bias
    split.json                    the training and test items, see `rada.data.record`

Weights of frozen encoders are not stored; head.json names them and has their SHA-256, which is checked when they are
opened. A part is a pair of files, PART.safetensors and PART.json, written by `write_part`: another part is another
pair, and leaves the rest alone. All of it is safetensors, JSON and NumPy: a folder to put on a hub as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rada.adapter import AdaptedHead, FeatureAdapter
from rada.classification import Classes, read_classes, write_classes
from rada.clip import RAdaCLIP
from rada.data.record import RECORD, SplitRecord
from rada.encoders import FeatureExtractor, choose_device
from rada.files import json_text, read_json, write_bytes
from rada.fused import RAdaHead
from rada.models import ModelSpec
from rada.precision import autocast
from rada.prompt import PromptedExtractor, PromptLearner
from rada.version import __version__
from rada_kernels import Options

WEIGHTS, ADAPTER, PROMPT, TOWERS = (f"{part}.safetensors" for part in ("head", "adapter", "prompt", "towers"))
HEAD = "head.json"  # written last, the mark of a whole checkpoint
PROMPT_OPTIONS = ("context", "text_tokens", "image_tokens", "depth")
FORMAT_VERSION = 1
OPTIONS = tuple(field.name for field in fields(Options))
ENTRIES = ("backbone", "embed_dim", *OPTIONS)  # of head.json


def write_part(weights: Path, part: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    """Write tensors to the file `weights` (.safetensors) and the JSON entries beside it.

    Each file appears whole or not at all, an older one is replaced, and the configuration, written last,
    holds the weights' SHA-256: an interrupted save cannot be mistaken for a whole one.
    """
    import safetensors.torch as safetensors

    data = safetensors.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {"format": f"rada-{part}", "format_version": FORMAT_VERSION, "rada_version": __version__}
    config = {**header, **entries, "sha256": hashlib.sha256(data).hexdigest()}
    text = json_text(config)  # before anything is written: it may not be JSON
    write_bytes(weights, data)
    write_bytes(weights.with_suffix(".json"), text.encode())


def read_config(weights: Path, part: str, entries: Sequence[str] = ()) -> dict:
    """The configuration of a part, with at least these entries. Raises as `rada.files.read_json`."""
    file = weights.with_suffix(".json")
    return read_json(file, f"a {part}'s configuration", f"rada-{part}", FORMAT_VERSION, (*entries, "sha256"))


def read_part(weights: Path, part: str, entries: Sequence[str] = ()) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of a part.

    Raises as `read_config`, and ValueError where the tensors' SHA-256 is not that of the configuration.
    """
    import safetensors.torch as safetensors

    config = read_config(weights, part, entries)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file, though its configuration is there")
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{weights}: its SHA-256 is not the one in {weights.with_suffix('.json').name}: the file is "
            "corrupt, or the two are not from one save"
        )
    return config, safetensors.load(data)


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

    path: a folder, created if missing, for head.safetensors and head.json; or a path ending in .safetensors, for
        this file and the .json beside it.
    backbone: the model whose features the head was trained on, for `load_head` to check.
    class_names, templates, extra: stored beside the options; extra is any JSON object.

    `load_head` refuses the files of an interrupted save, see `write_part`.
    """
    if not isinstance(backbone, str) or not backbone:
        raise ValueError(f"backbone: got {backbone!r}; it takes the name of the model")
    weights = _weights_path(path)
    entries = {
        "backbone": backbone,
        "embed_dim": head.embed_dim,
        **asdict(head.options),
        "class_names": None if class_names is None else list(class_names),
        "templates": None if templates is None else list(templates),
        "extra": extra or {},
    }
    write_part(weights, "head", head.state_dict(), entries)
    return weights


def load_config(path: str | os.PathLike) -> dict:
    """The configuration beside a head's weights, as `save_head` wrote it. Raises as `read_config`."""
    return read_config(_weights_path(path), "head", ENTRIES)


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

    backbone, embed_dim, num_heads: if given, they must equal the checkpoint's.
    device: of the parameters. Default: the CPU. backend: as for RAdaHead.

    Raises FileNotFoundError, or ValueError naming the mismatched field or the corrupt file.
    """
    weights = _weights_path(path)
    config, state = read_part(weights, "head", ENTRIES)
    for field, got in (("backbone", backbone), ("embed_dim", embed_dim), ("num_heads", num_heads)):
        if got is not None and got != config[field]:
            raise ValueError(f"{field}: got {got!r}; the checkpoint {os.fspath(path)} takes {config[field]!r}")
    try:
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


@dataclass(frozen=True)
class Checkpoint:
    """What was trained, with its classes, encoders and split.

    head: a RAdaHead, or an AdaptedHead. classes: all K, on the head's device; under a prompt or fine-tuned towers,
        what these make of the names. class_names: K names. backbone: the encoders' name.
    spec: the encoders; None: the head was trained on precomputed features, or on encoders made of objects.
    record: None for what a user's own training loop saved.
    prompt: options and state dict of a learned prompt. towers: the state dict of fine-tuned encoders.
    loss: see `rada.losses.LOSSES`; predictions are its probabilities. precision: see `rada.precision`.
    fingerprint: of the frozen encoders, `FeatureExtractor.fingerprint`. None: unknown.
    """

    head: Any
    classes: Classes
    class_names: tuple[str, ...]
    backbone: str
    spec: ModelSpec | None = None
    record: SplitRecord | None = None
    prompt: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
    towers: Mapping[str, Tensor] | None = None
    loss: str = "cross-entropy"
    precision: str = "fp32"
    fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        return self.classes.text.device

    @property
    def rada(self) -> RAdaHead:
        """The RAdaHead, without adapters."""
        return self.head.head if isinstance(self.head, AdaptedHead) else self.head

    @property
    def changes_encoders(self) -> bool:
        """Whether its features are not those of the frozen encoders."""
        return self.prompt is not None or self.towers is not None

    def autocast(self) -> AbstractContextManager:
        return autocast(self.precision, self.device)

    def save(self, folder: Path) -> None:
        """Write the checkpoint into a folder, created if missing. The head comes last and marks it complete."""
        if self.record is not None:
            self.record.write(folder)
        write_classes(folder, self.classes, self.class_names)
        parts = []
        if isinstance(self.head, AdaptedHead):
            sides = {"image": self.head.image_adapter, "text": self.head.text_adapter}
            tensors = {f"{side}.{name}": t for side, of in sides.items() for name, t in of.state_dict().items()}
            write_part(folder / ADAPTER, "adapter", tensors, {side: of.options for side, of in sides.items()})
            parts.append("adapter")
        if self.prompt is not None:
            options, contexts = self.prompt
            write_part(folder / PROMPT, "prompt", contexts, options)
            parts.append("prompt")
        if self.towers is not None:
            write_part(folder / TOWERS, "towers", self.towers, {})
            parts.append("towers")
        save_head(
            folder,
            self.rada,
            backbone=self.backbone,
            class_names=self.class_names,
            templates=None if self.spec is None else self.spec.templates,
            extra={
                "model": None if self.spec is None else asdict(self.spec),
                "parts": parts,
                "loss": self.loss,
                "precision": self.precision,
                "fingerprint": self.fingerprint,
            },
        )

    def check_width(self, width: int, where: str) -> None:
        """Raise ValueError for features of another width. where: they are from."""
        if width != self.rada.embed_dim:
            raise ValueError(f"{where}: got features of width {width}; the checkpoint takes {self.rada.embed_dim}")

    def open_frozen(self) -> FeatureExtractor:
        """The frozen encoders, checked to be those of the training. Raises ValueError where the checkpoint has none."""
        if self.spec is None and self.fingerprint is not None:
            raise ValueError(
                "checkpoint: its encoders were objects without a name, so it cannot open them; it takes features:PATH"
            )
        if self.spec is None:
            raise ValueError(
                "checkpoint: its head was trained on precomputed features, without encoders of images or names; it "
                "takes features:PATH, among its own classes"
            )
        encoders = self.spec.open(self.device, self.precision)
        if (encoders.backbone, encoders.embed_dim) != (self.backbone, self.rada.embed_dim):
            raise ValueError(
                f"checkpoint: got the backbone {encoders.backbone!r} of width {encoders.embed_dim}; it takes "
                f"{self.backbone!r} of width {self.rada.embed_dim}"
            )
        if self.fingerprint is not None and encoders.fingerprint() != self.fingerprint:
            raise ValueError(
                f"checkpoint: the weights of {self.backbone!r} are not those that it was trained on (SHA-256); it "
                "takes the same file"
            )
        return encoders

    def open_model(self) -> FeatureExtractor:
        """The encoders that the head takes: the frozen ones, those under the prompt, or the fine-tuned ones."""
        encoders = self.open_frozen()
        if self.towers is not None:
            encoders.model.float().load_state_dict(self.towers)
        if self.prompt is None:
            return encoders
        options, tensors = self.prompt
        prompt = PromptLearner(encoders.model, encoders.tokenizer, **{name: options[name] for name in PROMPT_OPTIONS})
        try:
            prompt.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: its prompt does not fit {self.backbone!r} ({error})") from error
        return PromptedExtractor(encoders, prompt)


def save_model(
    folder: str | os.PathLike,
    model: RAdaCLIP | RAdaHead | AdaptedHead,
    *,
    classes: Classes | None = None,
    class_names: Sequence[str] | None = None,
    backbone: str | None = None,
    loss: str | None = None,
) -> Path:
    """Write the checkpoint of what a loop of one's own trained; returns the folder.

    model: a RAdaCLIP, whose towers are stored where they require a gradient; or a head over precomputed features, with
        their classes, K class_names and backbone, the name of the model whose features they are.
    loss: see `rada.losses.LOSSES`. Default: "sigmoid" for classes with a logit bias, else "cross-entropy".

    Encoders that were opened by a name are opened again by it; of a model made of objects the checkpoint serves
    features alone, until its encoders are given a name.
    """
    known: dict[str, Any] = {}
    head: Any = model
    if isinstance(model, RAdaCLIP):
        head, class_names, backbone = model.head, model.class_names, model.backbone
        classes = model.among(model.text_features.detach())
        known["spec"] = model.spec
        if model.visual_trains or model.text_trains:
            known["towers"] = model.model.state_dict()
        else:
            known["fingerprint"] = model.fingerprint()
    elif not isinstance(model, RAdaHead | AdaptedHead):
        raise TypeError(
            f"model: got {type(model).__name__}; it takes a RAdaCLIP, a RAdaHead or an AdaptedHead itself, such as the "
            "module of a DistributedDataParallel"
        )
    elif classes is None or class_names is None or backbone is None:
        raise ValueError("classes, class_names, backbone: got none with a head alone; it takes all three")
    different = len(set(class_names))
    if different != len(classes.text) or len(class_names) != len(classes.text):
        raise ValueError(
            f"class_names: got {len(class_names)}, {different} of them different; it takes {len(classes.text)}, one "
            "per row of the text features, each once"
        )
    loss = loss or ("cross-entropy" if classes.logit_bias is None else "sigmoid")
    checkpoint = Checkpoint(head, classes, tuple(class_names), backbone, loss=loss, **known)
    checkpoint.check_width(classes.text.shape[1], "classes")
    checkpoint.save(Path(folder))
    return Path(folder)


def load_checkpoint(folder: str | os.PathLike, *, device: str = "auto", backend: str = "auto") -> Checkpoint:
    """The checkpoint in a folder, as `Checkpoint.save` writes it; of a run's folder that of its first seed.

    Raises FileNotFoundError or ValueError for a folder without a whole checkpoint.
    """
    folder = Path(folder)
    if not (folder / HEAD).exists():
        folder = next(iter(seed_folders(folder)), folder)
        if not (folder / HEAD).exists():
            raise FileNotFoundError(
                f"checkpoint: {folder} holds no {HEAD}; it takes the folder of a head, or of a run that trained one"
            )
    config = load_config(folder)
    extra = config["extra"]
    where = choose_device(device)
    head: Any = load_head(folder, device=where, backend=backend)
    parts = extra.get("parts", [])
    if "adapter" in parts:
        head = _adapted(head, folder)
    classes, names = read_classes(folder)
    classes = classes._replace(text=classes.text.to(where, next(head.parameters()).dtype))
    model = extra.get("model")
    return Checkpoint(
        head.eval(),
        classes,
        names,
        config["backbone"],
        spec=None if model is None else ModelSpec(model["name"], model["pretrained"], tuple(model["templates"])),
        record=SplitRecord.read(folder) if (folder / RECORD).exists() else None,
        prompt=read_part(folder / PROMPT, "prompt", PROMPT_OPTIONS) if "prompt" in parts else None,
        towers=read_part(folder / TOWERS, "towers")[1] if "towers" in parts else None,
        loss=extra.get("loss", "cross-entropy"),
        precision=extra.get("precision", "fp32"),
        fingerprint=extra.get("fingerprint"),
    )


def _adapted(head: RAdaHead, folder: Path) -> AdaptedHead:
    config, tensors = read_part(folder / ADAPTER, "adapter", ("image", "text"))
    weight = head.k_proj.weight
    try:
        sides = {side: FeatureAdapter(**config[side]).to(weight.device, weight.dtype) for side in ("image", "text")}
        for side, adapter in sides.items():
            prefix = f"{side}."
            adapter.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        return AdaptedHead(head, image_adapter=sides["image"], text_adapter=sides["text"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{folder / ADAPTER}: not as its configuration says ({error})") from error


def checkpoint_folder(run: Path, seed: int, method: str = "rada") -> Path:
    """The folder of one seed's checkpoint of a method in a run's folder."""
    folder = run / f"seed-{seed}"
    return folder if method == "rada" else folder / method


def seed_folders(run: Path) -> list[Path]:
    """The folders of the whole checkpoints in a run's folder, by seed; those of rada before other methods'."""
    folders = [path.parent for kind in ("seed-*", "seed-*/*") for path in run.glob(f"{kind}/{HEAD}")]

    def order(folder: Path) -> tuple[int, int, str]:
        parts = folder.relative_to(run).parts
        return len(parts), int(parts[0].removeprefix("seed-")), folder.name

    return sorted(folders, key=order)


def _weights_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS
