"""A checkpoint that predicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rada.adapter import AdaptedHead
from rada.cache import FeatureCache
from rada.checkpoint import Checkpoint, load_checkpoint
from rada.checks import check_one_of
from rada.data.classes import prompt_names, read_names
from rada.encoders import FeatureExtractor, hash_tensors
from rada.graphs import check_device, graphed
from rada.inference.inputs import DIGEST_BYTES, Rows
from rada.inference.options import PredictOptions
from rada.losses import LOSSES
from rada.precision import PRECISIONS
from rada.shortlist import shortlist_logits

NO_CLASS = -1  # of a row that could not be predicted; its numbers are NaN
NOT_FINITE = "not finite"  # NaN, infinite or empty


# Rows that a shortlist is compared on: of a batch, and of all.
COMPARED_OF_BATCH, COMPARED = 8, 256


class Predictor:
    """What a checkpoint makes of image features: classes and probabilities, or its adapted features.

    checkpoint: the folder of a head, or of a run: its first seed; or a Checkpoint.
    class_names: a file of names, one a line, that the text tower encodes: the classes to choose among in place of the
        checkpoint's.
    precision: of encoders and head, see `rada.precision`. Default: the checkpoint's.
    device, backend: as for `load_checkpoint`.
    cache: the folder of a cache of frozen encoders' image features, see `rada.cache`. Default: none.
    cuda_graph: replay the head's launches as a graph, see `rada.graphs`; on CUDA alone, not yet run on hardware.
        Default False.

    compared, agreed: of rows predicted by a shortlist, how many the full head predicted too, and how often both chose
    the same class.

    Raises FileNotFoundError, or ValueError naming the argument.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        class_names: str | Path | None = None,
        precision: str | None = None,
        device: str = "auto",
        backend: str = "auto",
        cache: str | Path | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.cache = None if cache is None else FeatureCache(cache)
        self.cuda_graph = cuda_graph
        self._full: Callable[[Tensor], Tensor] | None = None
        self.compared = self.agreed = 0
        stored = checkpoint
        if not isinstance(stored, Checkpoint):
            stored = load_checkpoint(stored, device=device, backend=backend)
        self.stored = stored
        self.trained = stored
        if cuda_graph:
            check_device(stored.device)
        if precision not in (None, stored.precision):
            check_one_of(PRECISIONS, precision=precision)
            # Weights of another dtype have another fingerprint: `encoders` checks the stored ones.
            self.trained = replace(stored, precision=str(precision), fingerprint=None)
        self.own_classes = class_names is None
        if class_names is not None:
            names = read_names(class_names)
            classes = self.encoders.classes(prompt_names(names))
            self.trained = replace(self.trained, class_names=names, classes=classes)
        self.backend = str(self.trained.rada.backend_for(self.trained.classes.text))

    @cached_property
    def encoders(self) -> FeatureExtractor:
        """The encoders that the head takes, opened when first asked for. Raises ValueError where there are none."""
        if self.trained.precision != self.stored.precision:
            self.stored.open_frozen()
        encoders = self.trained.open_model()
        if not self.trained.changes_encoders:
            encoders.cache = self.cache
        return encoders

    @property
    def device(self) -> torch.device:
        return self.trained.device

    def check(self, options: PredictOptions, rows: Rows) -> None:
        """Raise ValueError for features of another width, for images where there are no encoders or not the
        checkpoint's, and for adapted features where nothing adapts any.
        """
        trained, width = self.trained, rows.width
        if width is None:
            _ = self.encoders  # opened now, not in the first shard
        else:
            trained.check_width(width, rows.where)
        if options.shortlist > (count := len(trained.class_names)):
            raise ValueError(f"shortlist: got {options.shortlist}; it takes at most {count}, the number of classes")
        adapts = isinstance(trained.head, AdaptedHead)
        changes = trained.towers is not None or (trained.prompt is not None and trained.prompt[0]["image_tokens"])
        if options.what == "features" and not adapts and not (width is None and changes):
            raise ValueError(
                "what: got 'features', and the checkpoint has no adapter: its head changes the logits of an image and "
                "a class, not an image's features; it takes topk, probabilities or logits"
            )

    def check_labels(self, where: str, labels: Sequence[str]) -> None:
        """Raise ValueError for a label that is none of the checkpoint's classes. where: they are from."""
        if not self.own_classes:  # whoever names others knows that the data's may not be among them
            return
        known = set(self.trained.class_names)
        wrong = next((label for label in labels if label not in known), None)
        if wrong is not None:
            raise ValueError(
                f"label: {where} has the class {wrong!r}, which is none of the checkpoint's {len(known)}; it takes "
                "data of these classes, or --class-names FILE: those to choose among"
            )

    @cached_property
    def digest(self) -> str:
        """A digest of all that decides what the checkpoint predicts: head, classes, encoders."""
        stored = self.stored
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        tensors = {f"head.{name}": tensor for name, tensor in stored.head.state_dict().items()}
        tensors["text"] = stored.classes.text
        for part, of in (("prompt", stored.prompt and stored.prompt[1]), ("towers", stored.towers)):
            tensors |= {f"{part}.{name}": tensor for name, tensor in (of or {}).items()}
        hash_tensors(digest, tensors)
        options = None if stored.prompt is None else sorted(stored.prompt[0].items())
        rest = stored.class_names, stored.classes[1:], stored.rada.options, stored.loss, stored.fingerprint, options
        digest.update(repr(rest).encode())
        return digest.hexdigest()

    def __call__(self, features: Tensor, options: PredictOptions) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The results of features [n, D] by name, and which rows [n] are finite; the others' are NaN and NO_CLASS.

        topk gives `classes` [n, k] int32, positions in class_names, best first, and `probabilities` [n, k] float32
        (SigLIP's are sigmoids); the others `probabilities` [n, K], `logits` [n, K] or `features` [n, D], float32.
        """
        trained = self.trained
        features = features.to(trained.device).to(trained.classes.text.dtype)
        finite = (features * 0).sum(1) == 0  # of NaN and infinity the product is NaN
        whole = bool(finite.all())
        if not whole:
            features = features.masked_fill(~finite[:, None], 0)
        with torch.no_grad(), trained.autocast():
            results = self._results(features, options)
        if not whole:
            for name, values in results.items():
                values[~finite] = NO_CLASS if name == "classes" else float("nan")
        return {name: values.cpu().numpy() for name, values in results.items()}, finite.cpu().numpy()

    def _results(self, features: Tensor, options: PredictOptions) -> dict[str, Tensor]:
        trained = self.trained
        if options.what == "features":
            adapts = isinstance(trained.head, AdaptedHead)
            return {"features": (trained.head.image_adapter(features) if adapts else features).float()}
        places = None
        if options.shortlist:
            logits, places = shortlist_logits(trained.head, features, trained.classes, options.shortlist)
            self._compare(features, places.gather(1, logits.argmax(1, keepdim=True)).squeeze(1))
        else:
            logits = self._logits(features)
        if options.what == "logits":
            return {"logits": logits.float()}
        probabilities = LOSSES[trained.loss]().probabilities(logits.float())
        if options.what == "probabilities":
            return {"probabilities": probabilities}
        best = probabilities.topk(min(options.top_k, probabilities.shape[1]))
        classes = best.indices if places is None else places.gather(1, best.indices)
        return {"classes": classes.to(torch.int32), "probabilities": best.values}

    def _logits(self, features: Tensor) -> Tensor:
        """Of the full head [n, K]."""
        if self._full is None:
            trained = self.trained

            def full(features: Tensor) -> Tensor:
                return trained.head(features, *trained.classes)

            self._full = graphed(full, features) if self.cuda_graph else full
        return self._full(features)

    def _compare(self, features: Tensor, best: Tensor) -> None:
        """Count how often the shortlist's best class [n] is the full head's, among a few rows of each batch."""
        count = min(COMPARED_OF_BATCH, COMPARED - self.compared)
        if count > 0:
            full = self._logits(features[:count]).argmax(1)
            self.compared += len(full)
            self.agreed += int((full == best[:count]).sum())
