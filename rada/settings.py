"""The settings of a run, filled in from what is recommended for its data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rada.checks import check_ints, check_one_of
from rada.data import recommended
from rada.data.splits import LEAST_CLASSES
from rada.encoders import IMAGES_PER_BATCH
from rada.losses import LOSSES
from rada.precision import PRECISIONS
from rada.protocols import PROTOCOLS
from rada.templates import DEFAULT_TEMPLATES, expand_templates
from rada.tuning import PARALLEL, FullTuning, Tuning
from rada_kernels import Options


@dataclass(frozen=True)
class Settings:
    """The settings of a run. None: as `rada.data.recommended` for the data.

    data: a source as `rada.data.load_source` takes it.
    model, pretrained, templates: the encoders, see `rada.models.ModelSpec`; not with features:PATH, and needed with a
        folder. Default model: the data's. A template may be a name of `rada.templates.expand_templates`.
    class_names: a file with the classes' names and order, see `rada.data.classes`. None: as the data have them.
    max_classes: the number of classes to use, evenly spaced in their order; 0: all. Default: the data's, else all.
    protocol: see `rada.protocols`. Default: the data's, else "all". targets: a suite file of other data sets, with
        "cross" alone, see `rada.data.suite`.
    methods: names of `rada.methods.METHODS`. Default: the data's, else ("rada",).
    shots: training images per class. Default: the data's, else 16. curve: other numbers of shots, for a curve.
    seeds: one training run each.
    tuning, full: see `Tuning` and `FullTuning`. Default: the data's.
    head: num_heads, temperature, queries, penalty. penalty: in place of the head's. Default: head's; "mse" for SigLIP.
    loss: see `rada.losses.LOSSES`. Default: "sigmoid" for encoders with a logit bias, as SigLIP's, else
        "cross-entropy".
    image_tokens: of rada+prompt in the image tower, which then is trained on images; 0 (default): a text prompt alone.
    adapt_images: test images that each group gives to test-time; 0: all. Default: the data's, else all.
    cache: the folder of a cache of image features that runs share, see `rada.cache`. Default: none.
    device, backend: as for the head; "auto" chooses. precision: see `rada.precision`.
    workers: processes that decode images. Default: as many as are worth it. encode_batch: images per encoder call.
    parallel: of full fine-tuning under torchrun, see `rada.tuning.FineTuner`: "ddp" (default) or "fsdp".
    measure: time a step of the reference beside the backend in use. Default False.
    seed: of the data's own randomness (a split that the data come without, the emoji set's views).
    skip_bad: leave unreadable images out, counted in the report.
    """

    data: str = "emoji"
    model: str | None = None
    pretrained: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    class_names: str | None = None
    max_classes: int = None  # type: ignore[assignment]  # an int after __post_init__, and so on
    protocol: str = None  # type: ignore[assignment]
    targets: str | None = None
    methods: tuple[str, ...] = None  # type: ignore[assignment]
    shots: int = None  # type: ignore[assignment]
    curve: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning: Tuning = None  # type: ignore[assignment]
    full: FullTuning = None  # type: ignore[assignment]
    head: Options = field(default_factory=Options)
    penalty: str | None = None
    loss: str | None = None
    image_tokens: int = 0
    adapt_images: int = None  # type: ignore[assignment]
    device: str = "auto"
    backend: str = "auto"
    precision: str = "fp32"
    workers: int | None = None
    encode_batch: int = IMAGES_PER_BATCH
    cache: str | None = None
    parallel: str = "ddp"
    measure: bool = False
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self):
        own = recommended(self.data)
        filled = {name: getattr(own, name) for name in
                  ("model", "max_classes", "protocol", "methods", "shots", "adapt_images")}  # fmt: skip
        filled |= {"tuning": tuning_for(self.data), "full": full_tuning_for(self.data)}
        for name, value in filled.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "templates", expand_templates(self.templates))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds: got {self.seeds}; it takes at least one, none negative and each once, such as 1,2,3"
            )
        if self.max_classes != 0 and self.max_classes < LEAST_CLASSES:
            raise ValueError(f"max_classes: got {self.max_classes}; it takes 0 (all) or at least {LEAST_CLASSES}")
        counts = (self.shots, *self.curve)
        if min(counts) < 1 or len(set(counts)) != len(counts):
            raise ValueError(f"shots: got {counts}; it takes positive numbers, each once, such as 1,2,4,8,16")
        check_one_of(PROTOCOLS, protocol=self.protocol)
        if (self.protocol == "cross") != (self.targets is not None):
            raise ValueError(
                f"targets: got {self.targets!r} with the protocol {self.protocol!r}; 'cross' takes a suite file, the "
                "others none"
            )
        if self.loss is not None:
            check_one_of(LOSSES, loss=self.loss)
        check_ints(0, image_tokens=self.image_tokens, adapt_images=self.adapt_images, workers=self.workers or 0)
        check_ints(1, encode_batch=self.encode_batch)
        check_one_of(PARALLEL, parallel=self.parallel)
        check_one_of(PRECISIONS, precision=self.precision)


def tuning_for(data: str, **changes: Any) -> Tuning:
    """The recommended settings of training for a source, with changes."""
    return Tuning(**{**recommended(data).tuning, **changes})


def full_tuning_for(data: str, **changes: Any) -> FullTuning:
    """The recommended settings of full fine-tuning for a source, with changes."""
    return FullTuning(**{**recommended(data).full, **changes})
